"""How far an image has been moved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsrfast.compat.foolbox._tensors import like, raw


class Distance:
    """Base of all distances: a call gives one value an image, `clip_perturbation` shortens to a length."""

    def __call__(self, reference: Any, perturbed: Any) -> Any:
        raise NotImplementedError

    def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
        raise NotImplementedError


class LpDistance(Distance):
    """The p-norm of the difference."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __repr__(self) -> str:
        return f"LpDistance({self.p})"

    def __str__(self) -> str:
        return f"L{self.p} distance"

    def __call__(self, references: Any, perturbed: Any) -> Any:
        x = raw(references)
        return like(_norm(raw(perturbed) - x, self.p), references)

    def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
        """Images as `perturbed`, at most `epsilon` from `references`.

        Raises:
            NotImplementedError: p is 0 and an image is further away.
        """
        x = raw(references)
        p = raw(perturbed) - x
        if self.p == math.inf:
            return like(x + p.clamp(-epsilon, epsilon), references)
        factor = (epsilon / _norm(p, self.p).clamp_min(1e-12)).clamp_max(1)
        if self.p == 0:
            if bool((factor == 1).all()):
                return perturbed
            raise NotImplementedError("reducing L0 norms not yet supported")
        return like(x + factor.reshape(-1, *[1] * (p.ndim - 1)) * p, references)


def _norm(t: Tensor, p: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(t.flatten(1), ord=p, dim=1)
    return length


l0 = LpDistance(0)
l1 = LpDistance(1)
l2 = LpDistance(2)
linf = LpDistance(math.inf)
