from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU, load_checkpoint, save_checkpoint


def net(seed: int = 0) -> ConvReLU:
    return ConvReLU((4, 3), image=(2, 8, 7), classes=5, batch_norm=True, mean=(0.1, 0.2), std=(0.3, 0.4), seed=seed)


def rewrite(path: Path, tensors: dict | None = None, document: dict | None = None) -> None:
    """Write the file again with other tensors or another document."""
    with safetensors.safe_open(path, framework="pt") as f:
        old = json.loads(f.metadata()["tsrfast"])
    tensors = safetensors.torch.load_file(path) if tensors is None else tensors
    safetensors.torch.save_file(tensors, path, {"tsrfast": json.dumps(old if document is None else document)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "sub" / "net.safetensors"
    save_checkpoint(path, net())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = net(seed=4).to(dtype)
    x = torch.rand(6, 2, 8, 7, dtype=dtype)
    model(x)  # moves the running statistics
    model = model.to(memory_format=torch.channels_last).eval()
    save_checkpoint(tmp_path / "a.safetensors", model, path="not the file", accuracy=0.5, masks=[1, 2])
    loaded, metadata = load_checkpoint(tmp_path / "a.safetensors")
    assert metadata == {"path": "not the file", "accuracy": 0.5, "masks": [1, 2]}
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded(x), model(x))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", net(), b=1, a=2, c=3)
    save_checkpoint(tmp_path / "b", net(), c=3, b=1, a=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Malicious(), protocol=0))
    torch.save({"x": Malicious()}, tmp_path / "zip.pt")
    for name, message in [("plain.pt", "pickle"), ("zip.pt", "pickle"), ("old.pt", "not a complete safetensors file")]:
        with pytest.raises(InputError, match=message) as e:
            load_checkpoint(tmp_path / name)
        assert name in str(e.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # the file is one that would have run


def test_files_that_are_no_checkpoints(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path)
    for content in (b"", b"hello, this is text", saved.read_bytes()[:-10], saved.read_bytes()[:30]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match="bad is not a complete safetensors file"):
            load_checkpoint(tmp_path / "bad")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(InputError, match="foreign is a safetensors file without tsrfast metadata"):
        load_checkpoint(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "names no architecture"),
        ({"architecture": "ConvReLU"}, "names no architecture"),
        ({"architecture": {"name": "ConvRelu", "config": {}}}, "did you mean 'ConvReLU'"),
        ({"architecture": {"name": "ConvReLU", "config": {"widths": []}}}, "cannot be built.*widths must"),
        ({"architecture": {"name": "ConvReLU", "config": {"width": [3]}}}, "cannot be built"),
        ({"architecture": {"name": "ConvReLU", "config": {"widths": [3], "colour": 1}}}, "cannot be built"),
        ({"architecture": {"name": "ConvReLU", "config": None}}, "cannot be built"),
        ({"architecture": {"name": "WideResnet", "config": {}}}, "did you mean 'WideResNet'"),
        ({"architecture": {"name": "ResNet", "config": {}}}, "cannot be built"),
        ({"architecture": {"name": "ResNet", "config": {"blocks": [1] * 4, "classes": 10**18}}}, "cannot be built.*overflow"),
        ({"architecture": {"name": "ResNet", "config": {"blocks": [1, 1]}}}, "cannot be built.*blocks must be 4"),
        ({"architecture": {"name": "WideResNet", "config": {"depth": 11}}}, "cannot be built.*depth must be 6 n"),
        ({"architecture": {"name": "MobileNetV2", "config": {"stem": "x"}}}, "cannot be built.*stem must be one of"),
        (
            {"architecture": {"name": "WideResNet", "config": {"depth": 10, "widen": 1}}},
            "tensors must be those of the architecture",
        ),
    ],
)
def test_bad_architectures(saved: Path, document: dict, message: str) -> None:
    rewrite(saved, document=document)
    with pytest.raises(InputError, match=message) as e:
        load_checkpoint(saved)
    assert str(saved) in str(e.value)


def test_bad_tensors(saved: Path) -> None:
    good = safetensors.torch.load_file(saved)
    bias = good["head.bias"]
    cases = [
        ({k: v for k, v in good.items() if k != "head.bias"}, r"missing \['head.bias'\]"),
        ({**good, "extra": bias.clone()}, r"unexpected \['extra'\]"),
        ({**good, "head.bias": torch.zeros(6)}, r"'head.bias' must be torch.float32 \[5\], got torch.float32 \[6\]"),
        ({**good, "head.bias": bias.double()}, "one dtype"),
        ({**good, "norms.0.num_batches_tracked": torch.tensor(1, dtype=torch.int32)}, "must be torch.int64"),
        ({**good, "head.bias": bias * float("nan")}, "'head.bias' must be finite"),
        ({**good, "norms.0.running_var": torch.full((4,), float("inf"))}, "must be finite"),
        ({}, "one dtype"),
    ]
    for tensors, message in cases:
        rewrite(saved, tensors=tensors)
        with pytest.raises(InputError, match=message) as e:
            load_checkpoint(saved)
        assert str(saved) in str(e.value)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match=r"model must be one of ConvReLU, MobileNetV2, .*WideResNet, got Linear"):
        save_checkpoint(path, nn.Linear(2, 2))
    with pytest.raises(InputError, match="metadata"):
        save_checkpoint(path, net(), tensor=torch.zeros(1))
    with pytest.raises(InputError, match="metadata"):
        save_checkpoint(path, net(), accuracy=float("nan"))
    broken = net()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"head\.bias"):
        save_checkpoint(path, broken)
    assert not path.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "x", net())
