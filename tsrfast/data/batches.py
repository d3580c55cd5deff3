"""CIFAR-10's original batch files: pickles, read without running what a pickle may ask to run.

The format ("CIFAR-10 python version"): a dictionary with ``data``, uint8 [n, 3072] (channel, row, column), and
``labels``, a list of n integers. A pickle names the callables that rebuild its objects. Here none of NumPy's are handed
out: the few names that a batch needs get inert stand-ins that record shape, dtype and bytes; any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np
import torch

from tsrfast.data.dataset import Split
from tsrfast.errors import InputError


def read_batch(data: bytes, where: str, classes: int = 10) -> Split:
    """One batch file's content as images [n, 3, 32, 32] and labels [n].

    Args:
        where: the file's name, for error messages.
        classes: labels must be in 0..classes-1.

    Raises:
        InputError: the pickle names anything that could run code, is damaged or truncated, or is not a CIFAR-10 batch.
    """
    content = _unpickle(data, where)
    if not isinstance(content, dict):
        raise InputError(f"{where}: a CIFAR-10 batch must be a dictionary, got {type(content).__name__}")
    fields = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    for key in ("data", "labels"):
        if key not in fields:
            names = ", ".join(sorted(map(str, fields)))
            raise InputError(f"{where}: a CIFAR-10 batch must have the entry {key!r}, got {names or 'none'}")
    images = _images(fields["data"], where)
    labels = fields["labels"]
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise InputError(f"{where}: labels must be a list of integers, got {type(labels).__name__}")
    if len(labels) != len(images):
        raise InputError(f"{where}: labels must be as many as images, got {len(labels)} for {len(images)}")
    bad = next((i for i, label in enumerate(labels) if not 0 <= label < classes), None)
    if bad is not None:
        raise InputError(f"{where}: labels must be in 0..{classes - 1}, got {labels[bad]} for image {bad}")
    return Split(images, torch.tensor(labels, dtype=torch.int64))


def _images(value: Any, where: str) -> torch.Tensor:
    state = getattr(value, "state", None)  # (version, shape, dtype, is Fortran order, bytes), see ndarray.__reduce__
    if not isinstance(state, tuple) or len(state) != 5:
        raise InputError(f"{where}: data must be a NumPy array, got {type(value).__name__}")
    _, shape, dtype, fortran, raw = state
    kind = getattr(dtype, "kind", None)
    if kind not in ("u1", b"u1", "uint8", b"uint8") or not isinstance(raw, bytes) or fortran:
        order = "Fortran" if fortran else "C"
        raise InputError(f"{where}: data must be a C-ordered uint8 array, got dtype {kind!r} in {order} order")
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != 3072 or type(shape[0]) is not int or shape[0] < 1:
        raise InputError(f"{where}: data must have shape (n, 3072) with n >= 1, got {shape}")
    if len(raw) != shape[0] * 3072:
        raise InputError(f"{where}: data of shape {shape} must have {shape[0] * 3072} bytes, got {len(raw)}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3, 32, 32).copy())


def _unpickle(data: bytes, where: str) -> Any:
    # The stand-ins are made anew for each file: a pickle may set attributes on what it is given.
    class Array:
        def __setstate__(self, state: Any) -> None:
            self.state = state

    class Dtype:
        def __init__(self, kind: Any, *_: Any) -> None:
            self.kind = kind

        def __setstate__(self, state: Any) -> None:
            pass  # byte order and alignment: no matter for single bytes

    def encode(text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes under protocol 2. Only this codec: others decompress or transform.
        if encoding not in ("latin1", b"latin1"):
            raise InputError(f"{where}: the pickle wants the codec {encoding!r}; a CIFAR-10 batch has no use for it")
        return text.encode("latin1")

    admitted: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: Array(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: Array(),
        ("_codecs", "encode"): encode,
    }

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in admitted:
                wanted = f"{module}.{name}"
                raise InputError(f"{where}: refused, the pickle wants the global {wanted!r} and would run code")
            return admitted[module, name]

    try:
        # A first pass that builds nothing: a few bytes can announce gigabytes, which unpickling would allocate at once.
        for opcode, argument, _ in pickletools.genops(data):
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
                raise ValueError(f"memo entry {argument} in {len(data)} bytes")
        return Restricted(io.BytesIO(data), encoding="bytes").load()
    except InputError:
        raise
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise InputError(f"{where}: truncated or not a pickle ({type(e).__name__}: {e})") from e
