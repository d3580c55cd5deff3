"""Gradient attacks: hooks that users override, and the loop of `tsrfast.attacks` where nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tsrfast import attacks
from tsrfast._modes import evaluating
from tsrfast.attacks.loop import own_copy
from tsrfast.compat._running import ascend, checked_labels
from tsrfast.compat.foolbox._tensors import like, raw, shown
from tsrfast.compat.foolbox.attacks.base import (
    FixedEpsilonAttack,
    get_criterion,
    goal_of,
    raise_if_kwargs,
    verify_input_bounds,
)
from tsrfast.compat.foolbox.distances import l1, l2, linf
from tsrfast.compat.foolbox.models import Model, network_of
from tsrfast.compat.foolbox.types import Bounds


class Optimizer:
    """Makes a step of a normalised gradient."""

    def __init__(self, x: Any) -> None:
        pass

    def __call__(self, gradient: Any) -> Any:
        raise NotImplementedError


class GDOptimizer(Optimizer):
    """A step of a given length."""

    def __init__(self, x: Any, stepsize: float) -> None:
        self.stepsize = stepsize

    def __call__(self, gradient: Any) -> Any:
        return self.stepsize * gradient


class AdamOptimizer(Optimizer):
    """Adam (Kingma & Ba 2015)."""

    def __init__(self, x: Any, stepsize: float, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        self.stepsize = stepsize
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon
        self.m = self.v = x * 0
        self.t = 0

    def __call__(self, gradient: Any) -> Any:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return self.stepsize * m_hat / (v_hat.sqrt() + self.epsilon)


class GDMOptimizer(Optimizer):
    """A step along the sum of the gradients, earlier ones by powers of `momentum`, normalised again."""

    def __init__(self, x: Any, stepsize: float, momentum: float, normalize: Callable[[Any], Any]) -> None:
        self.stepsize = stepsize
        self.momentum = momentum
        self.normalize = normalize
        self.accumulation_grad = x * 0

    def __call__(self, gradient: Any) -> Any:
        self.accumulation_grad = self.momentum * self.accumulation_grad + gradient
        return self.stepsize * self.normalize(self.accumulation_grad)


# `get_random_start` is asked in any case.
_HOOKS = ("get_loss_fn", "get_optimizer", "value_and_grad", "normalize", "project")


class BaseGradientDescent(FixedEpsilonAttack):
    """Normalised gradient steps with a projection.

    A subclass may override `get_loss_fn`, `get_optimizer`, `value_and_grad`, `get_random_start`, `normalize` and `project`; they get
    eagerpy tensors if that package is installed, else PyTorch's. With the first and the last three as they are, linf and l2 run in the
    loop of `tsrfast.attacks`, natively where the network compiles.

    Args:
        rel_stepsize: length of a step, as a share of epsilon.
        abs_stepsize: its length, if given.
        steps: their number.
        random_start: begin at a random point of the ball.
    """

    _norm: ClassVar[str | None] = None  # of the loop that is the same as these hooks
    _plain: ClassVar[type[BaseGradientDescent]]

    def __init__(self, *, rel_stepsize: float, abs_stepsize: float | None = None, steps: int, random_start: bool) -> None:
        self.rel_stepsize = rel_stepsize
        self.abs_stepsize = abs_stepsize
        self.steps = steps
        self.random_start = random_start

    def get_loss_fn(self, model: Model, labels: Any) -> Callable[[Any], Any]:
        """What is to rise: a scalar from images; here the summed cross-entropy."""

        def loss_fn(inputs: Any) -> Any:
            logits = model(inputs)
            return like(F.cross_entropy(raw(logits), raw(labels), reduction="none").sum(), logits)

        return loss_fn

    def get_optimizer(self, x: Any, stepsize: float) -> Optimizer:
        return GDOptimizer(x, stepsize)

    def value_and_grad(self, loss_fn: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
        """The loss and its gradient with respect to x, NaN as 0; parameters get none."""
        leaf = raw(x).detach().clone().requires_grad_()
        loss = raw(loss_fn(like(leaf, x)))
        (gradient,) = torch.autograd.grad(loss, leaf)
        return like(loss.detach(), x), like(gradient.masked_fill(gradient.isnan(), 0), x)

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        raise NotImplementedError

    def normalize(self, gradients: Any, *, x: Any, bounds: Bounds) -> Any:
        raise NotImplementedError

    def project(self, x: Any, x0: Any, epsilon: float) -> Any:
        raise NotImplementedError

    def run(self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Images at most `epsilon` from `inputs`; away from the labels, or towards the targets of a criterion that has some.

        Raises:
            AssertionError: images beyond the model's bounds.
            ValueError: another criterion.
            TypeError: other arguments.
        """
        raise_if_kwargs(kwargs)
        verify_input_bounds(inputs, model)
        classes, targeted = goal_of(get_criterion(criterion))
        stepsize = self.rel_stepsize * epsilon if self.abs_stepsize is None else self.abs_stepsize
        with torch.inference_mode(False), torch.enable_grad():
            x0 = own_copy(raw(inputs))
            classes = checked_labels("foolbox", classes, x0)
            x = x0.clone()
            if self.random_start and x0.numel():
                x = raw(self.get_random_start(shown(x0), epsilon)).clamp(*model.bounds)
            if x0.numel():
                x = self._ascend(model, classes, targeted, x0, x, epsilon, stepsize)
        return like(x, inputs)

    def _ascend(
        self, model: Model, classes: Tensor, targeted: bool, x0: Tensor, x: Tensor, epsilon: float, stepsize: float
    ) -> Tensor:
        if self._norm is None or any(h in vars(self) or getattr(type(self), h) is not getattr(self._plain, h) for h in _HOOKS):
            return self._by_hooks(model, classes, targeted, x0, x, epsilon, stepsize)
        network, engine = network_of(model)
        lo, hi = model.bounds
        attack = attacks.PGD(
            norm=self._norm, eps=epsilon, step_size=stepsize, steps=self.steps, targeted=targeted, lo=lo, hi=hi, engine=engine
        )
        with evaluating(network):
            return ascend(attack, network, x0, classes, lambda _: x).x

    def _by_hooks(
        self, model: Model, classes: Tensor, targeted: bool, start: Tensor, at: Tensor, epsilon: float, stepsize: float
    ) -> Tensor:
        loss_fn = self.get_loss_fn(model, shown(classes))
        x0, x = shown(start), shown(at)
        optimizer = self.get_optimizer(x0, stepsize)
        for _ in range(self.steps):
            _, gradients = self.value_and_grad(loss_fn, x)
            gradients = self.normalize(gradients, x=x, bounds=model.bounds)
            x = x + (-1.0 if targeted else 1.0) * optimizer(gradients)
            x = self.project(x, x0, epsilon)
            x = x.clip(*model.bounds)
        return raw(x).detach()


