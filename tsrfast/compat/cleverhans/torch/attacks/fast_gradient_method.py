"""One gradient step (Goodfellow et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from tsrfast.compat._covered import not_covered
from tsrfast.compat.cleverhans.torch._running import check_bounds, run
from tsrfast.compat.cleverhans.torch.attacks import HAS


def fast_gradient_method(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    norm: float,
    clip_min: float | None = None,
    clip_max: float | None = None,
    y: Tensor | None = None,
    targeted: bool = False,
    sanity_checks: bool = False,
) -> Tensor:
    """As ``cleverhans.torch.attacks.fast_gradient_method``; differences: `tsrfast.compat.cleverhans`.

    Args:
        model_fn: module or function from images to logits.
        x: images ``[N, ...]``, floating point.
        eps: length of the step.
        norm: ``np.inf`` or 2, in which the step is that long.
        clip_min, clip_max: both, or none.
        y: int64 ``[N]`` labels, or targets; None: the model's predictions.
        targeted: towards `y`.
        sanity_checks: check that `x` is within the bounds.

    Returns:
        New images as `x`, detached.

    Raises:
        ValueError: a value that is not allowed.
        AssertionError: a sanity check.
        NotCovered: ``norm=1``.
    """
    if norm not in (np.inf, 1, 2):
        raise ValueError(f"Norm order must be either np.inf, 1, or 2, got {norm} instead.")
    if norm == 1:
        raise not_covered("cleverhans", "fast_gradient_method(norm=1)", HAS, "tsrfast.attacks.PGD(norm='l1')")
    if eps < 0:
        raise ValueError(f"eps must be greater than or equal to 0, got {eps} instead")
    if eps == 0:
        return x.detach().clone()
    check_bounds(x, clip_min, clip_max, sanity_checks)
    return run(
        model_fn, x, y, norm=norm, eps=eps, eps_iter=eps, nb_iter=1, clip_min=clip_min, clip_max=clip_max, targeted=targeted
    )  # fmt: skip
