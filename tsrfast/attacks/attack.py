"""What all attacks have in common: checking what they are given, choosing a path, running the loop, and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks import eager, native
from tsrfast.attacks.loop import Attempt, Best, Recipe, own_copy, run_loop, undisturbed
from tsrfast.attacks.native import Route
from tsrfast.chain import Chain
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Adversarial images and what is known about each of N.

    Attributes:
        x_adv: images as the input, inside ball and box (up to one rounding).
        success: bool ``[N]``, whether the loss's notion of adversarial (targeted: of the target) holds at `x_adv`.
        loss: ``[N]``, the loss there.
        steps: gradient steps asked for, restarts included: the most that an image takes.
        queries: int64 ``[N]``, forward passes each image took.
        bad_gradients: int64 ``[N]``, gradient entries without a direction (NaN) over all steps: not 0 means a broken model.
        path: which code ran: ``chain`` or ``eager`` (see `Route`).
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    steps: int
    queries: Tensor
    bad_gradients: Tensor
    path: str


class Attack:
    """An attack is a value: its fields say everything, calling it changes nothing but the tensor it returns."""

    def _recipe(self) -> Recipe:
        raise TypeError(f"{type(self).__name__} must define _recipe()")

    def __call__(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Adversarial images for `x`.

        Args:
            model: network from ``[N, C, H, W]`` to logits ``[N, classes]``; run in eval mode, left as it was. Or what
                `tsrfast.compile` made of one, used as it is.
            x: clean images in [0, 1] (or the attack's own box).
            y: int64 ``[N]`` labels (targeted: the targets); not needed by oracle losses.
            index: int64 ``[N]``, the images' numbers in their data set, default 0..N-1; random starts depend on them, so that an image
                gets the same start in any batch.

        Returns:
            A new tensor as `x`.

        Raises:
            InputError: bad images, labels, shapes or devices; the chain's path cannot be taken, but must be (see `plan`).
        """
        return self._run(model, x, y, index, judge=False).x_adv

    def run(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> AttackResult:
        """As calling the attack, and also says how it went (one more forward pass)."""
        return self._run(model, x, y, index, judge=True)

    def plan(self, model: nn.Module | Chain, x: Tensor | None = None) -> Route:
        """Which code a call would take, and why.

        Native code (``chain``) runs float32 on the CPU, for tsrfast's own losses and for networks that `tsrfast.compile` can compile;
        everything else runs in PyTorch (``eager``).

        Args:
            model: as for a call.
            x: images of which only shape, dtype and device count; None: images that the network itself says it takes.

        Raises:
            InputError: the chain's path cannot be taken, but must be: ``engine="chain"``, or a network is a `Chain`. `x` is None, and
                nothing says what images the network takes.
        """
        recipe = self._recipe()
        with undisturbed(torch.device("cpu") if x is None else x.device):
            return native.choose(recipe, model, x)[0]

    def _run(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None, index: Tensor | None, judge: bool) -> AttackResult:
        recipe = self._recipe()
        recipe.threat.check_images(x)
        if recipe.loss.needs_labels and y is None:
            raise InputError(f"tsrfast.attacks: y is needed by loss {recipe.loss.name!r}")
        if recipe.targeted and not recipe.loss.needs_labels:
            raise InputError(f"tsrfast.attacks: targeted needs a loss with labels, got {recipe.loss.name!r}")
        y = _check_integers("y", y, x)
        index = _check_integers("index", index, x)
        if isinstance(recipe.step_size, Tensor) and recipe.step_size.ndim and recipe.step_size.shape != x.shape[:1]:
            raise InputError(
                f"tsrfast.attacks: step_size must be a number or of shape ({len(x)},), got {tuple(recipe.step_size.shape)}"
            )
        with undisturbed(x.device):
            # Copies: free of inference mode.
            y = None if y is None else y.clone()
            index = torch.arange(len(x), device=x.device) if index is None else index.clone()
            route, chains = native.choose(recipe, model, x)
            if not x.numel():
                none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
                got = Attempt(Best.unjudged(own_copy(x)), none, none.clone())
            elif chains is None:
                with evaluating(*(m for m in (model, *recipe.loss.models()) if isinstance(m, nn.Module))):
                    got = run_loop(partial(eager.attempt, model, recipe), recipe, own_copy(x), y, index, judge)
            else:
                got = native.run(chains, recipe, x, y, index, judge)
        best = got.best
        return AttackResult(
            best.x, best.adversarial, best.loss, recipe.steps * recipe.restarts, got.queries, got.bad, route.path
        )


def _check_integers(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None:
        return None
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"tsrfast.attacks: {name} must be int64 of shape ({len(x)},), got {what}")
    if t.device != x.device:
        raise InputError(f"tsrfast.attacks: {name} must be on x's device {x.device}, got {t.device}")
    return t.detach()
