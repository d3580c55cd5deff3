"""`tsrfast.ops.channel_correlation` in plain PyTorch: the means first, then sums of products of what is left."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CorrelationState(NamedTuple):
    """As `tsrfast.ops.channel_correlation.CorrelationState`."""

    n: Tensor
    mean_student: Tensor
    mean_teacher: Tensor
    m2_student: Tensor
    m2_teacher: Tensor
    cross: Tensor


def channel_correlation(student: Tensor, teacher: Tensor) -> CorrelationState:
    """Moments of one batch, computed in the activations' own dtype, given as float64."""

    def centred(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.transpose(0, 1).flatten(1)
        mean = rows.mean(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
        return mean, rows - mean[:, None]

    mean_s, s = centred(student)
    mean_t, t = centred(teacher)
    count = torch.tensor(s.shape[1], dtype=torch.float64, device=s.device)
    moments = (mean_s, mean_t, s.square().sum(1), t.square().sum(1), s @ t.mT)
    return CorrelationState(count, *(m.double() for m in moments))


def merge(a: CorrelationState, b: CorrelationState) -> CorrelationState:
    """Moments of both states' samples together: each moved to the common mean, then added up."""
    count = a.n + b.n
    wa, wb = a.n / count.clamp(min=1), b.n / count.clamp(min=1)
    mean_s = wa * a.mean_student + wb * b.mean_student
    mean_t = wa * a.mean_teacher + wb * b.mean_teacher
    m2_s, m2_t, cross = torch.zeros_like(a.m2_student), torch.zeros_like(a.m2_teacher), torch.zeros_like(a.cross)
    for x in (a, b):
        ds, dt = x.mean_student - mean_s, x.mean_teacher - mean_t
        m2_s = m2_s + x.m2_student + x.n * ds * ds
        m2_t = m2_t + x.m2_teacher + x.n * dt * dt
        cross = cross + x.cross + x.n * torch.outer(ds, dt)
    return CorrelationState(count, mean_s, mean_t, m2_s, m2_t, cross)
