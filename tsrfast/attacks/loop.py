"""The one loop that serves every iterative attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.losses import Loss, wrong
from tsrfast.attacks.starts import random_start
from tsrfast.attacks.threat import Threat
from tsrfast.errors import InputError
from tsrfast.ops import pgd_step_
from tsrfast.ops._register import same_layout


@dataclass(frozen=True, eq=False)
class StepState:
    """What a callback sees at each step: the iterate *before* the step and what was computed there. Not to be written to."""

    restart: int
    step: int
    x: Tensor
    logits: Tensor
    loss: Tensor
    adversarial: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """A resolved attack: everything the loop needs beside the model and the images."""

    threat: Threat
    loss: Loss
    step_size: float | Tensor
    steps: int
    restarts: int
    random_start: bool
    targeted: bool
    keep: str
    seed: int
    on_step: Callable[[StepState], None] | None


@dataclass(eq=False)
class Best:
    """The best candidate of each image so far: adversarial before not, then the better loss; a NaN loss is the worst."""

    x: Tensor
    loss: Tensor
    adversarial: Tensor

    def offer(self, x: Tensor, loss: Tensor, adversarial: Tensor, targeted: bool) -> None:
        score = (-loss if targeted else loss).nan_to_num(nan=-torch.inf)
        held = (-self.loss if targeted else self.loss).nan_to_num(nan=-torch.inf)
        better = (adversarial & ~self.adversarial) | ((adversarial == self.adversarial) & (score > held))
        self.x = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, self.x)
        self.loss = torch.where(better, loss, self.loss)
        self.adversarial = torch.where(better, adversarial, self.adversarial)


@contextmanager
def undisturbed(*models: nn.Module, device: torch.device) -> Iterator[None]:
    """Run models in eval mode with gradients on, and leave modes (of every submodule) and random states as they were."""
    modules = {m: m.training for model in models for m in model.modules()}
    random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        for m in modules:
            m.training = False
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], device)
        for m, training in modules.items():
            m.training = training


def check_logits(logits: Tensor, n: int, y: Tensor | None) -> None:
    """The model gave ``[N, classes]``, and labels are among them."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"tsrfast.attacks: model must return logits [{n}, classes], got {what}")
    if y is not None and n and not bool(((y >= 0) & (y < logits.shape[1])).all()):
        bad = y[(y < 0) | (y >= logits.shape[1])][0].item()
        raise InputError(f"tsrfast.attacks: y must be in 0..{logits.shape[1] - 1}, the model's classes, got {bad}")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model and a loss at one iterate."""

    logits: Tensor
    loss: Tensor
    answer: Tensor
    targeted: bool

    @property
    def adversarial(self) -> Tensor:
        """bool ``[N]``; worked out only where somebody asks."""
        return wrong(self.logits, self.answer) ^ self.targeted


def _evaluate(model: nn.Module, plan: Plan, x: Tensor, y: Tensor | None, first: bool) -> Evaluation:
    logits = model(x)
    if first:  # once an attack: looking at labels waits for a GPU
        check_logits(logits, len(x), y)
    return Evaluation(logits, *plan.loss(x, logits, y), plan.targeted)


def run_loop(
    model: nn.Module, plan: Plan, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool
) -> tuple[Best, Tensor, int]:
    """Attack a batch.

    Args:
        model: the attacked network, already in eval mode (`undisturbed`).
        plan: the attack.
        x0: clean images ``[N, ...]``, dense, without gradient; not changed.
        y: labels, int64 ``[N]``, or None for losses that need none.
        index: int64 ``[N]``, the images' numbers.
        judge: whether loss and success of the returned images are wanted (one more forward pass).

    Returns:
        (best, bad, queries): the chosen images (with their loss and success where judged, else NaN and False), int64 ``[N]`` NaN
        gradient entries, and forward passes an image.
    """
    n, queries = len(x0), 0
    best: Best | None = None
    bad = torch.zeros(n, dtype=torch.int64, device=x0.device)
    judge = judge or plan.keep == "best" or plan.restarts > 1
    for restart in range(plan.restarts):
        if plan.random_start:
            x = random_start(x0, plan.threat, seed=plan.seed, index=index, restart=restart)
        else:
            x = x0.clone()
        for step in range(plan.steps):
            leaf = x.detach().requires_grad_()
            at = _evaluate(model, plan, leaf, y, first=queries == 0)
            queries += 1
            if not at.loss.requires_grad:
                raise InputError(
                    "tsrfast.attacks: model must be differentiable, but its loss has no gradient (detached, or no_grad inside?)"
                )
            # The sum: an image's gradient must not depend on its batch. allow_unused: a loss may ignore x (a constant model).
            gradient = torch.autograd.grad(at.loss.sum(), leaf, allow_unused=True)[0]
            g = torch.zeros_like(x) if gradient is None else gradient
            if not same_layout(g, x):
                g = torch.empty_like(x).copy_(g)
            if plan.on_step is not None:
                plan.on_step(StepState(restart, step, x.clone(), at.logits.detach(), at.loss.detach(), at.adversarial, g))
            if plan.keep == "best":
                best = _offer(best, x.clone(), at)
            with torch.no_grad():
                t = plan.threat
                bad += pgd_step_(
                    x, x0, g, step_size=plan.step_size, eps=t.eps, norm=t.norm, lo=t.lo, hi=t.hi, targeted=plan.targeted
                )
        if judge:
            with torch.no_grad():
                at = _evaluate(model, plan, x, y, first=queries == 0)
            queries += 1
            best = _offer(best, x, at)
        else:
            nothing = torch.full((n,), torch.nan, dtype=x0.dtype, device=x0.device)
            best = Best(x, nothing, torch.zeros(n, dtype=torch.bool, device=x0.device))
    assert best is not None  # restarts >= 1
    return best, bad, queries


def _offer(best: Best | None, x: Tensor, at: Evaluation) -> Best:
    if best is None:
        return Best(x, at.loss.detach(), at.adversarial)
    best.offer(x, at.loss.detach(), at.adversarial, at.targeted)
    return best
