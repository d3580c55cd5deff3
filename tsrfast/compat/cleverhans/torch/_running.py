"""What the gradient attacks of cleverhans share: their checks, and the loop of `tsrfast.attacks.PGD` underneath."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tsrfast._modes import evaluating
from tsrfast.attacks import PGD
from tsrfast.compat._running import Start, as_module, ascend, checked_labels
from tsrfast.errors import InputError

Bound = float | None


def check_bounds(x: Tensor, clip_min: Bound, clip_max: Bound, sanity_checks: bool) -> None:
    """Both bounds or none, in order; with sanity checks the images are between them.

    Raises:
        InputError: a ``ValueError``.
        AssertionError: the images are not.
    """
    if (clip_min is None) != (clip_max is None):
        raise InputError(
            "tsrfast.compat.cleverhans: clip_min and clip_max must both be given or both be None (one-sided clipping is not "
            f"supported), got {clip_min} and {clip_max}"
        )
    if clip_min is None or clip_max is None:
        return
    if clip_min > clip_max:
        raise InputError(
            f"tsrfast.compat.cleverhans: clip_min must be less than or equal to clip_max, got clip_min={clip_min} and "
            f"clip_max={clip_max}"
        )
    if sanity_checks and not bool(((x >= clip_min) & (x <= clip_max)).all()):  # NaN is not
        raise AssertionError(
            f"x must be in [clip_min, clip_max] = [{clip_min}, {clip_max}], got values in [{x.min().item():g}, {x.max().item():g}]"
        )


def run(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None,
    *,
    norm: float,
    eps: float,
    eps_iter: float,
    nb_iter: int,
    clip_min: Bound,
    clip_max: Bound,
    targeted: bool,
    start: Start | None = None,
) -> Tensor:
    """Arguments as in `projected_gradient_descent`, checked but for the images."""
    model = as_module(model_fn)
    attack = PGD(
        norm="linf" if norm == np.inf else "l2", eps=eps, step_size=eps_iter, steps=nb_iter, random_start=False, targeted=targeted,
        lo=-math.inf if clip_min is None else clip_min, hi=math.inf if clip_max is None else clip_max,
    )  # fmt: skip
    attack._recipe().threat.check_images(x)
    with evaluating(model):
        if y is None:
            with torch.no_grad():
                y = model(x).argmax(1)
        return ascend(attack, model, x, checked_labels("cleverhans", y, x), start).x
