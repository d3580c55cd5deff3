"""ResNets against torchvision's and RobustBench's; the numbers were recorded from torchvision 0.28 and RobustBench's files, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsrfast.errors import InputError
from tsrfast.nets import PreActResNet, ResNet, load_published, preact_resnet18, resnet18, resnet34, resnet50

BUILDERS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
# Of torchvision.models.<name>(): digest of names and shapes, parameters, first logits of two images of 64x64.
TORCHVISION = {
    "resnet18": (
        "867b8d8ae95f5a28",
        11_689_512,
        [0.059632081644, -0.677814939848, -0.145156246209, 0.212391959192, -0.519364771364, -0.180905111018],
    ),
    "resnet34": (
        "d6dbfa48843359d6",
        21_797_672,
        [-1.741112352939, -0.859293645393, 2.733180992251, -1.468292227848, -0.44952353566, 2.609821600555],
    ),
    "resnet50": (
        "2d5b8870b35e1530",
        25_557_032,
        [0.150860620097, 0.511407180895, -1.771150367049, 0.170645569, 0.453356195617, -1.741365260804],
    ),
}
# Of RobustBench's PreActResNet: digest, parameters, first logits of two images of 32x32; by (final_norm, shortcut).
PREACT = {
    (False, "input"): (
        "dc5b7688108ad259",
        11_171_146,
        [-2.819728098003, 4.524415277834, 4.956287074302, -3.768427620691, 3.399707771487, 4.133865854204],
    ),
    (False, "activated"): (
        "dc5b7688108ad259",
        11_171_146,
        [-0.0335651564, 0.253807240259, 0.511752882043, -0.087261556395, 0.009726011825, 0.292333392551],
    ),
    (True, "activated"): (
        "4571a26034ea2caf",
        11_172_170,
        [0.894200557369, 0.389570132358, -0.512495469377, 0.940993327295, 0.453946012709, -0.518083927773],
    ),
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_recorded(name: str, weights: Any, digest: Any, images: Callable[[int], Tensor]) -> None:
    net = BUILDERS[name](1000, "imagenet").double().eval()
    names, count, logits = TORCHVISION[name]
    assert digest(net) == names
    assert parameters(net) == count
    net.load_state_dict(weights(net.state_dict()))
    with torch.no_grad():
        got = net(images(64))[:, :3].flatten()
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "stem"), [("resnet18", "imagenet"), ("resnet50", "imagenet"), ("resnet18", "cifar")])
def test_torchvision(name: str, stem: str, torchvision_models: Any, weights: Any, images: Callable[[int], Tensor]) -> None:
    theirs = getattr(torchvision_models, name)(num_classes=10)
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs = theirs.double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = BUILDERS[name](10, stem).double().eval()
    report = load_published(ours, theirs.state_dict())
    assert not report.renamed
    x = images(32 if stem == "imagenet" else 16).requires_grad_()
    a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    ga, gb = (torch.autograd.grad(z.logsumexp(1).sum(), x)[0] for z in (a, b))
    assert (ga - gb).abs().max() <= 1e-12 * gb.abs().max()


def test_robustbench(robustbench: Callable[[str], ModuleType], weights: Any, images: Callable[[int], Tensor]) -> None:
    theirs = robustbench("resnet").ResNet18().double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = resnet18().double().eval()
    report = load_published(ours, theirs.state_dict())
    assert report.renamed["linear.weight"] == "fc.weight"
    with torch.no_grad():
        a, b = ours(images(32)), theirs(images(32))
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_robustbench_recorded(weights: Any, images: Callable[[int], Tensor]) -> None:
    net = resnet18().double().eval()
    their_names = {n.replace("downsample", "shortcut").replace("fc.", "linear."): t for n, t in net.state_dict().items()}
    load_published(net, weights(their_names))
    with torch.no_grad():
        got = net(images(32))[:, :3].flatten()
    logits = [-0.493186073392, -0.295190285504, -0.717195063322, -0.555468423842, -0.39580842028, -0.727688242416]
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("final_norm", "shortcut"), PREACT)
def test_preact_recorded(final_norm: bool, shortcut: str, weights: Any, digest: Any, images: Callable[[int], Tensor]) -> None:
    net = preact_resnet18(final_norm=final_norm, shortcut=shortcut).double().eval()
    names, count, logits = PREACT[final_norm, shortcut]
    assert digest(net) == names
    assert parameters(net) == count
    load_published(net, weights(net.state_dict()))
    with torch.no_grad():
        got = net(images(32))[:, :3].flatten()
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("final_norm", "shortcut"), PREACT)
def test_preact_robustbench(
    final_norm: bool, shortcut: str, robustbench: Callable[[str], ModuleType], weights: Any, images: Callable[[int], Tensor]
) -> None:
    module = robustbench("resnet")
    block = module.PreActBlock if shortcut == "input" else module.PreActBlockV2
    theirs = module.PreActResNet(block, [2, 2, 2, 2], bn_before_fc=final_norm).double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = preact_resnet18(final_norm=final_norm, shortcut=shortcut).double().eval()
    load_published(ours, theirs.state_dict())
    with torch.no_grad():
        a, b = ours(images(32)), theirs(images(32))
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


# Ours -> DeepMind's, by hand.
TO_DEEPMIND = [
    (".bn1.", ".batchnorm_0."), (".bn2.", ".batchnorm_1."), (".conv1.", ".conv_2d_1."), (".conv2.", ".conv_2d_2."),
    (".shortcut.0.", ".shortcut."), ("layer1.", "layer_0."), ("layer2.", "layer_1."), ("layer3.", "layer_2."), ("layer4.", "layer_3."),
    ("linear.", "logits."),
]  # fmt: skip


def test_preact_deepmind_recorded(weights: Any, images: Callable[[int], Tensor]) -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # not in these files: their nets keep them elsewhere
    net = preact_resnet18(10, mean, std, shortcut="deepmind", activation="silu").double().eval()
    shapes = {}
    for name, t in net.state_dict().items():
        for ours, theirs in TO_DEEPMIND:
            name = name.replace(ours, theirs)
        if name.startswith(("bn.", "conv1.")):
            name = name.replace("bn.", "batchnorm.").replace("conv1.", "conv_2d.")
        if name not in ("mean", "std"):
            shapes[name] = t
    assert sum(t.numel() for name, t in net.named_parameters()) == 12_548_426
    report = load_published(net, weights(shapes))
    assert report.renamed["layer_1.0.shortcut.weight"] == "layer2.0.shortcut.0.weight"
    assert len(report.renamed) == len(shapes)
    with torch.no_grad():
        got = net(images(32))[:, :3].flatten()
    logits = [7.704789341336, 3.220109282341, -1.824082169099, 5.993618103795, 5.106183297709, -0.808949534918]
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)
    with pytest.raises(
        InputError, match=r"layer_1\.0\.shortcut\.weight must have shape \[128, 64, 1, 1\], got \[128, 64, 3, 3\]"
    ):
        load_published(preact_resnet18(), shapes)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_preact_robustbench_deepmind(
    activation: str, robustbench: Callable[[str], ModuleType], weights: Any, images: Callable[[int], Tensor]
) -> None:
    module = robustbench("dm_wide_resnet")
    theirs = module.DMPreActResNet(activation_fn=module.Swish if activation == "silu" else nn.ReLU).double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = preact_resnet18(10, module.CIFAR10_MEAN, module.CIFAR10_STD, shortcut="deepmind", activation=activation)
    load_published(ours.double().eval(), theirs.state_dict())
    with torch.no_grad():
        a, b = ours(images(32)), theirs(images(32))
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("size", [16, 32, 40])
def test_any_image_size(size: int) -> None:
    for net in (
        ResNet((1, 1, 1, 1), width=2),
        PreActResNet((1, 1, 1, 1), width=2),
        ResNet((1, 1, 1, 1), width=2, stem="imagenet"),
    ):
        assert net(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet18(stem="tiny"), "stem must be one of cifar, imagenet, got 'tiny'"),
        (lambda: resnet18(0), "ResNet: classes must be a positive integer, got 0"),
        (lambda: resnet18(True), "classes must be a positive integer"),
        (lambda: ResNet((1, 1, 1)), "blocks must be 4 positive integers"),
        (lambda: ResNet((1, 1, 1, 0)), "blocks must be a positive integer, got 0"),
        (lambda: ResNet("1111"), "blocks must be 4 positive integers"),
        (lambda: ResNet((1, 1, 1, 1), width=0.5), "width must be a positive integer, got 0.5"),  # type: ignore[arg-type]
        (lambda: preact_resnet18(shortcut="x"), "PreActResNet: shortcut must be one of activated, input, deepmind, got 'x'"),
        (lambda: preact_resnet18(activation="x"), "PreActResNet: activation must be one of relu, silu, got 'x'"),
    ],
)
def test_bad_arguments(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
