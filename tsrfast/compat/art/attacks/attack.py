"""The base class of ART's attacks: parameters that can be set, NumPy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tsrfast import attacks
from tsrfast.compat.art.estimators.classification import PyTorchClassifier
from tsrfast.errors import InputError


class Attack:
    """Base of all attacks.

    Args:
        estimator: the classifier.
        summary_writer: False: nothing is written for TensorBoard.
    """

    attack_params: ClassVar[list[str]] = []

    def __init__(self, estimator: PyTorchClassifier, summary_writer: Any = False) -> None:
        if not isinstance(estimator, PyTorchClassifier):
            raise InputError(
                f"tsrfast.compat.art: estimator must be a PyTorchClassifier of the drop-in, got {type(estimator).__name__}"
            )
        if summary_writer is not False:
            raise InputError(
                f"tsrfast.compat.art: summary_writer must be False, got {summary_writer!r}: nothing is written here"
            )
        self._estimator = estimator

    @property
    def estimator(self) -> PyTorchClassifier:
        return self._estimator

    @property
    def summary_writer(self) -> None:
        return None

    def set_params(self, **kwargs: Any) -> None:
        """Set attributes among `attack_params`, and check them.

        Raises:
            ValueError: another attribute.
        """
        for key, value in kwargs.items():
            if key not in self.attack_params or key == "summary_writer":
                raise ValueError(f'The attribute "{key}" cannot be set for this attack.')
            setattr(self, key, value)
        self._check_params()

    def _check_params(self) -> None:
        pass

    def __repr__(self) -> str:
        shown = "".join(f"{p}={getattr(self, p)}, " for p in self.attack_params if hasattr(self, p))
        return f"{type(self).__name__}({shown})"


class EvasionAttack(Attack):
    """Base of the attacks on inputs: users' own define `generate`."""

    batch_size: int = 1
    _targeted = False

    @property
    def targeted(self) -> bool:
        return self._targeted

    @targeted.setter
    def targeted(self, targeted: bool) -> None:
        self._targeted = targeted

    def generate(self, x: Any, y: Any = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images.

        Args:
            x: images ``[N, ...]`` within the estimator's `clip_values`; real numbers of any type, taken as float32.
            y: labels ``[N]`` or one-hot; None: what the estimator predicts. Targeted: the targets, which must be given.
            mask: for attacks that take one: what broadcasts to `x`; nothing is changed where it is 0.

        Returns:
            float32, like x.
        """
        raise NotImplementedError

    def _given(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Images and labels as tensors on the estimator's device."""
        images = self.estimator.images(x)
        if y is not None:
            return images, self.estimator.labels(y, len(images))
        if self.targeted:
            raise ValueError("Target labels `y` need to be provided for a targeted attack.")
        return images, self._answers(images)

    def _answers(self, x: Tensor) -> Tensor:
        """Predicted classes, int64 ``[N]``."""
        return torch.from_numpy(self.estimator.predict(x.cpu().numpy()).argmax(1)).to(x.device)

    def _parts(self, n: int, least: int = 1) -> Iterator[slice]:
        size = max(self.batch_size, least)
        for first in range(0, n, size):
            yield slice(first, min(first + size, n))


# Images at a time, at least: ART's default for some attacks is 1, and results do not depend on it.
_LEAST = 64


class Own(EvasionAttack):
    """An attack that is one of `tsrfast.attacks`: subclasses define `_own`."""

    def _own(self, **common: Any) -> attacks.Attack:
        """The attack; `common`: its box."""
        raise NotImplementedError

    def generate(self, x: Any, y: Any = None, **kwargs: Any) -> np.ndarray:
        no_more(kwargs)
        images, labels = self._given(x, y)
        lo, hi = self._box(images)
        own, out = self._own(lo=lo, hi=hi), images.clone()
        index = torch.arange(len(images), device=images.device)
        for part in self._parts(len(images), _LEAST):
            out[part] = own(self.estimator._network, images[part], labels[part], index=index[part])
        return out.cpu().numpy()

    def _box(self, images: Tensor) -> tuple[float, float]:
        return self.estimator.box


def no_more(kwargs: dict[str, Any], known: str = "x and y") -> None:
    """Arguments that nobody takes."""
    if kwargs:
        raise InputError(
            f"tsrfast.compat.art: arguments of generate must be {known} for this attack, got {next(iter(kwargs))!r}"
        )


def named_norm(norm: Any, allowed: tuple[str, ...] = ("linf", "l2", "l1")) -> str:
    """ART's norm (``np.inf``, ``"inf"``, 1, 2) as `tsrfast.attacks` calls it.

    Raises:
        InputError: another norm (ART's gradient attacks take any p >= 1).
    """
    name = "linf" if norm == "inf" or norm == np.inf else {1: "l1", 2: "l2"}.get(norm)
    if name not in allowed:
        known = {"linf": 'np.inf, "inf"', "l2": "2", "l1": "1"}
        raise InputError(f"tsrfast.compat.art: norm must be {' or '.join(known[a] for a in allowed)}, got {norm!r}")
    return name


def check(condition: bool, message: str, kind: Callable[[str], Exception] = ValueError) -> None:
    """ART's own messages."""
    if not condition:
        raise kind(message)


def seed() -> int:
    """Of an attack with random numbers of its own: drawn from NumPy's generator, so that ``np.random.seed`` has its effect."""
    return int(np.random.randint(2**31 - 1))
