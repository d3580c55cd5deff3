"""The smallest change onto a hyperplane inside the box (Croce & Hein 2020, FAB, section 3.1), without sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError, unknown
from tsrfast.ops._register import check_dtype, check_like, register
from tsrfast.ops.pgd_step import NORMS


def _run(t: Tensor, w: Tensor, b: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    check_dtype("hyperplane_projection", "t", t)
    check_like("hyperplane_projection", "t", t, w=w)
    n = t.shape[0]
    d = t.numel() // max(n, 1)
    if n > 1 and d and t.stride(0) != d:
        raise InputError(
            f"tsrfast.hyperplane_projection: each image of t must be one block of memory, got strides {t.stride()}"
        )
    out = torch.empty_like(t)
    b = b.contiguous()
    _native.call(
        "hyperplane_projection", t, t.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr(),
        lo, hi, n, d, norm, _native.DTYPES[t.dtype],
    )  # fmt: skip
    return out


_op = register(
    "hyperplane_projection(Tensor t, Tensor w, Tensor b, int norm, float lo, float hi) -> Tensor",
    _run,
    lambda t, *_: torch.empty_like(t),
)


def hyperplane_projection(t: Tensor, w: Tensor, b: Tensor, *, norm: str = "linf", lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """The smallest d, in the norm, with ``<w, t + d> = b`` and ``t + d`` in the box; where there is none, as near as the box lets it.

    Where several d are as small (l1, equal \\|w_j\\|; linf, pixels that need not move so far), the one that moves pixels of equal weight
    by equal shares of the room they have (l1), or as many pixels as far as possible (linf).

    Args:
        t: points ``[N, ...]`` inside the box, float32, bfloat16, float16 or float64, dense (contiguous or channels_last).
        w: normals of the hyperplanes, as t in shape, strides and dtype. Entries that are 0, NaN or infinite leave their pixel. In l2 their
            squares are added up in float64: float64 normals are to be between 1e-150 and 1e150 there.
        b: ``[N]``, float32 or float64: the value of ``<w, x>`` on the hyperplane. NaN leaves the point.
        norm: ``linf``, ``l2`` or ``l1``.
        lo, hi: the pixel box, finite.

    Returns:
        d as `t`; ``t + d`` is inside the box up to one rounding of the dtype.

    Raises:
        InputError: an argument has the wrong dtype, shape, strides, device or value.

    Same as `tsrfast.reference.hyperplane_projection`. Kernels: ``csrc/{cpu,cuda}/hyperplane_projection``. No gradient.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if t.ndim < 2:
        raise InputError(
            f"tsrfast.hyperplane_projection: t must be [N, ...] with at least 2 dimensions, got shape {tuple(t.shape)}"
        )
    if b.dtype not in (torch.float32, torch.float64) or b.shape != t.shape[:1]:
        raise InputError(
            f"tsrfast.hyperplane_projection: b must be float32 or float64 of shape ({t.shape[0]},), "
            f"got {b.dtype} of shape {tuple(b.shape)}"
        )
    if b.device != t.device:
        raise InputError(f"tsrfast.hyperplane_projection: b must be on t's device {t.device}, got {b.device}")
    if not -math.inf < lo <= hi < math.inf:
        raise InputError(f"tsrfast.hyperplane_projection: lo <= hi must hold, both finite, got lo={lo}, hi={hi}")
    out: Tensor = _op(t, w, b.double(), NORMS[norm], lo, hi)
    return out
