"""Native tensors and eagerpy's: what comes in goes out, and a subclass's hooks see eagerpy tensors where that package is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from tsrfast.errors import InputError

_eagerpy: Any = importlib.import_module("eagerpy") if importlib.util.find_spec("eagerpy") else None


def _wrapped(t: object) -> bool:
    return _eagerpy is not None and isinstance(t, _eagerpy.Tensor)


def raw(t: Any) -> Tensor:
    """The PyTorch tensor.

    Raises:
        InputError: there is none.
    """
    native = t.raw if _wrapped(t) else t
    if not isinstance(native, Tensor):
        raise InputError(f"tsrfast.compat.foolbox: tensors must be PyTorch's, got {type(native).__name__}")
    return native


def shown(t: Tensor) -> Any:
    """As hooks and criteria see it."""
    return t if _eagerpy is None else _eagerpy.astensor(t)


def like(t: Tensor, template: Any) -> Any:
    """Wrapped if `template` is."""
    return _eagerpy.astensor(t) if _wrapped(template) else t
