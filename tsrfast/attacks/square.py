"""Square Attack (Andriushchenko et al., ECCV 2020): random search with squares, by what the model answers alone, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from tsrfast.attacks import native
from tsrfast.attacks.apgd import project
from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.eager import evaluate
from tsrfast.attacks.loop import Attempt, Batch, Best, select
from tsrfast.attacks.losses import Loss, resolve
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.errors import InputError
from tsrfast.ops import philox_uniform

# Draws of the random numbers: far from those of the random starts, which count from 0 (`starts.py`).
_FIRST_DRAW = 2**31

# Squares of so many iterations are drawn at once.
_AHEAD = 64

_TINY = 1e-12  # keeps norms of 0 from dividing

# Up to which iteration (of 10000) the share p of pixels in a square is p_init / 2^k, k = 0, 1, ...; later k = 9.
_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True, eq=False)
class Square(Attack):
    """Random search: propose a change in one square, keep it where the loss improves.

    The algorithms of AutoAttack's `square.py`, but each image has squares of its own (there one position serves the whole batch), which
    are a function of `seed`, image number, restart and iteration alone; and squares reach the last row and column, as in the paper
    (there they stop one before). An image that falls is done. What is misclassified as it is, and what does not fall, is returned
    unchanged. `AttackResult.queries` counts the question about the image itself, the start of each restart, and the proposals.

    Args:
        norm: ``linf`` (stripes, then squares of x +- eps), or ``l2`` and ``l1`` (patterns whose norm is moved between two squares; l1 is
            not in the paper: patterns are steeper, and images are projected onto ball and box).
        eps: radius in that norm, in pixel units; a number or ``[N]``.
        queries: proposals an image and restart, at most.
        p_init: share of pixels in a square at the beginning, in (0, 1].
        loss: what is to rise; ``margin``, ``cross_entropy``, or a `Loss`.
        restarts: independent attempts; images that fell do not take part.
        rescale_schedule: the square shrinks over `queries` iterations; False: always over 10000, as within AutoAttack.
        targeted: `y` are targets to be reached.
        seed: key of the random numbers.
        lo, hi: the pixel box.
        engine: as in `PGD`; the chain's path runs the model's forward pass in native code.

    Raises:
        InputError: a value that is not allowed; when called, also images that are not ``[N, C, H, W]``.
    """

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    queries: int = 5000
    p_init: float = 0.8
    loss: str | Loss = "margin"
    restarts: int = 1
    rescale_schedule: bool = True
    targeted: bool = False
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._terms()

    def _terms(self) -> Terms:
        check_count("queries", self.queries, 0)
        check_count("restarts", self.restarts, 1)
        if not 0 < self.p_init <= 1:
            raise InputError(f"tsrfast.attacks: p_init must be in (0, 1], got {self.p_init}")
        threat = Threat(self.norm, self.eps, self.lo, self.hi)
        return Terms(threat, resolve(self.loss), self.targeted, self.queries * self.restarts, self.engine)

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        if x0.ndim != 4:
            raise InputError(f"tsrfast.attacks: x must be images [N, C, H, W] for Square, got shape {tuple(x0.shape)}")
        loss = resolve(self.loss)
        others = [native.callable_network(m, x0, self.engine, who="teacher")[0] for m in loss.models()]
        loss = loss.with_models(*others)
        clean = evaluate(network, loss, self.targeted, x0, y, gradient=False, first=True)
        best = Best(x0.clone(), clean.loss.clone(), clean.adversarial)
        queries = torch.ones_like(index)
        whole = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._terms().threat, 0.0)
        for restart in range(self.restarts):
            standing = (~best.adversarial).nonzero().squeeze(1)
            if not len(standing):
                break
            self._search(network, loss, whole.only(standing), restart, best, queries)
        return Attempt(best, torch.zeros_like(queries), queries)

    def _search(self, network: nn.Module, loss: Loss, batch: Batch, restart: int, best: Best, queries: Tensor) -> None:
        """One restart for the images of `batch`: those that fall go into `best`."""
        kind: type[_Proposals] = _Squares if self.norm == "linf" else _Patterns
        search = kind(self, batch, _FIRST_DRAW + restart * (self.queries + 1))
        held = torch.full((len(batch.rows),), -torch.inf, dtype=best.loss.dtype, device=batch.x0.device)
        for i in range(self.queries + 1):
            proposal = search.start() if i == 0 else search.propose(i - 1)
            at = evaluate(network, loss.only(batch.rows), self.targeted, proposal, batch.y, gradient=False, first=False)
            score = (-at.loss if self.targeted else at.loss).nan_to_num(nan=-torch.inf)
            fallen = at.adversarial
            any_fallen = bool(fallen.any())
            if any_fallen:
                best.take(fallen, at.candidate, batch.rows)
                queries[batch.rows[fallen]] += i + 1
            if i == 0:
                held = score
            else:
                better = score > held
                search.settle(better)
                held = torch.where(better, score, held)
            if any_fallen:
                standing = (~fallen).nonzero().squeeze(1)
                if not len(standing):
                    return
                batch, held = batch.only(standing), held[standing]
                search.keep_only(batch, standing)
        queries[batch.rows] += self.queries + 1

    def _side(self, iteration: int, height: int, width: int, least: int) -> int:
        """Of the square at this iteration, from 0; at least 3 means also odd."""
        if self.rescale_schedule:
            iteration = int(iteration / self.queries * 10000)
        p = self.p_init / 2 ** sum(iteration > end for end in _SCHEDULE)
        side = max(round(math.sqrt(p * height * width)), least)
        if least == 3 and side % 2 == 0:
            side += 1
        return min(side, height, width)


class _Proposals:
    """What to ask about next, from the best so far; one for each restart."""

    x: Tensor  # the best so far

    def __init__(self, attack: Square, batch: Batch, draw: int) -> None:
        self.attack, self.draw = attack, draw
        # Half precision holds neither eps^2 nor the sums.
        self.exact = torch.promote_types(batch.x0.dtype, torch.float32)
        self.of_batch(batch)

    def of_batch(self, batch: Batch) -> None:
        """These images from now on."""
        self.batch = batch
        eps = torch.as_tensor(batch.threat.eps, dtype=self.exact, device=batch.x0.device)
        self.eps = eps.reshape(-1, 1, 1, 1)

    def keep_only(self, batch: Batch, rows: Tensor) -> None:
        """`batch` is what stands: the images at these positions."""
        self.of_batch(batch)
        self.x = select(self.x, rows)

    def uniform(self, count: int, iteration: int) -> Tensor:
        """Float64 ``[n, count]``; iteration -1: for the start."""
        return philox_uniform(self.attack.seed, self.batch.index, count, draw=self.draw + 1 + iteration).double()

    def start(self) -> Tensor:
        """The first images; they are the best so far."""
        self.x = self.first()
        return self.x

    def first(self) -> Tensor:
        raise NotImplementedError

    def propose(self, iteration: int) -> Tensor:
        """Images to ask about, to be read before `settle`."""
        raise NotImplementedError

    def settle(self, better: Tensor) -> None:
        """Which of them (bool ``[n]``) are the best so far."""
        raise NotImplementedError


class _Squares(_Proposals):
    """linf: every pixel is at x0 - eps or x0 + eps, up to the box; in one square, each channel goes to one of them.

    A square is a small part of an image: it is written into the best so far, and written back where that is not better.
    """

    ends: list[Tensor]  # of every pixel: the images x0 - eps and x0 + eps
    both: Tensor  # their memory, one after the other
    flat: Tensor  # that of x
    begin: int  # of the iterations whose squares are known
    end: int
    u: Tensor  # their random numbers, [k, n, 2 + c]
    sides: list[int]
    corners: Tensor
    which: Tensor
    windows: dict[int, Tensor]  # by side

    def of_batch(self, batch: Batch) -> None:
        super().of_batch(batch)
        self.begin = self.end = 0
        self.windows = {}

    def keep_only(self, batch: Batch, rows: Tensor) -> None:
        begin, end = self.begin, self.end
        super().keep_only(batch, rows)
        self.ends = [select(t, rows) for t in self.ends]
        if begin < end:
            self.begin, self.end, self.u = begin, end, self.u[:, rows]
            self._lay_out()

    def first(self) -> Tensor:
        x0, t = self.batch.x0, self.batch.threat
        _, c, _, w = x0.shape
        self.ends = [(x0 + self.eps * sign).clamp(t.lo, t.hi).to(x0.dtype) for sign in (-1.0, 1.0)]
        up = (self.uniform(c * w, -1) >= 0.5).reshape(-1, c, 1, w)
        return torch.empty_like(x0).copy_(torch.where(up, self.ends[1], self.ends[0]))

    def propose(self, iteration: int) -> Tensor:
        if iteration >= self.end:
            count = 2 + self.x.shape[1]
            self.begin, self.end = iteration, min(iteration + _AHEAD, self.attack.queries)
            self.u = torch.stack([self.uniform(count, i) for i in range(self.begin, self.end)])
            self._lay_out()
        k, side = iteration - self.begin, self.sides[iteration - self.begin]
        if side not in self.windows:
            self.windows[side] = _window(side, self.x)
        self.where = self.corners[k] + self.windows[side]
        self.before = self.flat.take(self.where)
        self.after = self.both.take(self.where + self.which[k])
        self.flat.put_(self.where, self.after)
        return self.x

    def settle(self, better: Tensor) -> None:
        self.flat.put_(self.where, torch.where(better[:, None, None, None], self.after, self.before))

    def _lay_out(self) -> None:
        """Where the squares of the known iterations are in memory: `corners` [k, n, 1, 1, 1]; `which` end their channels go to, [k, n, c, 1, 1]."""
        h, w = self.x.shape[2:]
        self.sides = [self.attack._side(i, h, w, 1) for i in range(self.begin, self.end)]
        side = torch.tensor(self.sides, device=self.x.device)[:, None]
        top, left = _corner(self.u[..., :2], side, h, w)
        image, _, row, column = self.x.stride()
        images = torch.arange(len(self.x), device=self.x.device) * image
        self.corners = (images + top * row + left * column)[..., None, None, None]
        self.which = ((self.u[..., 2:] >= 0.5) * self.x.numel())[..., None, None]
        self.flat = _memory(self.x)
        self.both = torch.cat([_memory(t) for t in self.ends])


class _Patterns(_Proposals):
    """l2 and l1: patterns whose norm is moved between two squares."""

    proposal: Tensor

    @property
    def p(self) -> int:
        return 2 if self.attack.norm == "l2" else 1

    def first(self) -> Tensor:
        x0 = self.batch.x0
        h, w = x0.shape[2:]
        side = max(min(h, w) // 5, 1)
        u = self.uniform((1 + x0.shape[1]) * (h // side) * (w // side), -1)
        return self._of(_tiles(u, side, x0.to(self.exact), self.p))

    def propose(self, iteration: int) -> Tensor:
        _, c, h, w = self.x.shape
        delta = self.x.to(self.exact) - self.batch.x0
        u, side = self.uniform(5 + c, iteration), self.attack._side(iteration, h, w, 3)
        self.proposal = self._of(_shift(u, side, delta, self.eps, self.p))
        return self.proposal

    def settle(self, better: Tensor) -> None:
        rows = better.nonzero().squeeze(1)  # few
        self.x[rows] = self.proposal[rows]

    def _of(self, delta: Tensor) -> Tensor:
        """The image of this change: in l2 as long as the ball is wide, in l1 at most."""
        x0, t = self.batch.x0, self.batch.threat
        if self.p == 1:
            return project(x0 + delta, self.batch)
        moved = torch.addcmul(x0.to(self.exact), delta, self.eps / (_norm(delta, (1, 2, 3), 2) + _TINY))
        return moved.clamp_(t.lo, t.hi).to(x0.dtype)


def _memory(t: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order in which they lie in memory, as a view."""
    return t.as_strided((t.numel(),), (1,))


