"""Standard training on the teacher's hard labels (Yang et al., AISTATS 2021, section 5; "ST-label" in its tables)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tsrfast.training.objectives.protocol import teacher_logits


@dataclass(frozen=True)
class TeacherLabels:
    """Mean over the batch of -log softmax(s(x))_k with k = argmax t(x), the teacher's label and not the data set's."""

    teacher: nn.Module
    name: ClassVar[str] = "st_label"

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(student(images), teacher_logits(self.teacher, images).argmax(1))
