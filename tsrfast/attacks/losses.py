"""What an attack increases: one value an image, and the right answer that an adversarial image makes the model miss.

Every loss is a small object called as ``loss(x, logits, y)`` with the iterate x (pixels in [0, 1]), the attacked model's logits
there, and the labels; the oracle losses of the teacher-student setting evaluate their teacher at the same x. Losses are summed,
not averaged, over images, so that an image's step does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.chain import Chain
from tsrfast.errors import InputError, unknown


class Loss:
    """Base of all losses: ``loss(x, logits, y) -> (value [N], answer)``.

    `answer` is what the model should say at x: labels ``[N]``, or another model's logits ``[N, classes]``. An image is adversarial
    where the model says otherwise (`wrong`).
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    """Whether `y` must be given."""

    def models(self) -> tuple[nn.Module | Chain, ...]:
        """Networks the loss evaluates besides the attacked one."""
        return ()

    def with_models(self, *models: nn.Module | Chain) -> Loss:
        """The same loss with other networks in the place of `models`."""
        return self

    def per_image(self) -> Mapping[str, Tensor]:
        """Fields that hold one value an image, ``[N]``, by name."""
        return {}

    def only(self, rows: Tensor) -> Loss:
        """The loss of the images at these positions, int64."""
        mine = {name: value[rows] for name, value in self.per_image().items()}
        return dataclasses.replace(self, **mine) if mine else self  # type: ignore[type-var]

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define __call__(x, logits, y)")


def _gap(logits: Tensor, label: Tensor) -> Tensor:
    """max_{k != label} z_k - z_label, several k that reach the maximum share the gradient."""
    here = label[:, None]
    return logits.scatter(1, here, -torch.inf).amax(1) - logits.gather(1, here).squeeze(1)


def wrong(logits: Tensor, answer: Tensor) -> Tensor:
    """Where the model's answer differs from `answer` (labels ``[N]`` or logits): bool ``[N]``. Ties go to the lowest class."""
    return logits.detach().argmax(1) != (answer.detach().argmax(1) if answer.ndim == 2 else answer)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """CE(s(x'), y) (Madry et al. 2018). Adversarial: argmax s(x') != y."""

    name: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return F.cross_entropy(logits, y, reduction="none"), y


@dataclass(frozen=True)
class Margin(Loss):
    """max_{k != y} s_k - s_y, the linf form of Carlini & Wagner (2017). Adversarial: argmax s(x') != y.

    Args:
        least, most: bounds of the value; no gradient beyond them. An attack that is confident enough at `most` drives no further (a
            targeted one at `least`).

    Raises:
        InputError: not least <= most.
    """

    name: ClassVar[str] = "margin"
    needs_labels: ClassVar[bool] = True

    least: float = -math.inf
    most: float = math.inf

    def __post_init__(self) -> None:
        if not self.least <= self.most:
            raise InputError(f"tsrfast.attacks.Margin: least must be <= most, got least={self.least}, most={self.most}")

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.least) or math.isfinite(self.most)

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        gap = _gap(logits, y)
        return gap.clamp(self.least, self.most) if self.bounded else gap, y


@dataclass(frozen=True)
class DLR(Loss):
    """The difference of logits ratio (Croce & Hein 2020, eq. 6): -(s_y - max_{k != y} s_k) / (s_1st - s_3rd), of the sorted logits.

    Invariant to shifting and scaling of the logits, so that it drives where cross-entropy's gradient vanishes. Adversarial:
    argmax s(x') != y. Called on fewer than 3 classes: InputError. No gradient where y is the third class (as defined).
    """

    name: ClassVar[str] = "dlr"
    needs_labels: ClassVar[bool] = True

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        _check_classes(self, logits, 3)
        ordered, order = logits.sort(dim=1)
        first = (order[:, -1] == y).to(logits.dtype)
        here = logits.gather(1, y[:, None]).squeeze(1)
        # Operation by operation the authors' code: gradients are the same bits.
        gap = here - ordered[:, -2] * first - ordered[:, -1] * (1.0 - first)
        return -gap / (ordered[:, -1] - ordered[:, -3] + 1e-12), y


