"""Layouts of published files. That they are the originals' is checked in test_resnet.py and its neighbours."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tsrfast.errors import InputError
from tsrfast.nets import Classifier, ConvReLU, PreActResNet, ResNet, WideResNet, load_published, save_checkpoint
from tsrfast.nets.published import NESTINGS

Tensors = dict[str, Tensor]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def resnet(seed: int = 0, **options: Any) -> ResNet:
    return ResNet((1, 1, 1, 1), width=2, classes=4, seed=seed, **options)


def preact(seed: int = 0) -> PreActResNet:
    return PreActResNet((1, 1, 1, 1), width=2, classes=4, seed=seed)


def wide(seed: int = 0) -> WideResNet:
    return WideResNet(10, 1, classes=4, seed=seed)


def published(build: Callable[[int], Classifier] = resnet) -> Tensors:
    """Tensors under our own names, none of them as in a fresh net."""
    return {name: t + 1 if name.endswith("num_batches_tracked") else t + 0.25 for name, t in build(7).state_dict().items()}


def renamed(tensors: Tensors, *replacements: tuple[str, str], prefix: str = "") -> Tensors:
    result = {}
    for name, t in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        result[prefix + name] = t
    return result


def holds(net: Classifier, tensors: Tensors) -> bool:
    own = {name: t for name, t in net.state_dict().items() if name not in ("mean", "std")}
    return own.keys() == tensors.keys() and all(torch.equal(t, tensors[name]) for name, t in own.items())


@pytest.mark.parametrize("build", [resnet, preact, wide])
def test_own_names(build: Callable[[int], Classifier]) -> None:
    net, tensors = build(0), published(build)
    report = load_published(net, tensors)
    assert holds(net, tensors)
    assert report == type(report)((), {}, (), (), False)
    assert str(report) == "no normalisation in the file"


@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_in_a_training_state(nesting: str) -> None:
    net, tensors = resnet(), published()
    report = load_published(net, {nesting: OrderedDict(tensors), "epoch": 3, "acc": 0.5, "optimizer": {"state": {}}})
    assert report.nesting == (nesting,)
    assert holds(net, tensors)
    twice = load_published(net, {"last": {"state_dict": tensors, "epoch": 1}})
    assert twice.nesting == ("last", "state_dict")
    assert "taken from last.state_dict" in str(twice)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "model.", "module.model.", "1.", "module.1.", "0.", "_orig_mod.", "_orig_mod.module.", "net.", "backbone."],
)
def test_wrapped(prefix: str) -> None:
    net, tensors = resnet(), published()
    report = load_published(net, renamed(tensors, prefix=prefix))
    assert holds(net, tensors)
    assert report.renamed == {prefix + name: name for name in tensors}
    assert f"{len(tensors)} renamed, as {prefix}conv1.weight -> conv1.weight" in str(report)


def test_wrapped_for_real() -> None:
    class Normalise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.mean) / self.std

    theirs = resnet(7).eval()
    x = torch.rand(2, 3, 32, 32)
    for wrapped in (
        nn.Sequential(Normalise(), theirs),
        nn.DataParallel(nn.Sequential(Normalise(), theirs)),
        nn.Sequential(OrderedDict(normalize=Normalise(), model=theirs)),  # RobustBench's normalize_model
    ):
        net = resnet().eval()
        assert load_published(net, wrapped.state_dict()).normalised
        torch.testing.assert_close(net(x), theirs((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("mu", "sigma"),
        ("mean", "std"),
        ("normalize.mean", "normalize.std"),
        ("module.normalizer.new_mean", "module.normalizer.new_std"),
        ("0.mean", "0.std"),
        ("normalization.mu", "normalization.sigma"),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_normalisation_in_the_file(mean: str, std: str, shape: tuple[int, ...]) -> None:
    tensors = published()
    found = {mean: torch.tensor(MEAN).view(shape), std: torch.tensor(STD).view(shape)}
    for net in (resnet(), resnet(mean=MEAN, std=STD)):
        report = load_published(net, {**tensors, **found})
        assert report.normalised
        assert holds(net, tensors)
        assert net.mean is not None
        assert net.std is not None
        assert net.mean.shape == net.std.shape == (3, 1, 1)
        assert torch.equal(net.mean.flatten(), torch.tensor(MEAN))
        assert torch.equal(net.std.flatten(), torch.tensor(STD))
        assert net.config["mean"] == torch.tensor(MEAN).tolist()


def test_normalisation_of_the_net_stays_where_the_file_has_none() -> None:
    net = resnet(mean=MEAN, std=STD)
    assert not load_published(net, published()).normalised
    assert net.config["mean"] == torch.tensor(MEAN).tolist()


def test_kuangliu_names() -> None:
    net, tensors = resnet(), published()
    theirs = renamed(tensors, ("downsample", "shortcut"), ("fc.", "linear."))
    report = load_published(net, {"net": renamed(theirs, prefix="module."), "acc": 95.0, "epoch": 199})
    assert holds(net, tensors)
    assert report.renamed["module.layer2.0.shortcut.1.running_var"] == "layer2.0.downsample.1.running_var"
    assert report.renamed["module.linear.bias"] == "fc.bias"
    net, tensors = preact(), published(preact)
    assert load_published(net, renamed(tensors, ("shortcut", "downsample"), ("linear.", "fc."))).renamed
    assert holds(net, tensors)
    net, tensors = wide(), published(wide)
    assert load_published(net, renamed(tensors, ("fc.", "linear."))).renamed["linear.bias"] == "fc.bias"
    assert holds(net, tensors)


def test_madry_lab_states_hold_the_net_twice() -> None:
    net, tensors = resnet(), published()
    normaliser = {"new_mean": torch.tensor(MEAN).view(3, 1, 1), "new_std": torch.tensor(STD).view(3, 1, 1)}
    state = {
        **renamed(normaliser, prefix="module.normalizer."),
        **renamed(tensors, prefix="module.model."),
        **renamed(normaliser, prefix="module.attacker.normalize."),
        **renamed(tensors, prefix="module.attacker.model."),
    }
    report = load_published(net, {"model": state, "epoch": 5})
    assert holds(net, tensors)
    assert report.normalised
    assert len(report.unused) == len(tensors) + 2
    assert all(name.startswith("module.attacker.") for name in report.unused)
    state["module.attacker.model.fc.bias"] = tensors["fc.bias"] + 1
    with pytest.raises(InputError, match=r"module\.attacker\.model\.fc\.bias is one of several tensors for fc\.bias"):
        load_published(net, {"model": state})


def test_counters_that_old_files_lack() -> None:
    net, tensors = resnet(), published()
    load_published(net, tensors)
    old = {name: t for name, t in tensors.items() if "num_batches_tracked" not in name}
    report = load_published(net, old)
    assert set(report.filled) == tensors.keys() - old.keys()
    assert f"{len(report.filled)} counters of batches set to 0" in str(report)
    assert holds(net, {**tensors, **dict.fromkeys(report.filled, torch.tensor(0))})


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_dtype_mode_and_gradients_stay(given: torch.dtype, own: torch.dtype) -> None:
    net = resnet().to(own)
    net.layer1.eval()
    modes = [m.training for m in net.modules()]
    tensors = {name: t.to(given) if t.is_floating_point() else t for name, t in published().items()}
    kept = {name: t.clone() for name, t in tensors.items()}
    load_published(net, {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in tensors.items()})
    assert holds(net, {name: t.to(own) if t.is_floating_point() else t for name, t in tensors.items()})
    assert [m.training for m in net.modules()] == modes
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(t, kept[name]) for name, t in tensors.items())
    with torch.no_grad():
        net.fc.bias.zero_()
    assert torch.equal(tensors["fc.bias"], kept["fc.bias"])  # nothing is shared


def test_safetensors_file(tmp_path: Path) -> None:
    tensors = published()
    safetensors.torch.save_file(renamed(tensors, prefix="module."), tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")):
        net = resnet()
        assert load_published(net, path).renamed["module.fc.bias"] == "fc.bias"
        assert holds(net, tensors)
    save_checkpoint(tmp_path / "own.safetensors", net)
    again = resnet()
    load_published(again, tmp_path / "own.safetensors")
    assert holds(again, tensors)


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("a.pt", "a.pth", "a.pkl", "a.bin", "a"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
        with pytest.raises(InputError, match=r"path of a \.safetensors file, got .*weights_only=True") as e:
            load_published(resnet(), tmp_path / name)
        assert name in str(e.value)
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match="not a complete safetensors file"):
        load_published(resnet(), tmp_path / "a.safetensors")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="no such file"):
        load_published(resnet(), tmp_path / "absent.safetensors")
    torch.save({"state_dict": published(), "epoch": 2}, tmp_path / "b.pth")
    net = resnet()
    load_published(net, torch.load(tmp_path / "b.pth", weights_only=True))  # what the message says
    assert holds(net, published())


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop("fc.bias"), [r"missing fc\.bias"]),
        (lambda t: t.update({"bn9.weight": torch.ones(2), "aux.fc": torch.ones(1)}), [r"superfluous bn9\.weight, aux\.fc"]),
        (
            lambda t: (
                t.pop("fc.bias"),
                t.pop("bn1.running_mean"),
                t.update({"extra": torch.ones(1), "conv1.weight": torch.ones(2)}),
            ),
            [
                r"missing bn1\.running_mean, fc\.bias",
                r"superfluous extra",
                r"conv1\.weight must have shape \[2, 3, 3, 3\], got \[2\]",
            ],
        ),
        (
            lambda t: t.update({"fc.weight": torch.ones(1000, 16), "fc.bias": torch.ones(1000)}),
            [r"fc\.weight must have shape \[4, 16\], got \[1000, 16\]", r"fc\.bias must have shape \[4\], got \[1000\]"],
        ),
        (lambda t: t.update({"fc.bias": torch.ones(4, dtype=torch.int64)}), [r"fc\.bias must be floating, got torch\.int64"]),
        (lambda t: t.update({"fc.bias": torch.full((4,), torch.nan)}), [r"fc\.bias must be finite"]),
        (lambda t: t.update({"model.fc.bias": t["fc.bias"] + 1}), [r"model\.fc\.bias is one of several tensors for fc\.bias"]),
        (lambda t: t.update({"mu": torch.tensor(MEAN)}), ["of mean and std the file has only one"]),
        (lambda t: t.update({"mu": torch.ones(2), "sigma": torch.ones(2)}), ["mean must be 3 finite numbers"]),
        (lambda t: t.update({"mu": torch.ones(3), "sigma": torch.zeros(3)}), ["std must be 3 finite positive numbers"]),
        (lambda t: t.update({f"sub_block1.{n}": v for n, v in published(wide).items()}), [r"superfluous sub_block1\."]),
    ],
)
def test_nothing_is_loaded_from_what_does_not_fit(change: Callable[[Tensors], object], messages: list[str]) -> None:
    net, tensors = resnet(), published()
    change(tensors)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for state in (tensors, {"state_dict": tensors}):
        with pytest.raises(InputError) as e:
            load_published(net, state)
        for message in messages:
            e.match(message)
    assert net.mean is None
    assert net.std is None
    assert holds(net, before)


def test_errors_name_what_the_file_says() -> None:
    theirs = renamed(published(), ("downsample", "shortcut"), ("fc.", "linear."), prefix="module.")
    theirs["module.linear.weight"] = torch.ones(10, 16)
    theirs["module.more"] = torch.ones(1)
    with pytest.raises(InputError, match=r"superfluous module\.more; module\.linear\.weight must have shape \[4, 16\]"):
        load_published(resnet(), theirs)


def test_normalisations_that_disagree() -> None:
    net = resnet(mean=(0.5, 0.5, 0.5), std=STD)
    before = {name: t.clone() for name, t in net.state_dict().items() if name not in ("mean", "std")}
    with pytest.raises(InputError, match=r"mean must be the net's \[0.5, 0.5, 0.5\], got \[0.49"):
        load_published(net, {**published(), "mu": torch.tensor(MEAN), "sigma": torch.tensor(STD)})
    assert net.config["mean"] == [0.5, 0.5, 0.5]
    assert holds(net, before)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must be names and tensors, got {}"),
        ({"epoch": 3}, "must be names and tensors, got {'epoch': 'int'}"),
        ({"net": resnet()}, "must be names and tensors, got {'net': 'ResNet'}"),
        ({"best": {}, "last": {}}, r"must hold one network, got last, best: pass one of them, state_dict\['last'\]"),
        ({"fc.bias": [1.0]}, "must be names and tensors, got {'fc.bias': 'list'}"),
        (resnet(), "must be a mapping of tensors or the path of a .safetensors file, got ResNet"),
        (None, "must be a mapping of tensors or the path of a .safetensors file, got NoneType"),
    ],
)
def test_what_is_no_state_dict(state: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_published(resnet(), state)


@pytest.mark.parametrize("rounded", ["net", "file"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_disagreement_about_normalisation(rounded: str, dtype: torch.dtype) -> None:
    net = resnet(mean=MEAN, std=STD)
    tensors = {**published(), "mu": torch.tensor(MEAN), "sigma": torch.tensor(STD)}
    if rounded == "net":
        net = net.to(dtype)
    else:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    assert load_published(net, tensors).normalised
    assert net.config["mean"] == torch.tensor(MEAN).to(dtype).tolist()


def test_weights_too_large_for_the_dtype_are_refused() -> None:
    net, tensors = resnet().half(), published()
    tensors["bn1.running_var"] += 1e5
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(InputError, match=r"bn1\.running_var must fit into torch\.float16, got values up to 100001"):
        load_published(net, tensors)
    assert holds(net, before)


def test_other_nets_are_refused() -> None:
    for net in (nn.Linear(2, 2), ConvReLU((2,)), None):
        with pytest.raises(InputError, match=f"net must be one of ResNet, .*, got {type(net).__name__}"):
            load_published(net, {})  # type: ignore[arg-type]
