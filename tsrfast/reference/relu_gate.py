"""`tsrfast.ops.relu_gate` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def relu_gate(z: Tensor) -> tuple[Tensor, Tensor]:
    """(relu(z), gates): unit u of an image is bit u % 32 of word u // 32, in int32 words."""
    bits = torch.nn.functional.pad((z > 0).flatten(1), (0, -z[0].numel() % 32 if len(z) else 0))
    words = (bits.unflatten(1, (-1, 32)).long() << torch.arange(32, device=z.device)).sum(2) if len(z) else bits[:, ::32].long()
    return z.relu(), words.to(torch.int32)


def relu_gate_backward(v: Tensor, gate: Tensor) -> Tensor:
    """v where the gate is open, 0 elsewhere."""
    bits = (gate[:, :, None] >> torch.arange(32, device=v.device)) & 1
    open_ = bits.flatten(1)[:, : v[0].numel() if len(v) else 0].reshape(v.shape)
    return torch.where(open_ == 1, v, torch.zeros((), dtype=v.dtype, device=v.device))
