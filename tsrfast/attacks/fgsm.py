"""The fast gradient sign method (Goodfellow et al. 2015): one step of full length from the image itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsrfast.attacks.attack import LoopAttack
from tsrfast.attacks.loop import Recipe
from tsrfast.attacks.losses import Loss
from tsrfast.attacks.pgd import PGD


@dataclass(frozen=True, eq=False)
class FGSM(LoopAttack):
    """One gradient step. ``step_size=None`` takes the whole radius.

    Args:
        norm, eps, loss, targeted, lo, hi, engine, memory_format, autocast: as in `PGD`.
        step_size: a shorter step than eps (the paper's FGSM row may be one step of 0.01), in pixel units.

    Raises:
        InputError: a value that is not allowed.
    """

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    step_size: float | Tensor | None = None
    loss: str | Loss = "cross_entropy"
    targeted: bool = False
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"
    memory_format: torch.memory_format | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._recipe()

    def _recipe(self) -> Recipe:
        step_size = self.eps if self.step_size is None else self.step_size
        return PGD(
            norm=self.norm, eps=self.eps, step_size=step_size, steps=1, loss=self.loss, random_start=False,
            targeted=self.targeted, lo=self.lo, hi=self.hi, engine=self.engine,
            memory_format=self.memory_format, autocast=self.autocast,
        )._recipe()  # fmt: skip