def _corner(u: Tensor, side: int | Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top row and left column, int64 ``[...]``, of squares within the image, from uniform numbers ``[..., 2]`` (float64: never 1)."""
    return (u[..., 0] * (height - side + 1)).long(), (u[..., 1] * (width - side + 1)).long()


def _window(side: int, like: Tensor) -> Tensor:
    """Where in memory the pixels of a square are, from its corner on: int64 ``[c, side, side]``."""
    channel, reach = (torch.arange(k, device=like.device) for k in (like.shape[1], side))
    strides = like.stride()
    return channel[:, None, None] * strides[1] + reach[:, None] * strides[2] + reach * strides[3]


@lru_cache(maxsize=64)
def _pattern(side: int, p: int) -> Tensor:
    """The change in a square, of lp norm 1: a hill above a valley; float64 ``[side, side]`` (p = 2: paper, section 3.3)."""

    def hill(height: int, width: int) -> Tensor:
        # Rectangles about the middle, the one of radius k with weight 1 / (k + 1)^(4/p): a pixel is in those from its distance on.
        row, column = (torch.arange(n, device="cpu") - n // 2 for n in (height, width))
        distance = torch.maximum(row.abs()[:, None], column.abs()[None, :])
        weights = 1 / torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64, device="cpu") ** (4 // p)
        heap = weights.flip(0).cumsum(0).flip(0)[distance]
        return heap / heap.norm(p=p)

    pattern = torch.cat([hill(side // 2, side), -hill(side - side // 2, side)])
    return pattern / pattern.norm(p=p)


def _oriented(lying: Tensor, side: int, like: Tensor, p: int) -> Tensor:
    """The pattern, or where `lying` (bool, any shape) its transpose: ``[*shape, side, side]``."""
    pattern = _pattern(side, p).to(like)
    return torch.where(lying[..., None, None], pattern.T, pattern)


def _signs(u: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(dtype)


def _norm(t: Tensor, dims: tuple[int, ...], p: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, ord=p, dim=dims, keepdim=True)
    return norm


def _tiles(u: Tensor, side: int, like: Tensor, p: int) -> Tensor:
    """The start of l2 and l1: patterns side by side, each with a sign a channel; shaped as `like`, 0 at the edge that is left over."""
    n, c, h, w = like.shape
    down, across = h // side, w // side
    lying, signs = u.split([down * across, c * down * across], 1)
    tiles = _oriented(lying.reshape(n, 1, down, across) < 0.5, side, like, p)
    tiles = tiles * _signs(signs, like.dtype).reshape(n, c, down, across, 1, 1)
    delta = torch.zeros_like(like)
    top, left = (h - down * side) // 2, (w - across * side) // 2
    filled = tiles.permute(0, 1, 2, 4, 3, 5).reshape(n, c, down * side, across * side)
    delta[:, :, top : top + down * side, left : left + across * side] = filled
    return delta


def _shift(u: Tensor, side: int, delta: Tensor, eps: Tensor, p: int) -> Tensor:
    """A step of l2 (paper, algorithm 3) and l1: a new pattern in one square, with the norm of that square, of a second one, which
    becomes 0, and what is left of eps.

    In l1 it is as many times as long as there are channels, as in the authors' code; the projection takes off what is too much.
    """
    n, c, h, w = delta.shape
    image, _, row, column = delta.stride()
    corners = [_corner(u[:, i : i + 2], side, h, w) for i in (0, 2)]
    images, window = torch.arange(n, device=delta.device) * image, _window(side, delta)
    to, away = ((images + top * row + left * column)[:, None, None, None] + window for top, left in corners)
    out = torch.empty_like(delta).copy_(delta)
    flat = _memory(out)
    old, moved = flat.take(to), (flat.take(away).abs() ** p).sum((2, 3), keepdim=True)
    flat.put_(away, torch.zeros_like(old))
    moved = moved + (flat.take(to).abs() ** p).sum((2, 3), keepdim=True)  # of both squares, what they share counted once
    unspent = (eps**p - _norm(delta, (1, 2, 3), p) ** p).clamp_min(0)
    new = _oriented(u[:, 4:5] < 0.5, side, delta, p) * _signs(u[:, 5:], delta.dtype)[:, :, None, None]
    new = new + old / (_norm(old, (2, 3), p) + _TINY)
    length = unspent / c + moved
    flat.put_(to, new / (_norm(new, (2, 3), p) + _TINY) * (length.sqrt() if p == 2 else length * c))
    return out
