"""`tsrfast.ops.chain_correlation` in plain PyTorch: all activations, then their moments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tsrfast.reference.chain import Network, chain_forward
from tsrfast.reference.channel_correlation import CorrelationState, channel_correlation


def chain_correlation(
    x: Tensor,
    student: Network,
    teacher: Network,
    layers_student: Sequence[int],
    layers_teacher: Sequence[int],
    *,
    precision: str = "float32",
) -> list[CorrelationState]:
    """Moments of each pair of layers for x ``[N, ...]``, computed in x's dtype whatever the kernels' `precision`, given as float64."""
    ours = chain_forward(x, *student, layers_student)
    theirs = chain_forward(x, *teacher, layers_teacher)
    return [channel_correlation(s, t.reshape(*t.shape[:2], *s.shape[2:])) for s, t in zip(ours, theirs, strict=True)]
