"""What every path shares: the resolved attack, the images still under attack, the best candidates, and the loop over restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.direction import Direction
from tsrfast.attacks.losses import Loss
from tsrfast.attacks.starts import random_start
from tsrfast.attacks.threat import Threat
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class StepState:
    """What a callback sees at each step: the iterate *before* the step and what was computed there. Not to be written to.

    `rows` are the positions in the batch of the images that take the step: all of them, except where `early_stop` ended some.
    """

    restart: int
    step: int
    x: Tensor
    logits: Tensor
    loss: Tensor
    adversarial: Tensor
    gradient: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Recipe:
    """A resolved attack: everything the loop needs beside the model and the images."""

    threat: Threat
    loss: Loss
    step_size: float | Tensor
    steps: int
    restarts: int
    random_start: bool
    targeted: bool
    keep: str
    early_stop: bool
    seed: int
    on_step: Callable[[StepState], None] | None
    engine: str
    direction: Direction | None = None  # None: the gradient at the iterate
    memory_format: torch.memory_format | None = None  # of what the networks are shown; None: that of the images
    autocast: torch.dtype | None = None  # of gradients; verdicts and losses are the networks' own
    precision: str = "auto"  # of native code on CUDA

    @property
    def watched(self) -> bool:
        """Whether iterates themselves are asked about, besides the gradient."""
        return self.early_stop or self.keep == "best" or self.on_step is not None


@dataclass(frozen=True, eq=False)
class Batch:
    """Images under attack and what belongs to each of them."""

    rows: Tensor  # int64 [n], their positions in the batch that the user gave
    x0: Tensor
    y: Tensor | None
    index: Tensor
    threat: Threat
    step_size: float | Tensor

    def only(self, rows: Tensor) -> Batch:
        """The images at these positions, int64."""
        return Batch(
            self.rows[rows],
            select(self.x0, rows),
            None if self.y is None else self.y[rows],
            self.index[rows],
            dataclasses.replace(self.threat, eps=of_image(self.threat.eps, rows)),
            of_image(self.step_size, rows),
        )


def select(x: Tensor, rows: Tensor) -> Tensor:
    """Images at these positions, in x's memory format."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x[rows].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def own_copy(x: Tensor) -> Tensor:
    """The same images: dense, each in one block of memory, outside any graph, and free of inference mode."""
    x0 = x.detach().clone(memory_format=torch.preserve_format)
    if not torch.ops.aten.is_non_overlapping_and_dense(x0) or (len(x0) > 1 and x0.stride(0) != x0[0].numel()):
        x0 = x0.contiguous()
    return x0


def of_image(value: float | Tensor, rows: Tensor) -> float | Tensor:
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


@dataclass(eq=False)
class Best:
    """The best candidate of each image so far: adversarial before not, then the better loss; a NaN loss is the worst."""

    x: Tensor
    loss: Tensor
    adversarial: Tensor

    @classmethod
    def unjudged(cls, x: Tensor) -> Best:
        """Images of which nothing is known: loss NaN, not adversarial."""
        loss = torch.full((len(x),), torch.nan, dtype=x.dtype, device=x.device)
        return cls(x, loss, torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def offer(self, other: Best, targeted: bool, rows: Tensor | None = None) -> None:
        """Take the candidates that are better; `rows` says which images they belong to (None: all)."""
        self.take(self.surpassed(other, targeted, rows), other, rows)

    def surpassed(self, other: Best, targeted: bool, rows: Tensor | None = None) -> Tensor:
        """bool ``[n]``, which of the candidates are better; `rows` as in `offer`."""
        loss, adversarial = (self.loss, self.adversarial) if rows is None else (self.loss[rows], self.adversarial[rows])
        score = (-other.loss if targeted else other.loss).nan_to_num(nan=-torch.inf)
        held = (-loss if targeted else loss).nan_to_num(nan=-torch.inf)
        return (other.adversarial & ~adversarial) | ((other.adversarial == adversarial) & (score > held))

    def take(self, chosen: Tensor, other: Best, rows: Tensor | None = None) -> None:
        """Take the `chosen` (bool ``[n]``) candidates, whatever is held; `rows` as in `offer`."""
        if rows is None:  # selects instead of indexing: no wait for a GPU
            self.x = torch.where(chosen.reshape(-1, *[1] * (self.x.ndim - 1)), other.x, self.x)
            self.loss = torch.where(chosen, other.loss, self.loss)
            self.adversarial = torch.where(chosen, other.adversarial, self.adversarial)
        else:
            to = rows[chosen]
            self.x[to], self.adversarial[to] = other.x[chosen], other.adversarial[chosen]
            self.loss[to] = other.loss[chosen].to(self.loss.dtype)


@dataclass(frozen=True, eq=False)
class Attempt:
    """What one start led to: the chosen images, int64 ``[n]`` NaN gradient entries, int64 ``[n]`` forward passes.

    `ungraphed`: why a step was not replayed as a graph, where that was to be tried; None: it was, or was not to be.
    """

    best: Best
    bad: Tensor
    queries: Tensor
    ungraphed: str | None = None


# An attempt on a batch from its starts: (batch, start, judge, number of the restart); `judge`: loss and success are wanted.
Engine = Callable[[Batch, Tensor, bool, int], Attempt]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Gradients on, whatever is outside; afterwards the random states are what they were (a network may draw numbers)."""
    random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], device)


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Parameters that need no gradient inside the block; afterwards those that did need it again."""
    needed = [p for model in models for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        for p in needed:
            p.requires_grad_(False)
        yield
    finally:
        for p in needed:
            p.requires_grad_(True)


def check_labels(y: Tensor | None, classes: int, name: str = "y") -> None:
    """Labels, or what else numbers classes, are among the model's classes."""
    if y is not None and len(y) and not bool(((y >= 0) & (y < classes)).all()):
        bad = y[(y < 0) | (y >= classes)][0].item()
        raise InputError(f"tsrfast.attacks: {name} must be in 0..{classes - 1}, the model's classes, got {bad}")


def check_logits(logits: Tensor, x: Tensor) -> None:
    """A row of logits an image."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"tsrfast.attacks: model must return logits [{len(x)}, classes], got {what}")


def run_loop(engine: Engine, recipe: Recipe, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
    """Attack a batch: one attempt a restart, each image keeps its best.

    Args:
        engine: makes an attempt.
        recipe: the attack.
        x0: clean images ``[N, ...]``, dense, without gradient; not changed.
        y: labels, int64 ``[N]``, or None for losses that need none.
        index: int64 ``[N]``, the images' numbers.
        judge: whether loss and success of the returned images are wanted (else NaN and False; one forward pass less).
    """
    judge = judge or recipe.keep == "best" or recipe.early_stop or recipe.restarts > 1
    batch = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, recipe.threat, recipe.step_size)
    total: Attempt | None = None
    for restart in range(recipe.restarts):
        if recipe.random_start:
            start = random_start(batch.x0, batch.threat, seed=recipe.seed, index=batch.index, restart=restart)
        else:
            start = batch.x0.clone()
        got = engine(batch, start, judge, restart)
        if total is None:
            total = got
        else:
            total.best.offer(got.best, recipe.targeted, batch.rows if recipe.early_stop else None)
            total.bad.index_add_(0, batch.rows, got.bad)
            total.queries.index_add_(0, batch.rows, got.queries)
        if recipe.early_stop:
            batch = batch.only((~got.best.adversarial).nonzero().squeeze(1))
            if not len(batch.rows):
                break
    assert total is not None  # restarts >= 1
    return total
