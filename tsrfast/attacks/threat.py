"""What the attacker may do: a norm ball around the clean image, intersected with the pixel box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsrfast.errors import InputError, unknown
from tsrfast.ops.pgd_step import NORMS


@dataclass(frozen=True, eq=False)
class Threat:
    """The set of allowed images around x: ``|x' - x| <= eps`` in `norm`, and every pixel in [lo, hi].

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in pixel units, >= 0; a number, or a tensor ``[N]`` with one radius an image.
        lo, hi: the pixel box, [0, 1] unless the model takes other inputs; ``-inf`` and ``inf`` for no box (spec: "no clamp").

    Raises:
        InputError: unknown norm, negative or NaN eps, empty box.
    """

    norm: str
    eps: float | Tensor
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        check_radius("eps", self.eps)
        if not self.lo < self.hi:
            raise InputError(f"tsrfast.attacks: lo must be < hi, got lo={self.lo}, hi={self.hi}")

    def check_images(self, x: Tensor) -> None:
        """`x` is a batch of finite images inside the box.

        Raises:
            InputError: `x` is no floating-point batch, or holds NaN, infinities or values outside [lo, hi].
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"tsrfast.attacks: x must be a floating-point tensor [N, C, H, W], got {what}")
        if isinstance(self.eps, Tensor) and self.eps.ndim and self.eps.shape != x.shape[:1]:
            raise InputError(f"tsrfast.attacks: eps must be a number or of shape ({len(x)},), got {tuple(self.eps.shape)}")
        if not x.numel():
            return
        least, most = (v.item() for v in torch.aminmax(x))
        if math.isnan(least) or math.isinf(least) or math.isinf(most):
            raise InputError("tsrfast.attacks: x must be finite, got NaN or infinite pixels")
        if least < self.lo or most > self.hi:
            raise InputError(
                f"tsrfast.attacks: x must be pixels in [{self.lo:g}, {self.hi:g}], got values in [{least:g}, {most:g}]"
                + (" (0..255? divide by 255)" if most > 1 and self.hi == 1 else "")
            )


def check_radius(name: str, value: float | Tensor, *, finite: bool = False) -> None:
    """A number or tensor of numbers >= 0 (`finite`: and below inf), or an InputError that names it."""
    ok = bool((value >= 0).all()) if isinstance(value, Tensor) else value >= 0
    if not ok:
        shown = f"{value.min().item():g}" if isinstance(value, Tensor) else value
        raise InputError(f"tsrfast.attacks: {name} must be >= 0, got {shown}")
    if finite and not bool(torch.as_tensor(value, device="cpu").isfinite().all()):
        raise InputError(f"tsrfast.attacks: {name} must be finite, got inf")


def check_count(name: str, value: int, least: int) -> None:
    """An integer of at least `least`, or an InputError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"tsrfast.attacks: {name} must be an integer >= {least}, got {value!r}")
