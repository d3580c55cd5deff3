"""Auto-PGD, and what the drop-in's single attacks share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsrfast import attacks
from tsrfast._modes import evaluating
from tsrfast.attacks.attack import Terms
from tsrfast.attacks.cascade import device_of
from tsrfast.attacks.loop import Attempt
from tsrfast.compat._running import DrawnAPGD, DrawnAPGDTargeted, as_module, drawn
from tsrfast.errors import InputError, unknown

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}
LOSSES = {"ce": "cross_entropy", "dlr": "dlr"}


@dataclass(frozen=True, eq=False)
class Drawn(attacks.Attack):
    """Auto-PGD that begins where the original does: PyTorch's numbers after ``manual_seed(seed)``, drawn anew for every batch."""

    attack: attacks.APGD | attacks.APGDTargeted

    def _terms(self) -> Terms:
        return self.attack._terms()

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        fields: dict[str, Any] = {f.name: getattr(self.attack, f.name) for f in dataclasses.fields(self.attack)}
        kind = DrawnAPGD if isinstance(self.attack, attacks.APGD) else DrawnAPGDTargeted
        fields |= {"random_start": False, "draw": drawn(self.attack.norm, torch.Generator().manual_seed(self.attack.seed))}
        return kind(**fields)._attack(network, x0, y, index, judge)


class Single:
    """An attack of its own, whose attributes are what it does when it is called."""

    model: Callable[[Tensor], Tensor]
    norm: str
    eps: float | None
    seed: float | None

    def __init__(self, is_tf_model: bool = False) -> None:
        if is_tf_model:
            raise InputError("tsrfast.compat.autoattack: is_tf_model must be False (PyTorch models only), got True")
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.eps is None:
            raise InputError("tsrfast.compat.autoattack: eps must be a number, got None")

    def attack(self, keep: str, seed: int) -> attacks.Attack:
        """The attack of `tsrfast.attacks`; `keep`: which adversarial image it returns."""
        raise TypeError(f"{type(self).__name__} must define attack(keep, seed)")

    def _shared(self, seed: int) -> dict[str, Any]:
        return {"norm": NORMS[self.norm], "eps": self.eps, "seed": seed}

    def _perturb(self, x: Tensor, y: Tensor | None, keep: str) -> Tensor:
        module = as_module(self.model)
        x = x.detach().to(device_of(module, x))
        y = answers(module, x) if y is None else y.to(x.device)
        return self.attack(keep, int(time.time()) if self.seed is None else int(self.seed))(module, x, y)


class APGDAttack(Single):
    """Auto-PGD on cross-entropy (``ce``) or the difference of logits ratio (``dlr``): see `tsrfast.attacks.APGD`."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        n_iter: int = 100,
        norm: str = "Linf",
        n_restarts: int = 1,
        eps: float | None = None,
        seed: float | None = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        topk: float | None = None,
        verbose: bool = False,
        device: Any = None,
        use_largereps: bool = False,
        is_tf_model: bool = False,
        logger: Any = None,
    ) -> None:
        self.model, self.n_iter, self.norm, self.n_restarts, self.eps, self.seed = predict, n_iter, norm, n_restarts, eps, seed
        self.loss, self.eot_iter, self.thr_decr, self.topk, self.verbose, self.device = (
            loss,
            eot_iter,
            rho,
            topk,
            verbose,
            device,
        )
        self.use_largereps, self.is_tf_model, self.logger = use_largereps, is_tf_model, logger
        super().__init__(is_tf_model)

    def _fields(self, keep: str, seed: int) -> dict[str, Any]:
        return {
            **self._shared(seed), "steps": self.n_iter, "restarts": self.n_restarts, "keep": keep, "rho": self.thr_decr,
            "eot_iter": self.eot_iter, "larger_eps": self.use_largereps,
        }  # fmt: skip

    def attack(self, keep: str, seed: int) -> attacks.Attack:
        if self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        return Drawn(attacks.APGD(**self._fields(keep, seed), loss=LOSSES[self.loss]))

    def perturb(self, x: Tensor, y: Tensor | None = None, best_loss: bool = False, x_init: Tensor | None = None) -> Tensor:
        """The last adversarial iterates; `best_loss`: those of the highest loss, of all images. Without `y`: of the model's answers.

        `x_init` has no effect, as in the original.
        """
        return self._perturb(x, y, "best" if best_loss else "last")


class APGDAttack_targeted(APGDAttack):
    """Auto-PGD on the targeted DLR loss, towards one wrong class after the other: see `tsrfast.attacks.APGDTargeted`."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        n_iter: int = 100,
        norm: str = "Linf",
        n_restarts: int = 1,
        eps: float | None = None,
        seed: float | None = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        topk: float | None = None,
        n_target_classes: int = 9,
        verbose: bool = False,
        device: Any = None,
        use_largereps: bool = False,
        is_tf_model: bool = False,
        logger: Any = None,
    ) -> None:
        super().__init__(
            predict, n_iter, norm, n_restarts, eps, seed, "dlr-targeted", eot_iter, rho, topk, verbose, device, use_largereps,
            is_tf_model, logger,
        )  # fmt: skip
        self.n_target_classes = n_target_classes

    def attack(self, keep: str, seed: int) -> attacks.Attack:
        return Drawn(attacks.APGDTargeted(**self._fields(keep, seed), target_classes=self.n_target_classes))

    def perturb(self, x: Tensor, y: Tensor | None = None, x_init: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self._perturb(x, y, "last")


def answers(model: nn.Module, x: Tensor, batch_size: int = 250) -> Tensor:
    """What the model says, in eval mode: int64 ``[N]``, on x's device."""
    device, said = device_of(model, x), [torch.zeros(0, dtype=torch.int64, device=x.device)]
    with evaluating(model), torch.no_grad():
        for batch in x.split(batch_size) if len(x) else ():
            said.append(model(batch.to(device)).argmax(1).to(x.device))
    return torch.cat(said)
