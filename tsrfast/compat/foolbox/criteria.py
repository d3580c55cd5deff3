"""What counts as adversarial."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tsrfast.compat.foolbox._tensors import like, raw, shown


class Criterion:
    """Base of all criteria: ``criterion(perturbed, outputs)`` gives bool ``[N]``; `&` demands both."""

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        raise NotImplementedError

    def __and__(self, other: Criterion) -> Criterion:
        return _And(self, other)


class _And(Criterion):
    def __init__(self, a: Criterion, b: Criterion) -> None:
        self.a = a
        self.b = b

    def __repr__(self) -> str:
        return f"{self.a!r} & {self.b!r}"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        return like(raw(self.a(perturbed, outputs)) & raw(self.b(perturbed, outputs)), outputs)


class Misclassification(Criterion):
    """The predicted class differs from the label: `labels` ``[N]``, an attribute as hooks get tensors."""

    def __init__(self, labels: Any) -> None:
        self.labels = shown(raw(labels))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.labels!r})"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        return like(_classes(outputs, raw(self.labels)) != raw(self.labels), outputs)


class TargetedMisclassification(Criterion):
    """The predicted class is the target: `target_classes` ``[N]``, an attribute as hooks get tensors."""

    def __init__(self, target_classes: Any) -> None:
        self.target_classes = shown(raw(target_classes))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target_classes!r})"

    def __call__(self, perturbed: Any, outputs: Any) -> Any:
        return like(_classes(outputs, raw(self.target_classes)) == raw(self.target_classes), outputs)


def _classes(outputs: Any, labels: Tensor) -> Tensor:
    classes = raw(outputs).argmax(-1)
    if classes.shape != labels.shape:
        raise ValueError(f"expected labels of shape {tuple(classes.shape)}, got {tuple(labels.shape)}")
    return classes
