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
    rescale: bool = False

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
        scale = self._scale() if self.rescale else None
        # The sum: an image's gradient must not depend on its batch. allow_unused: a loss may ignore x (a constant model).
        total = self.loss.sum() if scale is None else (self.loss * scale).sum()
        g = torch.autograd.grad(total, self.x, allow_unused=True)[0]
        if g is None:
            return torch.zeros_like(self.x)
        if scale is not None:
            g = g / scale.reshape(-1, *[1] * (g.ndim - 1))
        return as_dense(g, self.x)

    def _scale(self) -> Tensor:
        """``[N]`` powers of two that bring each image's largest cotangent of the logits to between 32 and 64.

        float16 loses what is below 6e-8, and the gradient of a confident image is. Powers of two, so that nothing else is rounded.
        """
        one = torch.ones_like(self.loss)
        if not self.logits.requires_grad:  # the loss gets its gradient from elsewhere
            return one
        d = torch.autograd.grad(self.loss.sum(), self.logits, retain_graph=True, allow_unused=True)[0]
        if d is None:
            return one
        most = d.abs().amax(1)
        usable = most.isfinite() & (most > 0)
        exponent = torch.frexp(torch.where(usable, most, one)).exponent
        # 2^120: not much further, the scale itself would not be a float32.
        return torch.where(usable, torch.ldexp(one, (6 - exponent).clamp(-120, 120)), one)

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
    direction = recipe.direction
    velocity = None if direction is None else direction.start(x)
    rows: Tensor | None = None  # positions in `start` of the images that still stand; None: all
    for step in range(recipe.steps + 1):
        final = step == recipe.steps
        if final and not judge:
            return Attempt(Best.unjudged(x), bad, queries)
        number = restart * recipe.steps + step
        view = None if final else view_of(recipe, batch.index, batch.step_size, velocity, number)
        twice = asks_twice(recipe, view)
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
            view = view_of(recipe, batch.index, batch.step_size, velocity, number)
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
    return look(model, recipe, recipe.loss.only(batch.rows), x, batch.y, gradient=gradient, first=first, view=view)


def look(
    model: Callable[[Tensor], Tensor],
    recipe: Recipe,
    loss: Loss,
    x: Tensor,
    y: Tensor | None,
    *,
    gradient: bool,
    first: bool,
    view: Callable[[Tensor], Tensor] | None,
) -> Evaluation:
    """`evaluate` as the recipe wants it: gradients, and nothing else, in the precision that it asks for."""
    low = recipe.autocast if gradient else None
    if low is not None:
        model, loss = Lowered(model, low), loss.with_models(*(Lowered(m, low) for m in loss.models()))
    return evaluate(model, loss, recipe.targeted, x, y, gradient=gradient, first=first, view=view, rescale=low is not None)


class Lowered(nn.Module):
    """A network under autocast, whose logits come back in the dtype of the images, so that the loss is not computed in fewer bits."""

    def __init__(self, network: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        # No cache: what it holds would be baked into a graph, and stay when the weights change.
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            logits = self.network(x)
        return logits.to(x.dtype) if isinstance(logits, Tensor) else logits


def asks_twice(recipe: Recipe, view: Callable[[Tensor], Tensor] | None) -> bool:
    """Whether a step evaluates the iterate and, apart from it, the gradient.

    Where the gradient is taken elsewhere or in another precision, the iterate itself is evaluated only if somebody asks about it.
    """
    return recipe.watched and (view is not None or recipe.autocast is not None)


def view_of(
    recipe: Recipe, index: Tensor, step_size: float | Tensor, velocity: Tensor | None, number: int
) -> Callable[[Tensor], Tensor] | None:
    """What the model is shown at a step, from x; None: x."""
    direction = recipe.direction
    if direction is None or velocity is None or not direction.elsewhere:
        return None
    draw = Draw(direction.seed, index, number)
    return partial(direction.view, velocity=velocity, step_size=step_size, targeted=recipe.targeted, draw=draw)


def finite(g: Tensor) -> tuple[Tensor, Tensor]:
    """`g` with 0 for NaN and infinities, and their number, int64 ``[n]``."""
    if not g.is_cuda and g.sum().isfinite():  # one pass, and usual; a GPU would be waited for
        return g, torch.zeros(len(g), dtype=torch.int64, device=g.device)
    return masked(g)


def masked(g: Tensor) -> tuple[Tensor, Tensor]:
    """`finite`, without looking at a value: nothing waits for a GPU."""
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
    rescale: bool = False,
) -> Evaluation:
    """The model and the loss at `x`; `gradient`: it will be asked for; `first`: logits and labels are to be checked.

    `view`: what model and loss are shown instead of x; the gradient is still that with respect to x. `rescale`: the backward pass is in few
    bits, and must not underflow.
    """
    # An alias that can carry a gradient: x itself is stepped in place afterwards.
    leaf = x.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        shown = leaf if view is None else view(leaf)
        version = shown._version
        try:
            logits = model(shown)
        except RuntimeError as e:
            if first and not isinstance(e, torch.OutOfMemoryError):
                _check_dtype(model, shown, e)
            raise
        if shown._version != version:
            raise InputError("tsrfast.attacks: model must not change its input in place, but did")
        if first:  # once: looking at labels waits for a GPU
            check_logits(logits, x)
            for name, labels in {"y": y, **loss.per_image()}.items():
                check_labels(labels, logits.shape[1], name)
        return Evaluation(leaf, logits, *loss(shown, logits, y), targeted, rescale)
