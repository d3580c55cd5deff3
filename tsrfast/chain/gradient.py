"""A chain that autograd can go through, for attacks whose loop of steps is in Python."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tsrfast.chain.chain import Chain


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain) -> Tensor:
        ctx.save_for_backward(x)
        ctx.chain = chain
        return chain(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gradient: Tensor = ctx.chain.input_gradient(x, cotangent)
        return gradient, None


class Differentiable(nn.Module):
    """`chain` as a module from images to logits, differentiable once with respect to the images.

    The way back runs the forward pass again, which keeps nothing but x in memory: three native passes instead of two.

    Args:
        chain: a compiled network; a snapshot, as ever.

    Raises:
        InputError: when called, as `Chain` does.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Through.apply(x, self.chain)
        return logits
