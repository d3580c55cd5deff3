"""Normalised correlation of student and teacher nodes, streamed batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.errors import InputError
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge

_DEAD = 1e-12


@dataclass(frozen=True, eq=False)
class NormalizedCorrelation:
    """Correlations of one layer's nodes; on the CPU.

    Attributes:
        rho: float64 [Cs, Ct] in [-1, 1]; row k is student node k, column j teacher node j. 0 where either is dead.
        dead_student, dead_teacher: bool [Cs], [Ct]: nodes whose activation does not vary (variance at most 1e-12 of the
            mean square).
        count: samples, N H W.
    """

    rho: Tensor
    dead_student: Tensor
    dead_teacher: Tensor
    count: int


class ChannelCorrelation:
    """Accumulates the correlation of every student channel with every teacher channel, with torchmetrics' calls.

    A node's activations are one vector over all images and all positions, after the ReLU; rho is the inner product of
    two such vectors after standardisation, divided by their length (Yang et al., AISTATS 2021, section 3). Batches may
    be cut in any way.
    """

    def __init__(self) -> None:
        self._state: CorrelationState | None = None

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add one batch.

        Args:
            student: ``[N, Cs, H, W]`` or ``[N, Cs]``, float32, bfloat16, float16 or float64; gradients are ignored.
            teacher: ``[N, Ct, H, W]`` or ``[N, Ct]``, of student's N, H, W, dtype and device. N may be 0.

        Raises:
            InputError: see `tsrfast.ops.channel_correlation`; or the number of channels or the device has changed.
        """
        batch = channel_correlation(student.detach(), teacher.detach())
        self._state = batch if self._state is None else merge(self._state, batch)

    def merge_state(self, other: ChannelCorrelation) -> None:
        """Add all that `other` has seen; `other` is left as it is.

        Raises:
            InputError: `other` has seen different channels or another device.
        """
        if other._state is not None:
            self._state = other._state if self._state is None else merge(self._state, other._state)

    def reset(self) -> None:
        """Forget everything."""
        self._state = None

    def to(self, device: torch.device | str) -> ChannelCorrelation:
        """Move what was seen to `device`; returns itself."""
        if self._state is not None:
            self._state = CorrelationState(*(m.to(device) for m in self._state))
        return self

    def compute(self) -> NormalizedCorrelation:
        """The correlation over all batches so far.

        Raises:
            InputError: no samples yet, or an activation was not finite (or its square overflows float32).
        """
        if self._state is None or self._state.n == 0:
            raise InputError("tsrfast.ChannelCorrelation.compute: update must have been given at least one sample, got none")
        count, mean_s, mean_t, m2_s, m2_t, cross = (m.cpu() for m in self._state)
        for name, mean, m2 in (("student", mean_s, m2_s), ("teacher", mean_t, m2_t)):
            bad = (~(mean.isfinite() & m2.isfinite())).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"tsrfast.ChannelCorrelation.update: {name} must have finite activations (with finite squares), "
                    f"got others in channels {bad[:8]}{' and more' if len(bad) > 8 else ''}"
                )
        dead_s, dead_t = _dead(count, mean_s, m2_s), _dead(count, mean_t, m2_t)
        # Roots before the product: the product of two tiny sums may underflow.
        rho = (cross / m2_s.sqrt()[:, None] / m2_t.sqrt()).clamp(-1, 1)
        rho = rho.masked_fill(dead_s[:, None] | dead_t, 0.0)
        return NormalizedCorrelation(rho, dead_s, dead_t, int(count))


def _dead(count: Tensor, mean: Tensor, m2: Tensor) -> Tensor:
    variance = m2.clamp(min=0) / count
    return variance <= _DEAD * (variance + mean.square())


class HasActivations(Protocol):
    """A network that shows its hidden layers, as `tsrfast.nets.ConvReLU` does."""

    def activations(self, x: Tensor) -> list[Tensor]:
        """Per layer [N, C, H, W] or [N, C]."""
        ...


def correlate(
    student: HasActivations, teacher: HasActivations, images: Tensor, batch_size: int = 256
) -> list[NormalizedCorrelation]:
    """Correlate two networks layer by layer: `accumulate`, and `ChannelCorrelation.compute` of each.

    Returns:
        One `NormalizedCorrelation` a layer, first layer first.

    Raises:
        InputError: as `accumulate`; activations that are not finite.
    """
    return [layer.compute() for layer in accumulate(student, teacher, images, batch_size)]


def accumulate(
    student: HasActivations, teacher: HasActivations, images: Tensor, batch_size: int = 256
) -> list[ChannelCorrelation]:
    """What `correlate` sees, to be merged with what others saw of other images.

    Args:
        student, teacher: networks with `activations(x)`, as many layers each, of equal H and W; they run in eval mode and
            get their own mode back.
        images: ``[N, C, H, W]``, float pixels in [0, 1] or uint8 (divided by 255); moved to the student's device.
        batch_size: images at a time; the result does not depend on it (up to rounding, 1e-7).

    Returns:
        One `ChannelCorrelation` a layer, first layer first.

    Raises:
        InputError: no images, a batch size below 1, different numbers of layers, activations that do not fit.
    """
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"tsrfast.correlate: images must be [N, C, H, W] with N >= 1, got shape {tuple(images.shape)}")
    if batch_size < 1:
        raise InputError(f"tsrfast.correlate: batch_size must be at least 1, got {batch_size}")
    parameter = next(student.parameters(), None) if isinstance(student, nn.Module) else None
    device = images.device if parameter is None else parameter.device
    layers: list[ChannelCorrelation] = []
    with torch.no_grad(), evaluating(*(net for net in (student, teacher) if isinstance(net, nn.Module))):
        for batch in images.split(batch_size):
            x = batch.to(device)
            x = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x
            ours, theirs = student.activations(x), teacher.activations(x)
            if len(ours) != len(theirs):
                raise InputError(f"tsrfast.correlate: teacher must have student's {len(ours)} layers, got {len(theirs)}")
            layers = layers or [ChannelCorrelation() for _ in ours]
            for layer, s, t in zip(layers, ours, theirs, strict=True):
                layer.update(s, t)
    return layers
