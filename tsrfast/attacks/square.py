"""Square Attack (Andriushchenko et al., ECCV 2020): random search with squares, by what the model answers alone, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from tsrfast.attacks import native
from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.eager import evaluate
from tsrfast.attacks.loop import Attempt, Batch, Best, select
from tsrfast.attacks.losses import Loss, resolve
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.errors import InputError, unknown
from tsrfast.ops import philox_uniform

# Draws of the random numbers: far from those of the random starts, which count from 0 (`starts.py`).
_FIRST_DRAW = 2**31

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
        norm: ``linf`` (stripes, then squares of x +- eps) or ``l2`` (patterns whose norm is moved between two squares).
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
        if self.norm not in ("linf", "l2"):
            raise unknown("norm", self.norm, ("linf", "l2"))
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
        x = batch.x0.clone()
        held = torch.full((len(x),), -torch.inf, dtype=best.loss.dtype, device=x.device)
        for i in range(self.queries + 1):
            proposal = self._propose(batch, x, i - 1, _FIRST_DRAW + restart * (self.queries + 1) + i)
            at = evaluate(network, loss.only(batch.rows), self.targeted, proposal, batch.y, gradient=False, first=False)
            queries[batch.rows] += 1
            score = (-at.loss if self.targeted else at.loss).nan_to_num(nan=-torch.inf)
            # Few are better, so indices and not a select. The start is taken as it is.
            better = ((score > held) | (i == 0)).nonzero().squeeze(1)
            x[better], held[better] = proposal[better], score[better]
            fallen = at.adversarial
            if bool(fallen.any()):
                best.take(fallen, at.candidate, batch.rows)
                standing = (~fallen).nonzero().squeeze(1)
                if not len(standing):
                    return
                batch, x, held = batch.only(standing), select(x, standing), held[standing]

    def _propose(self, batch: Batch, x: Tensor, iteration: int, draw: int) -> Tensor:
        """What to ask about next: images as x, which is the best so far; iteration -1: the start."""
        x0, t = batch.x0, batch.threat
        # Half precision holds neither eps^2 nor the sums.
        exact = torch.promote_types(x.dtype, torch.float32)
        eps = torch.as_tensor(t.eps, dtype=exact, device=x.device).reshape(-1, 1, 1, 1)
        c, h, w = x.shape[1:]

        def uniform(count: int) -> Tensor:
            return philox_uniform(self.seed, batch.index, count, draw=draw).double()

        if t.norm == "linf":
            if iteration < 0:
                stripes = _signs(uniform(c * w), exact).reshape(-1, c, 1, w)
                return (x0 + eps * stripes).clamp(t.lo, t.hi).to(x.dtype)
            side = self._side(iteration, h, w, 1)
            u = uniform(2 + c)
            square = _window(*_corner(u[:, :2], side, h, w), side, c)
            proposal = x.clone()
            # x + 2 eps (+-1), projected: every pixel of x is at x0 - eps or x0 + eps, up to the box.
            proposal[square] = (x0[square] + eps * _signs(u[:, 2:], exact)[:, :, None, None]).clamp(t.lo, t.hi).to(x.dtype)
            return proposal

        if iteration < 0:
            side = max(min(h, w) // 5, 1)
            delta = _tiles(uniform((1 + c) * (h // side) * (w // side)), side, x0.to(exact))
        else:
            delta = _shift(uniform(5 + c), self._side(iteration, h, w, 3), x.to(exact) - x0, eps)
        return torch.addcmul(x0.to(exact), delta, eps / (_norm(delta, (1, 2, 3)) + _TINY)).clamp_(t.lo, t.hi).to(x.dtype)

    def _side(self, iteration: int, height: int, width: int, least: int) -> int:
        """Of the square at this iteration, from 0; at least 3 means also odd."""
        if self.rescale_schedule:
            iteration = int(iteration / self.queries * 10000)
        p = self.p_init / 2 ** sum(iteration > end for end in _SCHEDULE)
        side = max(round(math.sqrt(p * height * width)), least)
        if least == 3 and side % 2 == 0:
            side += 1
        return min(side, height, width)


def _corner(u: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top row and left column, int64 ``[n]``, of squares within the image, from uniform numbers ``[n, 2]`` (float64: never 1)."""
    return (u[:, 0] * (height - side + 1)).long(), (u[:, 1] * (width - side + 1)).long()


