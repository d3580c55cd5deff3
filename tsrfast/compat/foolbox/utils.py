"""Measuring a model."""

from __future__ import annotations

from typing import Any, NoReturn

from tsrfast.compat._covered import NotCovered
from tsrfast.compat.foolbox._tensors import raw
from tsrfast.compat.foolbox.models import Model


def accuracy(fmodel: Model, inputs: Any, labels: Any) -> float:
    """Share of the images that the model classifies as labelled."""
    return (raw(fmodel(inputs)).argmax(-1) == raw(labels)).float().mean().item()


def samples(*args: Any, **kwargs: Any) -> NoReturn:
    """foolbox's example images come with foolbox."""
    raise NotCovered("tsrfast.compat.foolbox: samples() must be called from foolbox, whose files the images are")
