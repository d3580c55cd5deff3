"""Auto-PGD (Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks").

Gradient ascent with momentum that halves an image's step and returns to its best iterate where progress has stalled; the l1 form
(Croce & Hein 2021, "Mind the box", section 4) adapts the sparsity of the steps as well. On the eager path every operation is the
authors' own (package autoattack): from the same start linf and l2 give the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tsrfast.attacks import native
from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.eager import Evaluation, as_dense, evaluate, finite
from tsrfast.attacks.loop import Attempt, Batch, Best, select
from tsrfast.attacks.losses import Loss, TargetedDLR, resolve
from tsrfast.attacks.starts import random_start
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.errors import InputError, unknown
from tsrfast.ops import pgd_step, pgd_step_

KEEPS = ("first", "last", "best")


@dataclass(frozen=True, eq=False)
class _APGD(Attack):
    """What both forms share (their docstrings say what the fields are)."""

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    steps: int = 100
    restarts: int = 1
    keep: str = "first"
    random_start: bool = True
    rho: float = 0.75
    eot_iter: int = 1
    larger_eps: bool = False
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._terms()

    def _threat(self) -> Threat:
        """The threat, and the checks of the shared fields."""
        threat = Threat(self.norm, self.eps, self.lo, self.hi)
        if not torch.as_tensor(self.eps, device="cpu").isfinite().all():  # the first step is as long as the ball is wide
            raise InputError("tsrfast.attacks: eps must be finite, got inf")
        for name, least in (("steps", 0), ("restarts", 1), ("eot_iter", 1)):
            check_count(name, getattr(self, name), least)
        if not 0 <= self.rho <= 1:
            raise InputError(f"tsrfast.attacks: rho must be in [0, 1], got {self.rho}")
        if self.larger_eps and self.norm != "l1":
            raise InputError(f"tsrfast.attacks: larger_eps needs norm='l1', got {self.norm!r}")
        return threat

    def _rounds(self, loss: Loss, clean: Tensor | None) -> Iterator[Loss]:
        """The losses to be driven one after the other, of all images; `clean`: the logits there, None if `keep` is ``best``."""
        yield loss

    def _search(self, network: nn.Module, loss: Loss, targeted: bool, x0: Tensor, y: Tensor | None, index: Tensor) -> Attempt:
        batch = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._threat(), 0.0)
        zeros = torch.zeros_like(index)
        logits = None
        if self.keep == "best":  # the iterates alone count
            total = Attempt(Best.unjudged(x0.clone()), zeros, zeros.clone())
        else:
            clean = evaluate(network, loss, targeted, x0, y, gradient=False, first=True)
            total = Attempt(clean.candidate, zeros, zeros + 1)
            total.best.x = x0.clone()  # written to below
            batch, logits = batch.only((~total.best.adversarial).nonzero().squeeze(1)), clean.logits
        starts = 0
        for goal in self._rounds(loss, logits):
            for _ in range(self.restarts):
                if not len(batch.rows):
                    return total
                start = batch.x0.clone()
                if self.random_start:
                    widest = dataclasses.replace(batch.threat, eps=batch.threat.eps * (3.0 if self.larger_eps else 1.0))
                    start = random_start(batch.x0, widest, seed=self.seed, index=batch.index, restart=starts)
                starts += 1
                got = self._ascend(network, goal, batch, start, targeted)
                total.bad[batch.rows] += got.bad
                total.queries[batch.rows] += got.queries
                if self.keep == "best":
                    better = got.best.loss < total.best.loss if targeted else got.best.loss > total.best.loss
                    total.best.take(better | total.best.loss.isnan(), got.best, batch.rows)
                else:
                    total.best.take(got.best.adversarial, got.best, batch.rows)
                    batch = batch.only((~got.best.adversarial).nonzero().squeeze(1))
        return total

    def _ascend(self, network: nn.Module, loss: Loss, batch: Batch, start: Tensor, targeted: bool) -> Attempt:
        run = partial(ascend, network, loss, targeted=targeted, rho=self.rho, eot_iter=self.eot_iter)
        if not self.larger_eps:
            return run(batch, start, steps=self.steps, keep=self.keep)
        # Each ascent begins where the one before it came highest.
        first = math.ceil(0.3 * self.steps)
        bad, queries = torch.zeros_like(batch.rows), torch.zeros_like(batch.rows)
        for times, steps in ((3.0, first), (2.0, min(first, self.steps - first)), (1.0, max(self.steps - 2 * first, 0))):
            wider = dataclasses.replace(batch, threat=dataclasses.replace(batch.threat, eps=times * batch.threat.eps))
            got = run(wider, project(start, wider), steps=steps, keep=self.keep if times == 1 else "best", warm=True)
            bad, queries, start = bad + got.bad, queries + got.queries, got.best.x
        return Attempt(got.best, bad, queries)


@dataclass(frozen=True, eq=False)
class APGD(_APGD):
    """Auto-PGD on one loss.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in that norm, in pixel units of [0, 1]; a number or ``[N]``; finite.
        steps: number of steps, >= 0; the schedule of checkpoints follows from it.
        restarts: independent attempts, each on the images that still stand (``best``: on all).
        keep: ``first``: an image ends at its first adversarial iterate, which is returned (for evaluation: least work). ``last``: an
            attempt goes on to its end, and the last adversarial iterate is returned (what the authors' code returns; success is that
            of ``first``). With both, images that are adversarial as they are, and images that withstand, come back as they were.
            ``best``: the iterate of the best loss, of all images (the authors' ``best_loss``).
        random_start: begin at a random point of the ball (a function of `seed`, image number and restart alone).
        rho: the share of a checkpoint's steps that must have raised the loss, else the step is halved (linf, l2).
        larger_eps: l1 only: spend 30 % of the steps in the ball of 3 eps, 30 % in that of 2 eps, and the rest in that of eps, each ascent
            from the best iterate before it ("Mind the box", section 4.2; AutoAttack's choice for l1).
        eot_iter: gradients to average at each iterate, for networks that draw random numbers.
        seed: key of the random starts.
        lo, hi: the pixel box.
        engine: ``auto`` computes networks in native code where it can (`plan` says whether and why); ``eager`` always in PyTorch;
            ``chain`` natively, or an error that says why not. The steps are the same.
        loss: ``cross_entropy``, ``dlr``, ``margin``, or a `Loss`.
        targeted: `y` are targets to be reached.

    Raises:
        InputError: a value that is not allowed.
    """

    loss: str | Loss = "cross_entropy"
    targeted: bool = False

    def _terms(self) -> Terms:
        if self.keep not in KEEPS:
            raise unknown("keep", self.keep, KEEPS)
        return Terms(self._threat(), resolve(self.loss), self.targeted, self.steps * self.restarts, self.engine)

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        loss = resolve(self.loss)
        others = [native.callable_network(m, x0, self.engine, who="teacher")[0] for m in loss.models()]
        return self._search(network, loss.with_models(*others), self.targeted, x0, y, index)


@dataclass(frozen=True, eq=False)
class APGDTargeted(_APGD):
    """Auto-PGD on the targeted DLR loss, towards one wrong class after the other, the most likely first: any wrong answer ends it.

    `y` are the true labels. At least 4 classes. The loss of a result is that towards the class it fell for; 0 where none was reached.

    Args:
        norm, eps, steps, random_start, rho, eot_iter, larger_eps, seed, lo, hi, engine: as in `APGD`.
        restarts: attempts for each class.
        keep: ``first`` or ``last``.
        target_classes: wrong classes to try, of which no model has more than its classes less one.

    Raises:
        InputError: a value that is not allowed.
    """

    target_classes: int = 9

    def _terms(self) -> Terms:
        if self.keep not in KEEPS[:2]:
            raise unknown("keep", self.keep, KEEPS[:2])
        check_count("target_classes", self.target_classes, 1)
        steps = self.steps * self.restarts * self.target_classes
        return Terms(self._threat(), None, False, steps, self.engine)

    def _rounds(self, loss: Loss, clean: Tensor | None) -> Iterator[Loss]:
        assert clean is not None  # keep is not "best"
        # Where the clean image is classified rightly, its last class in this order is y.
        order = clean.sort(dim=1)[1]
        for k in range(min(self.target_classes, order.shape[1] - 1)):
            yield TargetedDLR(order[:, -2 - k])

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        assert y is not None  # checked
        # For the clean images: with y as its target the loss is 0.
        return self._search(network, TargetedDLR(y), False, x0, y, index)


@dataclass(frozen=True, eq=False)
class _State:
    """Where the ascent of each image stands."""

    x: Tensor
    previous: Tensor  # the iterate before x
    gradient: Tensor  # at x, of what increases
    best: Best  # its loss is what increases
    best_gradient: Tensor
    step: Tensor  # length of a step, [n, 1, ...]
    value: Tensor  # at x
    rises: Tensor  # steps since the last check that raised the value
    checked: Tensor  # the best value at the last check
    halved: Tensor  # whether that check halved the step
    sparsity: Tensor  # l1: share of pixels that a step moves
    moved: Tensor  # l1: pixels that the best iterate had moved at the last check

    def only(self, rows: Tensor) -> _State:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kept = {name: select(t, rows) for name, t in fields.items() if isinstance(t, Tensor)}
        b = self.best
        return _State(**kept, best=Best(select(b.x, rows), b.loss[rows], b.adversarial[rows]))


def ascend(
    network: nn.Module,
    loss: Loss,
    batch: Batch,
    start: Tensor,
    *,
    targeted: bool,
    steps: int,
    keep: str,
    rho: float,
    eot_iter: int,
    warm: bool = False,
) -> Attempt:
    """One attempt from `start`; fields as in `APGD`. With ``first`` and ``last`` only adversarial images are of use in the result.

    `warm`: l1 begins with steps as sparse as `start`, not with a fifth of the pixels.
    """
    sign = -1.0 if targeted else 1.0
    held = Best.unjudged(start.clone())
    rows = torch.arange(len(start), device=start.device)  # positions in `start` of the images that still stand
    bad, queries = torch.zeros_like(rows), torch.zeros_like(rows)
    l1 = batch.threat.norm == "l1"
    every = max(int((0.04 if l1 else 0.22) * steps), 1)
    shortest, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    since = 0
    s: _State | None = None
    x = start
    for i in range(steps + 1):
        final = i == steps
        at, g = _look(network, loss.only(batch.rows), batch, x, targeted, 0 if final else eot_iter, first=i == 0)
        queries[rows] += 1 if final else eot_iter
        fallen = at.adversarial
        standing: Tensor | None = None
        if keep != "best" and bool(fallen.any()):
            held.take(fallen, Best(x, at.loss.detach(), fallen), rows)
            if keep == "first":
                standing = (~fallen).nonzero().squeeze(1)
                if not len(standing):
                    break
        if final and keep != "best":
            break
        value = sign * at.loss.detach()
        if s is None:
            s = _begin(batch, x, g, value, fallen, warm)
        else:
            s = _note(s, x, g, value, fallen)
            since += 1
            if since == every and not final:
                s = _check_sparsity(s, batch) if l1 else _check_progress(s, every, rho)
                since = 0
                if not l1:
                    every = max(every - shorter, shortest)
        if final:
            break
        if standing is not None:
            batch, s, rows = batch.only(standing), s.only(standing), rows[standing]
        with torch.no_grad():
            x, lost = {"linf": _step_linf, "l2": _step_l2, "l1": _step_l1}[batch.threat.norm](s, batch, 0.75 if i > 0 else 1.0)
        bad[rows] += lost
        s = dataclasses.replace(s, previous=s.x)
    if keep == "best":
        assert s is not None  # there is a first evaluation, and no image leaves
        held = Best(s.best.x, sign * s.best.loss, s.best.adversarial)
    return Attempt(held, bad, queries)


def _look(
    network: nn.Module, loss: Loss, batch: Batch, x: Tensor, targeted: bool, gradients: int, first: bool
) -> tuple[Evaluation, Tensor]:
    """Network and loss at `x`, and the mean of that many gradients of what increases (none: 0)."""
    total: Tensor | None = None
    for k in range(max(gradients, 1)):
        at = evaluate(network, loss, targeted, x, batch.y, gradient=gradients > 0, first=first and k == 0)
        if gradients:
            g = at.gradient()
            total = g if total is None else total + g
    if total is None:
        return at, torch.zeros_like(x)
    scale = -gradients if targeted else gradients
    return at, total if scale == 1 else total / scale


def _begin(batch: Batch, x: Tensor, g: Tensor, value: Tensor, fallen: Tensor, warm: bool) -> _State:
    d = x[0].numel()
    moved = _moved(x, batch) if warm else torch.full((len(x),), float(d), device=x.device)
    step = _radius(batch, x) * (1.0 if batch.threat.norm == "l1" else 2.0)
    return _State(
        x, x, g, Best(x.clone(), value.clone(), fallen), g.clone(), step,
        # The authors' record of losses begins with zeros: the first step rises if its value is positive.
        value=torch.zeros_like(value), rises=torch.zeros_like(value), checked=value.clone(), halved=torch.ones_like(fallen),
        sparsity=moved / d / 1.5 if warm else torch.full_like(moved, 0.2), moved=moved,
    )  # fmt: skip


def _note(s: _State, x: Tensor, g: Tensor, value: Tensor, fallen: Tensor) -> _State:
    """A step was taken to `x`."""
    best = s.best
    # Any value is better than NaN.
    better = (value > best.loss) | (best.loss.isnan() & ~value.isnan())
    best.loss, best.adversarial = torch.where(better, value, best.loss), torch.where(better, fallen, best.adversarial)
    rows = better.nonzero().squeeze(1)  # usually few: less is moved than by a select of whole images
    for held, new in ((best.x, x), (s.best_gradient, g)):
        held.index_copy_(0, rows, new.index_select(0, rows))
    return dataclasses.replace(s, x=x, gradient=g, value=value, rises=s.rises + (value > s.value))


def _check_progress(s: _State, steps: int, rho: float) -> _State:
    """Halve the step, and go back to the best iterate, where too few of the `steps` rose or nothing was gained since the last check."""
    halve = (s.rises <= steps * rho) | (~s.halved & (s.checked >= s.best.loss))
    return dataclasses.replace(
        _back(s, halve), step=torch.where(_wide(halve, s.step), s.step / 2, s.step), halved=halve,
        checked=s.best.loss.clone(), rises=torch.zeros_like(s.rises),
    )  # fmt: skip


def _check_sparsity(s: _State, batch: Batch) -> _State:
    """Steps as sparse as the best iterate; while it becomes sparser (5 %), go on from it with full steps, else with shorter ones."""
    longest = _radius(batch, s.x)
    moved = _moved(s.best.x, batch)
    sparser = moved / s.moved < 0.95
    step = torch.where(_wide(sparser, s.step), longest, s.step / 1.5)
    return dataclasses.replace(
        _back(s, sparser), step=torch.minimum(torch.maximum(step, longest / 10), longest), moved=moved,
        sparsity=moved / s.x[0].numel() / 1.5,
    )  # fmt: skip


def _moved(x: Tensor, batch: Batch) -> Tensor:
    return (x != batch.x0).flatten(1).sum(1).float()


def _back(s: _State, chosen: Tensor) -> _State:
    wide = _wide(chosen, s.x)
    return dataclasses.replace(s, x=torch.where(wide, s.best.x, s.x), gradient=torch.where(wide, s.best_gradient, s.gradient))


def _step_linf(s: _State, batch: Batch, a: float) -> tuple[Tensor, Tensor]:
    """The next iterate, and int64 ``[n]`` gradient entries without a direction."""
    t, before = batch.threat, as_dense(s.x, batch.x0)
    g = as_dense(s.gradient, batch.x0)
    x, bad = pgd_step(before, batch.x0, g, step_size=s.step.flatten(), eps=t.eps, norm="linf", lo=t.lo, hi=t.hi)
    # s.x + (x - s.x) a + (s.x - s.previous) (1 - a), in the memory of x.
    x.sub_(s.x).mul_(a).add_(s.x).add_((s.x - s.previous).mul_(1 - a))
    pgd_step_(x, batch.x0, x, step_size=0.0, eps=t.eps, norm="linf", lo=t.lo, hi=t.hi)
    return x, bad


def _step_l2(s: _State, batch: Batch, a: float) -> tuple[Tensor, Tensor]:
    t, radius = batch.threat, _radius(batch, s.x)
    g, bad = finite(s.gradient)

    def project(x: Tensor) -> Tensor:
        # As the authors' code: not the bits of `pgd_step`, which leaves points inside the ball as they are.
        direction, length = _normalised(x - batch.x0)
        return (batch.x0 + direction * torch.minimum(radius, length)).clamp(t.lo, t.hi)

    x = project(s.x + s.step * _normalised(g)[0])
    return project(s.x + (x - s.x) * a + (s.x - s.previous) * (1 - a)), bad


def _step_l1(s: _State, batch: Batch, a: float) -> tuple[Tensor, Tensor]:
    """Without momentum."""
    g, bad = finite(s.gradient)
    d, size = g[0].numel(), g.abs()
    place = ((1.0 - s.sparsity) * d).clamp(0, d - 1).long()
    least = size.flatten(1).sort(1)[0].gather(1, place[:, None]).squeeze(1)
    signs = (g * (size >= _wide(least, size))).sign()
    share = signs.abs().flatten(1).sum(1, dtype=torch.float32).clamp_min(1)
    return project(s.x + s.step * signs / _wide(share, signs).to(s.x.dtype), batch), bad


def project(x: Tensor, batch: Batch) -> Tensor:
    """Into ball and box: a step of no length."""
    t = batch.threat
    x = as_dense(x, batch.x0)
    return pgd_step(x, batch.x0, x, step_size=0.0, eps=t.eps, norm=t.norm, lo=t.lo, hi=t.hi)[0]


def _radius(batch: Batch, x: Tensor) -> Tensor:
    """``[n, 1, ...]``, in x's dtype."""
    eps = torch.as_tensor(batch.threat.eps, dtype=x.dtype, device=x.device)
    return eps.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))


def _normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v / |v|, |v|) in l2, 0 / 0 = 0; 16-bit numbers by way of float32, where 1e-12 is a number."""
    f = v if v.dtype in (torch.float32, torch.float64) else v.float()
    length = (f**2).flatten(1).sum(-1).sqrt().reshape(-1, *[1] * (v.ndim - 1))
    return (f / (length + 1e-12)).to(v.dtype), length.to(v.dtype)


def _wide(t: Tensor, like: Tensor) -> Tensor:
    """``[n]`` as ``[n, 1, ...]``."""
    return t.reshape(-1, *[1] * (like.ndim - 1))
