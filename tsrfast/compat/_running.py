"""How drop-ins run the attacks of `tsrfast.attacks`: from starts that PyTorch's generator draws, and on plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast import attacks
from tsrfast.attacks import eager, native
from tsrfast.attacks.apgd import _APGD, project
from tsrfast.attacks.loop import Attempt, Batch, Best, own_copy, undisturbed
from tsrfast.attacks.losses import Loss
from tsrfast.errors import InputError

Start = Callable[[Tensor], Tensor]  # from clean images


class Function(nn.Module):
    """A function from images to logits as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def as_module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    return model if isinstance(model, nn.Module) else Function(model)


def checked_labels(library: str, labels: object, x: Tensor, soft: bool = False) -> Tensor:
    """A copy on the images' device: int64 ``[N]``, or if `soft` also probabilities ``[N, classes]``.

    Raises:
        InputError: anything else; in the name of the drop-in `library`.
    """
    if isinstance(labels, Tensor) and len(labels.shape) and len(labels) == len(x):
        if labels.ndim == 1 and labels.dtype == torch.int64:
            return labels.clone().detach().to(x.device)
        if soft and labels.ndim == 2 and labels.is_floating_point():
            return labels.clone().detach().to(x.device)
    what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    allowed = f"int64 of shape ({len(x)},)" + (f", or probabilities ({len(x)}, classes)" if soft else "")
    raise InputError(f"tsrfast.compat.{library}: labels must be {allowed}, got {what}")


def ascend(attack: attacks.PGD, network: nn.Module, x: Tensor, y: Tensor, start: Start | None = None) -> Best:
    """The loop of `attack` from a start of the caller's (None: the images); its own `random_start` and `restarts` do not count.

    The engines are called directly, not through the attack: it would begin where its own generator says, put the network into eval mode
    whatever the caller wants, and restore the random state that a network with dropout is to advance.

    Args:
        network: in the mode in which it is to be attacked.
        x: images; checked here.
        y: labels, as `checked_labels` returns them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        recipe = attack._recipe()
        recipe.threat.check_images(x)
        x0 = own_copy(x)
        begin = x0.clone() if start is None else start(x0)
        if not x0.numel():
            return Best.unjudged(begin)
        rows = torch.arange(len(x0), device=x0.device)
        batch = Batch(rows, x0, y, rows, recipe.threat, recipe.step_size)
        chains = None
        with undisturbed(x0.device):
            if native.beyond(recipe) is None:
                chains = native.choose(recipe, network, x0)[1]
            else:
                network, _ = native.callable_network(network, x0, recipe.engine)
        if chains is None:
            return eager.attempt(network, recipe, batch, begin, False, 0).best
        return native.attempt(chains, recipe, batch, begin, False, 0).best


def may_leave(abort_early: bool, steps: int) -> bool:
    """Whether images may end by themselves where an original with `abort_early` ends its whole batch.

    A batch's sum goes on falling when single images seem to stand still, so in short runs, where it is looked at every few steps, they would
    end too soon: CW of 20 steps left 26 % more change on a trained network.
    """
    return abort_early and steps >= 500


def search(attack: attacks.Attack, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What calling `attack` returns; mode and random state of the network as in `ascend`."""
    with torch.inference_mode(False), torch.enable_grad():
        terms = attack._terms()
        terms.threat.check_images(x)
        x0 = own_copy(x)
        if not x0.numel():
            return x0
        with undisturbed(x0.device):
            network, _ = native.callable_network(network, x0, terms.engine)
        return attack._attack(network, x0, y, torch.arange(len(x0), device=x0.device), False).best.x


# Auto-PGD from starts as its authors' code draws them, and those who took it over

Draw = Callable[[Tensor], Tensor]  # from clean images to random numbers of their shape


def drawn(norm: str, generator: torch.Generator | None = None) -> Draw:
    """What a start of Auto-PGD is made of: numbers uniform in [-1, 1] for linf, else normal; float32, drawn on the CPU."""

    def draw(x0: Tensor) -> Tensor:
        if norm == "linf":
            return 2 * torch.rand(x0.shape, generator=generator) - 1
        return torch.randn(x0.shape, generator=generator)

    return draw


class _Drawn(_APGD):
    draw: Draw

    def _ascend(self, network: nn.Module, loss: Loss, batch: Batch, start: Tensor, targeted: bool) -> Attempt:
        x0, threat = batch.x0, batch.threat
        t = self.draw(x0).to(x0)
        if threat.norm == "l1":
            start = x0 + t if self.larger_eps else project(x0 + t, batch)  # with larger_eps it is projected on the widest ball
        else:  # on the sphere
            length = t.flatten(1).norm(p=2 if threat.norm == "l2" else torch.inf, dim=1)
            shape = (-1, *[1] * (x0.ndim - 1))
            eps = torch.as_tensor(threat.eps, dtype=x0.dtype, device=x0.device)
            start = (x0 + eps.reshape(shape) * t / length.reshape(shape)).clamp(threat.lo, threat.hi)
        return super()._ascend(network, loss, batch, start, targeted)


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnAPGD(_Drawn, attacks.APGD):
    """`tsrfast.attacks.APGD` on starts made of what `draw` says, called once a restart on the images that still stand."""

    random_start: bool = False
    draw: Draw


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnAPGDTargeted(_Drawn, attacks.APGDTargeted):
    """`tsrfast.attacks.APGDTargeted` likewise."""

    random_start: bool = False
    draw: Draw
