"""FAB and AutoAttack of torchattacks 3.5.1."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsrfast import attacks
from tsrfast.attacks.fab import FAB as _FAB
from tsrfast.attacks.fab import FABTargeted
from tsrfast.compat._running import checked_labels
from tsrfast.compat.torchattacks._running import search
from tsrfast.compat.torchattacks.attack import Attack
from tsrfast.compat.torchattacks.multiattack import MultiAttack
from tsrfast.compat.torchattacks.search import APGD, APGDT, Square, norm_of
from tsrfast.errors import unknown

STEPS = 100  # the paper's, for all attacks of AutoAttack but Square


@dataclass(frozen=True, eq=False, kw_only=True)
class _Towards(_FAB):
    """FAB towards the classes `targets`, int64 ``[N]``; any wrong answer counts."""

    targets: Tensor

    def _rounds(self, clean: Tensor, y: Tensor) -> Iterator[Tensor]:
        yield self.targets[:, None]


class FAB(Attack):
    """FAB (Croce & Hein 2020): see `tsrfast.attacks.FAB`; the nearest adversarial iterate, if it is within `eps`.

    `multi_targeted`: `tsrfast.attacks.FABTargeted`, towards each wrong class in turn. `verbose` prints nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | None = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: int = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("FAB", model)
        self.norm = norm
        self.n_restarts = n_restarts
        self.eps = eps if eps is not None else {"Linf": 0.3, "L2": 1.0, "L1": 5.0}[norm]
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta
        self.steps = steps
        self.verbose = verbose
        self.seed = seed
        self.target_class = None
        self.multi_targeted = multi_targeted
        self.n_target_classes = n_classes - 1
        self.supported_mode = ["default", "targeted"]
        self._keep = "best"

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        norm = norm_of(self, self.norm, ("Linf", "L2", "L1"))

        def own(engine: str) -> attacks.Attack:
            fields: dict[str, Any] = {
                "norm": norm, "eps": self.eps, "steps": self.steps, "restarts": self.n_restarts, "keep": self._keep,
                "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta, "seed": int(self.seed), "engine": engine,
            }  # fmt: skip
            if self.multi_targeted:
                return FABTargeted(target_classes=self.n_target_classes, **fields)
            if not self.targeted:
                return _FAB(**fields)
            pixels = images.detach().to(self.device)
            targets = self.get_target_label(pixels, labels.detach().to(self.device))
            return _Towards(targets=checked_labels("torchattacks", targets, pixels), **fields)

        return search(self, images, labels, own, aims=False)


class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020): APGD, APGDT, FAB and Square one after the other, each on the images that still stand.

    The iterative attacks take the paper's 100 steps; the original leaves them at its default of 10 (a fault: it reports more robustness
    than there is). Where exactly that is wanted: ``MultiAttack([APGD(model), APGDT(model), FAB(model, multi_targeted=True), Square(model)])``.
    Returned is the first adversarial iterate of the attack that an image falls to.

    `eps` and `norm` may be written to; the other arguments count when the object is made. `verbose` prints the success after each attack.

    Raises:
        ValueError: another version than ``standard``, ``plus`` and ``rand``.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        n_classes: int = 10,
        seed: int | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__("AutoAttack", model)
        self.norm = norm
        self.eps = eps
        self.version = version
        self.n_classes = n_classes
        self.seed = seed
        self.verbose = verbose
        self.supported_mode = ["default"]

        def apgd(loss: str, restarts: int = 1, eot_iter: int = 1) -> Attack:
            return APGD(model, norm, eps, STEPS, restarts, self.get_seed(), loss, eot_iter)

        def apgdt() -> Attack:
            return APGDT(model, norm, eps, STEPS, seed=self.get_seed(), n_classes=n_classes)

        def fab(restarts: int, multi_targeted: bool) -> Attack:
            return FAB(
                model, norm, eps, STEPS, restarts, seed=self.get_seed(), multi_targeted=multi_targeted, n_classes=n_classes
            )

        def square() -> Attack:
            return Square(model, norm, eps, seed=self.get_seed())

        if version == "standard":
            chosen = [apgd("ce"), apgdt(), fab(1, True), square()]
        elif version == "plus":
            chosen = [apgd("ce", 5), apgd("dlr", 5), fab(5, False), square(), apgdt(), fab(1, True)]
        elif version == "rand":
            chosen = [apgd("ce", eot_iter=20), apgd("dlr", eot_iter=20)]
        else:
            raise unknown("version of AutoAttack", version, ("standard", "plus", "rand"))
        for attack in chosen:
            attack._keep = "first"  # type: ignore[attr-defined]  # success is the same, for less work
        self._autoattack = MultiAttack(chosen, verbose)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        for attack in self._autoattack.attacks:
            attack.eps, attack.norm = self.eps, self.norm  # type: ignore[attr-defined]
        with torch.no_grad():
            return self._autoattack(images, labels)

    def get_seed(self) -> int:
        return int(time.time()) if self.seed is None else self.seed
