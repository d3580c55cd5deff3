"""What holds for all nets that people attack: small ones of each class."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tsrfast
from tsrfast.attacks import PGD
from tsrfast.errors import InputError
from tsrfast.nets import (
    Classifier,
    MobileNetV2,
    PreActResNet,
    ResNet,
    WideResNet,
    load_checkpoint,
    mobilenet_v2,
    preact_resnet18,
    resnet18,
    resnet34,
    resnet50,
    save_checkpoint,
    wide_resnet,
)

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
Build = Callable[..., Classifier]
SMALL: dict[str, Build] = {
    "resnet": lambda **k: ResNet((1, 1, 1, 1), width=4, classes=5, **k),
    "imagenet stem": lambda **k: ResNet((1, 2, 1, 1), width=4, classes=5, stem="imagenet", **k),
    "bottleneck": lambda **k: ResNet((1, 1, 1, 1), bottleneck=True, width=2, classes=5, **k),
    "preact": lambda **k: PreActResNet((1, 1, 1, 1), width=4, classes=5, **k),
    "preact plain": lambda **k: PreActResNet((1, 1, 1, 1), width=4, classes=5, final_norm=False, shortcut="input", **k),
    "preact deepmind": lambda **k: PreActResNet((1, 1, 1, 1), width=4, classes=5, shortcut="deepmind", activation="silu", **k),
    "wide": lambda **k: WideResNet(10, 1, classes=5, **k),
    "wide silu": lambda **k: WideResNet(10, 1, classes=5, activation="silu", padding="same", **k),
    "mobilenet": lambda **k: MobileNetV2(width=0.1, classes=5, **k),
}
small = pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)


def trained(build: Build, **options: Any) -> Classifier:
    """In eval mode, with statistics of some images: a fresh deep net in eval mode has nearly constant logits."""
    net = build(mean=MEAN, std=STD, **options)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0  # the statistics become those of the one batch
    with torch.no_grad(), torch.random.fork_rng():
        net(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    for module in norms:
        module.momentum = 0.1
    return net.eval()


@small
def test_attacks_run_and_leave_the_net_as_it_was(build: Build) -> None:
    net = trained(build)
    net.train()
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()  # a mixed state
    seen = []
    hook = net.register_forward_hook(lambda *_: seen.append(1))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    modes, random = [m.training for m in net.modules()], torch.get_rng_state()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    result = PGD(eps=8 / 255, steps=5)(net, x, y), PGD(eps=8 / 255, steps=5).run(net, x, y)
    assert torch.equal(result[0], result[1].x_adv)
    assert (result[0] - x).abs().max() <= 8 / 255 + 1e-6
    assert result[0].min() >= 0
    assert result[0].max() <= 1
    assert seen
    assert len(net._forward_hooks) == 1
    hook.remove()
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in before.items())
    clean, adversarial = (nn.functional.cross_entropy(net.eval()(z), y, reduction="sum") for z in (x, result[0]))
    assert adversarial > clean


@small
def test_logits_depend_on_the_image_alone(build: Build) -> None:
    net = trained(build).double()
    x = torch.rand(5, 3, 32, 32, dtype=torch.float64)
    kept = x.clone()
    with torch.no_grad():
        whole = net(x)
        torch.testing.assert_close(torch.cat([net(x[:1]), net(x[1:])]), whole, rtol=1e-12, atol=1e-12)
        assert torch.equal(net(x), whole)
        assert net(x[:0]).shape == (0, 5)
        assert torch.equal(x, kept)


@small
def test_nothing_works_in_place(build: Build) -> None:
    net = trained(build)
    assert not any(getattr(module, "inplace", False) for module in net.modules())
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in net.modules():
        module.register_forward_hook(lambda _, __, out: outputs.append((out, out.clone())))
    net(torch.rand(2, 3, 32, 32))
    assert len(outputs) > 10
    assert all(torch.equal(out, then) for out, then in outputs)


@small
def test_normalisation_is_inside(build: Build) -> None:
    net = trained(build).double()
    bare = build().double().eval()
    assert "mean" not in bare.state_dict()
    bare.load_state_dict({n: t for n, t in net.state_dict().items() if n not in ("mean", "std")})
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    assert net.mean is not None
    assert net.std is not None
    assert torch.equal(net(x), bare((x - net.mean) / net.std))
    bare.set_normalisation(net.mean, net.std)
    assert torch.equal(net(x), bare(x))
    assert bare.mean is not None
    assert bare.mean.dtype == torch.float64


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpoint(build: Build, dtype: torch.dtype, tmp_path: Path) -> None:
    net = trained(build, seed=3).to(dtype)
    save_checkpoint(tmp_path / "net.safetensors", net, accuracy=0.5)
    loaded, metadata = load_checkpoint(tmp_path / "net.safetensors")
    assert type(loaded) is type(net)
    assert loaded.config == net.config
    assert metadata == {"accuracy": 0.5}
    assert not loaded.training
    x = torch.rand(2, 3, 32, 32, dtype=dtype)
    assert torch.equal(loaded(x), net(x))


@small
def test_config(build: Build) -> None:
    for net in (build(), build(mean=MEAN, std=STD)):
        config = json.loads(json.dumps(net.config))
        again = type(net).from_config(config)
        assert again.config == net.config
        assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in net.state_dict().items()}
    with pytest.raises(InputError, match=r"unknown .* config key 'clases'; did you mean 'classes'"):
        type(net).from_config({**config, "clases": 3})
    with pytest.raises(InputError, match="config must be a mapping, got list"):
        type(net).from_config([])  # type: ignore[arg-type]
    if "blocks" in config:
        with pytest.raises(InputError, match="config must name blocks"):
            type(net).from_config({"classes": 3})


@small
def test_seed(build: Build) -> None:
    before = torch.get_rng_state()
    a, b, c = build(), build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, r), name


@small
def test_plan_says_why_not_compiled(build: Build) -> None:
    net = trained(build)
    route = PGD().plan(net, torch.rand(2, 3, 32, 32))
    assert route.path == "eager"
    assert "model does not compile: tsrfast.compile: model." in route.reason
    with pytest.raises(InputError, match=r"tsrfast\.compile: model\."):
        tsrfast.compile(net, image=(3, 32, 32))


@small
def test_can_be_traced_copied_and_pickled(build: Build) -> None:
    net = trained(build)
    x = torch.rand(2, 3, 32, 32)
    for other in (torch.fx.symbolic_trace(net), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": MEAN}, "mean and std must be given together"),
        ({"std": STD}, "mean and std must be given together"),
        ({"mean": (0.5, 0.5), "std": STD}, r"mean must be 3 finite numbers, got \(0.5, 0.5\)"),
        ({"mean": (0.5, 0.5, float("nan")), "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": MEAN, "std": (0.1, 0.0, 0.1)}, "std must be 3 finite positive numbers"),
        ({"mean": "abc", "std": STD}, "mean must be 3 finite numbers"),
        ({"mean": 0.5, "std": 0.5}, "mean must be 3 finite numbers"),
    ],
)
@small
def test_bad_normalisation(build: Build, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


@small
def test_bad_images(build: Build) -> None:
    net = build()
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)):
        with pytest.raises(InputError, match=r"x must have shape \[N, 3, H, W\], got"):
            net(torch.rand(shape))


def test_builders_take_the_same_arguments() -> None:
    for function in (resnet18, resnet34, resnet50, mobilenet_v2):
        net = function(3, "imagenet", MEAN, STD, seed=2)
        assert (net.config["classes"], net.config["stem"]) == (3, "imagenet")
    for net in (preact_resnet18(3, MEAN, STD), wide_resnet(10, 1, 3, MEAN, STD)):
        assert net.config["classes"] == 3
        assert net.config["mean"] == pytest.approx(MEAN)
        assert net.config["std"] == pytest.approx(STD)
