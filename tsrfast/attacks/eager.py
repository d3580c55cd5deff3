"""An attempt in PyTorch: forward and backward of any module, and the fused step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tsrfast.attacks.direction import Draw
from tsrfast.attacks.loop import Attempt, Batch, Best, Recipe, StepState, check_labels, check_logits, select
from tsrfast.attacks.losses import Loss, wrong
from tsrfast.errors import InputError
from tsrfast.ops import pgd_step_
from tsrfast.ops._register import same_layout


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model and a loss at one iterate."""

    x: Tensor
    logits: Tensor
    loss: Tensor
    answer: Tensor
    targeted: bool

    @property
    def adversarial(self) -> Tensor:
        """bool ``[N]``; worked out only where somebody asks."""
        return wrong(self.logits, self.answer) ^ self.targeted

    @property
    def candidate(self) -> Best:
        return Best(self.x.detach(), self.loss.detach(), self.adversarial)

    def gradient(self) -> Tensor:
        """Of the loss with respect to x, like x."""
        if not self.loss.requires_grad:
            raise InputError(
                "tsrfast.attacks: model must be differentiable, but its loss has no gradient (detached, or no_grad inside?)"
            )
        # The sum: an image's gradient must not depend on its batch. allow_unused: a loss may ignore x (a constant model).
        g = torch.autograd.grad(self.loss.sum(), self.x, allow_unused=True)[0]
        if g is None:
            return torch.zeros_like(self.x)
        return as_dense(g, self.x)

    def only(self, rows: Tensor) -> Evaluation:
        """The images at these positions, without graph."""
        x, logits, loss, answer = (t.detach() for t in (self.x, self.logits, self.loss, self.answer))
        return Evaluation(select(x, rows), logits[rows], loss[rows], answer[rows], self.targeted)


def attempt(
    model: Callable[[Tensor], Tensor], recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int
) -> Attempt:
    """One run of the loop from `start` (see `loop.Engine`). `model` is in eval mode already (`loop.evaluating`)."""
    best = Best.unjudged(start)
    bad = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    queries = torch.zeros_like(bad)
    x = start.clone()
    direction, watched = recipe.direction, recipe.early_stop or recipe.keep == "best" or recipe.on_step is not None
    velocity = None if direction is None else direction.start(x)
    rows: Tensor | None = None  # positions in `start` of the images that still stand; None: all
    for step in range(recipe.steps + 1):
        final = step == recipe.steps
        if final and not judge:
            return Attempt(Best.unjudged(x), bad, queries)
        number = restart * recipe.steps + step
        view = None if final else _view(recipe, batch, velocity, number)
        # Where the gradient is taken elsewhere, the iterate itself is evaluated only if somebody asks about it.
        twice = view is not None and watched
        shown = None if twice else view
        at = _look(model, recipe, batch, x, gradient=not (final or twice), first=step == 0, view=shown)
        _add(queries, 1, rows)
        if recipe.keep == "best":
            best.offer(at.candidate, recipe.targeted, rows)
        elif final:
            best.take(torch.ones_like(at.adversarial), at.candidate, rows)
        if final:
            break
        standing: Tensor | None = None
        if recipe.early_stop and bool((fallen := at.adversarial).any()):
            best.take(fallen, at.candidate, rows)
            standing = (~fallen).nonzero().squeeze(1)
            if not len(standing):
                break
        g = None if twice else at.gradient()  # before the fallen are left out: the graph is that of all
        if standing is not None:
            at, batch, x = at.only(standing), batch.only(standing), select(x, standing)
            g, velocity = (None if t is None else select(t, standing) for t in (g, velocity))
            rows = standing if rows is None else rows[standing]
        if g is None:
            view = _view(recipe, batch, velocity, number)
            g = _look(model, recipe, batch, x, gradient=True, first=step == 0, view=view).gradient()
            _add(queries, 1, rows)
        if recipe.on_step is not None:
            recipe.on_step(
                StepState(restart, step, x.clone(), at.logits.detach(), at.loss.detach(), at.adversarial, g, batch.rows)
            )
        if direction is not None and velocity is not None:
            g, count = finite(g)
            _add(bad, count, rows)
            velocity = direction.next(velocity, g)
            g = as_dense(velocity, x)
        t, size = batch.threat, batch.step_size
        with torch.no_grad():
            count = pgd_step_(
                x, batch.x0, g, step_size=size, eps=t.eps, norm=t.norm, lo=t.lo, hi=t.hi, targeted=recipe.targeted
            )
        _add(bad, count, rows)
    return Attempt(best, bad, queries)


