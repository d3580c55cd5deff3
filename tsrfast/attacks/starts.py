"""Where an attack begins: at the image, or at a random point of the ball that depends on seed and image number alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tsrfast.attacks.threat import Threat
from tsrfast.ops import philox_uniform

# Draw numbers keep the streams of one (seed, image) apart: restart r uses draws 4 r .. 4 r + 3.
_DRAWS = 4


def random_start(x0: Tensor, threat: Threat, *, seed: int, index: Tensor, restart: int = 0) -> Tensor:
    """A point drawn uniformly from the ball around each image, then clamped to the box.

    linf: x0 + eps (2u - 1). l2: Gaussian direction, radius eps u^(1/D). l1: D + 1 exponential variables divided by their sum
    (uniform on the solid simplex) with random signs. Clamping never leaves a ball around a point of the box.

    Args:
        x0: images ``[N, ...]`` in the threat's box.
        threat: norm, radius, box.
        seed, index: key and counter: int64 ``[N]`` numbers of the images in their data set.
        restart: number of the restart.

    Returns:
        A new tensor as `x0` (same strides). The numbers behind it are bitwise the same in any batch and on any device; linf uses only
        additions and one product, l2 and l1 also log, cos and sqrt in float64, which may differ in their last bit.
    """
    n, d = len(x0), x0[0].numel() if len(x0) else 0
    first = restart * _DRAWS
    if threat.norm == "linf":
        offset = 2 * philox_uniform(seed, index, d, draw=first).double() - 1
    elif threat.norm == "l2":
        half = (d + 1) // 2
        # 1 - u is in (0, 1]: the logarithm is finite.
        r = (-2 * (1 - philox_uniform(seed, index, half, draw=first).double()).log()).sqrt()
        phi = 2 * math.pi * philox_uniform(seed, index, half, draw=first + 1).double()
        normal = torch.cat([r * phi.cos(), r * phi.sin()], 1)[:, :d]
        length = normal.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        offset = normal / length * philox_uniform(seed, index, 1, draw=first + 2).double() ** (1 / max(d, 1))
    else:
        e = -(1 - philox_uniform(seed, index, d + 1, draw=first).double()).log()
        total = e.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        signs = torch.where(philox_uniform(seed, index, d, draw=first + 1) < 0.5, -1.0, 1.0)
        offset = signs * e[:, :d] / total
    eps = torch.as_tensor(threat.eps, dtype=torch.float64, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))
    moved = x0.double() + eps * offset.reshape(x0.shape) if n else x0.double()
    out = torch.empty_like(x0)
    out.copy_(moved.clamp(threat.lo, threat.hi))
    return out
