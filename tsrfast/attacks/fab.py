"""FAB (Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack").

Each step projects iterate and image onto the boundary of the linearised model inside the box (`ops.hyperplane_projection`), goes a
little beyond, and leans towards the image (the paper's eq. 9 and 10); what has crossed the boundary comes a tenth of its way back.
Given the same start, iterates are those of the authors' code (package autoattack) up to rounding: their projections are other
arithmetic for the same point.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.deepfool import gap_gradients
from tsrfast.attacks.eager import Evaluation, evaluate, finite
from tsrfast.attacks.loop import Attempt, Batch, Best
from tsrfast.attacks.losses import Margin
from tsrfast.attacks.starts import random_start
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.errors import InputError, unknown
from tsrfast.ops import hyperplane_projection

KEEPS = ("first", "best")
_DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
_TINY = 1e-12  # added to the lengths of gradients, as in the authors' code; and
_SHORT = 1e-8  # the shortest that a projection counts as


@dataclass(frozen=True, eq=False)
class _FAB(Attack):
    """What both forms share (their docstrings say what the fields are)."""

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    steps: int = 100
    restarts: int = 1
    keep: str = "first"
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._terms()

    def _rounds(self, clean: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The classes ``[N, k]`` to be driven to, one set after the other; `clean`: logits."""
        raise TypeError(f"{type(self).__name__} must define _rounds(clean, y)")

    def _terms(self) -> Terms:
        threat = Threat(self.norm, self.eps, self.lo, self.hi)
        if not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            raise InputError(f"tsrfast.attacks: lo and hi must be finite for FAB, got lo={self.lo}, hi={self.hi}")
        check_count("steps", self.steps, 0)
        check_count("restarts", self.restarts, 1)
        if self.restarts > 1 and not torch.as_tensor(self.eps, device="cpu").isfinite().all():
            raise InputError("tsrfast.attacks: eps must be finite for random starts (restarts > 1), got inf")
        for name in ("alpha_max", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"tsrfast.attacks: {name} must be in [0, 1], got {getattr(self, name)}")
        if not 1 <= self.eta < math.inf:
            raise InputError(f"tsrfast.attacks: eta must be >= 1 and finite, got {self.eta}")
        if self.keep not in KEEPS:
            raise unknown("keep", self.keep, KEEPS)
        return Terms(threat, None, False, self.steps * self.restarts, self.engine)

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        assert y is not None  # checked
        clean = evaluate(network, Margin(), False, x0, y, gradient=False, first=True)
        if clean.logits.shape[1] < 2:
            raise InputError(f"tsrfast.attacks: model must return at least 2 classes for FAB, got {clean.logits.shape[1]}")
        best = clean.candidate
        best.x = x0.clone()  # written to below
        search = _Search(network, best, torch.full((len(x0),), torch.inf, dtype=_exact(x0), device=x0.device), index)
        whole = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._terms().threat, 0.0)
        batch, starts = whole.only((~best.adversarial).nonzero().squeeze(1)), 0
        for others in self._rounds(clean.logits, y):
            for restart in range(self.restarts):
                if not len(batch.rows):
                    break
                start = batch.x0
                if restart:
                    half = dataclasses.replace(batch.threat, eps=batch.threat.eps * 0.5)
                    start = random_start(batch.x0, half, seed=self.seed, index=batch.index, restart=starts)
                    starts += 1
                self._descend(search, batch, start, others[batch.rows])
                if self.keep == "first":
                    batch = batch.only((~best.adversarial[batch.rows]).nonzero().squeeze(1))
        return Attempt(best, search.bad, search.queries)

    def _descend(self, search: _Search, batch: Batch, start: Tensor, others: Tensor) -> None:
        """One run from `start`; images are flat here, ``[n, D]``, whatever their memory format."""
        shape, dtype = start.shape[1:], start.dtype
        x, x0 = (t.flatten(1).to(_exact(start)).contiguous() for t in (start, batch.x0))
        everything = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            at = search.look(batch, x.to(dtype).reshape(-1, *shape), gradient=True)
            gap, w, bad = _nearest(at, gap_gradients(search.network, at, others, everything[: len(x)]), others, self.norm)
            search.bad[batch.rows] += bad
            x = self._step(x, x0, gap, w)
            at = search.look(batch, x.to(dtype).reshape(-1, *shape), gradient=False)
            distance = _length(at.x.flatten(1).to(x.dtype) - x0, self.norm)
            eps = torch.as_tensor(batch.threat.eps, dtype=x.dtype, device=x.device)
            fallen = at.adversarial
            inside = fallen & (distance <= eps)
            nearer = inside & (distance < search.distance[batch.rows])
            search.best.take(nearer, at.candidate, batch.rows)
            search.distance[batch.rows[nearer]] = distance[nearer]
            x = torch.where(fallen[:, None], x0 + (x - x0) * self.beta, x)
            if self.keep == "first" and bool(inside.any()):
                standing = (~inside).nonzero().squeeze(1)
                if not len(standing):
                    return
                batch, others, x, x0 = batch.only(standing), others[standing], x[standing], x0[standing]

    def _step(self, x: Tensor, x0: Tensor, gap: Tensor, w: Tensor) -> Tensor:
        """From iterates and images ``[n, D]`` over the hyperplanes gap + <w, x' - x> = 0 (the paper's eq. 9 and 10)."""
        b = (w * x).sum(1, dtype=torch.float64) - gap
        d, d0 = (hyperplane_projection(t, w, b, norm=self.norm, lo=self.lo, hi=self.hi) for t in (x, x0))
        far, far0 = (_length(t, self.norm).clamp_min(_SHORT) for t in (d, d0))
        alpha = (far / (far + far0)).clamp(0, self.alpha_max)[:, None]
        return ((x + self.eta * d) * (1 - alpha) + (x0 + self.eta * d0) * alpha).clamp(self.lo, self.hi)


