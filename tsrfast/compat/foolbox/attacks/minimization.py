"""foolbox's attacks for the smallest change, as attacks of `tsrfast.attacks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tsrfast import attacks
from tsrfast.compat._covered import NotCovered
from tsrfast.compat._running import may_leave
from tsrfast.compat.foolbox._tensors import like, raw
from tsrfast.compat.foolbox.attacks.base import (
    MinimizationAttack,
    get_criterion,
    goal_of,
    raise_if_kwargs,
    verify_input_bounds,
)
from tsrfast.compat.foolbox.distances import l1, l2
from tsrfast.compat.foolbox.models import Model, network_of
from tsrfast.errors import unknown


class _Own(MinimizationAttack):
    """Runs what `_attack` says."""

    def _attack(self, targeted: bool, common: dict[str, Any]) -> attacks.Attack:
        raise NotImplementedError

    def run(self, model: Model, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """Images as near as adversarial ones were found, and where none was, the images themselves."""
        raise_if_kwargs(kwargs)
        verify_input_bounds(inputs, model)
        x: Tensor = raw(inputs)
        labels, targeted = goal_of(get_criterion(criterion))
        if labels.shape != x.shape[:1]:
            name = "target_classes" if targeted else "labels"
            raise ValueError(f"expected {name} to have shape ({len(x)},), got {tuple(labels.shape)}")
        network, engine = network_of(model)
        lo, hi = model.bounds
        return like(self._attack(targeted, {"lo": lo, "hi": hi, "engine": engine})(network, x, labels), inputs)


class L2CarliniWagnerAttack(_Own):
    """The l2 attack of Carlini & Wagner (2017), as `tsrfast.attacks.CW`."""

    distance = l2

    def __init__(
        self,
        binary_search_steps: int = 9,
        steps: int = 10000,
        stepsize: float = 1e-2,
        confidence: float = 0,
        initial_const: float = 1e-3,
        abort_early: bool = True,
    ) -> None:
        self.binary_search_steps = binary_search_steps
        self.steps = steps
        self.stepsize = stepsize
        self.confidence = confidence
        self.initial_const = initial_const
        self.abort_early = abort_early

    def _attack(self, targeted: bool, common: dict[str, Any]) -> attacks.Attack:
        return attacks.CW(
            c=self.initial_const, kappa=self.confidence, steps=self.steps, lr=self.stepsize,
            binary_search_steps=self.binary_search_steps, abort_early=may_leave(self.abort_early, self.steps), targeted=targeted, **common,
        )  # fmt: skip


class L2DeepFoolAttack(_Own):
    """DeepFool (Moosavi-Dezfooli et al. 2016), as `tsrfast.attacks.DeepFool`; untargeted.

    Either `loss` gives the same steps: the logarithms of the probabilities differ by what the logits do.
    """

    distance = l2

    def __init__(self, *, steps: int = 50, candidates: int | None = 10, overshoot: float = 0.02, loss: str = "logits") -> None:
        self.steps = steps
        self.candidates = candidates
        self.overshoot = overshoot
        self.loss = loss

    def _attack(self, targeted: bool, common: dict[str, Any]) -> attacks.Attack:
        if self.loss not in ("logits", "crossentropy"):
            raise unknown("loss", self.loss, ("logits", "crossentropy"))
        if targeted:
            raise NotCovered("tsrfast.compat.foolbox: criterion must be Misclassification for DeepFool, got targets")
        return attacks.DeepFool(steps=self.steps, candidates=self.candidates, overshoot=self.overshoot, **common)


class EADAttack(_Own):
    """The elastic-net attack (Chen et al. 2018), as `tsrfast.attacks.EAD`."""

    distance = l1

    def __init__(
        self,
        binary_search_steps: int = 9,
        steps: int = 10000,
        initial_stepsize: float = 1e-2,
        confidence: float = 0.0,
        initial_const: float = 1e-3,
        regularization: float = 1e-2,
        decision_rule: str = "EN",
        abort_early: bool = True,
    ) -> None:
        if decision_rule not in ("EN", "L1"):
            raise unknown("decision_rule", decision_rule, ("EN", "L1"))
        self.binary_search_steps = binary_search_steps
        self.steps = steps
        self.confidence = confidence
        self.initial_stepsize = initial_stepsize
        self.regularization = regularization
        self.initial_const = initial_const
        self.abort_early = abort_early
        self.decision_rule = decision_rule

    def _attack(self, targeted: bool, common: dict[str, Any]) -> attacks.Attack:
        return attacks.EAD(
            c=self.initial_const, kappa=self.confidence, steps=self.steps, lr=self.initial_stepsize,
            binary_search_steps=self.binary_search_steps, abort_early=may_leave(self.abort_early, self.steps), beta=self.regularization,
            decision_rule=self.decision_rule.lower(), targeted=targeted, **common,
        )  # fmt: skip
