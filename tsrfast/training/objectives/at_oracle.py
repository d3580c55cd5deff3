"""Oracle-adversarial training (Yang et al., AISTATS 2021, eq. 3; "AT" in its tables)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.training.objectives.protocol import teacher_logits


@dataclass(frozen=True)
class OracleAdversarial:
    """Mean over batch and outputs of (s(x') - t(x'))^2 at x' = attack(s, x).

    The student is attacked in eval mode as it is at that step, and trained on x' only; neither x' nor the target t(x')
    carries a gradient.

    Args:
        teacher: the oracle.
        attack: called as attack(student, images, labels, index=index) -> x' like images. A dataclass with a field
            `seed` (such as `tsrfast.attacks.PGD`) is used with seed + epoch, so that an image starts elsewhere in every
            epoch and at the same place when the epoch is run again; any other callable is used as it is.
    """

    teacher: nn.Module
    attack: Callable[..., Tensor]
    name: ClassVar[str] = "at_oracle"

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        with evaluating(student):
            adversarial = attack_of_epoch(self.attack, epoch)(student, images, labels, index=index).detach()
        return F.mse_loss(student(adversarial), teacher_logits(self.teacher, adversarial))


def attack_of_epoch(attack: Callable[..., Tensor], epoch: int) -> Callable[..., Tensor]:
    """`attack` with its field `seed` moved on by `epoch`; `attack` itself where it has no such field."""
    has_seed = dataclasses.is_dataclass(attack) and any(f.name == "seed" for f in dataclasses.fields(attack))
    seeded: Any = attack
    return dataclasses.replace(seeded, seed=seeded.seed + epoch) if has_seed else attack
