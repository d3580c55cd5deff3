"""foolbox's gradient attacks: defaults on the bases of `gradient_descent_base`."""

from __future__ import annotations

from functools import partial
from typing import Any

from tsrfast.compat.foolbox.attacks.gradient_descent_base import (
    AdamOptimizer,
    BaseGradientDescent,
    GDMOptimizer,
    L1BaseGradientDescent,
    L2BaseGradientDescent,
    LinfBaseGradientDescent,
    Optimizer,
    normalize_lp_norms,
)
from tsrfast.compat.foolbox.models import Model


class L1ProjectedGradientDescentAttack(L1BaseGradientDescent):
    """Projected gradient descent (Madry et al. 2018) in l1."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.025,
        abs_stepsize: float | None = None,
        steps: int = 50,
        random_start: bool = True,
    ) -> None:
        super().__init__(rel_stepsize=rel_stepsize, abs_stepsize=abs_stepsize, steps=steps, random_start=random_start)


class L2ProjectedGradientDescentAttack(L2BaseGradientDescent):
    """Projected gradient descent (Madry et al. 2018) in l2."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.025,
        abs_stepsize: float | None = None,
        steps: int = 50,
        random_start: bool = True,
    ) -> None:
        super().__init__(rel_stepsize=rel_stepsize, abs_stepsize=abs_stepsize, steps=steps, random_start=random_start)


class LinfProjectedGradientDescentAttack(LinfBaseGradientDescent):
    """Projected gradient descent (Madry et al. 2018) in linf."""

    def __init__(
        self,
        *,
        rel_stepsize: float = 0.01 / 0.3,
        abs_stepsize: float | None = None,
        steps: int = 40,
        random_start: bool = True,
    ) -> None:
        super().__init__(rel_stepsize=rel_stepsize, abs_stepsize=abs_stepsize, steps=steps, random_start=random_start)


class _BasicIterative(BaseGradientDescent):
    def __init__(
        self,
        *,
        rel_stepsize: float = 0.2,
        abs_stepsize: float | None = None,
        steps: int = 10,
        random_start: bool = False,
    ) -> None:
        super().__init__(rel_stepsize=rel_stepsize, abs_stepsize=abs_stepsize, steps=steps, random_start=random_start)


class L1BasicIterativeAttack(_BasicIterative, L1BaseGradientDescent):
    """The basic iterative method (Kurakin et al. 2017) in l1."""


class L2BasicIterativeAttack(_BasicIterative, L2BaseGradientDescent):
    """The basic iterative method in l2."""


class LinfBasicIterativeAttack(_BasicIterative, LinfBaseGradientDescent):
    """The basic iterative method in linf."""


class _Adam(BaseGradientDescent):
    """Adam makes the steps of the normalised gradient."""

    def __init__(
        self, *, adam_beta1: float = 0.9, adam_beta2: float = 0.999, adam_epsilon: float = 1e-8, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.adam_beta1 = adam_beta1
        self.adam_beta2 = adam_beta2
        self.adam_epsilon = adam_epsilon

    def get_optimizer(self, x: Any, stepsize: float) -> Optimizer:
        return AdamOptimizer(x, stepsize, self.adam_beta1, self.adam_beta2, self.adam_epsilon)


class L1AdamProjectedGradientDescentAttack(_Adam, L1ProjectedGradientDescentAttack):
    """With Adam."""


class L2AdamProjectedGradientDescentAttack(_Adam, L2ProjectedGradientDescentAttack):
    """With Adam."""


class LinfAdamProjectedGradientDescentAttack(_Adam, LinfProjectedGradientDescentAttack):
    """With Adam."""

    def __init__(self, *, rel_stepsize: float = 0.025, steps: int = 50, **kwargs: Any) -> None:
        super().__init__(rel_stepsize=rel_stepsize, steps=steps, **kwargs)


class L1AdamBasicIterativeAttack(_Adam, L1BasicIterativeAttack):
    """With Adam."""


class L2AdamBasicIterativeAttack(_Adam, L2BasicIterativeAttack):
    """With Adam."""


class LinfAdamBasicIterativeAttack(_Adam, LinfBasicIterativeAttack):
    """With Adam."""


class _Momentum(BaseGradientDescent):
    """foolbox's MI-FGSM: the sum of *normalised* gradients, normalised again (`tsrfast.attacks.MIM` is that of the paper)."""

    def __init__(self, *, momentum: float = 1.0, **kwargs: Any) -> None:
        self.momentum = momentum
        super().__init__(**kwargs)


class L1MomentumIterativeFastGradientMethod(_Momentum, L1BasicIterativeAttack):
    """With momentum."""

    def get_optimizer(self, x: Any, stepsize: float) -> Optimizer:
        return GDMOptimizer(x, stepsize, self.momentum, partial(normalize_lp_norms, p=1))


class L2MomentumIterativeFastGradientMethod(_Momentum, L2BasicIterativeAttack):
    """With momentum."""

    def get_optimizer(self, x: Any, stepsize: float) -> Optimizer:
        return GDMOptimizer(x, stepsize, self.momentum, partial(normalize_lp_norms, p=2))


class LinfMomentumIterativeFastGradientMethod(_Momentum, LinfBasicIterativeAttack):
    """With momentum."""

    def get_optimizer(self, x: Any, stepsize: float) -> Optimizer:
        return GDMOptimizer(x, stepsize, self.momentum, lambda g: g.sign())


class _FastGradient(BaseGradientDescent):
    def __init__(self, *, random_start: bool = False) -> None:
        super().__init__(rel_stepsize=1.0, steps=1, random_start=random_start)

    def run(self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        if hasattr(criterion, "target_classes"):
            raise ValueError("unsupported criterion: one step of full length is not made for targets")
        return super().run(model, inputs, criterion, epsilon=epsilon, **kwargs)


class L1FastGradientAttack(_FastGradient, L1BaseGradientDescent):
    """One step of the gradient (Goodfellow et al. 2015) in l1."""


class L2FastGradientAttack(_FastGradient, L2BaseGradientDescent):
    """One step of the gradient in l2."""


class LinfFastGradientAttack(_FastGradient, LinfBaseGradientDescent):
    """One signed step."""
