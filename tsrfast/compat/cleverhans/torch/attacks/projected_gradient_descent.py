"""Projected gradient descent (Madry et al. 2018), or without random start the basic iterative method (Kurakin et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tsrfast.compat.cleverhans.torch._running import check_bounds, run
from tsrfast.compat.cleverhans.torch.utils import clip_eta


def projected_gradient_descent(
    model_fn: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    eps_iter: float,
    nb_iter: int,
    norm: float,
    clip_min: float | None = None,
    clip_max: float | None = None,
    y: Tensor | None = None,
    targeted: bool = False,
    rand_init: bool = True,
    rand_minmax: float | None = None,
    sanity_checks: bool = True,
) -> Tensor:
    """As ``cleverhans.torch.attacks.projected_gradient_descent``; differences: `tsrfast.compat.cleverhans`.

    Args:
        model_fn, x, clip_min, clip_max, y, targeted: as in `fast_gradient_method`.
        eps: radius.
        eps_iter: length of a step, at most `eps`.
        nb_iter: number of steps.
        norm: ``np.inf`` or 2.
        rand_init: begin at x + uniform numbers in [-rand_minmax, rand_minmax], put into the ball.
        rand_minmax: None: `eps`.
        sanity_checks: check that `x` is within the bounds, and they wide enough for `eps`.

    Returns:
        New images as `x`, detached.

    Raises:
        ValueError: a value that is not allowed.
        AssertionError: a sanity check, or ``eps_iter > eps``.
        NotImplementedError: ``norm=1``.
    """
    if norm == 1:
        raise NotImplementedError(
            "projected_gradient_descent takes norm=np.inf or 2, as the original; tsrfast.attacks.PGD has l1"
        )
    if norm not in (np.inf, 2):
        raise ValueError("Norm order must be either np.inf or 2.")
    for name, value in (("eps", eps), ("eps_iter", eps_iter)):
        if value < 0:
            raise ValueError(f"{name} must be greater than or equal to 0, got {value} instead")
        if value == 0:
            return x.detach().clone()
    if eps_iter > eps:
        raise AssertionError(f"eps_iter must be <= eps, got {eps_iter} and {eps}")
    check_bounds(x, clip_min, clip_max, sanity_checks)
    if sanity_checks and norm == np.inf and clip_min is not None and clip_max is not None and eps + clip_min > clip_max:
        raise AssertionError(f"eps must be <= clip_max - clip_min, got {eps} and {clip_max - clip_min}")

    def start(x0: Tensor) -> Tensor:
        most = eps if rand_minmax is None else rand_minmax
        begin = x0 + clip_eta(torch.zeros_like(x0).uniform_(-most, most), norm, eps)
        return begin if clip_min is None else begin.clamp(clip_min, clip_max)

    return run(
        model_fn, x, y, norm=norm, eps=eps, eps_iter=eps_iter, nb_iter=nb_iter, clip_min=clip_min, clip_max=clip_max,
        targeted=targeted, start=start if rand_init else None,
    )  # fmt: skip
