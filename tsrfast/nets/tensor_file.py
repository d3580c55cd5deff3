"""Named tensors with one JSON document, in a safetensors file: the container of checkpoints and training states.

Reading never runs code: a pickle (the usual .pt or .pth) is refused, not loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tsrfast._files import atomic_write
from tsrfast.errors import EnvironmentFault, InputError

# One metadata entry only: safetensors writes several in random order, and equal content should give equal bytes.
_KEY = "tsrfast"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


def write_tensor_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write `tensors` and `document` to `path` by atomic rename; equal content gives equal bytes.

    Raises:
        InputError: `document` is not JSON (or holds NaN or infinity).
        EnvironmentFault: the file cannot be written.
    """
    try:
        text = json.dumps(document, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise InputError(f"tsrfast: metadata of {path} must be plain finite JSON values, got: {e}") from e
    # clone: safetensors refuses tensors that share memory
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    atomic_write(path, safetensors.torch.save(plain, {_KEY: text}))


def read_tensor_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (CPU) and the document of a file that `write_tensor_file` wrote.

    Raises:
        InputError: no such file, not a safetensors file (a pickle is named as such), no document inside, non-finite
            floats.
        EnvironmentFault: the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except OSError as e:
        raise EnvironmentFault(f"cannot read {path}: {e.strerror or e}") from e
    except safetensors.SafetensorError as e:
        with path.open("rb") as f:
            pickled = f.read(4).startswith(_PICKLE_STARTS)
        hint = "; it looks like a pickle (.pt, .pth), which is never loaded because that could run code" if pickled else ""
        raise InputError(f"{path} is not a complete safetensors file: {e}{hint}") from e
    if text is None:
        raise InputError(f"{path} is a safetensors file without tsrfast metadata (no architecture to build)")
    try:
        document = json.loads(text)
    except ValueError as e:
        raise InputError(f"{path} has damaged tsrfast metadata: {e}") from e
    if not isinstance(document, dict):
        raise InputError(f"{path} has damaged tsrfast metadata: expected an object, got {type(document).__name__}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name!r} must be finite, got NaN or infinity")
    return tensors, document
