"""In-plane and out-of-plane adversarial images (Yang et al., AISTATS 2021, section 5.4, table 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks import PGD
from tsrfast.errors import InputError, unknown

_SECOND = 1 << 40  # added to the seed for the second start: further than any epoch moves it


@dataclass(frozen=True, eq=False)
class TwoStarts:
    """Two attacks from different random starts; of each image's two candidates, one by its distance to the patches' subspace.

    `OracleAdversarial(teacher, TwoStarts(..., side="in"))` is the mode `at_in`, with ``out`` `at_out`. The paper does not say how the
    distance is measured; the suite takes `tsrfast.specialization.distance_to_patches` of x' itself. Equal distances: the first candidate is
    the one inside.

    Args:
        attack: run twice; its own seed is not used. It must start at random.
        distance: from images to ``[N]``, how far each is from the subspace.
        side: ``in`` takes the candidate closer to the subspace, ``out`` the other.
        seed: of the first start; the second one's is derived.

    Raises:
        InputError: another `side`, or an attack that starts at the image.
    """

    attack: PGD
    distance: Callable[[Tensor], Tensor]
    side: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side not in ("in", "out"):
            raise unknown("side", self.side, ("in", "out"))
        if not self.attack.random_start:
            raise InputError("tsrfast.training.TwoStarts: attack must have random_start, or both candidates are the same")

    def candidates(self, model: nn.Module, x: Tensor, y: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """The adversarial images from the first and from the second start."""
        first, second = (dataclasses.replace(self.attack, seed=seed) for seed in (self.seed, self.seed + _SECOND))
        return first(model, x, y, index), second(model, x, y, index)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Adversarial images for `x`; arguments as for the attack."""
        a, b = self.candidates(model, x, y, index)
        first_is_inside = self.distance(a) <= self.distance(b)
        chosen = first_is_inside if self.side == "in" else ~first_is_inside
        return torch.where(chosen[:, None, None, None], a, b)
