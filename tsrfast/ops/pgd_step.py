"""One step of projected gradient ascent inside a norm ball and the pixel box (Madry et al. 2018), fused into one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError, unknown
from tsrfast.ops._register import check_dtype, check_like, per_image, register

# Norms by the tags of csrc/core/pgd_step.h.
NORMS = {"linf": 0, "l2": 1, "l1": 2}


def _run(
    out: Tensor,
    x: Tensor,
    x0: Tensor,
    g: Tensor,
    step: Tensor | None,
    eps: Tensor | None,
    step_value: float,
    eps_value: float,
    norm: int,
    lo: float,
    hi: float,
    targeted: bool,
    sparsity: float,
) -> Tensor:
    check_dtype("pgd_step", "x", x)
    check_like("pgd_step", "x", x, x0=x0, g=g)
    n = x.shape[0]
    d = x.numel() // max(n, 1)
    if n > 1 and d and x.stride(0) != d:
        raise InputError(f"tsrfast.pgd_step: each image of x must be one block of memory, got strides {x.stride()}")
    for name, value in (("step_size", step), ("eps", eps)):
        if value is not None and value.is_cpu and n and not bool((value >= 0).all()):  # on a GPU, looking would wait for it
            raise InputError(f"tsrfast.pgd_step: {name} must be >= 0, got {float(value.min()):g}")
    bad = x.new_zeros(n, dtype=torch.int64)
    _native.call(
        "pgd_step",
        x,
        *(t.data_ptr() for t in (x, x0, g, out, bad)),
        step.data_ptr() if step is not None else 0,
        eps.data_ptr() if eps is not None else 0,
        *(step_value, eps_value, lo, hi, sparsity, n, d, norm, _native.DTYPES[x.dtype], targeted),
    )
    return bad


def _out_of_place(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    return out, _run(out, x, *args)


def _in_place(x: Tensor, *args: Any) -> Tensor:
    return _run(x, x, *args)


_SCALARS = (
    "Tensor x0, Tensor g, Tensor? step, Tensor? eps, float step_value, float eps_value, int norm, float lo, float hi, "
    "bool targeted, float sparsity"
)
_op = register(
    f"pgd_step(Tensor x, {_SCALARS}) -> (Tensor, Tensor)",
    _out_of_place,
    lambda x, *_: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int64)),
)
_op_ = register(
    f"pgd_step_(Tensor(a!) x, {_SCALARS}) -> Tensor",
    _in_place,
    lambda x, *_: x.new_empty(x.shape[0], dtype=torch.int64),
)


def _scalars(
    x: Tensor, step_size: float | Tensor, eps: float | Tensor, norm: str, lo: float, hi: float, targeted: bool, sparsity: float
) -> tuple[Tensor | None, Tensor | None, float, float, int, float, float, bool, float]:
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if x.ndim < 2:
        raise InputError(f"tsrfast.pgd_step: x must be [N, ...] with at least 2 dimensions, got shape {tuple(x.shape)}")
    step_value, step = per_image("pgd_step", "step_size", step_size, x)
    eps_value, radius = per_image("pgd_step", "eps", eps, x)
    for name, value in (("step_size", step_value), ("eps", eps_value)):
        if not value >= 0:
            raise InputError(f"tsrfast.pgd_step: {name} must be >= 0, got {value}")
    if math.isinf(step_value):
        raise InputError(f"tsrfast.pgd_step: step_size must be finite, got {step_value}")
    if not lo <= hi:
        raise InputError(f"tsrfast.pgd_step: lo must be <= hi, got lo={lo}, hi={hi}")
    if not 0 < sparsity <= 1:
        raise InputError(f"tsrfast.pgd_step: sparsity must be in (0, 1], got {sparsity}")
    return step, radius, step_value, eps_value, NORMS[norm], lo, hi, targeted, sparsity


def pgd_step(
    x: Tensor,
    x0: Tensor,
    g: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
    targeted: bool = False,
    sparsity: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Move x along g, back into the eps-ball around x0, and into the box: ``clamp(project(x + step * direction(g)), lo, hi)``.

    linf: sign(g) with sign(0) = 0, clamped to x0 +- eps. l2: g / |g|, radial projection. l1: the ``sparsity`` fraction of
    coordinates with the largest |g| that the box lets move share the step (Tramer & Boneh 2019); the projection is the exact one
    onto the intersection of l1 ball and box (Croce & Hein 2021, "Mind the box", prop. 2.1), for which x0 must lie in the box.

    Args:
        x: current images ``[N, ...]``, float32, bfloat16, float16 or float64, dense (contiguous or channels_last).
        x0: clean images, as x in shape, strides and dtype.
        g: gradient of the loss to be increased, likewise. NaN leaves its pixel unmoved and is counted (l2, l1: infinities too).
        step_size: length of the step in that norm, in pixel units; a number or ``[N]``.
        eps: radius of the ball, in pixel units; a number (``inf``: no ball) or ``[N]``.
        norm: ``linf``, ``l2`` or ``l1``.
        lo, hi: the pixel box; ``-inf``, ``inf`` for none.
        targeted: decrease the loss instead.
        sparsity: l1 only, in (0, 1].

    Returns:
        (x_next, bad): images as `x`, within the ball and the box up to one rounding of the dtype; int64 ``[N]``, the number of
        gradient entries without a direction.

    Raises:
        InputError: an argument has the wrong dtype, shape, strides, device or value. Values inside ``[N]`` tensors are looked at
            on the CPU only (it would wait for a GPU).

    Same as `tsrfast.reference.pgd_step`. Kernels: ``csrc/{cpu,cuda}/pgd_step``. No gradient. In place: `pgd_step_`.
    """
    out, bad = _op(x, x0, g, *_scalars(x, step_size, eps, norm, lo, hi, targeted, sparsity))
    return out, bad


def pgd_step_(
    x: Tensor,
    x0: Tensor,
    g: Tensor,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
    targeted: bool = False,
    sparsity: float = 0.01,
) -> Tensor:
    """`pgd_step` written into x; returns `bad`. Arguments, units and errors as there."""
    bad: Tensor = _op_(x, x0, g, *_scalars(x, step_size, eps, norm, lo, hi, targeted, sparsity))
    return bad
