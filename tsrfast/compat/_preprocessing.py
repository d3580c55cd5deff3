"""A network as raw pixels see it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Preprocessed(nn.Module):
    """`model` on ``(x - mean) / std``.

    Args:
        model: takes preprocessed images.
        mean, std: what broadcasts to a batch of images; None: 0, 1.
        flip_axis: axis, or axes, along which images are flipped first.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: nn.Module, mean: Tensor | None, std: Tensor | None, flip_axis: Any = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.flip_axis = flip_axis

    def forward(self, x: Tensor) -> Tensor:
        if self.flip_axis is not None:
            x = x.flip(self.flip_axis)
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)
        if self.std is not None:
            x = x / self.std.to(x.dtype)
        logits: Tensor = self.model(x)
        return logits
