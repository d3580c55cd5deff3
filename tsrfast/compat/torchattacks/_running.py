"""From an attack object of torchattacks to a run of `tsrfast.attacks`: images, labels, and the model as `get_logits` says it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast import attacks
from tsrfast.attacks.loop import own_copy
from tsrfast.compat import _running
from tsrfast.compat.torchattacks.attack import Attack
from tsrfast.errors import InputError


def ascend(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    kind: type[attacks.PGD] = attacks.PGD,
    *,
    start: _running.Start | None = None,
    eot_iter: int = 1,
    steps: int,
    **fields: Any,
) -> Tensor:
    """The loop of `kind` with its `fields`, from a start of the caller's.

    Labels may be probabilities, as `torch.nn.CrossEntropyLoss` takes them.
    """
    x0, y, network, engine = _prepared(attack, images, labels, soft=True)
    loss: attacks.Loss = attacks.CrossEntropy()
    if y.ndim == 2 or eot_iter > 1:
        loss = _CrossEntropies(network, operator.index(eot_iter))
    settings = {"loss": loss, "steps": operator.index(steps), "random_start": False, "engine": engine, **fields}
    own = kind(targeted=attack.targeted, **settings)
    return _running.ascend(own, network, x0, y, start).x


def search(attack: Attack, images: Tensor, labels: Tensor, own: Callable[[str], attacks.Attack], aims: bool = True) -> Tensor:
    """What the attack that `own` makes for an engine returns; `aims`: if targeted, it takes targets in the place of labels."""
    x0, y, network, engine = _prepared(attack, images, labels, soft=False, aims=aims)
    return _running.search(own(engine), network, x0, y)


def _prepared(
    attack: Attack, images: Tensor, labels: Tensor, soft: bool, aims: bool = True
) -> tuple[Tensor, Tensor, nn.Module, str]:
    """Images, labels or targets, the model, and the engine that may run it."""
    with torch.inference_mode(False), torch.enable_grad():
        x0 = _pixels(attack, images.to(attack.device))
        y = _running.checked_labels("torchattacks", labels, x0, soft)
        if attack.targeted and aims:
            y = _running.checked_labels("torchattacks", attack.get_target_label(x0.clone(), y), x0, soft)
        network, compiles = _network(attack, x0)
    return x0, y, network, "auto" if compiles else "eager"


@dataclass(frozen=True, eq=False)
class _CrossEntropies(attacks.Loss):
    """The sum of `times` cross-entropies, for networks that draw random numbers (expectation over transformation).

    A loss that native code does not know: labels may be probabilities.
    """

    name: ClassVar[str] = "cross_entropies"
    needs_labels: ClassVar[bool] = True

    network: nn.Module
    times: int

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        value = F.cross_entropy(logits, y, reduction="none")
        for _ in range(self.times - 1):
            value = value + F.cross_entropy(self.network(x), y, reduction="none")
        return value, y


class _Normalised(nn.Module):
    """The model as pixels see it."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


def _pixels(attack: Attack, images: Tensor) -> Tensor:
    """An own copy of images in [0, 1]; what normalising and its inverse have rounded beyond is put back."""
    x0 = own_copy(images)
    if not x0.is_floating_point() or not x0.numel():
        return x0
    inside = x0.clamp(0, 1)
    beyond = (x0 - inside).abs().max().item()
    if beyond > 16 * torch.finfo(x0.dtype).eps:
        hint = "" if attack.normalization_used else "; are they normalised? set_normalization_used(mean, std) says how"
        raise InputError(
            f"tsrfast.compat.torchattacks: images must be in [0, 1], got [{x0.min().item():g}, {x0.max().item():g}]{hint}"
        )
    return inside


def _network(attack: Attack, x0: Tensor) -> tuple[nn.Module, bool]:
    """What `get_logits` computes, as a module; and whether it may be compiled."""
    for name in ("get_logits", "normalize"):
        if getattr(type(attack), name) is not getattr(Attack, name) or name in vars(attack):
            return _running.Function(attack.get_logits), False
    # A chain is the network in eval mode; `forward`, called directly, attacks it in the mode it has.
    may = not any(m.training for m in attack.model.modules())
    if attack._normalization_applied is not False:
        return attack.model, may
    mean, std = attack._normalization(x0)
    kept: _Normalised | None = vars(attack).get("_normalised")
    # Kept: compiling it is worth while once.
    if kept is None or kept.model is not attack.model or not (torch.equal(kept.mean, mean) and torch.equal(kept.std, std)):
        attack._normalised = kept = _Normalised(attack.model, mean, std)  # type: ignore[attr-defined]
    return kept, may
