"""`tsrfast.ops.pgd_step` in plain PyTorch, in x's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def _norm(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1).reshape(-1, *[1] * (t.ndim - 1))


def l1_box_projection(y: Tensor, x0: Tensor, eps: Tensor, lo: float, hi: float) -> Tensor:
    """The point of {|z - x0|_1 <= eps} and [lo, hi]^D nearest to y (Croce & Hein 2021, prop. 2.1), by sorting breakpoints."""
    d = (y - x0).flatten(1)
    room = torch.where(d > 0, hi - x0.flatten(1), x0.flatten(1) - lo).clamp_min(0)
    a = d.abs()
    # kept(t) = sum clamp(a - t, 0, room) falls with slope 1 a coordinate between t = a - room and t = a.
    start = (a - room).clamp_min(0)
    t, order = torch.cat([start, a], 1).sort(1)
    slope = torch.cat([-torch.ones_like(a), torch.ones_like(a)], 1).gather(1, order).cumsum(1)
    # Between start and a every coordinate is on the slope; those with start = 0 began at 0.
    kept0 = torch.minimum(a, room).sum(1, keepdim=True)
    kept = torch.cat([kept0, kept0 + (slope[:, :-1] * t.diff(dim=1)).cumsum(1)], 1)
    k = (kept > eps.reshape(-1, 1)).sum(1, keepdim=True).clamp_min(1) - 1  # the last breakpoint where too much is kept
    lam = t.gather(1, k) + (kept.gather(1, k) - eps.reshape(-1, 1)) / (-slope.gather(1, k)).clamp_min(1)
    lam = torch.where(kept0 > eps.reshape(-1, 1), lam, torch.zeros_like(lam))
    return x0 + (d.sign() * (a - lam).clamp_min(0).minimum(room)).reshape(x0.shape)


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
    """(next images, number of gradient entries without a direction [N]); formulas in csrc/core/pgd_step.h."""
    step, radius = _column(step_size, x), _column(eps, x)
    if x.numel() == 0:
        return x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    g = -g if targeted else g
    bad = g.isnan() if norm == "linf" else ~g.isfinite()
    count = bad.flatten(1).sum(1)
    g = g.masked_fill(bad, 0)
    if norm == "linf":
        moved = x + step * g.sign()
        return torch.minimum(torch.maximum(moved, x0 - radius), x0 + radius).clamp(lo, hi), count
    if norm == "l2":
        length = _norm(g)
        d = x + g * torch.where(length > 0, step / length, torch.zeros_like(length)) - x0
        size = _norm(d)
        return (x0 + d * torch.where(size > radius, radius / size, torch.ones_like(size))).clamp(lo, hi), count
    free = ((g > 0) & (x < hi)) | ((g < 0) & (x > lo))
    size = g.abs().masked_fill(~free, 0).flatten(1)
    k = max(1, math.ceil(sparsity * size.shape[1]))
    threshold = size.topk(k, dim=1).values[:, -1:]
    chosen = free & (size >= threshold).reshape(x.shape)
    m = chosen.flatten(1).sum(1).clamp_min(1).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    y = x + chosen * g.sign() * (step / m)
    return l1_box_projection(y, x0, radius.expand(len(x), *radius.shape[1:]), lo, hi).clamp(lo, hi), count
