"""Numbers and curves from a correlation matrix (Yang et al., AISTATS 2021, section 5; footnote 4 for the thresholds)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.specialization.correlation import NormalizedCorrelation


def bnc(nc: NormalizedCorrelation) -> Tensor:
    """Best normalised correlation of each live teacher node: max_k rho_kj, signed.

    Returns:
        float64 [live teacher nodes], in teacher order; dead teacher nodes are left out (nothing can correlate with them).
    """
    return nc.rho[:, ~nc.dead_teacher].amax(0)


def mbnc(nc: NormalizedCorrelation) -> float:
    """Mean of `bnc`; NaN if all teacher nodes are dead."""
    return float(bnc(nc).mean())


def sorted_bnc(nc: NormalizedCorrelation) -> Tensor:
    """`bnc` in ascending order: the curve over ranks 0, 1, ..."""
    return bnc(nc).sort().values


class SpecializedCounts(NamedTuple):
    """How many nodes have a best correlation above the high threshold, below the low one, in between."""

    specialized: int
    unspecialized: int
    ignored: int

    @property
    def ratio(self) -> float:
        """unspecialized / specialized; infinite if none is specialized (NaN if neither)."""
        if self.specialized:
            return self.unspecialized / self.specialized
        return math.inf if self.unspecialized else math.nan


def specialized_counts(
    nc: NormalizedCorrelation, low: float = 0.8, high: float = 0.9, *, side: str = "student"
) -> SpecializedCounts:
    """Count nodes by their best correlation with the other network.

    Args:
        nc: the layer's correlations.
        low, high: unspecialized is best < low, specialized is best > high, both strict.
        side: ``"student"``: of student nodes, best over live teacher nodes (dead student nodes have 0 and so are
            unspecialized); ``"teacher"``: of live teacher nodes, best over student nodes.

    Raises:
        InputError: low > high, or another side.
    """
    if not low <= high:
        raise InputError(f"tsrfast.specialized_counts: low must be at most high, got low={low}, high={high}")
    if side not in ("student", "teacher"):
        raise InputError(f"tsrfast.specialized_counts: side must be 'student' or 'teacher', got {side!r}")
    if side == "teacher":
        best = bnc(nc)
    else:
        live = nc.rho[:, ~nc.dead_teacher]
        best = live.amax(1) if live.shape[1] else live.new_zeros(len(live))
    above, below = int((best > high).sum()), int((best < low).sum())
    return SpecializedCounts(above, below, len(best) - above - below)


def specialization_frequency(nc: NormalizedCorrelation, threshold: float = 0.9) -> Tensor:
    """For each teacher node, how many student nodes have rho_kj > threshold: int64 [Ct] (0 for dead ones)."""
    return (nc.rho > threshold).sum(0)


class Pearson(NamedTuple):
    """r, the number of pairs behind it, and the two-sided p-value of "no correlation" (Student's t with n - 2 degrees)."""

    r: float
    n: int
    p_value: float


def pearson(x: Tensor, y: Tensor) -> Pearson:
    """Pearson's correlation of paired values, in float64.

    Args:
        x, y: tensors of one shape; pairs with a NaN (such as invalid filters have) are left out.

    Returns:
        (r, n, p_value). r is NaN if either side is constant or n < 2; p_value is NaN if r is or n < 3.

    Raises:
        InputError: different shapes, or an infinite value.
    """
    if x.shape != y.shape:
        raise InputError(f"tsrfast.pearson: y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    a, b = (v.detach().flatten().to("cpu", torch.float64) for v in (x, y))
    if a.isinf().any() or b.isinf().any():
        raise InputError("tsrfast.pearson: x and y must be finite or NaN, got inf")
    kept = ~(a.isnan() | b.isnan())
    a, b = a[kept], b[kept]
    n = len(a)
    if n < 2 or a.min() == a.max() or b.min() == b.max():
        return Pearson(math.nan, n, math.nan)
    a, b = a - a.mean(), b - b.mean()
    r = max(-1.0, min(1.0, float(a @ b / a.norm() / b.norm())))
    # t^2 = (n-2) r^2 / (1-r^2), and P(|T| > t) = I_{1-r^2}((n-2)/2, 1/2).
    return Pearson(r, n, _betainc((n - 2) / 2, 0.5, (1 - r) * (1 + r)) if n > 2 else math.nan)


def spearman(x: Tensor, y: Tensor) -> Pearson:
    """Spearman's rank correlation: `pearson` of the ranks, equal values sharing their mean rank. Arguments as there."""
    if x.shape != y.shape:
        raise InputError(f"tsrfast.spearman: y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    a, b = (v.detach().flatten().to("cpu", torch.float64) for v in (x, y))
    kept = ~(a.isnan() | b.isnan())
    return pearson(_ranks(a[kept]), _ranks(b[kept]))


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def _betainc(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b): its continued fraction, by Lentz's method (Numerical Recipes 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _betainc(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction
