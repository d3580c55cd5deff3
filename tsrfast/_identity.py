"""What a run depends on, as JSON values and as a hash: a resumed run is checked against the first one. Open to all rooms."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def describe(value: Any) -> Any:
    """`value` as JSON values that are equal when a run with it is the same.

    Tensors and modules become hashes of their content (a module: its state_dict, and what else its modules hold that is a tensor or
    plain value, such as a mean that is no buffer; not its mode), dataclasses and other objects their type and public attributes,
    functions their qualified name (what a closure captured is not seen; `functools.partial` is).
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"tensor": tensor_hash(value)}
    if isinstance(value, nn.Module):
        return {"type": _name(type(value)), "weights": weights_hash(value), "rest": digest(_beside_weights(value))}
    if isinstance(value, Mapping):
        return {"items": sorted(([describe(k), describe(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, functools.partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": _name(type(value)), "fields": fields}
    if hasattr(value, "__qualname__"):
        return {"function": _name(value)}
    public = {k: describe(v) for k, v in sorted(getattr(value, "__dict__", {}).items()) if not k.startswith("_")}
    return {"type": _name(type(value)), "fields": public}


def digest(description: Any) -> str:
    """SHA-256 (hex) of a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of dtype, shape and values, whatever the device and memory format."""
    plain = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    hasher.update(np.ascontiguousarray(plain.flatten().view(torch.uint8).numpy()).data)
    return hasher.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the state_dict: names and values."""
    return digest([[name, tensor_hash(t)] for name, t in model.state_dict().items()])


def _beside_weights(model: nn.Module) -> list[Any]:
    """What the state_dict does not say: the kinds of modules, buffers that are not in it, and attributes with plain values."""
    of_all = vars(nn.Module())  # the mode, hooks, ...
    modules = []
    for name, m in model.named_modules():
        own = {k: describe(v) for k, v in sorted(vars(m).items()) if k not in of_all and _plain(v)}
        modules.append([name, type(m).__qualname__, m.extra_repr(), own])
    return [modules, [[name, tensor_hash(t)] for name, t in model.named_buffers()]]


def _plain(value: Any) -> bool:
    """No object: it may know the module that holds it."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype, torch.device))


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