def _look(
    model: Callable[[Tensor], Tensor],
    recipe: Recipe,
    batch: Batch,
    x: Tensor,
    *,
    gradient: bool,
    first: bool,
    view: Callable[[Tensor], Tensor] | None,
) -> Evaluation:
    loss = recipe.loss.only(batch.rows)
    return evaluate(model, loss, recipe.targeted, x, batch.y, gradient=gradient, first=first, view=view)


def _view(recipe: Recipe, batch: Batch, velocity: Tensor | None, number: int) -> Callable[[Tensor], Tensor] | None:
    """What the model is shown at a step, from x; None: x."""
    direction = recipe.direction
    if direction is None or velocity is None or not direction.elsewhere:
        return None
    draw = Draw(direction.seed, batch.index, number)
    return partial(direction.view, velocity=velocity, step_size=batch.step_size, targeted=recipe.targeted, draw=draw)


def finite(g: Tensor) -> tuple[Tensor, Tensor]:
    """`g` with 0 for NaN and infinities, and their number, int64 ``[n]``."""
    if g.sum().isfinite():  # one pass, and usual
        return g, torch.zeros(len(g), dtype=torch.int64, device=g.device)
    lost = ~g.isfinite()
    return g.masked_fill(lost, 0.0), lost.flatten(1).sum(1)


def as_dense(g: Tensor, x: Tensor) -> Tensor:
    """In x's strides and dtype."""
    return g if same_layout(g, x) and g.dtype == x.dtype else torch.empty_like(x).copy_(g)


def _add(total: Tensor, more: Tensor | int, rows: Tensor | None) -> None:
    if rows is None:
        total += more
    else:
        total[rows] += more


def _check_dtype(model: Callable[[Tensor], Tensor], x: Tensor, error: RuntimeError) -> None:
    """Says so if the model failed on images of a dtype that none of its parameters has. Not before: a model may convert them itself."""
    held = {p.dtype for p in model.parameters() if p.is_floating_point()} if isinstance(model, nn.Module) else set()
    if held and x.dtype not in held:
        names = ", ".join(sorted(map(str, held)))
        raise InputError(f"tsrfast.attacks: x must have the dtype of the model, {names}, got {x.dtype}") from error


def evaluate(
    model: Callable[[Tensor], Tensor],
    loss: Loss,
    targeted: bool,
    x: Tensor,
    y: Tensor | None,
    *,
    gradient: bool,
    first: bool,
    view: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """The model and the loss at `x`; `gradient`: it will be asked for; `first`: logits and labels are to be checked.

    `view`: what model and loss are shown instead of x; the gradient is still that with respect to x.
    """
    # An alias that can carry a gradient: x itself is stepped in place afterwards.
    leaf = x.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        shown = leaf if view is None else view(leaf)
        version = shown._version
        try:
            logits = model(shown)
        except RuntimeError as e:
            if first:
                _check_dtype(model, shown, e)
            raise
        if shown._version != version:
            raise InputError("tsrfast.attacks: model must not change its input in place, but did")
        if first:  # once: looking at labels waits for a GPU
            check_logits(logits, x)
            for name, labels in {"y": y, **loss.per_image()}.items():
                check_labels(labels, logits.shape[1], name)
        return Evaluation(leaf, logits, *loss(shown, logits, y), targeted)