def _window(top: Tensor, left: Tensor, side: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices into images, all channels, of a square in each of them: what they index is ``[n, channels, side, side]``."""
    image, channel, reach = (torch.arange(k, device=top.device) for k in (len(top), channels, side))
    row, column = top[:, None] + reach, left[:, None] + reach
    return image[:, None, None, None], channel[:, None, None], row[:, None, :, None], column[:, None, None, :]


@lru_cache(maxsize=64)
def _pattern(side: int) -> Tensor:
    """The change in a square of the l2 attack, of norm 1: a hill above a valley; float64 ``[side, side]`` (paper, section 3.3)."""

    def hill(height: int, width: int) -> Tensor:
        # Rectangles about the middle, the one of radius k with weight 1 / (k + 1)^2: a pixel is in those from its distance on.
        row, column = (torch.arange(n, device="cpu") - n // 2 for n in (height, width))
        distance = torch.maximum(row.abs()[:, None], column.abs()[None, :])
        weights = 1 / torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64, device="cpu").square()
        heap = weights.flip(0).cumsum(0).flip(0)[distance]
        return heap / heap.norm()

    pattern = torch.cat([hill(side // 2, side), -hill(side - side // 2, side)])
    return pattern / pattern.norm()


def _oriented(lying: Tensor, side: int, like: Tensor) -> Tensor:
    """The pattern, or where `lying` (bool, any shape) its transpose: ``[*shape, side, side]``."""
    pattern = _pattern(side).to(like)
    return torch.where(lying[..., None, None], pattern.T, pattern)


def _signs(u: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(dtype)


def _norm(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t, dim=dims, keepdim=True)
    return norm


def _tiles(u: Tensor, side: int, like: Tensor) -> Tensor:
    """The start of the l2 attack: patterns side by side, each with a sign a channel; shaped as `like`, 0 at the edge that is left over."""
    n, c, h, w = like.shape
    down, across = h // side, w // side
    lying, signs = u.split([down * across, c * down * across], 1)
    tiles = _oriented(lying.reshape(n, 1, down, across) < 0.5, side, like)
    tiles = tiles * _signs(signs, like.dtype).reshape(n, c, down, across, 1, 1)
    delta = torch.zeros_like(like)
    top, left = (h - down * side) // 2, (w - across * side) // 2
    filled = tiles.permute(0, 1, 2, 4, 3, 5).reshape(n, c, down * side, across * side)
    delta[:, :, top : top + down * side, left : left + across * side] = filled
    return delta


def _shift(u: Tensor, side: int, delta: Tensor, eps: Tensor) -> Tensor:
    """A step of the l2 attack (paper, algorithm 3): a new pattern in one square, with the norm of that square, of a second one, which
    becomes 0, and what is left of eps."""
    _, c, h, w = delta.shape
    to, away = (_window(*_corner(u[:, i : i + 2], side, h, w), side, c) for i in (0, 2))
    old, moved = delta[to], delta[away].square().sum((2, 3), keepdim=True)
    out = delta.clone()
    out[away] = 0
    moved = moved + out[to].square().sum((2, 3), keepdim=True)  # of both squares, what they share counted once
    unspent = (eps.square() - _norm(delta, (1, 2, 3)).square()).clamp_min(0)
    new = _oriented(u[:, 4:5] < 0.5, side, delta) * _signs(u[:, 5:], delta.dtype)[:, :, None, None]
    new = new + old / (_norm(old, (2, 3)) + _TINY)
    out[to] = new / (_norm(new, (2, 3)) + _TINY) * (unspent / c + moved).sqrt()
    return out
