"""WideResNets against RobustBench's; the numbers were recorded from RobustBench's files, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.nets import WideResNet, load_published, wide_resnet

# Ours -> DeepMind's, by hand.
TO_DEEPMIND = {
    ".bn1.": ".batchnorm_0.",
    ".bn2.": ".batchnorm_1.",
    ".conv1.": ".conv_0.",
    ".conv2.": ".conv_1.",
    ".convShortcut.": ".shortcut.",
}


def deepmind(name: str) -> str:
    for ours, theirs in TO_DEEPMIND.items():
        name = name.replace(ours, theirs)
    for group in (1, 2, 3):
        name = name.replace(f"block{group}.layer.", f"layer.{group - 1}.block.")
    if name.startswith(("bn1.", "conv1.", "fc.")):
        head, rest = name.split(".", 1)
        name = {"bn1": "batchnorm", "conv1": "init_conv", "fc": "logits"}[head] + f".{rest}"
    return name


@pytest.mark.parametrize(
    ("depth", "widen", "count", "names"),
    [(16, 2, 691_674, "f72ffea70e3f2b63"), (28, 10, 36_479_194, "15969f4fc18ee535"), (34, 10, 46_160_474, "ffedf8c0ef0dc649")],
)
def test_names_and_shapes(depth: int, widen: int, count: int, names: str, digest: Any) -> None:
    net = wide_resnet(depth, widen)
    assert sum(p.numel() for p in net.parameters()) == count
    assert digest(net) == names


@pytest.mark.parametrize(
    ("depth", "widen", "logits"),
    [
        (16, 2, [-0.163075993767, -0.065193112403, 0.354844777204, -0.160310102656, -0.043217579922, 0.328854071928]),
        (16, 1, [0.4095735744, 0.157996527196, 0.015668431704, 0.382373016909, 0.126188768875, 0.014265123718]),
    ],
)
def test_recorded(depth: int, widen: int, logits: list[float], weights: Any, images: Callable[[int], Tensor]) -> None:
    net = wide_resnet(depth, widen).double().eval()
    shapes = net.state_dict()
    if widen == 1:  # recorded with TRADES' sub_block1, whose tensors are drawn too
        shapes |= {n.replace("block1", "sub_block1"): t for n, t in shapes.items() if n.startswith("block1")}
    report = load_published(net, weights(shapes))
    assert len(report.unused) == (len(shapes) - len(net.state_dict()))
    assert all(name.startswith("sub_block1.") for name in report.unused)
    with torch.no_grad():
        got = net(images(32))[:, :3].flatten()
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


def test_deepmind_recorded(weights: Any, images: Callable[[int], Tensor]) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # not in these files: their nets keep them elsewhere
    net = wide_resnet(16, 2, mean=mean, std=std, activation="silu", padding="same").double().eval()
    shapes = {deepmind(n): t for n, t in net.state_dict().items() if n not in ("mean", "std")}
    report = load_published(net, weights(shapes))
    assert report.renamed["layer.1.block.0.shortcut.weight"] == "block2.layer.0.convShortcut.weight"
    with torch.no_grad():
        got = net(images(32))[:, :3].flatten()
    logits = [-0.441375539059, -0.070488586094, 0.624488317171, -0.413519670359, -0.083784630222, 0.543848569778]
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sub_block1", [False, True])
def test_robustbench(
    sub_block1: bool, robustbench: Callable[[str], ModuleType], weights: Any, images: Callable[[int], Tensor]
) -> None:
    theirs = robustbench("wide_resnet").WideResNet(16, 10, 2, sub_block1=sub_block1).double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = wide_resnet(16, 2).double().eval()
    load_published(ours, theirs.state_dict())
    x = images(32).requires_grad_()
    a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    ga, gb = (torch.autograd.grad(z.logsumexp(1).sum(), x)[0] for z in (a, b))
    assert (ga - gb).abs().max() <= 1e-12 * gb.abs().max()


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_robustbench_deepmind(
    activation: str, robustbench: Callable[[str], ModuleType], weights: Any, images: Callable[[int], Tensor]
) -> None:
    module = robustbench("dm_wide_resnet")
    theirs = module.DMWideResNet(depth=16, width=2, activation_fn=module.Swish if activation == "silu" else torch.nn.ReLU)
    theirs = theirs.double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = wide_resnet(16, 2, mean=module.CIFAR10_MEAN, std=module.CIFAR10_STD, activation=activation, padding="same")
    ours = ours.double().eval()
    load_published(ours, theirs.state_dict())
    with torch.no_grad():
        a, b = ours(images(32)), theirs(images(32))
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_deepmind_needs_its_padding() -> None:
    net = wide_resnet(10, 1)
    theirs = {deepmind(n): t for n, t in net.state_dict().items()}
    with pytest.raises(InputError, match=r"DeepMind's names .* padding='same'"):
        load_published(net, theirs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wide_resnet(27), r"depth must be 6 n \+ 4 with n >= 1, got 27"),
        (lambda: wide_resnet(4), "depth must be 6 n"),
        (lambda: wide_resnet("28"), "depth must be a positive integer"),  # type: ignore[arg-type]
        (lambda: wide_resnet(10, 0), "WideResNet: widen must be a positive integer, got 0"),
        (lambda: wide_resnet(10, 1, activation="tanh"), "activation must be one of relu, silu, got 'tanh'"),
        (lambda: WideResNet(10, 1, padding="full"), "padding must be one of symmetric, same, got 'full'"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
