"""`tsrfast.ops.philox_uniform` in plain PyTorch (int64 arithmetic, 32 bits at a time)."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011) on int64 tensors holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which leaves all 64 product bits in place
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def philox_uniform(seed: int, index: Tensor, count: int, *, draw: int = 0) -> Tensor:
    """Lane j % 4 of block j // 4 under the counter (block, draw, image low, image high), mapped to [0, 1) with 24 bits."""
    block = torch.arange((count + 3) // 4, device=index.device)
    image = index[:, None].expand(-1, len(block))
    counter = (block.expand_as(image), torch.full_like(image, draw), image & _MASK, image >> 32 & _MASK)
    lanes = philox(counter, (seed & _MASK, seed >> 32 & _MASK))
    return (torch.stack(lanes, 2).flatten(1)[:, :count] >> 8).float() * 2.0**-24
