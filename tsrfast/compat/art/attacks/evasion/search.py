"""ART's attacks that are not gradient steps within a ball, as attacks of `tsrfast.attacks`."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tsrfast import attacks
from tsrfast.compat._covered import NotCovered
from tsrfast.compat.art.attacks.attack import Own, check, named_norm, seed
from tsrfast.compat.art.estimators.classification import PyTorchClassifier
from tsrfast.errors import unknown


class CarliniL2Method(Own):
    """The l2 attack of Carlini & Wagner (2017), as `tsrfast.attacks.CW`.

    Args:
        classifier: the estimator.
        confidence: in logits.
        targeted: `y` are targets.
        learning_rate: of Adam (ART searches along a line instead).
        binary_search_steps: constants that are tried.
        max_iter: iterations for each constant. Each stands for as many steps of Adam as ART may halve or double its
            step, whichever is more: 5.
        initial_const: the first constant.
        max_halving, max_doubling: see `max_iter`.
        batch_size: images at a time, 64 at least.
        verbose: no bars are drawn.
    """

    attack_params: ClassVar[list[str]] = [
        "confidence", "targeted", "learning_rate", "max_iter", "binary_search_steps", "initial_const", "max_halving", "max_doubling",
        "batch_size", "verbose",
    ]  # fmt: skip

    def __init__(
        self,
        classifier: PyTorchClassifier,
        confidence: float = 0.0,
        targeted: bool = False,
        learning_rate: float = 0.01,
        binary_search_steps: int = 10,
        max_iter: int = 10,
        initial_const: float = 0.01,
        max_halving: int = 5,
        max_doubling: int = 5,
        batch_size: int = 1,
        verbose: bool = True,
    ) -> None:
        super().__init__(classifier)
        self.confidence = confidence
        self._targeted = targeted
        self.learning_rate = learning_rate
        self.binary_search_steps = binary_search_steps
        self.max_iter = max_iter
        self.initial_const = initial_const
        self.max_halving = max_halving
        self.max_doubling = max_doubling
        self.batch_size = batch_size
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        for name, least in (
            ("binary_search_steps", 1),
            ("max_iter", 0),
            ("max_halving", 1),
            ("max_doubling", 1),
            ("batch_size", 1),
        ):
            _count(name, getattr(self, name), least)

    def _own(self, **common: Any) -> attacks.Attack:
        return attacks.CW(
            c=self.initial_const, kappa=self.confidence, steps=self.max_iter * max(self.max_halving, self.max_doubling),
            lr=self.learning_rate, binary_search_steps=self.binary_search_steps, targeted=self.targeted, **common,
        )  # fmt: skip

    def _box(self, images: Tensor) -> tuple[float, float]:
        return _finite(self.estimator, images)


class ElasticNet(Own):
    """EAD (Chen et al. 2018), as `tsrfast.attacks.EAD`.

    Args:
        classifier, confidence, targeted, binary_search_steps, initial_const, batch_size, verbose: as in `CarliniL2Method`.
        learning_rate: length of the first step.
        max_iter: steps for each constant.
        beta: weight of the l1 part.
        decision_rule: ``EN`` or ``L1`` (ART's ``L2`` is not covered).
    """

    attack_params: ClassVar[list[str]] = [
        "confidence", "targeted", "learning_rate", "max_iter", "beta", "binary_search_steps", "initial_const", "batch_size",
        "decision_rule", "verbose",
    ]  # fmt: skip

    def __init__(
        self,
        classifier: PyTorchClassifier,
        confidence: float = 0.0,
        targeted: bool = False,
        learning_rate: float = 1e-2,
        binary_search_steps: int = 9,
        max_iter: int = 100,
        beta: float = 1e-3,
        initial_const: float = 1e-3,
        batch_size: int = 1,
        decision_rule: str = "EN",
        verbose: bool = True,
    ) -> None:
        super().__init__(classifier)
        self.confidence = confidence
        self._targeted = targeted
        self.learning_rate = learning_rate
        self.binary_search_steps = binary_search_steps
        self.max_iter = max_iter
        self.beta = beta
        self.initial_const = initial_const
        self.batch_size = batch_size
        self.decision_rule = decision_rule
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        for name, least in (("binary_search_steps", 1), ("max_iter", 1), ("batch_size", 1)):
            _count(name, getattr(self, name), least)
        if self.decision_rule == "L2":
            raise NotCovered("tsrfast.compat.art: decision_rule must be 'EN' or 'L1', got 'L2' (nearest here: CarliniL2Method)")
        if self.decision_rule not in ("EN", "L1"):
            raise unknown("decision_rule", self.decision_rule, ("EN", "L1"))

    def _own(self, **common: Any) -> attacks.Attack:
        return attacks.EAD(
            c=self.initial_const, kappa=self.confidence, steps=self.max_iter, lr=self.learning_rate,
            binary_search_steps=self.binary_search_steps, beta=self.beta, decision_rule=self.decision_rule.lower(),
            targeted=self.targeted, **common,
        )  # fmt: skip

    def _box(self, images: Tensor) -> tuple[float, float]:
        return _finite(self.estimator, images)


class DeepFool(Own):
    """DeepFool (Moosavi-Dezfooli et al. 2016), as `tsrfast.attacks.DeepFool`: away from what the model says, whatever `y` is.

    Args:
        classifier: the estimator.
        max_iter: the most steps.
        epsilon: how much further than the boundary, as a share.
        nb_grads: classes that are considered.
        batch_size: images at a time, 64 at least.
        verbose: no bars are drawn.
    """

    attack_params: ClassVar[list[str]] = ["max_iter", "epsilon", "nb_grads", "batch_size", "verbose"]

    def __init__(
        self,
        classifier: PyTorchClassifier,
        max_iter: int = 100,
        epsilon: float = 1e-6,
        nb_grads: int = 10,
        batch_size: int = 1,
        verbose: bool = True,
    ) -> None:
        super().__init__(classifier)
        self.max_iter = max_iter
        self.epsilon = epsilon
        self.nb_grads = nb_grads
        self.batch_size = batch_size
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        for name in ("max_iter", "nb_grads", "batch_size"):
            _count(name, getattr(self, name), 1)
        check(self.epsilon >= 0, "The overshoot parameter must not be negative.")

    def _given(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        images = self.estimator.images(x)
        return images, self._answers(images)

    def _own(self, **common: Any) -> attacks.Attack:
        return attacks.DeepFool(steps=self.max_iter, candidates=max(self.nb_grads, 2), overshoot=self.epsilon, **common)


_LOSSES = (None, "cross_entropy", "difference_logits_ratio")


class AutoProjectedGradientDescent(Own):
    """Auto-PGD (Croce & Hein 2020), as `tsrfast.attacks.APGD`.

    Args:
        estimator: the classifier.
        norm: ``np.inf``, ``"inf"``, 1 or 2.
        eps: radius.
        eps_step: checked, not used: the first step is as long as the ball is wide, as the authors have it.
        max_iter: steps of a start.
        targeted: `y` are targets.
        nb_random_init: random starts, each for the images that still stand.
        batch_size: images at a time, 64 at least.
        loss_type: None (the estimator's loss), ``cross_entropy`` or ``difference_logits_ratio``.
        verbose: no bars are drawn.
    """

    attack_params: ClassVar[list[str]] = [
        "norm", "eps", "eps_step", "max_iter", "targeted", "nb_random_init", "batch_size", "loss_type", "verbose",
    ]  # fmt: skip

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        eps: float = 0.3,
        eps_step: float = 0.1,
        max_iter: int = 100,
        targeted: bool = False,
        nb_random_init: int = 5,
        batch_size: int = 32,
        loss_type: str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(estimator)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.max_iter = max_iter
        self._targeted = targeted
        self.nb_random_init = nb_random_init
        self.batch_size = batch_size
        self.loss_type = loss_type
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        named_norm(self.norm)
        _positive("eps", self.eps)
        _positive("eps_step", self.eps_step)
        for name in ("max_iter", "nb_random_init", "batch_size"):
            _count(name, getattr(self, name), 1)
        check(isinstance(self.targeted, bool), "The argument targeted has to be of bool.")
        check(self.loss_type in _LOSSES, f"The argument loss_type has to be one of {_LOSSES}, got {self.loss_type!r}.")

    def _own(self, **common: Any) -> attacks.Attack:
        losses: dict[str | None, str | attacks.Loss] = {"cross_entropy": "cross_entropy", "difference_logits_ratio": "dlr"}
        loss = self.estimator.attack_loss() if self.loss_type is None else losses[self.loss_type]
        return attacks.APGD(
            norm=named_norm(self.norm), eps=self.eps, steps=self.max_iter, restarts=self.nb_random_init, keep="last", seed=seed(),
            loss=loss, targeted=self.targeted, **common,
        )  # fmt: skip


class SquareAttack(Own):
    """Square Attack (Andriushchenko et al. 2020), as `tsrfast.attacks.Square`.

    Args:
        estimator: the classifier, with `channels_first`.
        norm: ``np.inf``, ``"inf"`` or 2.
        adv_criterion, loss: None: misclassification and the margin.
        max_iter: proposals of a start.
        eps: radius.
        p_init: share of pixels in the first square.
        nb_restarts: starts, each for the images that still stand.
        batch_size: images at a time, 64 at least.
        verbose: no bars are drawn.
    """

    attack_params: ClassVar[list[str]] = [
        "norm",
        "adv_criterion",
        "loss",
        "max_iter",
        "eps",
        "p_init",
        "nb_restarts",
        "batch_size",
        "verbose",
    ]

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        adv_criterion: Any = None,
        loss: Any = None,
        max_iter: int = 100,
        eps: float = 0.3,
        p_init: float = 0.8,
        nb_restarts: int = 1,
        batch_size: int = 128,
        verbose: bool = True,
    ) -> None:
        super().__init__(estimator)
        self.norm = norm
        self.adv_criterion = adv_criterion
        self.loss = loss
        self.max_iter = max_iter
        self.eps = eps
        self.p_init = p_init
        self.nb_restarts = nb_restarts
        self.batch_size = batch_size
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        named_norm(self.norm, ("linf", "l2"))
        _positive("eps", self.eps)
        for name in ("max_iter", "nb_restarts", "batch_size"):
            _count(name, getattr(self, name), 1)
        for name in ("adv_criterion", "loss"):
            if getattr(self, name) is not None:
                raise NotCovered(
                    f"tsrfast.compat.art: {name} must be None for SquareAttack: it takes misclassification and the margin"
                )
        if not self.estimator.channels_first:
            raise NotCovered("tsrfast.compat.art: channels_first must be True for SquareAttack")

    def _own(self, **common: Any) -> attacks.Attack:
        return attacks.Square(
            norm=named_norm(self.norm), eps=self.eps, queries=self.max_iter, p_init=self.p_init, restarts=self.nb_restarts,
            seed=seed(), **common,
        )  # fmt: skip


def _count(name: str, value: Any, least: int) -> None:
    check(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"The argument `{name}` has to be an integer of at least {least}, got {value!r}.",
    )


def _positive(name: str, value: Any) -> None:
    check(
        isinstance(value, (int, float)) and value > 0,
        f"The argument {name} has to be either of type int or float and larger than zero, got {value!r}.",
    )


def _finite(estimator: PyTorchClassifier, images: Tensor) -> tuple[float, float]:
    """The estimator's box, else that of the images."""
    if estimator.clip_values is not None or not images.numel():
        return estimator.box
    return images.min().item(), images.max().item()
