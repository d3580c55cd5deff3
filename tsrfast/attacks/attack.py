"""What all attacks have in common: checking what they are given, running the loop, and what they return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.loop import Plan, run_loop, undisturbed
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Adversarial images and what is known about each of N.

    Attributes:
        x_adv: images as the input, inside ball and box (up to one rounding).
        success: bool ``[N]``, whether the loss's notion of adversarial (targeted: of the target) holds at `x_adv`.
        loss: ``[N]``, the loss there.
        steps: gradient steps an image took, restarts included.
        queries: forward passes an image took.
        bad_gradients: int64 ``[N]``, gradient entries without a direction (NaN) over all steps: not 0 means a broken model.
        path: which code ran: ``eager`` (PyTorch forward and backward, fused step).
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    steps: int
    queries: int
    bad_gradients: Tensor
    path: str


class Attack:
    """An attack is a value: its fields say everything, calling it changes nothing but the tensor it returns."""

    def _plan(self) -> Plan:
        raise TypeError(f"{type(self).__name__} must define _plan()")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Adversarial images for `x`.

        Args:
            model: network from ``[N, C, H, W]`` to logits ``[N, classes]``; run in eval mode, left as it was.
            x: clean images in [0, 1] (or the attack's own box).
            y: int64 ``[N]`` labels (targeted: the targets); not needed by oracle losses.
            index: int64 ``[N]``, the images' numbers in their data set, default 0..N-1; random starts depend on them, so that an image
                gets the same start in any batch.

        Returns:
            A new tensor as `x`.

        Raises:
            InputError: bad images, labels, shapes or devices.
        """
        return self._run(model, x, y, index, judge=False).x_adv

    def run(self, model: nn.Module, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> AttackResult:
        """As calling the attack, and also says how it went (one more forward pass)."""
        return self._run(model, x, y, index, judge=True)

    def _run(self, model: nn.Module, x: Tensor, y: Tensor | None, index: Tensor | None, judge: bool) -> AttackResult:
        plan = self._plan()
        plan.threat.check_images(x)
        if plan.loss.needs_labels and y is None:
            raise InputError(f"tsrfast.attacks: y is needed by loss {plan.loss.name!r}")
        if plan.targeted and not plan.loss.needs_labels:
            raise InputError(f"tsrfast.attacks: targeted needs a loss with labels, got {plan.loss.name!r}")
        y = _check_integers("y", y, x)
        index = _check_integers("index", index, x)
        with undisturbed(model, *plan.loss.models(), device=x.device):
            # A copy: dense, outside any graph, and free of inference mode.
            x0 = x.detach().clone(memory_format=torch.preserve_format)
            if not torch.ops.aten.is_non_overlapping_and_dense(x0) or (len(x0) > 1 and x0.stride(0) != x0[0].numel()):
                x0 = x0.contiguous()
            if index is None:
                index = torch.arange(len(x0), device=x0.device)
            if not x0.numel():
                return AttackResult(x0, _no(x0), x0.new_zeros(len(x0)), 0, 0, _no(x0).long(), "eager")
            best, bad, queries = run_loop(model, plan, x0, y, index.contiguous(), judge)
        return AttackResult(
            best.x.detach(), best.adversarial, best.loss.detach(), plan.steps * plan.restarts, queries, bad, "eager"
        )


def _no(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.bool, device=x.device)


def _check_integers(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None:
        return None
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"tsrfast.attacks: {name} must be int64 of shape ({len(x)},), got {what}")
    if t.device != x.device:
        raise InputError(f"tsrfast.attacks: {name} must be on x's device {x.device}, got {t.device}")
    return t.detach()