@dataclass(frozen=True, eq=False)
class FAB(_FAB):
    """FAB towards the nearest of all other classes: the gradients of all logits at each step.

    Args:
        norm: ``linf``, ``l2`` or ``l1``, the length to be made small.
        eps: radius in that norm, in pixel units of [0, 1], a number or ``[N]``: only what is within it is returned. ``inf`` (with
            ``keep="best"`` and one restart) for the nearest at any distance.
        steps: steps of a run, >= 0.
        restarts: runs: the first from the image, the others from random points of the ball of eps / 2 (a function of `seed`, image
            number and restart alone).
        keep: ``first``: an image ends at its first adversarial iterate within eps, which is returned (for evaluation: least work,
            success is that of ``best``). ``best``: every image takes every step, and the nearest adversarial iterate is returned.
            What is misclassified as it is, and what does not fall, comes back as it was.
        alpha_max: the most that a step leans towards the image's own projection, in [0, 1].
        eta: how far to go beyond the boundary, >= 1: 1 is up to it.
        beta: the share of its way that what has crossed the boundary keeps, in [0, 1].
        seed: key of the random starts.
        lo, hi: the pixel box, finite.
        engine: as in `APGD`; the chain's path computes the gradients of all classes in one native pass.

    Raises:
        InputError: a value that is not allowed; the model has one class.
    """

    def _rounds(self, clean: Tensor, y: Tensor) -> Iterator[Tensor]:
        others = torch.arange(clean.shape[1] - 1, device=y.device)
        yield others + (others >= y[:, None]).long()


@dataclass(frozen=True, eq=False)
class FABTargeted(_FAB):
    """FAB towards one wrong class after the other, the most likely first (AutoAttack's FAB-T): one gradient a step.

    `y` are the true labels; any wrong answer counts.

    Args:
        norm, eps, steps, alpha_max, eta, beta, seed, lo, hi, engine: as in `FAB`.
        restarts: runs for each class.
        keep: as in `FAB`; ``best`` goes through all classes.
        target_classes: wrong classes to try, of which no model has more than its classes less one.

    Raises:
        InputError: a value that is not allowed; the model has one class.
    """

    target_classes: int = 9

    def _terms(self) -> Terms:
        check_count("target_classes", self.target_classes, 1)
        terms = super()._terms()
        return dataclasses.replace(terms, steps=terms.steps * self.target_classes)

    def _rounds(self, clean: Tensor, y: Tensor) -> Iterator[Tensor]:
        # Where the clean image is classified rightly, its last class in this order is y.
        order = clean.sort(dim=1)[1]
        for k in range(min(self.target_classes, clean.shape[1] - 1)):
            yield order[:, -2 - k, None]


class _Search:
    """What is known of each image of the call: the best, its distance (inf: none), NaN gradient entries, forward passes."""

    def __init__(self, network: nn.Module, best: Best, distance: Tensor, index: Tensor) -> None:
        self.network, self.best, self.distance = network, best, distance
        self.bad, self.queries = torch.zeros_like(index), torch.ones_like(index)

    def look(self, batch: Batch, x: Tensor, gradient: bool) -> Evaluation:
        self.queries[batch.rows] += 1
        return evaluate(self.network, Margin(), False, x, batch.y, gradient=gradient, first=False)


def _nearest(at: Evaluation, gradients: Iterable[Tensor], others: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of the linearised boundaries (0 where there is none), and the gradient entries without a direction, int64 ``[n]``.

    Args:
        at: logits and labels.
        gradients: of z_other - z_label with respect to x, one after the other.
        others: the classes ``[n, k]``.
        norm: in which distance is measured.

    Returns:
        z_other - z_label ``[n]``, its gradient ``[n, D]``, and the count.
    """
    exact = _exact(at.x)
    logits = at.logits.detach().to(exact)
    gaps = logits.gather(1, others) - logits.gather(1, at.answer[:, None])
    gap, bad = torch.zeros_like(gaps[:, 0]), torch.zeros_like(at.answer)
    nearest, w = torch.full_like(gap, torch.inf), torch.zeros_like(at.x, dtype=exact).flatten(1).contiguous()
    for other, gradient in zip(gaps.unbind(1), gradients, strict=True):
        g, lost = finite(gradient.flatten(1).to(exact))
        bad += lost
        distance = other.abs() / (_length(g, _DUAL[norm]) + _TINY)
        closer = distance < nearest  # NaN is not
        nearest, gap = torch.where(closer, distance, nearest), torch.where(closer, other, gap)
        w = torch.where(closer[:, None], g, w)
    return gap, w, bad


def _length(d: Tensor, norm: str) -> Tensor:
    """Of each row."""
    if norm == "linf":
        return d.abs().amax(1)
    return d.abs().sum(1) if norm == "l1" else d.square().sum(1).sqrt()


def _exact(x: Tensor) -> torch.dtype:
    """What steps are computed in: in half precision their rounding would be as large as the last ones."""
    return torch.promote_types(x.dtype, torch.float32)
