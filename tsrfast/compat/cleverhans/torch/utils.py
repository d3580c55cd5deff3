"""As ``cleverhans.torch.utils``, of which attacks of one's own use `clip_eta`."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from tsrfast.compat._covered import not_covered
from tsrfast.compat.cleverhans.torch.attacks import HAS

_MISSING = ("get_or_guess_labels", "optimize_linear", "zero_out_clipped_grads")


def clip_eta(eta: Tensor, norm: float, eps: float) -> Tensor:
    """Perturbations ``[N, ...]`` scaled (norm 2) or clamped (``np.inf``) into the ball of radius `eps`; a new tensor.

    Raises:
        ValueError: another norm.
        NotImplementedError: norm 1.
    """
    if norm not in (np.inf, 1, 2):
        raise ValueError("norm must be np.inf, 1, or 2.")
    if norm == 1:
        raise NotImplementedError("L1 clip is not implemented.")
    if norm == np.inf:
        return eta.clamp(-eps, eps)
    length = torch.linalg.vector_norm(eta, dim=tuple(range(1, eta.ndim)), keepdim=True).clamp_min(1e-6)
    return eta * (eps / length).clamp_max(1.0)


def __getattr__(name: str) -> NoReturn:
    if name in _MISSING:
        raise not_covered("cleverhans", name, HAS, "clip_eta")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
