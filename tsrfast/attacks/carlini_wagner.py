"""The l2 attack of Carlini & Wagner (S&P 2017): the smallest change that is misclassified, by Adam in the space of arctanh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.eager import Evaluation, evaluate
from tsrfast.attacks.loop import Attempt, Batch, Best, of_image, select
from tsrfast.attacks.losses import Margin, wrong
from tsrfast.attacks.threat import Threat, check_count, check_radius
from tsrfast.errors import InputError

_INSIDE = 1 - 1e-6  # arctanh of a pixel at the end of the box would be infinite
_PROGRESS = 0.9999  # an image goes on where its cost fell below this share of what it was
_BETA = (0.9, 0.999)  # Adam
_EPS = 1e-8
_C_MAX = 1e10  # of an image that no c was large enough for


@dataclass(frozen=True, eq=False)
class CW(Attack):
    """Minimises |x' - x|_2^2 + c max(kappa - margin(x'), 0), the constant c of each image found by binary search.

    The margin is max_{k != y} z_k - z_y (targeted: its negative). Every image has its own c, state of Adam and early abort, so its result
    does not depend on its batch. Returned is the nearest of all iterates that reach the confidence; where none does, and for what reaches
    it as it is, the image itself, unchanged. As in every implementation, pixels at the ends of the box hardly move (tanh is flat there).

    Args:
        c: first constant, a number or ``[N]``; it grows tenfold until an image falls.
        kappa: confidence, in logits, >= 0.
        steps: evaluations for each c; the step after the last is not taken.
        lr: step size of Adam.
        binary_search_steps: how many c are tried; from 10 on the last is once more the smallest that was successful.
        abort_early: for each c, an image ends when a tenth of the steps brought less than 0.01 % (looked at 10 times).
        targeted: `y` are targets to be reached.
        lo, hi: the pixel box, finite.
        engine: as in `PGD`; the chain's path computes logits and gradients in native code.

    Raises:
        InputError: a value that is not allowed.
    """

    c: float | Tensor = 1e-3
    kappa: float = 0.0
    steps: int = 1000
    lr: float = 0.01
    binary_search_steps: int = 9
    abort_early: bool = True
    targeted: bool = False
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._terms()

    def _terms(self) -> Terms:
        for name, value in (("c", self.c), ("kappa", self.kappa), ("lr", self.lr)):
            check_radius(name, value)
        check_count("steps", self.steps, 0)
        check_count("binary_search_steps", self.binary_search_steps, 1)
        if not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            raise InputError(f"tsrfast.attacks: lo and hi must be finite for CW, got lo={self.lo}, hi={self.hi}")
        threat = Threat("l2", math.inf, self.lo, self.hi)
        return Terms(threat, Margin(), self.targeted, self.steps * self.binary_search_steps, self.engine, {"c": self.c})

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        clean = evaluate(network, Margin(), self.targeted, x0, y, gradient=False, first=True)
        best = Best(x0.clone(), clean.loss.clone(), clean.adversarial)
        exact = torch.promote_types(x0.dtype, torch.float32)  # Adam's averages of squares vanish in half precision
        distance = torch.zeros(len(x0), dtype=exact, device=x0.device).masked_fill_(~self._reached(clean), torch.inf)
        rows = (distance > 0).nonzero().squeeze(1)
        search = _Search(network, best, distance, torch.zeros_like(index), torch.ones_like(index))
        if len(rows):
            whole = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._terms().threat, 0.0)
            self._search(search, whole.only(rows))
        return Attempt(best, search.bad, search.queries)

    def _search(self, search: _Search, batch: Batch) -> None:
        """Binary search for the constant of each image."""
        c = torch.as_tensor(of_image(self.c, batch.rows), dtype=search.distance.dtype, device=batch.x0.device)
        c = c.expand(len(batch.rows)).clone()
        lower, upper = torch.zeros_like(c), torch.full_like(c, torch.inf)
        for number in range(self.binary_search_steps):
            if number >= 9 and number == self.binary_search_steps - 1:
                c = upper.clamp(max=_C_MAX)
            found = self._descend(search, batch, c)
            upper = torch.where(found, torch.minimum(upper, c), upper)
            lower = torch.where(found, lower, torch.maximum(lower, c))
            c = torch.where(upper.isinf(), c * 10, (lower + upper) / 2)

    def _descend(self, search: _Search, batch: Batch, c: Tensor) -> Tensor:
        """Adam from the images themselves; bool ``[n]``, which reached the confidence."""
        found = torch.zeros_like(c, dtype=torch.bool)
        every, half = max(self.steps // 10, 1), (self.hi - self.lo) / 2
        own = torch.arange(len(c), device=c.device)  # which of `found` the images belong to
        w0 = torch.atanh(((batch.x0.to(c.dtype) - self.lo) / half - 1) * _INSIDE)
        w, mean, square = w0, torch.zeros_like(w0), torch.zeros_like(w0)
        before = torch.full_like(c, torch.inf)
        for step in range(self.steps):
            tanh = w.tanh()
            x = (self.lo + (tanh + 1) * half).clamp(self.lo, self.hi).to(batch.x0.dtype)
            at = evaluate(search.network, Margin(), self.targeted, x, batch.y, gradient=True, first=False)
            search.queries[batch.rows] += 1
            delta = x.to(c.dtype) - batch.x0
            squared = delta.flatten(1).square().sum(1)
            reached = self._reached(at)
            found[own] |= reached
            nearer = reached & (squared.sqrt() < search.distance[batch.rows])
            search.best.take(nearer, at.candidate, batch.rows)
            search.distance[batch.rows[nearer]] = squared.sqrt()[nearer]
            if step == self.steps - 1:
                break
            lack = (self.kappa + (at.loss.detach() if self.targeted else -at.loss.detach())).to(c.dtype).clamp_min(0)
            gradient = 2 * delta
            if bool((lack > 0).any()):
                pull = torch.where(lack > 0, c if self.targeted else -c, 0.0).reshape(-1, *[1] * (x.ndim - 1))
                g = at.gradient().to(c.dtype)
                bad = ~g.isfinite()
                search.bad[batch.rows] += bad.flatten(1).sum(1)
                gradient = gradient + pull * g.masked_fill(bad, 0)
            gradient = gradient * (1 - tanh.square()) * half
            if self.abort_early and step % every == 0:
                cost = squared + c * lack
                stalled = cost > before * _PROGRESS
                before = cost
                if bool(stalled.any()):
                    on = (~stalled).nonzero().squeeze(1)
                    if not len(on):
                        break
                    batch, own, c, before = batch.only(on), own[on], c[on], before[on]
                    w, mean, square, gradient = (select(t, on) for t in (w, mean, square, gradient))
            mean = _BETA[0] * mean + (1 - _BETA[0]) * gradient
            square = _BETA[1] * square + (1 - _BETA[1]) * gradient.square()
            scale = square.sqrt() / math.sqrt(1 - _BETA[1] ** (step + 1)) + _EPS
            w = w - self.lr / (1 - _BETA[0] ** (step + 1)) * mean / scale
        return found

    def _reached(self, at: Evaluation) -> Tensor:
        """bool ``[n]``: the model's answer is wrong (targeted: the target) by more than kappa."""
        label = at.answer[:, None]
        margin = torch.full_like(label, -self.kappa if self.targeted else self.kappa, dtype=at.logits.dtype)
        return wrong(at.logits.detach().scatter_add(1, label, margin), at.answer) ^ self.targeted


@dataclass(frozen=True, eq=False)
class _Search:
    """What is known of each image of the call: the best, its distance (inf: none), NaN gradient entries, forward passes."""

    network: nn.Module
    best: Best
    distance: Tensor
    bad: Tensor
    queries: Tensor
