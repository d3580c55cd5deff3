"""What the trainer asks of an objective, and how objectives ask the teacher."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from tsrfast.chain import logits


class Objective(Protocol):
    """A loss to minimise. Objectives are frozen dataclasses: their fields are part of a run's identity.

    One that is no mean over images may have a method ``splits(count, parts)``: whether its value on a batch of `count` images is the mean of
    its values on ``batch[0::parts]``, ``batch[1::parts]``, ...; where it is not, processes that share a training do not cut the batch.
    """

    @property
    def name(self) -> str:
        """Short name, as in the paper's tables: "st_logit", "at_oracle", ..."""

    def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Scalar loss, averaged over the batch, that can be differentiated with respect to the student's parameters.

        Args:
            student: in train mode; must be given back so.
            images: [N, C, H, W] in [0, 1].
            labels: int64 [N], of the data set, on the images' device as `index` is.
            index: int64 [N], the images' numbers in the data set.
            epoch: 0-based.
        """


def teacher_logits(teacher: nn.Module, images: Tensor) -> Tensor:
    """t(x) [N, classes] in eval mode, without gradient; the teacher's modes are left as they were."""
    return logits(teacher, images)
