"""ReLU that keeps one bit a unit, and gating back: the D_l of the recursive gradient rule (Tian 2019, Lemma 1).

Gate layout (csrc/core/gates.h): int32 ``[N, ceil(n / 32)]`` for n = product of the other dimensions. Unit u, the flat index in
C, H, W order, is bit ``u % 32`` (least significant first) of word ``u // 32``; 1 means z > 0. Unused bits are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError
from tsrfast.ops._register import check_dtype, register


def _units(z: Tensor) -> int:
    n = 1
    for size in z.shape[1:]:
        n *= size
    return n


def _check(op: str, name: str, z: Tensor) -> None:
    check_dtype(op, name, z)
    if z.ndim < 2:
        raise InputError(f"tsrfast.{op}: {name} must be [N, n] or [N, C, H, W], got shape {tuple(z.shape)}")
    if not z.is_contiguous():
        raise InputError(
            f"tsrfast.{op}: {name} must be contiguous (gates are in C, H, W order; use .contiguous()), got strides {z.stride()}"
        )


def _empty_gate(z: Tensor) -> Tensor:
    return z.new_empty((z.shape[0], (_units(z) + 31) // 32), dtype=torch.int32)


def _forward(z: Tensor) -> tuple[Tensor, Tensor]:
    _check("relu_gate", "z", z)
    a, gate = torch.empty_like(z), _empty_gate(z)
    _native.call("relu_gate", z, z.data_ptr(), a.data_ptr(), gate.data_ptr(), z.shape[0], _units(z), _native.DTYPES[z.dtype])
    return a, gate


def _backward(v: Tensor, gate: Tensor) -> Tensor:
    op = "relu_gate_backward"
    _check(op, "v", v)
    if gate.dtype != torch.int32 or not gate.is_contiguous() or gate.device != v.device:
        raise InputError(
            f"tsrfast.{op}: gate must be contiguous int32 on {v.device}, got {gate.dtype}, strides {gate.stride()}, {gate.device}"
        )
    words = (v.shape[0], (_units(v) + 31) // 32)
    if tuple(gate.shape) != words:
        raise InputError(f"tsrfast.{op}: gate must have shape {words} for v {tuple(v.shape)}, got {tuple(gate.shape)}")
    out = torch.empty_like(v)
    _native.call(op, v, v.data_ptr(), gate.data_ptr(), out.data_ptr(), v.shape[0], _units(v), _native.DTYPES[v.dtype])
    return out


_relu_gate = register("relu_gate(Tensor z) -> (Tensor, Tensor)", _forward, lambda z: (torch.empty_like(z), _empty_gate(z)))
_relu_gate_backward = register(
    "relu_gate_backward(Tensor v, Tensor gate) -> Tensor", _backward, lambda v, gate: torch.empty_like(v)
)


def relu_gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU and its gates in one pass.

    Args:
        z: pre-activations ``[N, n]`` or ``[N, C, H, W]``, float32, bfloat16, float16 or float64, contiguous. NaN stays NaN in the
            activation and is a closed gate.

    Returns:
        (a, gate): the activations as `z`, and int32 ``[N, ceil(n / 32)]`` in the layout above.

    Raises:
        InputError: wrong dtype, number of dimensions or strides.

    Same as `tsrfast.reference.relu_gate`. Kernels: ``csrc/{cpu,cuda}/relu_gate``. No gradient: see `gated_relu`.
    """
    a, gate = _relu_gate(z)
    return a, gate


def relu_gate_backward(v: Tensor, gate: Tensor) -> Tensor:
    """Carry vectors back through the gates: ``v * gate`` (closed units give 0 even where v is NaN).

    Args:
        v: ``[N, n]`` or ``[N, C, H, W]``, contiguous, dtypes as in `relu_gate`.
        gate: int32 ``[N, ceil(n / 32)]`` from `relu_gate`.

    Returns:
        A tensor as `v`.

    Raises:
        InputError: wrong dtype, shape, strides or device.

    Same as `tsrfast.reference.relu_gate_backward`. Kernels: ``csrc/{cpu,cuda}/relu_gate``. No gradient: see `gated_relu`.
    """
    out: Tensor = _relu_gate_backward(v, gate)
    return out


class _Gate(torch.autograd.Function):
    """v -> v * gate: linear and symmetric, so it is its own backward, to any order."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return relu_gate_backward(v.detach().contiguous(), gate)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gate,) = ctx.saved_tensors
        return _Gate.apply(v, gate), None


class _GatedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        a, gate = relu_gate(z.detach())
        ctx.save_for_backward(gate)
        return a

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:  # type: ignore[override]
        (gate,) = ctx.saved_tensors
        out: Tensor = _Gate.apply(v, gate)
        return out


def gated_relu(z: Tensor) -> Tensor:
    """Differentiable ReLU that keeps 1 bit a unit for the backward pass instead of a whole activation.

    Args:
        z: as in `relu_gate`; may require gradients (of any order).

    Returns:
        ``max(z, 0)``, as `z`.

    Raises:
        InputError: as `relu_gate`.
    """
    out: Tensor = _GatedReLU.apply(z)
    return out
