"""`tsrfast.ops.hyperplane_projection` in plain PyTorch, in t's dtype, by sorting breakpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def hyperplane_projection(t: Tensor, w: Tensor, b: Tensor, *, norm: str = "linf", lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """The change d ``[N, ...]``; formulas in csrc/core/hyperplane_projection.h."""
    if t.numel() == 0:
        return t.clone()
    shape, t, w = t.shape, t.flatten(1), w.flatten(1)
    w = w.masked_fill(~w.isfinite(), 0)
    beyond = (w * t).sum(1, keepdim=True) - b.to(t.dtype)[:, None]
    sign = torch.where(beyond >= 0, 1.0, -1.0).to(t.dtype) * w.sign()
    c, weight = beyond.abs(), w.abs()
    room = torch.where(sign > 0, t - lo, hi - t).clamp_min(0)
    if norm == "l1":
        value, order = weight.sort(1, descending=True)
        covered = (weight * room).gather(1, order).cumsum(1)
        mu = value.gather(1, (covered < c).sum(1, keepdim=True).clamp_max(w.shape[1] - 1))
        full, tied = (weight * room * part for part in (weight > mu, weight == mu))
        share = (c - full.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
        v = torch.where(weight > mu, room, torch.where(weight == mu, room * share, torch.zeros_like(room)))
    else:
        speed = torch.ones_like(weight) if norm == "linf" else weight
        # Up to its breakpoint a coordinate moves; sum |w_j| v_j grows by the weights of those that still do.
        at, order = torch.where(weight > 0, room / speed, torch.inf).sort(1)
        slope = (weight * speed).gather(1, order)
        still = slope.flip(1).cumsum(1).flip(1)
        stopped = torch.cat([torch.zeros_like(c), (weight * room).gather(1, order).cumsum(1)[:, :-1]], 1)
        covered = torch.where(still > 0, stopped + still * at, torch.inf)
        k = (covered < c).sum(1, keepdim=True).clamp_max(w.shape[1] - 1)
        v = torch.minimum((c - stopped.gather(1, k)) / still.gather(1, k) * speed, room)
    v = torch.where((weight * room).sum(1, keepdim=True) <= c, room, v)
    return torch.where((c > 0) & (sign != 0), -sign * v, torch.zeros_like(v)).reshape(shape)
