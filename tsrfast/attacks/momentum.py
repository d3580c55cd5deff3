"""Projected gradient descent whose examples transfer: MI-, NI-, DI- and TI-FGSM, one loop with PGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tsrfast.attacks.direction import Direction, Draw, Smoothing
from tsrfast.attacks.loop import Recipe
from tsrfast.attacks.pgd import PGD
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class MIM(PGD):
    """`PGD` with momentum, and what else makes examples transfer; as it stands MI-FGSM (Dong et al., CVPR 2018).

    NI-FGSM is ``MIM(nesterov=True)``, DI-FGSM ``MIM(momentum=0, diversity=Diversity())``, TI-FGSM the same with
    ``smoothing=Smoothing()``; they combine. With `nesterov` or `diversity` the gradient is not that of the iterate: `keep`, `early_stop`
    and `on_step`, which look at the iterate itself, then take one more forward pass a step.

    Args:
        momentum: decay factor mu of the velocity, >= 0 (see `PGD`); 1 as in the paper.
        random_start: here the image itself is the default start.
        nesterov: the gradient is taken where the velocity leads: x + momentum * step_size * velocity, inside the ball or not.
        diversity: what the model is shown at each step: a `Diversity`, or a function of images ``[n, C, H, W]`` and a `Draw`, the source
            of its random numbers, differentiable. One that changes the images' size needs ``engine="eager"``.
        smoothing: of the gradient.

    The other arguments are those of `PGD`.

    Raises:
        InputError: a value that is not allowed; when called, also images that are not ``[N, C, H, W]``, if `Diversity` or `Smoothing` is
            given.
    """

    random_start: bool = False
    momentum: float = 1.0
    nesterov: bool = False
    diversity: Callable[[Tensor, Draw], Tensor] | None = None
    smoothing: Smoothing | None = None

    def _recipe(self) -> Recipe:
        if self.diversity is not None and not callable(self.diversity):
            what = type(self.diversity).__name__
            raise InputError(f"tsrfast.attacks: diversity must be a function of images and a Draw, or None, got {what}")
        if self.smoothing is not None and not isinstance(self.smoothing, Smoothing):
            raise InputError(f"tsrfast.attacks: smoothing must be a Smoothing or None, got {type(self.smoothing).__name__}")
        direction = Direction(self.momentum, self.nesterov, self.diversity, self.smoothing, self.seed)
        return dataclasses.replace(super()._recipe(), direction=direction)
