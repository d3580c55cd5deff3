"""FAB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tsrfast import attacks
from tsrfast.compat.autoattack.autopgd_base import Single
from tsrfast.errors import InputError

DEFAULT_EPS_DICT_BY_NORM = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}


class FABAttack_PT(Single):
    """Minimum-norm attack over linearised boundaries: see `tsrfast.attacks.FAB`, and with `targeted` `tsrfast.attacks.FABTargeted`."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        n_restarts: int = 1,
        n_iter: int = 100,
        eps: float | None = None,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        loss_fn: None = None,
        verbose: bool = False,
        seed: float | None = 0,
        targeted: bool = False,
        device: Any = None,
        n_target_classes: int = 9,
    ) -> None:
        if loss_fn is not None:
            raise InputError(f"tsrfast.compat.autoattack: loss_fn must be None (the original does not use it), got {loss_fn!r}")
        self.model = self.predict = predict
        self.norm, self.n_restarts, self.n_iter, self.alpha_max, self.eta, self.beta = (
            norm,
            n_restarts,
            n_iter,
            alpha_max,
            eta,
            beta,
        )
        self.eps = DEFAULT_EPS_DICT_BY_NORM.get(norm) if eps is None else eps
        self.verbose, self.seed, self.targeted, self.device, self.n_target_classes = (
            verbose,
            seed,
            targeted,
            device,
            n_target_classes,
        )
        super().__init__()

    def attack(self, keep: str, seed: int) -> attacks.Attack:
        fields: dict[str, Any] = {
            **self._shared(seed), "steps": self.n_iter, "restarts": self.n_restarts, "keep": keep, "alpha_max": self.alpha_max,
            "eta": self.eta, "beta": self.beta,
        }  # fmt: skip
        return attacks.FABTargeted(**fields, target_classes=self.n_target_classes) if self.targeted else attacks.FAB(**fields)

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The nearest adversarial images within `eps`. Without `y`: of the model's answers."""
        return self._perturb(x, y, "best")
