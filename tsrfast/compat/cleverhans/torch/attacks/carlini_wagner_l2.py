"""Carlini & Wagner's l2 attack (2017)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsrfast._modes import evaluating
from tsrfast.attacks import CW
from tsrfast.compat._running import as_module


def carlini_wagner_l2(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    n_classes: int,
    y: Tensor | None = None,
    targeted: bool = False,
    lr: float = 5e-3,
    confidence: float = 0,
    clip_min: float = 0,
    clip_max: float = 1,
    initial_const: float = 1e-2,
    binary_search_steps: int = 5,
    max_iterations: int = 1000,
) -> Tensor:
    """As ``cleverhans.torch.attacks.carlini_wagner_l2``; differences: `tsrfast.compat.cleverhans`.

    Args:
        model_fn, y, targeted: as in `fast_gradient_method`.
        x: images in [clip_min, clip_max]; the original clips others.
        n_classes: not needed: the model says.
        lr, confidence, initial_const, binary_search_steps, max_iterations: `lr`, `kappa`, `c`, `binary_search_steps` and `steps` of
            `tsrfast.attacks.CW`.

    Returns:
        New images as `x`: the nearest that reach the confidence, else the images themselves.

    Raises:
        ValueError: a value that is not allowed.
    """
    model = as_module(model_fn)
    attack = CW(
        c=initial_const, kappa=confidence, steps=max_iterations, lr=lr, binary_search_steps=binary_search_steps, abort_early=False,
        targeted=targeted, lo=clip_min, hi=clip_max,
    )  # fmt: skip
    attack._terms().threat.check_images(x)
    if y is None:
        with evaluating(model), torch.no_grad():
            y = model(x).argmax(1)
    return attack(model, x, y)
