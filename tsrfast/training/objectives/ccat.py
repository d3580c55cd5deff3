"""Confidence-calibrated adversarial training (Stutz et al., ICML 2020) against an oracle (Yang et al., AISTATS 2021, section 5.6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks import Attack, Draw, Loss, Threat
from tsrfast.attacks.attack import Terms
from tsrfast.attacks.eager import evaluate, finite
from tsrfast.attacks.loop import Attempt
from tsrfast.attacks.losses import resolve
from tsrfast.attacks.native import callable_network
from tsrfast.attacks.threat import check_count
from tsrfast.data.augment import gaussian
from tsrfast.errors import InputError
from tsrfast.training.objectives.at_oracle import attack_of_epoch
from tsrfast.training.objectives.protocol import teacher_logits


@dataclass(frozen=True)
class CCAT:
    """Mean over the batch of the cross-entropy of s with soft labels; the first half of a batch is clean, the rest attacked.

    An image's label is k = argmax t(x), moved towards the uniform distribution as far as the attack went (`soft_labels`); a clean image
    keeps it whole. The student is attacked in eval mode as it is at that step, and no gradient goes through the attack.

    Section 5.6 mentions no clean half, and the attack that the paper uses elsewhere takes nearly every image to the rim of the ball, where
    the label is uniform whatever rho: ``clean_share=0`` with such an attack learns nothing at all. Hence the clean half and the attack of
    the original (`Backtracking`). With many steps that one reaches the rim as well: look at the distances before comparing values of rho.

    Args:
        teacher: the oracle.
        attack: called as attack(student, images, labels, index=index) -> x' like images; a field `seed` is used as in `OracleAdversarial`.
        rho: how fast confidence falls with the distance, > 0; the paper's are 5, 10 and 20.
        eps: the linf distance at which none is left, in pixel units, > 0: the attack's radius.
        clean_share: of a batch, in [0, 1); rounded down to whole images.

    Raises:
        InputError: a value that is not allowed.
    """

    teacher: nn.Module
    attack: Callable[..., Tensor]
    rho: float
    eps: float
    clean_share: float = 0.5
    name: ClassVar[str] = "ccat"

    def __post_init__(self) -> None:
        for name in ("rho", "eps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"tsrfast.training.CCAT: {name} must be > 0 and finite, got {value}")
        if not 0 <= self.clean_share < 1:
            raise InputError(f"tsrfast.training.CCAT: clean_share must be in [0, 1), got {self.clean_share}")

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        wanted = teacher_logits(self.teacher, images)
        clean = int(self.clean_share * len(images))
        x, y = images[clean:], wanted.argmax(1)
        with evaluating(student):
            moved = attack_of_epoch(self.attack, epoch)(student, x, y[clean:], index=index[clean:]).detach()
        distance = images.new_zeros(len(images))
        distance[clean:] = (moved - x).abs().flatten(1).amax(1)
        targets = soft_labels(y, distance / self.eps, self.rho, wanted.shape[1])
        return F.cross_entropy(student(torch.cat([images[:clean], moved])), targets)

    def splits(self, count: int, parts: int) -> bool:
        """Whether every `parts`-th image of a batch of `count` has the clean and the attacked images of the whole; see `Objective`."""
        return count % parts == 0 and parts * int(self.clean_share * (count // parts)) == int(self.clean_share * count)


def soft_labels(labels: Tensor, distance: Tensor, rho: float, classes: int) -> Tensor:
    """lambda onehot(y) + (1 - lambda) / K with lambda = (1 - min(1, distance))^rho.

    Args:
        labels: y, int64 [N].
        distance: |delta| / eps, [N], >= 0.
        rho: > 0.
        classes: K.

    Returns:
        [N, K] in the dtype of `distance`; rows sum to 1.
    """
    confidence = (1 - distance.clamp(max=1)).pow(rho)[:, None]
    return confidence * F.one_hot(labels, classes) + (1 - confidence) / classes


@dataclass(frozen=True, eq=False)
class Backtracking(Attack):
    """CCAT's attack: signed gradients under momentum, and a step is taken only where the loss does not fall.

    v <- momentum v + (1 - momentum) sign(gradient); x' = x + step v, back in ball and box. Where the loss at x' is below that at x, x stays
    and the step of this image is divided by `factor`. So the last iterate is the best. The start is eps u n / |n|_inf with n normal
    and u uniform in [0, 1]: any distance from the image is as likely as any other. Where no step helps, or steps are few, an image
    thus comes back from inside the ball.

    A loop of its own: whether an image moves, and how far, depends on the loss after the step, which the loop of PGD does not look at.

    Args:
        eps: radius of the linf ball in pixel units, > 0 and finite.
        step_size: likewise, the first step's.
        steps: >= 0; each takes a forward and a backward pass.
        loss: to be increased; see `PGD`.
        momentum: in [0, 1).
        factor: > 1.
        seed: key of the starts, which depend on it and the image's number alone.
        lo, hi: the pixel box.
        engine: as in `APGD`.

    Raises:
        InputError: a value that is not allowed.
    """

    loss: str | Loss
    eps: float = 10 / 255
    step_size: float = 0.01
    steps: int = 40
    momentum: float = 0.9
    factor: float = 1.5
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"tsrfast.training.Backtracking: {name} must be > 0 and finite, got {value}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"tsrfast.training.Backtracking: momentum must be in [0, 1), got {self.momentum}")
        if not 1 < self.factor < math.inf:
            raise InputError(f"tsrfast.training.Backtracking: factor must be > 1 and finite, got {self.factor}")
        self._terms()

    def _terms(self) -> Terms:
        return Terms(Threat("linf", self.eps, self.lo, self.hi), resolve(self.loss), False, self.steps, self.engine)

    def start(self, x0: Tensor, index: Tensor) -> Tensor:
        """Where the images [N, C, H, W] with the numbers `index`, int64 [N], begin: inside ball and box, strided as `x0`."""
        values = x0[0].numel()
        u = Draw(self.seed, index, 0).uniform(2 * ((values + 1) // 2))
        length = Draw(self.seed, index, 1).uniform(1).to(x0.dtype)
        n = gaussian(torch.zeros_like(x0), u, sigma=1.0).flatten(1)
        offset = self.eps * length * n / n.abs().amax(1, keepdim=True)
        return torch.empty_like(x0).copy_((x0 + offset.view(x0.shape)).clamp(self.lo, self.hi))

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        loss = resolve(self.loss)
        loss = loss.with_models(*(callable_network(m, x0, self.engine, who="teacher")[0] for m in loss.models()))
        low, high = (x0 - self.eps).clamp_min(self.lo), (x0 + self.eps).clamp_max(self.hi)
        x = self.start(x0, index)
        at = evaluate(network, loss, False, x, y, gradient=self.steps > 0, first=True)
        held, bad = at.candidate, torch.zeros_like(index)
        if not self.steps:
            return Attempt(held, bad, torch.ones_like(index))
        g, bad = finite(at.gradient())
        velocity = torch.zeros_like(x)
        step = torch.full((len(x), *[1] * (x.ndim - 1)), self.step_size, dtype=x.dtype, device=x.device)
        for left in reversed(range(self.steps)):
            velocity = self.momentum * velocity + (1 - self.momentum) * g.sign()
            at = evaluate(network, loss, False, (held.x + step * velocity).clamp(low, high), y, gradient=left > 0, first=False)
            taken = at.loss.detach() >= held.loss  # no step leads to NaN
            wide = taken.view(step.shape)
            held.take(taken, at.candidate)
            step = torch.where(wide, step, step / self.factor)
            if left:
                here, lost = finite(at.gradient())
                bad = bad + lost
                g = torch.where(wide, here, g)
        return Attempt(held, bad, torch.full_like(index, self.steps + 1))
