"""The loop of steps without a look at any value in between: for GPUs, which such a look would stop.

Every image takes every step, and masks say for whom it counts. Where `early_stop` ends images, those that still stand are gathered into
a smaller batch every few steps. Image by image the result is that of `eager.attempt`, which gathers them at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tsrfast.attacks.eager import Evaluation, as_dense, asks_twice, look, masked, view_of
from tsrfast.attacks.loop import Attempt, Batch, Best, Recipe
from tsrfast.attacks.losses import Loss
from tsrfast.ops import pgd_step_

Model = Callable[[Tensor], Tensor]
State = dict[str, Tensor]  # what images have, a tensor of one entry an image for each

# Steps between two looks at who still stands. A look waits for the GPU; between two looks the fallen cost what the others do. Most images
# of an undefended network fall within two to five steps.
EVERY = 4
# What a step does not change.
GIVEN = ("rows", "places", "index", "x0", "y", "eps", "step_size")


class Steps:
    """Images under attack, and a step of all of them, written over what they were.

    Args:
        recipe: the attack.
        loss: of these images alone.
        state: see `begin`; changed in place.
        count: of the first images; the others fill the batch up, and are nobody's.
    """

    def __init__(self, recipe: Recipe, loss: Loss, state: State, count: int) -> None:
        self.recipe, self.loss, self.state, self.count = recipe, loss, state, count

    @property
    def size(self) -> int:
        return len(self.state["x"])

    def step(self, model: Model, number: int, first: bool = False) -> Evaluation:
        """One step; `number` counts steps over restarts, `first` is as in `eager.evaluate`. Returns what the networks said."""
        s, recipe = self.state, self.recipe
        x, standing, direction, threat = s["x"], s["standing"], recipe.direction, recipe.threat
        size = s.get("step_size", recipe.step_size)
        view = view_of(recipe, s["index"], size, s.get("velocity"), number)
        twice = asks_twice(recipe, view)
        at = self._look(model, gradient=not twice, first=first, view=None if twice else view)
        s["queries"] += standing
        if recipe.watched:
            self._watch(at)
        if twice:
            at = self._look(model, gradient=True, first=first, view=view)
            s["queries"] += standing
        g = at.gradient()
        if direction is not None:
            g, count = masked(g)
            s["bad"] += count * standing
            s["velocity"].copy_(direction.next(s["velocity"], g))
            g = as_dense(s["velocity"], x)
        eps = s.get("eps", threat.eps)
        with torch.no_grad():
            count = pgd_step_(
                x, s["x0"], g, step_size=size, eps=eps, norm=threat.norm, lo=threat.lo, hi=threat.hi, targeted=recipe.targeted
            )
        s["bad"] += count * standing
        return at

    def judge(self, model: Model, first: bool) -> None:
        """The last forward pass: loss and success where the images are now."""
        at = self._look(model, gradient=False, first=first, view=None)
        self.state["queries"] += self.state["standing"]
        found = at.candidate
        if self.recipe.keep == "best":
            self._keep(self._best().surpassed(found, self.recipe.targeted), found)
        else:
            self._keep(torch.ones_like(found.adversarial), found)

    def _watch(self, at: Evaluation) -> None:
        found = at.candidate
        if self.recipe.keep == "best":
            self._keep(self._best().surpassed(found, self.recipe.targeted), found)
        if self.recipe.early_stop:
            self._keep(found.adversarial, found)
            self.state["standing"] &= ~found.adversarial

    def _best(self) -> Best:
        s = self.state
        return Best(s["best_x"], s["best_loss"], s["best_adversarial"])

    def _keep(self, chosen: Tensor, found: Best) -> None:
        """The `chosen` candidates become the best, where their images stand."""
        held = self._best()
        held.take(chosen & self.state["standing"], found)
        for name, value in (("best_x", held.x), ("best_loss", held.loss), ("best_adversarial", held.adversarial)):
            self.state[name].copy_(value)

    def _look(self, model: Model, *, gradient: bool, first: bool, view: Callable[[Tensor], Tensor] | None) -> Evaluation:
        s = self.state
        return look(model, self.recipe, self.loss, s["x"], s.get("y"), gradient=gradient, first=first, view=view)


class Launcher(Protocol):
    """How steps are made and run."""

    ungraphed: str | None
    """Why steps are not replayed though that was tried."""

    def begin(self, state: State) -> Steps:
        """Steps of all images of a state."""

    def size(self, standing: int) -> int:
        """Of the batch that so many images would be gathered into."""

    def gather(self, state: State, rows: Tensor, left: int) -> Steps:
        """Steps of the images at these positions, int64; `left` steps are still to be made."""

    def advance(self, steps: Steps, number: int, first: bool) -> None:
        """A step."""


class OneByOne:
    """Steps launched from Python, on exactly the images that are asked for."""

    def __init__(self, model: Model, recipe: Recipe, ungraphed: str | None = None) -> None:
        self.model, self.recipe, self.ungraphed = model, recipe, ungraphed

    def begin(self, state: State) -> Steps:
        return Steps(self.recipe, self.recipe.loss.only(state["places"]), state, len(state["x"]))

    def size(self, standing: int) -> int:
        return standing

    def gather(self, state: State, rows: Tensor, left: int) -> Steps:
        mine = room(state, len(rows))
        fill(mine, state, rows)
        return self.begin(mine)

    def advance(self, steps: Steps, number: int, first: bool) -> None:
        steps.step(self.model, number, first)


def attempt(model: Model, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int) -> Attempt:
    """One run of the loop from `start` (see `loop.Engine`), launched step by step. `recipe.on_step` is not called."""
    recipe = plain_numbers(recipe)
    return run(OneByOne(model, recipe), model, recipe, batch, start, judge, restart)


def run(
    launcher: Launcher, model: Model, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int
) -> Attempt:  # fmt: skip
    """As `attempt`; `recipe` is one of `plain_numbers`."""
    whole = begin(recipe, batch, start)
    steps = launcher.begin(whole) if recipe.steps else OneByOne(model, recipe).begin(whole)
    for step in range(recipe.steps):
        launcher.advance(steps, restart * recipe.steps + step, first=step == 0)
        left = recipe.steps - step - 1
        if recipe.early_stop and left and (step + 1) % EVERY == 0:
            standing = steps.state["standing"].nonzero().squeeze(1)
            if not len(standing):
                break
            if launcher.size(len(standing)) < steps.size:
                rows = steps.state["rows"][standing]
                store(whole, steps)
                steps = launcher.gather(whole, rows, left)
    store(whole, steps)
    if not judge:
        return Attempt(Best.unjudged(whole["x"]), whole["bad"], whole["queries"], launcher.ungraphed)
    _finish(model, recipe, whole)
    best = Best(whole["best_x"], whole["best_loss"], whole["best_adversarial"])
    return Attempt(best, whole["bad"], whole["queries"], launcher.ungraphed)


def _finish(model: Model, recipe: Recipe, whole: State) -> None:
    """Judges the images that stand."""
    if not recipe.watched:
        whole |= _unjudged(whole["x"])
    last = OneByOne(model, recipe)
    if not recipe.early_stop:
        last.begin(whole).judge(model, first=True)
        return
    rows = whole["standing"].nonzero().squeeze(1)
    if len(rows):
        steps = last.gather(whole, rows, 0)
        steps.judge(model, first=True)
        store(whole, steps)


def plain_numbers(recipe: Recipe) -> Recipe:
    """The recipe with numbers where it had tensors of one: looked at once, not at every step."""

    def plain(value: float | Tensor) -> float | Tensor:
        return value.item() if isinstance(value, Tensor) and not value.ndim else value

    threat = dataclasses.replace(recipe.threat, eps=plain(recipe.threat.eps))
    return dataclasses.replace(recipe, threat=threat, step_size=plain(recipe.step_size))


def begin(recipe: Recipe, batch: Batch, start: Tensor) -> State:
    """What the images of a batch have before the first step."""
    n, device = len(start), start.device
    state = {
        "rows": torch.arange(n, device=device),  # positions in this batch
        "places": batch.rows,  # positions in the batch that the user gave
        "index": batch.index,
        "x": start.clone(),
        "x0": batch.x0,
        "standing": torch.ones(n, dtype=torch.bool, device=device),
        "queries": torch.zeros(n, dtype=torch.int64, device=device),
        "bad": torch.zeros(n, dtype=torch.int64, device=device),
    }
    if batch.y is not None:
        state["y"] = batch.y
    for name, value in (("eps", batch.threat.eps), ("step_size", batch.step_size)):
        if isinstance(value, Tensor) and value.ndim:
            state[name] = value
    if recipe.direction is not None:
        state["velocity"] = recipe.direction.start(start)
    return state | _unjudged(start) if recipe.watched else state


def _unjudged(x: Tensor) -> State:
    best = Best.unjudged(x.clone())
    return {"best_x": best.x, "best_loss": best.loss, "best_adversarial": best.adversarial}


def room(state: State, size: int) -> State:
    """Uninitialised tensors for `size` images, each laid out as it is in `state`."""

    def like(t: Tensor) -> Tensor:
        return torch.empty_strided((size, *t.shape[1:]), (t[0].numel(), *t.stride()[1:]), dtype=t.dtype, device=t.device)

    return {name: like(t) for name, t in state.items()}


def fill(into: State, state: State, rows: Tensor) -> None:
    """The images at these positions, at most as many as there is room for; then the first is repeated, as nobody's."""
    count = len(rows)
    for name, t in state.items():
        into[name][:count] = t[rows]
        into[name][count:] = into[name][:1]
    into["standing"][count:] = False


def store(into: State, steps: Steps) -> None:
    """What became of the images, at the positions that they were taken from."""
    if steps.state is into:
        return
    rows = steps.state["rows"][: steps.count]
    for name in steps.state.keys() - set(GIVEN):
        into[name][rows] = steps.state[name][: steps.count]