def _lengths(t: Tensor, p: float) -> Tensor:
    """Norms ``[N, 1, ...]``, at least 1e-12."""
    flat = t.flatten(1)
    n = flat.abs().sum(-1) if p == 1 else flat.square().sum(-1).sqrt() if p == 2 else torch.linalg.vector_norm(flat, p, -1)
    return n.clamp_min(1e-12).reshape(-1, *[1] * (t.ndim - 1))


def clip_lp_norms(x: Any, *, norm: float, p: float) -> Any:
    """Each of `x` scaled to at most this p-norm, p finite."""
    return like(raw(x) * (norm / _lengths(raw(x), p)).clamp_max(1), x)


def normalize_lp_norms(x: Any, *, p: float) -> Any:
    """Each of `x` divided by its p-norm, p finite."""
    return like(raw(x) * (1 / _lengths(raw(x), p)), x)


class L1BaseGradientDescent(BaseGradientDescent):
    """Steps of the gradient divided by its l1 norm; too long perturbations are scaled (no sparse steps, no exact projection)."""

    distance = l1

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        """Differences of sorted uniform numbers, with random signs."""
        x = raw(x0)
        n, d = x.flatten(1).shape
        v = torch.rand((n, d), dtype=x.dtype, device=x.device).sort(-1).values
        gaps = v - torch.cat([v.new_zeros(n, 1), v[:, : d - 1]], -1)
        signs = (torch.rand((n, d), dtype=x.dtype, device=x.device) * 2.0 - 1.0).sign()
        return like(x + epsilon * (signs * gaps).reshape(x.shape), x0)

    def normalize(self, gradients: Any, *, x: Any, bounds: Bounds) -> Any:
        return normalize_lp_norms(gradients, p=1)

    def project(self, x: Any, x0: Any, epsilon: float) -> Any:
        return x0 + clip_lp_norms(x - x0, norm=epsilon, p=1)


class L2BaseGradientDescent(BaseGradientDescent):
    """Steps of the gradient divided by its l2 norm."""

    distance = l2
    _norm = "l2"

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        """D of the D + 2 coordinates of a point on the sphere (Voelker et al. 2017)."""
        x = raw(x0)
        n, d = x.flatten(1).shape
        g = torch.randn((n, d + 2), dtype=x.dtype, device=x.device)
        s = g / g.square().sum(-1, keepdim=True).sqrt()
        return like(x + epsilon * s[:, :d].reshape(x.shape), x0)

    def normalize(self, gradients: Any, *, x: Any, bounds: Bounds) -> Any:
        return normalize_lp_norms(gradients, p=2)

    def project(self, x: Any, x0: Any, epsilon: float) -> Any:
        return x0 + clip_lp_norms(x - x0, norm=epsilon, p=2)


class LinfBaseGradientDescent(BaseGradientDescent):
    """Signed steps."""

    distance = linf
    _norm = "linf"

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        """Uniform in the ball."""
        x = raw(x0)
        u = torch.rand(x.shape, dtype=x.dtype, device=x.device)
        return like(x + (u * (2 * epsilon) + -epsilon), x0)

    def normalize(self, gradients: Any, *, x: Any, bounds: Bounds) -> Any:
        return gradients.sign()

    def project(self, x: Any, x0: Any, epsilon: float) -> Any:
        return x0 + (x - x0).clip(-epsilon, epsilon)


for _base in (L1BaseGradientDescent, L2BaseGradientDescent, LinfBaseGradientDescent):
    _base._plain = _base
