"""The attacks of Carlini & Wagner (S&P 2017): in l2 the smallest change that is misclassified, by Adam in the space of arctanh; in linf
their loss, followed by signed steps inside a ball."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.attack import Attack, LoopAttack, Terms
from tsrfast.attacks.eager import Evaluation, evaluate, finite
from tsrfast.attacks.loop import Attempt, Batch, Best, Recipe, of_image, select
from tsrfast.attacks.losses import Margin, wrong
from tsrfast.attacks.pgd import PGD
from tsrfast.attacks.threat import Threat, check_count, check_radius
from tsrfast.errors import InputError

_INSIDE = 1 - 1e-6  # arctanh of a pixel at the end of the box would be infinite
_PROGRESS = 0.9999  # an image goes on where its cost fell below this share of what it was
_BETA = (0.9, 0.999)  # Adam
_EPS = 1e-8
_C_MAX = 1e10  # of an image that no c was large enough for


@dataclass(frozen=True, eq=False)
class Search:
    """What is known of each image of the call: the best, its distance (inf: none), NaN gradient entries, forward passes."""

    network: nn.Module
    best: Best
    distance: Tensor
    bad: Tensor
    queries: Tensor

    def offer(self, at: Evaluation, reached: Tensor, distance: Tensor, rows: Tensor) -> None:
        """Iterates of the images at `rows`: those that reached the confidence nearer than any before are kept."""
        nearer = reached & (distance < self.distance[rows])
        self.best.take(nearer, at.candidate, rows)
        self.distance[rows[nearer]] = distance[nearer]


@dataclass(frozen=True, eq=False)
class ConstantSearch(Attack):
    """What attacks share that minimise a distance plus c max(kappa - margin(x'), 0), the constant c of each image found by binary search.

    A kind of distance defines `_descend`. The fields are described at `CW`.
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
        for name, value in (("c", self.c), ("lr", self.lr)):
            check_radius(name, value, finite=True)
        check_radius("kappa", self.kappa)
        check_count("steps", self.steps, 0)
        check_count("binary_search_steps", self.binary_search_steps, 1)
        if not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            raise InputError(
                f"tsrfast.attacks: lo and hi must be finite for {type(self).__name__}, got lo={self.lo}, hi={self.hi}"
            )
        threat = Threat("l2", math.inf, self.lo, self.hi)
        return Terms(threat, Margin(), self.targeted, self.steps * self.binary_search_steps, self.engine, {"c": self.c})

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        clean = evaluate(network, Margin(), self.targeted, x0, y, gradient=False, first=True)
        best = Best(x0.clone(), clean.loss.clone(), clean.adversarial)
        exact = torch.promote_types(x0.dtype, torch.float32)  # Adam's averages of squares vanish in half precision
        distance = torch.zeros(len(x0), dtype=exact, device=x0.device).masked_fill_(~self._reached(clean), torch.inf)
        rows = (distance > 0).nonzero().squeeze(1)
        search = Search(network, best, distance, torch.zeros_like(index), torch.ones_like(index))
        if len(rows):
            whole = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._terms().threat, 0.0)
            self._search(search, whole.only(rows))
        return Attempt(best, search.bad, search.queries)

    def _search(self, search: Search, batch: Batch) -> None:
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

    def _descend(self, search: Search, batch: Batch, c: Tensor) -> Tensor:
        """Minimise for these constants ``[n]`` from the images themselves; bool ``[n]``, which reached the confidence."""
        raise TypeError(f"{type(self).__name__} must define _descend(search, batch, c)")

    def _pull(self, search: Search, batch: Batch, at: Evaluation, c: Tensor) -> tuple[Tensor, Tensor]:
        """What an image lacks of the confidence ``[n]``, and the gradient of c times that, shaped as images, in c's dtype."""
        lack = (self.kappa + (at.loss.detach() if self.targeted else -at.loss.detach())).to(c.dtype).clamp_min(0)
        if not bool((lack > 0).any()):
            return lack, torch.zeros_like(at.x, dtype=c.dtype, requires_grad=False)
        pull = torch.where(lack > 0, c if self.targeted else -c, 0.0).reshape(-1, *[1] * (at.x.ndim - 1))
        g, bad = finite(at.gradient().to(c.dtype))
        search.bad[batch.rows] += bad
        return lack, pull * g

    def _progressing(self, step: int, cost: Tensor, before: Tensor) -> Tensor | None:
        """The positions, int64, of the images that go on, if it is time to ask and any ends."""
        if not self.abort_early or step % max(self.steps // 10, 1):
            return None
        stalled = cost > before * _PROGRESS
        before.copy_(cost)
        return (~stalled).nonzero().squeeze(1) if bool(stalled.any()) else None

    def _reached(self, at: Evaluation) -> Tensor:
        """bool ``[n]``: the model's answer is wrong (targeted: the target) by more than kappa."""
        label = at.answer[:, None]
        margin = torch.full_like(label, -self.kappa if self.targeted else self.kappa, dtype=at.logits.dtype)
        return wrong(at.logits.detach().scatter_add(1, label, margin), at.answer) ^ self.targeted


@dataclass(frozen=True, eq=False)
class CW(ConstantSearch):
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

    def _descend(self, search: Search, batch: Batch, c: Tensor) -> Tensor:
        """Adam from the images themselves; bool ``[n]``, which reached the confidence."""
        found = torch.zeros_like(c, dtype=torch.bool)
        half = (self.hi - self.lo) / 2
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
            search.offer(at, reached, squared.sqrt(), batch.rows)
            if step == self.steps - 1:
                break
            lack, pull = self._pull(search, batch, at, c)
            gradient = (2 * delta + pull) * (1 - tanh.square()) * half
            on = self._progressing(step, squared + c * lack, before)
            if on is not None:
                if not len(on):
                    break
                batch, own, c, before = batch.only(on), own[on], c[on], before[on]
                w, mean, square, gradient = (select(t, on) for t in (w, mean, square, gradient))
            mean = _BETA[0] * mean + (1 - _BETA[0]) * gradient
            square = _BETA[1] * square + (1 - _BETA[1]) * gradient.square()
            scale = square.sqrt() / math.sqrt(1 - _BETA[1] ** (step + 1)) + _EPS
            w = w - self.lr / (1 - _BETA[0] ** (step + 1)) * mean / scale
        return found


@dataclass(frozen=True, eq=False)
class CWLinf(LoopAttack):
    """`PGD` in linf on the loss of Carlini & Wagner: min(margin(x'), kappa), driven no further than the confidence.

    What "CW" means in tables of robust accuracy since Madry et al. (2018), whose kappa is 50: signed steps on
    -max(kappa - margin(x'), 0), the margin as in `CW`. Images that are confident enough stay where they are.

    Args:
        eps, step_size, steps, random_start, restarts, targeted, keep, seed, lo, hi, early_stop, engine: as in `PGD`.
        kappa: confidence, in logits, >= 0; ``inf``: the margin is driven without end, which native code does in one call.

    Raises:
        InputError: a value that is not allowed.
    """

    eps: float | Tensor = 8 / 255
    step_size: float | Tensor = 2 / 255
    steps: int = 20
    kappa: float = 50.0
    random_start: bool = True
    restarts: int = 1
    targeted: bool = False
    keep: str = "last"
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    early_stop: bool = False
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._recipe()

    def _recipe(self) -> Recipe:
        check_radius("kappa", self.kappa)
        return PGD(
            eps=self.eps, step_size=self.step_size, steps=self.steps, random_start=self.random_start, restarts=self.restarts,
            loss=Margin(least=-self.kappa) if self.targeted else Margin(most=self.kappa), targeted=self.targeted, keep=self.keep,
            seed=self.seed, lo=self.lo, hi=self.hi, early_stop=self.early_stop, engine=self.engine,
        )._recipe()  # fmt: skip
