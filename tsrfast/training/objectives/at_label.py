"""Adversarial training on labels (Yang et al., AISTATS 2021, section 3: the label-target and data-adversarial modes)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.errors import unknown
from tsrfast.training.objectives.at_oracle import attack_of_epoch
from tsrfast.training.objectives.protocol import teacher_logits


@dataclass(frozen=True)
class AdversarialLabels:
    """Mean over the batch of -log softmax(s(x'))_y at x' = attack(s, x, y), with y a label of the clean image.

    With an oracle attack (`tsrfast.attacks.OracleL2`) this is the label-target mode, `at_oracle_label`; with cross-entropy, which moves
    the student alone, the data-adversarial mode, `at_data` (Madry et al. 2018 with the oracle's labels).

    Args:
        teacher: the oracle.
        attack: as in `OracleAdversarial`; it is given y.
        name: ``at_oracle_label`` or ``at_data``.
        label_source: ``teacher``: y = argmax t(x); ``dataset``: the data set's label. The paper takes the two for equal.

    Raises:
        InputError: another `label_source`.
    """

    teacher: nn.Module
    attack: Callable[..., Tensor]
    name: str = "at_oracle_label"
    label_source: str = "teacher"

    def __post_init__(self) -> None:
        if self.label_source not in ("teacher", "dataset"):
            raise unknown("label_source", self.label_source, ("teacher", "dataset"))

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        y = labels if self.label_source == "dataset" else teacher_logits(self.teacher, images).argmax(1)
        with evaluating(student):
            adversarial = attack_of_epoch(self.attack, epoch)(student, images, y, index=index).detach()
        return F.cross_entropy(student(adversarial), y)
