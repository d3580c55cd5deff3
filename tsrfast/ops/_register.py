"""Make a torch operator out of a Python function that calls a kernel, and check what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tsrfast._native import DTYPES
from tsrfast.errors import InputError

_lib = torch.library.Library("tsrfast", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``tsrfast::<schema>``: `kernel` runs it, `fake` makes results of the right shape for tracing.

    The operator has no gradient, and says so instead of returning tensors that silently cut the graph.
    """
    name = schema.split("(", 1)[0]

    def guard(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                raise RuntimeError(f"tsrfast.{name} has no gradient: call it under torch.no_grad()")
            return f(*args)

        return run

    _lib.define(schema)
    for key in ("CPU", "CUDA"):
        _lib.impl(name, guard(kernel), key)
    _lib.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"tsrfast::{name}", guard(fake), lib=_lib)
    overload: Callable[..., Any] = getattr(torch.ops.tsrfast, name).default
    return overload


def check_dtype(op: str, name: str, t: Tensor, allowed: Sequence[torch.dtype] = tuple(DTYPES)) -> None:
    """`t` has one of the `allowed` dtypes, or an InputError."""
    if t.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise InputError(f"tsrfast.{op}: {name} must be {names}, got {t.dtype}")


def check_like(op: str, like_name: str, like: Tensor, **tensors: Tensor) -> None:
    """All of `tensors` have `like`'s device, dtype, shape and strides, and `like` is dense, or an InputError."""
    if not (like.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(like)):  # the first is faster, and usual
        raise InputError(f"tsrfast.{op}: {like_name} must be dense (contiguous or channels_last), got strides {like.stride()}")
    for name, t in tensors.items():
        if t.device != like.device:
            raise InputError(f"tsrfast.{op}: {name} must be on {like_name}'s device {like.device}, got {t.device}")
        if t.dtype != like.dtype:
            raise InputError(f"tsrfast.{op}: {name} must be {like.dtype} as {like_name} is, got {t.dtype}")
        if t.shape != like.shape:
            raise InputError(f"tsrfast.{op}: {name} must have {like_name}'s shape {tuple(like.shape)}, got {tuple(t.shape)}")
        if not same_layout(t, like):
            raise InputError(f"tsrfast.{op}: {name} must have {like_name}'s strides {like.stride()}, got {t.stride()}")


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal strides wherever a dimension has more than one entry (elsewhere a stride means nothing)."""
    if a.stride() == b.stride():  # usual, and fast
        return True
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)) or a.numel() == 0


def per_image(op: str, name: str, value: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """Split a scalar-or-``[N]`` argument into (scalar, tensor or None); the tensor as float64 on `like`'s device."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.ndim == 0:
        return float(value), None
    if value.shape != like.shape[:1]:
        raise InputError(f"tsrfast.{op}: {name} must be a number or of shape ({like.shape[0]},), got {tuple(value.shape)}")
    if value.device != like.device:
        raise InputError(f"tsrfast.{op}: {name} must be on {like.device}, got {value.device}")
    return 0.0, value.to(torch.float64).contiguous()
