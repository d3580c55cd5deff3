"""Attacks of torchattacks 3.5.1 that search for themselves how far to go: APGD, APGDT, Square, CW, DeepFool, EAD."""

from __future__ import annotations

import time
from typing import ClassVar

import torch
from torch import Tensor, nn

from tsrfast import attacks
from tsrfast.attacks.eager import Evaluation
from tsrfast.compat._running import DrawnAPGD, DrawnAPGDTargeted, drawn
from tsrfast.compat.torchattacks._running import search
from tsrfast.compat.torchattacks.attack import Attack
from tsrfast.errors import unknown

LOSSES = {"ce": "cross_entropy", "dlr": "dlr", "margin": "margin"}


def norm_of(attack: Attack, norm: str, allowed: tuple[str, ...] = ("Linf", "L2")) -> str:
    """tsrfast's name of a norm."""
    if norm not in allowed:
        raise unknown(f"norm of {attack.attack}", norm, allowed)
    return norm.lower()


def loss_of(attack: Attack, loss: str, allowed: tuple[str, ...]) -> str:
    if loss not in allowed:
        raise unknown(f"loss of {attack.attack}", loss, allowed)
    return LOSSES[loss]


class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020): see `tsrfast.attacks.APGD`. An image that does not fall comes back as it was.

    Starts are what the original draws after resetting PyTorch's generator to `seed`; here that generator is left alone.
    `verbose` prints nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
    ) -> None:
        super().__init__("APGD", model)
        self.eps = eps
        self.steps = steps
        self.norm = norm
        self.n_restarts = n_restarts
        self.seed = seed
        self.loss = loss
        self.eot_iter = eot_iter
        self.thr_decr = rho
        self.verbose = verbose
        self.supported_mode = ["default"]
        self._keep = "last"

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        norm = norm_of(self, self.norm)
        return search(
            self,
            images,
            labels,
            lambda engine: DrawnAPGD(
                norm=norm, eps=self.eps, steps=self.steps, restarts=self.n_restarts, keep=self._keep, rho=self.thr_decr,
                eot_iter=self.eot_iter, engine=engine, loss=loss_of(self, self.loss, ("ce", "dlr")),
                draw=drawn(norm, torch.Generator().manual_seed(int(self.seed))),
            ),
        )  # fmt: skip


class APGDT(Attack):
    """Auto-PGD on the targeted DLR loss towards each wrong class in turn: see `tsrfast.attacks.APGDTargeted`; else as `APGD`."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
    ) -> None:
        super().__init__("APGDT", model)
        self.eps = eps
        self.steps = steps
        self.norm = norm
        self.n_restarts = n_restarts
        self.seed = seed
        self.eot_iter = eot_iter
        self.thr_decr = rho
        self.verbose = verbose
        self.target_class = None
        self.n_target_classes = n_classes - 1
        self.supported_mode = ["default"]
        self._keep = "last"

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        norm = norm_of(self, self.norm)
        return search(
            self,
            images,
            labels,
            lambda engine: DrawnAPGDTargeted(
                norm=norm, eps=self.eps, steps=self.steps, restarts=self.n_restarts, keep=self._keep, rho=self.thr_decr,
                eot_iter=self.eot_iter, engine=engine, target_classes=self.n_target_classes,
                draw=drawn(norm, torch.Generator().manual_seed(int(self.seed))),
            ),
        )  # fmt: skip


class Square(Attack):
    """Square Attack (Andriushchenko et al. 2020): see `tsrfast.attacks.Square`; each image has squares of its own."""

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int | None = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__("Square", model)
        self.norm = norm
        self.n_queries = n_queries
        self.eps = eps
        self.p_init = p_init
        self.n_restarts = n_restarts
        self.seed = seed
        self.verbose = verbose
        self.loss = loss
        self.rescale_schedule = resc_schedule
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return search(
            self,
            images,
            labels,
            lambda engine: attacks.Square(
                norm=norm_of(self, self.norm), eps=self.eps, queries=self.n_queries, p_init=self.p_init,
                loss=loss_of(self, self.loss, ("margin", "ce")), restarts=self.n_restarts,
                rescale_schedule=self.rescale_schedule, targeted=self.targeted, engine=engine,
                seed=int(time.time() if self.seed is None else self.seed),
            ),
        )  # fmt: skip


class _AnyConfidence(attacks.CW):
    """Takes any misclassified iterate, whether it reaches `kappa` or not: `kappa` says how far the search drives."""

    def _reached(self, at: Evaluation) -> Tensor:
        return at.adversarial


class CW(Attack):
    """Carlini & Wagner's l2 attack (2017) with one constant `c`: see `tsrfast.attacks.CW`.

    As in the original, returned is the nearest misclassified iterate, whatever its confidence.
    """

    def __init__(self, model: nn.Module, c: float = 1, kappa: float = 0, steps: int = 50, lr: float = 0.01) -> None:
        super().__init__("CW", model)
        self.c = c
        self.kappa = kappa
        self.steps = steps
        self.lr = lr
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return search(
            self,
            images,
            labels,
            lambda engine: _AnyConfidence(
                c=self.c, kappa=self.kappa, steps=self.steps, lr=self.lr, binary_search_steps=1, abort_early=False, targeted=self.targeted,
                engine=engine,
            ),
        )  # fmt: skip


class DeepFool(Attack):
    """DeepFool (Moosavi-Dezfooli et al. 2016), all classes considered: see `tsrfast.attacks.DeepFool`."""

    def __init__(self, model: nn.Module, steps: int = 50, overshoot: float = 0.02) -> None:
        super().__init__("DeepFool", model)
        self.steps = steps
        self.overshoot = overshoot
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return search(
            self,
            images,
            labels,
            lambda engine: attacks.DeepFool(steps=self.steps, candidates=None, overshoot=self.overshoot, engine=engine),
        )

    def forward_return_target_labels(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Also what the model says of the images returned, int64 ``[N]``."""
        adversarial = self.forward(images, labels)
        with torch.no_grad():
            return adversarial, self.get_logits(adversarial).argmax(1)


class _EAD(Attack):
    rule: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        kappa: float = 0,
        lr: float = 0.01,
        binary_search_steps: int = 9,
        max_iterations: int = 100,
        abort_early: bool = True,
        initial_const: float = 0.001,
        beta: float = 0.001,
    ) -> None:
        super().__init__(type(self).__name__, model)
        self.kappa = kappa
        self.lr = lr
        self.binary_search_steps = binary_search_steps
        self.max_iterations = max_iterations
        self.abort_early = abort_early
        self.initial_const = initial_const
        self.beta = beta
        self.repeat = binary_search_steps >= 10
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return search(
            self,
            images,
            labels,
            lambda engine: attacks.EAD(
                c=self.initial_const, kappa=self.kappa, steps=self.max_iterations, lr=self.lr, beta=self.beta,
                binary_search_steps=self.binary_search_steps, abort_early=self.abort_early, decision_rule=self.rule,
                targeted=self.targeted, engine=engine,
            ),
        )  # fmt: skip


class EADL1(_EAD):
    """The elastic-net attack (Chen et al. 2018) that keeps the image nearest in l1: see `tsrfast.attacks.EAD`."""

    rule = "l1"


class EADEN(_EAD):
    """The elastic-net attack (Chen et al. 2018) that keeps the image nearest in the elastic net: see `tsrfast.attacks.EAD`."""

    rule = "en"
