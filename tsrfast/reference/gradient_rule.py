"""The sums of `tsrfast.specialization.GradientRule` by their definitions: Jacobians of the layers above, in x's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradient_rows(net: nn.Sequential, x: Tensor, module: int) -> Tensor:
    """V_l(x) = d net(x) / d (what `net[module]` returns), ``[N, classes, ...]``."""
    hidden, above = net[: module + 1](x), net[module + 1 :]
    rows: Tensor = torch.func.vmap(torch.func.jacrev(lambda f: above(f[None])[0]))(hidden)
    return rows.detach()


def gram(s: Tensor, t: Tensor) -> Tensor:
    """E over images of V_l^T V*_l, summed over positions: rows ``[N, R, Cs, ...]`` and ``[N, R, Ct, ...]`` to ``[Cs, Ct]``."""
    s, t = (v.reshape(*v.shape[:3], -1) for v in (s, t))
    return torch.einsum("nrkp,nrjp->kj", s, t) / len(s)


def unit_squares(v: Tensor) -> Tensor:
    """E over images of V_u^2 summed over classes: ``[N, R, ...]`` to ``[...]``."""
    return v.square().sum((0, 1)) / len(v)
