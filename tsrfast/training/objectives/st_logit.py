"""Standard training on the teacher's logits (Yang et al., AISTATS 2021, section 5; "ST-logit" in its tables)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tsrfast.training.objectives.protocol import teacher_logits


@dataclass(frozen=True)
class TeacherLogits:
    """Mean over batch and outputs of (s(x) - t(x))^2."""

    teacher: nn.Module
    name: ClassVar[str] = "st_logit"

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        return F.mse_loss(student(images), teacher_logits(self.teacher, images))
