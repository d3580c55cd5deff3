"""DeepFool (Moosavi-Dezfooli et al., CVPR 2016): steps to the nearest boundary of the linearised model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.eager import Evaluation, evaluate
from tsrfast.attacks.loop import Attempt, Batch, Best, select
from tsrfast.attacks.losses import Margin
from tsrfast.attacks.threat import Threat, check_count, check_radius
from tsrfast.chain import Differentiable
from tsrfast.errors import InputError
from tsrfast.ops.chain import chain_gradient

_BEYOND = 1e-4  # added to each distance, as in the authors' code: the boundary itself is not beyond it
_TINY = 1e-8


@dataclass(frozen=True, eq=False)
class DeepFool(Attack):
    """The nearest misclassified image, nearly: each step goes to where the linearised model changes its answer, in the l2 norm.

    Every iterate is x + (1 + overshoot) times the sum of the steps, clamped to the box. An image that falls is done, the others go on;
    what is misclassified as it is, and what does not fall, is returned unchanged.

    Args:
        steps: the most that an image takes.
        candidates: how many classes are considered, the likeliest of the clean image, its own included; None: all.
        overshoot: how much further than the boundary, as a share.
        lo, hi: the pixel box.
        engine: as in `PGD`; the chain's path computes the gradients of all candidates in one native pass.

    Raises:
        InputError: a value that is not allowed.
    """

    steps: int = 50
    candidates: int | None = 10
    overshoot: float = 0.02
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        self._terms()

    def _terms(self) -> Terms:
        check_count("steps", self.steps, 0)
        if self.candidates is not None:
            check_count("candidates", self.candidates, 2)
        check_radius("overshoot", self.overshoot)
        return Terms(Threat("l2", math.inf, self.lo, self.hi), Margin(), False, self.steps, self.engine)

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        assert y is not None  # Margin needs it
        batch = Batch(torch.arange(len(x0), device=x0.device), x0, y, index, self._terms().threat, 0.0)
        best, others = Best.unjudged(x0.clone()), torch.empty(0)
        queries, bad = torch.zeros_like(index), torch.zeros_like(index)
        x, total = x0, torch.zeros_like(x0, dtype=torch.promote_types(x0.dtype, torch.float32))
        for step in range(self.steps + 1):
            final = step == self.steps
            at = evaluate(network, Margin(), False, x, batch.y, gradient=not final, first=step == 0)
            queries[batch.rows] += 1
            fallen = at.adversarial
            if step == 0:
                best.take(torch.ones_like(fallen), at.candidate, batch.rows)
                others = self._others(at)
            else:
                best.take(fallen, at.candidate, batch.rows)
            standing = (~fallen).nonzero().squeeze(1)
            if final or not len(standing):
                break
            # Before the fallen are left out: in PyTorch the graph is that of all.
            gradients = gap_gradients(network, at, others, standing)
            batch, total, others, at = batch.only(standing), select(total, standing), others[standing], at.only(standing)
            move, count = _nearest(at, others, gradients, total)
            bad[batch.rows] += count
            total += move
            x = (batch.x0 + (1 + self.overshoot) * total).clamp(self.lo, self.hi).to(x0.dtype)
        return Attempt(best, bad, queries)

    def _others(self, at: Evaluation) -> Tensor:
        """The classes that an image may be driven to, int64 ``[n, candidates - 1]``."""
        classes = at.logits.shape[1]
        if classes < 2:
            raise InputError(f"tsrfast.attacks: model must return at least 2 classes for DeepFool, got {classes}")
        count = classes if self.candidates is None else min(self.candidates, classes)
        masked = at.logits.detach().scatter(1, at.answer[:, None], -torch.inf)
        return masked.topk(count - 1, 1).indices


def _nearest(at: Evaluation, others: Tensor, gradients: Iterable[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """The step over the nearest of the linearised boundaries, and how many gradient entries had no direction, int64 ``[n]``.

    Args:
        at: logits and labels.
        others: the classes ``[n, k]``.
        gradients: of z_other - z_label with respect to x, one after the other.
        like: a tensor of the step's shape and dtype.
    """
    nearest = torch.full((len(like),), torch.inf, dtype=like.dtype, device=like.device)
    count = torch.zeros_like(at.answer)
    move = torch.zeros_like(like)
    own = at.logits.gather(1, at.answer[:, None])
    for gap, gradient in zip((at.logits.gather(1, others) - own).to(like.dtype).abs().unbind(1), gradients, strict=True):
        bad = ~gradient.isfinite()
        count += bad.flatten(1).sum(1)
        g = gradient.to(like.dtype).masked_fill(bad, 0)
        length = g.flatten(1).norm(dim=1) + _TINY
        distance = gap / length
        closer = (distance < nearest) & (length > _TINY)  # NaN and flat ones are not
        nearest = torch.where(closer, distance, nearest)
        scale = ((distance + _BEYOND) / length).reshape(-1, *[1] * (g.ndim - 1))
        move = torch.where(closer.reshape(scale.shape), scale * g, move)
    return move, count


def gap_gradients(network: nn.Module, at: Evaluation, others: Tensor, standing: Tensor) -> Iterable[Tensor]:
    """Of z_other - z_label with respect to x, for the standing images: like x, for each of `others` ``[n, k]``."""
    if isinstance(network, Differentiable):
        chain = network.chain
        x = at.x.detach()[standing]
        to, own = others[standing], at.answer[standing, None]
        rows = (F.one_hot(to, chain.classes) - F.one_hot(own, chain.classes)).to(x.dtype)
        got: Tensor = chain_gradient(x.reshape(len(x), *chain.entering).contiguous(), chain.plan, chain.packed, rows)
        return got.reshape(len(x), others.shape[1], *x.shape[1:]).unbind(1)
    if not at.logits.requires_grad:
        raise InputError(
            "tsrfast.attacks: model must be differentiable, but its logits have no gradient (detached, or no_grad inside?)"
        )
    gaps = (at.logits.gather(1, others) - at.logits.gather(1, at.answer[:, None])).sum(0)
    # One at a time: with many candidates their gradients are the largest thing here. A model may ignore x (zeros).
    return (torch.autograd.grad(gap, at.x, retain_graph=True, materialize_grads=True)[0][standing] for gap in gaps)
