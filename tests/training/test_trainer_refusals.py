"""What `train` refuses: bad arguments, and folders that hold another run or a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsrfast.data import Split
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.training import TeacherLogits, TrueLabels, train


def split(count: int = 22, seed: int = 0) -> Split:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 2, 7, 7), generator=g, dtype=torch.uint8)
    return Split(images, torch.randint(3, (count,), generator=g))


def net(seed: int = 0, batch_norm: bool = True) -> ConvReLU:
    return ConvReLU((4, 3), image=(2, 7, 7), classes=3, batch_norm=batch_norm, seed=seed)


def shifted(images: Tensor, index: Tensor, epoch: int) -> Tensor:
    return images.roll(epoch, 3) + 0.01 * (index % 3).view(-1, 1, 1, 1)


def settings(**changes: Any) -> dict[str, Any]:
    """3 epochs of 5 + 1 batches (22 = 5 * 4 + 2), so that the last batch of an epoch is smaller."""
    return {"epochs": 3, "batch_size": 4, "lr": "piecewise:0=0.05,2=0.01", "seed": 3, "save_at": (0, 1, 3), **changes}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.05}, "lr"),
        ({"epochs": 4}, "epochs"),
        ({"batch_size": 5}, "batch_size"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"momentum": 0.5}, "momentum"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"seed": 4}, "seed"),
        ({"save_at": (0, 3)}, "save_at"),
        ({"augment": shifted, "seed": 4}, "augment, seed"),
        ({"split": split(seed=1)}, "split"),
        ({"objective": TeacherLogits(net(5))}, "objective"),
        ({"model": net(1)}, "model must have the weights"),
        ({"model": net(0, batch_norm=False)}, "model must have the weights"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    arguments = settings(folder=tmp_path)
    train(net(), TrueLabels(), split(), **arguments)
    before = files(tmp_path)
    arguments |= {"model": net(), "objective": TrueLabels(), "split": split(), **changes}
    with pytest.raises(InputError, match=f"folder must be empty.*differs in {named}$|{named}"):
        train(**arguments)
    assert files(tmp_path) == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    arguments = settings(folder=tmp_path)
    train(net(), TrueLabels(), split(), **arguments)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"state\.safetensors is not a complete"):
        train(net(), TrueLabels(), split(), **arguments)
    state.write_bytes((tmp_path / "epoch_0001.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"state\.safetensors is not a training state"):
        train(net(), TrueLabels(), split(), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"lr": -0.1}, "lr must be a positive number"),
        ({"lr": "step:0.1"}, "unknown learning-rate schedule"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum must be 0 with optimizer 'adam'"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"save_at": (4,), "folder": Path("x")}, r"save_at must list epochs in 0\.\.3"),
        ({"save_at": (1,)}, "folder must be given where save_at is"),
        ({"save_at": (1,), "folder": Path("x"), "model": nn.Linear(2, 2)}, "model must be one of ConvReLU"),
        ({"checkpoint_every": -1.0}, "checkpoint_every must be"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": net(), "objective": TrueLabels(), "split": split(), **settings(save_at=()), **changes}
    with pytest.raises(InputError, match=message):
        train(**arguments)
