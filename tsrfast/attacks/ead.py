"""EAD (Chen et al., AAAI 2018): the smallest change in the elastic net of l1 and l2 that is misclassified, by shrinkage-thresholding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tsrfast.attacks.attack import Terms
from tsrfast.attacks.carlini_wagner import ConstantSearch, Search
from tsrfast.attacks.eager import evaluate
from tsrfast.attacks.loop import Batch, select
from tsrfast.attacks.losses import Margin
from tsrfast.attacks.threat import check_radius
from tsrfast.errors import unknown


@dataclass(frozen=True, eq=False)
class EAD(ConstantSearch):
    """Minimises beta |x' - x|_1 + |x' - x|_2^2 + c max(kappa - margin(x'), 0), the constant c of each image found by binary search.

    FISTA as in the authors' code and foolbox (paper, algorithm 1): a step of length lr sqrt(1 - k / steps) at the point y that momentum
    leads to, then every pixel that differs from x by at most beta becomes x, the others come nearer by beta. Every image has its own c
    and early abort. Returned is, of all iterates that reach the confidence, the nearest by `decision_rule`; where none does, and for what
    reaches it as it is, the image itself, unchanged.

    Args:
        c, kappa, binary_search_steps, targeted, lo, hi, engine: as in `CW`.
        steps: of each c; two forward passes each, at y and at x'.
        lr: length of the first step.
        abort_early: as in `CW`, by the cost at y without its l1 part.
        beta: weight of the l1 part, and the threshold, in pixel units.
        decision_rule: ``l1`` or ``en``, beta |x' - x|_1 + |x' - x|_2^2.

    Raises:
        InputError: a value that is not allowed.
    """

    beta: float = 1e-3
    decision_rule: str = "en"

    def _terms(self) -> Terms:
        check_radius("beta", self.beta, finite=True)
        if self.decision_rule not in ("l1", "en"):
            raise unknown("decision_rule", self.decision_rule, ("l1", "en"))
        return super()._terms()

    def _descend(self, search: Search, batch: Batch, c: Tensor) -> Tensor:
        """FISTA from the images themselves; bool ``[n]``, which reached the confidence."""
        found = torch.zeros_like(c, dtype=torch.bool)
        own = torch.arange(len(c), device=c.device)  # which of `found` the images belong to
        before = torch.full_like(c, torch.inf)
        x0 = batch.x0.to(c.dtype)
        x = y = x0
        for step in range(self.steps):
            at = evaluate(search.network, Margin(), self.targeted, y.to(batch.x0.dtype), batch.y, gradient=True, first=False)
            search.queries[batch.rows] += 1
            delta = y - x0
            lack, pull = self._pull(search, batch, at, c)
            last, x = x, self._shrink(y - self.lr * math.sqrt(1 - step / self.steps) * (2 * delta + pull), x0)
            on = self._progressing(step, delta.flatten(1).square().sum(1) + c * lack, before)
            if on is not None:
                if not len(on):
                    break
                batch, own, c, before = batch.only(on), own[on], c[on], before[on]
                x0, x, last = (select(t, on) for t in (x0, x, last))
            y = x + step / (step + 3) * (x - last)
            at = evaluate(search.network, Margin(), self.targeted, x.to(batch.x0.dtype), batch.y, gradient=False, first=False)
            search.queries[batch.rows] += 1
            reached = self._reached(at)
            found[own] |= reached
            search.offer(at, reached, self._distance(at.x.to(c.dtype) - x0), batch.rows)
        return found

    def _shrink(self, z: Tensor, x0: Tensor) -> Tensor:
        """The nearest point to z in the elastic net, within the box (paper, eq. 5)."""
        delta = z - x0
        nearer = torch.where(delta > self.beta, (z - self.beta).clamp_max(self.hi), (z + self.beta).clamp_min(self.lo))
        return torch.where(delta.abs() <= self.beta, x0, nearer)

    def _distance(self, delta: Tensor) -> Tensor:
        """``[n]``, of changes ``[n, ...]``, by the decision rule."""
        l1 = delta.flatten(1).abs().sum(1)
        return l1 if self.decision_rule == "l1" else self.beta * l1 + delta.flatten(1).square().sum(1)
