"""Classifiers of ART: that of PyTorch."""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import NotCovered
from tsrfast.compat.art.estimators.classification.pytorch import PyTorchClassifier

__all__ = ["PyTorchClassifier"]


def __getattr__(name: str) -> NoReturn:
    if name.endswith(("Classifier", "Classification", "Ensemble")):
        raise NotCovered(
            f"tsrfast.compat.art: the classifier must be PyTorchClassifier, got {name!r}: the drop-in has no other"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
