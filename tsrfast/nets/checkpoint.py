"""A network on disk: its weights and the architecture to rebuild it, in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsrfast.errors import InputError, unknown
from tsrfast.nets.conv_relu import ConvReLU
from tsrfast.nets.mobilenet_v2 import MobileNetV2
from tsrfast.nets.resnet import PreActResNet, ResNet
from tsrfast.nets.tensor_file import read_tensor_file, write_tensor_file
from tsrfast.nets.wide_resnet import WideResNet

# A class listed here has `config` (JSON), `from_config(config)`, and raises InputError for a config it cannot build.
ARCHITECTURES: dict[str, Any] = {kind.__name__: kind for kind in (ConvReLU, MobileNetV2, PreActResNet, ResNet, WideResNet)}

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def architecture(model: nn.Module) -> dict[str, Any]:
    """{"name", "config"} from which `load_checkpoint` rebuilds `model`.

    Raises:
        InputError: `model` is not of a class in `ARCHITECTURES`.
    """
    name = type(model).__name__
    if ARCHITECTURES.get(name) is not type(model):
        raise InputError(
            f"tsrfast.save_checkpoint: model must be one of {', '.join(ARCHITECTURES)}, got {type(model).__name__}"
        )
    return {"name": name, "config": model.config}


def save_checkpoint(path: str | os.PathLike[str], model: nn.Module, /, **metadata: Any) -> None:
    """Write `model` and the JSON-able `metadata` to `path` by atomic rename.

    Raises:
        InputError: a model of another architecture, non-finite weights, or metadata that is not finite JSON.
        EnvironmentFault: the file cannot be written.
    """
    tensors = model.state_dict()
    document = {"architecture": architecture(model), "metadata": metadata}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"tsrfast.save_checkpoint: model must have finite weights, got NaN or infinity in {name!r}")
    write_tensor_file(path, tensors, document)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The model (on the CPU, in eval mode, in the dtype it was saved with) and the metadata of `save_checkpoint`.

    The model is of the class that the file names, one of `ARCHITECTURES`.

    Raises:
        InputError: no such file; not a safetensors file (pickles are never loaded); no or an unknown architecture;
            tensors that are missing, unexpected, of the wrong shape or dtype, or not finite. The message names the
            file.
        EnvironmentFault: the file cannot be read.
    """
    tensors, document = read_tensor_file(path)
    described = document.get("architecture")
    if not isinstance(described, Mapping) or "name" not in described or "config" not in described:
        raise InputError(f"{path} names no architecture to build")
    name = str(described["name"])
    if name not in ARCHITECTURES:
        raise InputError(f"{path}: {unknown('architecture', name, ARCHITECTURES)}")
    try:
        model = ARCHITECTURES[name].from_config(described["config"])
    except (InputError, RuntimeError, TypeError, ValueError) as e:  # RuntimeError: PyTorch's, of absurd sizes
        raise InputError(f"{path} has an architecture that cannot be built: {e}") from e
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise InputError(f"{path}: all weights must have one dtype, got {sorted(str(d) for d in dtypes)}")
    model = model.to(dtypes.pop())
    load_tensors(model, tensors, str(path))
    metadata = document.get("metadata", {})
    return model.eval(), dict(metadata) if isinstance(metadata, Mapping) else {}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into the parameters and buffers of `model`, all of them, in place.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape or dtype; `source` opens the message.
    """
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise InputError(f"{source}: tensors must be those of the architecture, missing {missing}, unexpected {extra}")
    for name, target in wanted.items():
        given = tensors[name]
        if given.shape != target.shape or given.dtype != target.dtype:
            raise InputError(
                f"{source}: tensor {name!r} must be {target.dtype} {list(target.shape)}, got {given.dtype} {list(given.shape)}"
            )
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(tensors[name])