@dataclass(frozen=True, eq=False)
class TargetedDLR(Loss):
    """The targeted difference of logits ratio (Croce & Hein 2020, eq. 7): -(s_y - s_t) / (s_1st - (s_3rd + s_4th) / 2).

    Increased by untargeted attacks with y the true labels: any other answer than y is adversarial, t is only the way there. Called on
    fewer than 4 classes: InputError.

    Args:
        targets: t, int64 ``[N]``, one an image of the call, on its device.
    """

    name: ClassVar[str] = "targeted_dlr"
    needs_labels: ClassVar[bool] = True

    targets: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.targets, Tensor) or self.targets.dtype != torch.int64 or self.targets.ndim != 1:
            t = self.targets
            what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise InputError(f"tsrfast.attacks.TargetedDLR: targets must be int64 of shape [N], got {what}")

    def per_image(self) -> Mapping[str, Tensor]:
        return {"targets": self.targets}

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        _check_classes(self, logits, 4)
        ordered = logits.sort(dim=1)[0]
        here, there = (logits.gather(1, k[:, None]).squeeze(1) for k in (y, self.targets))
        return -(here - there) / (ordered[:, -1] - 0.5 * (ordered[:, -3] + ordered[:, -4]) + 1e-12), y


def _check_classes(loss: Loss, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise InputError(
            f"tsrfast.attacks: loss {loss.name!r} needs a model of at least {least} classes, got {logits.shape[1]}"
        )


@dataclass(frozen=True)
class _Oracle(Loss):
    """Losses against a teacher evaluated at the same x'. Adversarial: argmax s(x') != argmax t(x') (paper, section 5.4)."""

    teacher: nn.Module | Chain

    def models(self) -> tuple[nn.Module | Chain, ...]:
        return (self.teacher,)

    def with_models(self, *models: nn.Module | Chain) -> Loss:
        return dataclasses.replace(self, teacher=models[0])

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define value(student, teacher)")

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher = self.teacher(x)
        if teacher.shape != logits.shape:
            raise InputError(
                f"tsrfast.attacks: teacher must give the student's logits {tuple(logits.shape)}, got {tuple(teacher.shape)}"
            )
        return self.value(logits, teacher), teacher


@dataclass(frozen=True)
class OracleL2(_Oracle):
    """|s(x') - t(x')|^2, gradient through both networks: the oracle-adversarial example of the paper, eq. 3."""

    name: ClassVar[str] = "oracle_l2"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().sum(1)


@dataclass(frozen=True)
class OracleCrossEntropy(_Oracle):
    """CE(s(x'), argmax t(x')): the oracle's label of the adversarial image itself; the gradient goes through s only."""

    name: ClassVar[str] = "oracle_cross_entropy"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(student, teacher.detach().argmax(1), reduction="none")


@dataclass(frozen=True)
class OracleMargin(_Oracle):
    """max_{k != c} s_k - s_c at c = argmax t(x'): Carlini & Wagner's objective in the oracle setting (Table 1, row CW)."""

    name: ClassVar[str] = "oracle_margin"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _gap(student, teacher.detach().argmax(1))


@dataclass(frozen=True)
class OracleKL(_Oracle):
    """KL(softmax t(x') || softmax s(x')), gradient through both networks."""

    name: ClassVar[str] = "oracle_kl"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = teacher.log_softmax(1)
        return (t.exp() * (t - student.log_softmax(1))).sum(1)


@dataclass(frozen=True)
class OracleMaxDifference(_Oracle):
    """max_k |s_k(x') - t_k(x')|, gradient through both networks: the attack of the adapted CCAT (paper, section 5.6).

    The gradient is that of the one k which reaches the maximum, of several the lowest (`Tensor.max` along a dimension gives the first).
    """

    name: ClassVar[str] = "oracle_max_difference"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().max(1).values


BY_NAME: dict[str, Loss] = {loss.name: loss for loss in (CrossEntropy(), Margin(), DLR())}


def resolve(loss: str | Loss) -> Loss:
    """The loss of that name, or the object itself.

    Raises:
        InputError: unknown name, or something that is no loss.
    """
    if isinstance(loss, str):
        if loss not in BY_NAME:
            raise unknown("loss", loss, BY_NAME)
        return BY_NAME[loss]
    if not isinstance(loss, Loss):
        raise InputError(f"tsrfast.attacks: loss must be a name ({', '.join(BY_NAME)}) or a Loss, got {type(loss).__name__}")
    return loss
