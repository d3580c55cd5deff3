"""Square Attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tsrfast import attacks
from tsrfast.compat.autoattack.autopgd_base import Single
from tsrfast.errors import InputError, unknown

LOSSES = {"margin": "margin", "ce": "cross_entropy"}


class SquareAttack(Single):
    """Random search by queries: see `tsrfast.attacks.Square`."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        n_queries: int = 5000,
        eps: float | None = None,
        p_init: float = 0.8,
        n_restarts: int = 1,
        seed: float | None = 0,
        verbose: bool = False,
        targeted: bool = False,
        loss: str = "margin",
        resc_schedule: bool = True,
        device: Any = None,
    ) -> None:
        self.model = self.predict = predict
        self.norm, self.n_queries, self.eps, self.p_init, self.n_restarts, self.seed = (
            norm,
            n_queries,
            eps,
            p_init,
            n_restarts,
            seed,
        )
        self.verbose, self.targeted, self.loss, self.rescale_schedule, self.device = (
            verbose,
            targeted,
            loss,
            resc_schedule,
            device,
        )
        super().__init__()

    def attack(self, keep: str, seed: int) -> attacks.Attack:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        return attacks.Square(
            **self._shared(seed), queries=self.n_queries, p_init=self.p_init, restarts=self.n_restarts, targeted=self.targeted,
            loss=LOSSES[self.loss], rescale_schedule=self.rescale_schedule,
        )  # fmt: skip

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Adversarial images; what does not fall is returned as it is. Without `y`: of the model's answers."""
        if y is None and self.targeted:
            raise InputError("tsrfast.compat.autoattack: y must be the targets of a targeted SquareAttack, got None")
        return self._perturb(x, y, "first")
