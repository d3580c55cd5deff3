"""ART's AutoAttack: attacks one after the other on the images that still stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tsrfast.compat.art.attacks.attack import EvasionAttack, check, named_norm
from tsrfast.compat.art.attacks.evasion.search import AutoProjectedGradientDescent, DeepFool, SquareAttack
from tsrfast.compat.art.estimators.classification import PyTorchClassifier

_WITHIN = 1e-4  # how much longer than eps a change may be, as a share: rounding


class AutoAttack(EvasionAttack):
    """An ensemble after Croce & Hein (2020). ART's is not their AutoAttack (`tsrfast.attacks.AutoAttack`): its list has no FAB.

    Args:
        estimator: the classifier.
        norm: ``np.inf``, ``"inf"``, 1 or 2.
        eps: radius.
        eps_step: handed to Auto-PGD.
        attacks: any attacks of this drop-in; None: Auto-PGD with cross-entropy and with the difference of logits ratio (5 starts each),
            DeepFool, and Square with 5 times 5000 proposals (not in l1, which it does not have).
        batch_size: images at a time.
        estimator_orig: says which images are classified rightly as they are; None: `estimator`.
        targeted: afterwards also those attacks that can aim, at every other class.
        parallel_pool_size: nothing runs in other processes.

    Attributes:
        best_attacks: after `generate`, for each image the position of the attack that was successful, -2 if it was misclassified as it is,
            -1 if it stands.
    """

    attack_params: ClassVar[list[str]] = [
        "norm", "eps", "eps_step", "attacks", "batch_size", "estimator_orig", "targeted",
    ]  # fmt: skip
    SAMPLE_DEFAULT = -1
    SAMPLE_MISCLASSIFIED = -2

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        eps: float = 0.3,
        eps_step: float = 0.1,
        attacks: Sequence[EvasionAttack] | None = None,
        batch_size: int = 32,
        estimator_orig: PyTorchClassifier | None = None,
        targeted: bool = False,
        parallel_pool_size: int = 0,
    ) -> None:
        super().__init__(estimator)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.batch_size = batch_size
        self.estimator_orig = estimator if estimator_orig is None else estimator_orig
        self._targeted = targeted
        self.parallel_pool_size = parallel_pool_size
        self.best_attacks = np.array([], dtype=np.int64)
        self._check_params()
        self.attacks = list(attacks) if attacks else self._standard()

    def _standard(self) -> list[EvasionAttack]:
        found: list[EvasionAttack] = [
            AutoProjectedGradientDescent(
                self.estimator, self.norm, self.eps, self.eps_step, batch_size=self.batch_size, loss_type=loss
            )
            for loss in ("cross_entropy", "difference_logits_ratio")
        ]
        found.append(DeepFool(self.estimator, epsilon=1e-3, batch_size=self.batch_size))
        if named_norm(self.norm) != "l1":
            found.append(SquareAttack(self.estimator, self.norm, max_iter=5000, eps=self.eps, nb_restarts=5))
        return found

    def _check_params(self) -> None:
        named_norm(self.norm)
        for name in ("eps", "eps_step"):
            value = getattr(self, name)
            check(
                isinstance(value, (int, float)) and value > 0,
                f"The argument {name} has to be either of type int or float and larger than zero.",
            )
        check(
            isinstance(self.batch_size, int) and self.batch_size > 0,
            "The argument batch_size has to be of type int and larger than zero.",
        )

    def generate(self, x: Any, y: Any = None, **kwargs: Any) -> np.ndarray:
        images = self.estimator.images(x)
        labels = self._answers(images) if y is None else self.estimator.labels(y, len(images))
        clean, truth = images.cpu().numpy(), labels.cpu().numpy()
        out = clean.copy()
        standing = self.estimator_orig.predict(clean).argmax(1) == truth
        self.best_attacks = np.where(standing, self.SAMPLE_DEFAULT, self.SAMPLE_MISCLASSIFIED)
        for number, attack in enumerate(self.attacks):
            if attack.targeted:
                attack.set_params(targeted=False)
            self._run(number, clean, truth, truth, out, kwargs)
        aiming = [k for k, attack in enumerate(self.attacks) if "targeted" in attack.attack_params] if self.targeted else []
        for number in aiming:
            self.attacks[number].set_params(targeted=True)
            try:
                for shift in range(1, self.estimator.nb_classes):
                    self._run(number, clean, truth, (truth + shift) % self.estimator.nb_classes, out, kwargs)
            finally:
                self.attacks[number].set_params(targeted=False)
        return out

    def _run(
        self, number: int, clean: np.ndarray, truth: np.ndarray, goal: np.ndarray, out: np.ndarray, kwargs: dict[str, Any]
    ) -> None:
        """One attack on the images that stand, to or from the labels of `goal`; what falls goes into `out` and `best_attacks`."""
        rows = (self.best_attacks == self.SAMPLE_DEFAULT).nonzero()[0]
        if not len(rows):
            return
        got = self.attacks[number].generate(clean[rows], goal[rows], **kwargs)
        length = np.linalg.norm(
            (got - clean[rows]).reshape(len(rows), -1), axis=1, ord=np.inf if self.norm == "inf" else float(self.norm)
        )
        fallen = (self.estimator.predict(got).argmax(1) != truth[rows]) & ((1 - _WITHIN) * length <= self.eps)
        out[rows[fallen]] = got[fallen]
        self.best_attacks[rows[fallen]] = number

    def __repr__(self) -> str:
        lines = [f"image {i + 1}: {self.attacks[k] if k >= 0 else 'n/a'}" for i, k in enumerate(self.best_attacks.tolist())]
        head = f"AutoAttack(targeted={self.targeted}, parallel_pool_size={self.parallel_pool_size}, num_attacks={len(self.attacks)})"
        return "\n".join([head, "BestAttacks:", *lines])
