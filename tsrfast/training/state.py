"""A training run on disk: enough to go on at the exact step, and to refuse to go on with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tsrfast.errors import InputError
from tsrfast.nets.checkpoint import load_tensors
from tsrfast.nets.tensor_file import read_tensor_file, write_tensor_file

_MODEL, _OPTIMIZER = "model/", "optimizer/"


@dataclass
class Progress:
    """Steps done, summed loss and image count of the running epoch, and one metrics line per finished epoch."""

    step: int = 0
    loss_sum: float = 0.0
    images: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def save_state(path: Path, model: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any], progress: Progress) -> None:
    """Write weights, buffers, optimiser state and progress to `path` by atomic rename.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    tensors = {_MODEL + name: t for name, t in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{number}/{key}": v for key, v in values.items() if isinstance(v, Tensor)}
    write_tensor_file(path, tensors, {"settings": dict(settings), "progress": vars(progress)})


def load_state(path: Path, model: nn.Module, optimizer: Optimizer, settings: Mapping[str, Any]) -> Progress:
    """Put the state in `path` into `model` and `optimizer`, in place.

    Raises:
        InputError: the file is no training state, is damaged, or comes from other settings (all that differ are named).
        EnvironmentFault: the file cannot be read.
    """
    tensors, document = read_tensor_file(path)
    if not isinstance(document.get("settings"), dict) or not isinstance(document.get("progress"), dict):
        raise InputError(f"{path} is not a training state")
    saved = document["settings"]
    differing = sorted(k for k in saved.keys() | settings.keys() if saved.get(k) != settings.get(k))
    if differing == ["model"]:
        wanted = f"the weights that the run in {path.parent} started from (build it anew with the same seed)"
        raise InputError(f"tsrfast.train: model must have {wanted}, got others")
    if differing:
        given = f"{path.parent}, whose run differs in {', '.join(differing)}"
        raise InputError(f"tsrfast.train: folder must be empty or hold a run of the same settings, got {given}")
    weights = {k.removeprefix(_MODEL): t for k, t in tensors.items() if k.startswith(_MODEL)}
    load_tensors(model, weights, str(path))
    _load_optimizer(optimizer, {k.removeprefix(_OPTIMIZER): t for k, t in tensors.items() if k.startswith(_OPTIMIZER)})
    return Progress(**document["progress"])


def _load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition("/")
        parameter = parameters[int(number)]
        if tensor.shape == parameter.shape:
            # In the parameter's memory format: another layout may take another vector loop, and round otherwise.
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
