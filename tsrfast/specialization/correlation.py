"""Normalised correlation of student and teacher nodes, streamed batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tsrfast import _native
from tsrfast._modes import evaluating
from tsrfast.chain import Chain, automatic, mostly_wide_linear
from tsrfast.errors import InputError, UnsupportedModel, unknown
from tsrfast.ops.chain import ACTIVATIONS, FIELDS, PRECISIONS
from tsrfast.ops.chain_correlation import chain_correlation
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge

ENGINES = ("auto", "chain", "eager")

# Images that a network and its chain are compared on.
PROBE = 2
# Images at a time in native code: Ctrl-C, which it does not hear, waits some seconds at most. Not a matter of threads, or sums would be.
PIECE = 2048
PIECE_ON_CUDA = 16384

_DEAD = 1e-12


@dataclass(frozen=True, eq=False)
class NormalizedCorrelation:
    """Correlations of one layer's nodes; on the CPU.

    Attributes:
        rho: float64 [Cs, Ct] in [-1, 1]; row k is student node k, column j teacher node j. 0 where either is dead.
        dead_student, dead_teacher: bool [Cs], [Ct]: nodes whose activation does not vary (variance at most 1e-12 of the
            mean square; 1e-6 where a fused kernel took the moments, see `tsrfast.ops.chain_correlation`).
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
        self.update_moments(channel_correlation(student.detach(), teacher.detach()))

    def update_moments(self, batch: CorrelationState) -> None:
        """Add a batch of which the moments are known.

        Raises:
            InputError: of other channels or on another device than what was seen.
        """
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
    student: HasActivations,
    teacher: HasActivations,
    images: Tensor,
    batch_size: int = 256,
    *,
    engine: str = "auto",
    precision: str = "auto",
) -> list[NormalizedCorrelation]:
    """Correlate two networks layer by layer: `accumulate`, and `ChannelCorrelation.compute` of each.

    Returns:
        One `NormalizedCorrelation` a layer, first layer first.

    Raises:
        InputError: as `accumulate`; activations that are not finite.
    """
    layers = accumulate(student, teacher, images, batch_size, engine=engine, precision=precision)
    return [layer.compute() for layer in layers]


def accumulate(
    student: HasActivations,
    teacher: HasActivations,
    images: Tensor,
    batch_size: int = 256,
    *,
    engine: str = "auto",
    precision: str = "auto",
) -> list[ChannelCorrelation]:
    """What `correlate` sees, to be merged with what others saw of other images.

    Args:
        student, teacher: networks with `activations(x)`, as many layers each, of equal H and W; they run in eval mode and
            get their own mode back.
        images: ``[N, C, H, W]``, float pixels in [0, 1] or uint8 (divided by 255); moved to the student's device.
        batch_size: images at a time in PyTorch; the result does not depend on it (up to rounding, 1e-7). Native code takes as many as
            suit it, in memory that does not grow with their number.
        engine: ``auto`` takes native code on the CPU where it can: both networks compile (`tsrfast.compile`), and their activations,
            tried on two of the images, are those of the compiled networks' ReLUs; so activations are never stored. ``chain``: that,
            or an error that says why not; on CUDA too. ``eager``: the networks' own `activations`.
        precision: of native code, one of `tsrfast.ops.chain.PRECISIONS`; ``auto`` is float32 on the CPU and split on CUDA, where
            ``float16`` may have a fused kernel (`tsrfast.ops.chain_correlation`; not for `Chain`s, whose logits are correlated, too).

    Returns:
        One `ChannelCorrelation` a layer, first layer first.

    Raises:
        InputError: no images, a batch size below 1, different numbers of layers, activations that do not fit; an unknown engine or
            precision, or one that cannot be had.
    """
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"tsrfast.correlate: images must be [N, C, H, W] with N >= 1, got shape {tuple(images.shape)}")
    if batch_size < 1:
        raise InputError(f"tsrfast.correlate: batch_size must be at least 1, got {batch_size}")
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if precision not in ("auto", *PRECISIONS):
        raise unknown("precision", precision, ("auto", *PRECISIONS))
    parameter = next(student.parameters(), None) if isinstance(student, nn.Module) else None
    device = images.device if parameter is None else parameter.device
    with torch.no_grad(), evaluating(*(net for net in (student, teacher) if isinstance(net, nn.Module))):
        pair, reason = _compiled(student, teacher, _pixels(images[:PROBE], device), engine)
        if pair is not None:
            return _native_moments(pair, images, device, precision)
        if engine == "chain":
            raise InputError(f"tsrfast.correlate: engine must be 'auto' or 'eager' for this call, got 'chain': {reason}")
        if precision != "auto":
            raise InputError(
                f"tsrfast.correlate: precision must be 'auto' where native code does not run, got {precision!r}: {reason}"
            )
        return _eager(student, teacher, images, device, batch_size)


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    x = images.to(device)
    return x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x


def _eager(
    student: HasActivations, teacher: HasActivations, images: Tensor, device: torch.device, batch_size: int
) -> list[ChannelCorrelation]:
    layers: list[ChannelCorrelation] = []
    for batch in images.split(batch_size):
        x = _pixels(batch, device)
        ours, theirs = student.activations(x), teacher.activations(x)
        if len(ours) != len(theirs):
            raise InputError(f"tsrfast.correlate: teacher must have student's {len(ours)} layers, got {len(theirs)}")
        layers = layers or [ChannelCorrelation() for _ in ours]
        for layer, s, t in zip(layers, ours, theirs, strict=True):
            layer.update(s, t)
    return layers


class _Compiled(NamedTuple):
    chain: Chain
    layers: list[int]  # the records that its network's `activations` shows


def _compiled(
    student: HasActivations, teacher: HasActivations, x: Tensor, engine: str
) -> tuple[tuple[_Compiled, _Compiled] | None, str]:
    """Both networks, or None and why not; `x`: some of the images."""
    if engine == "eager":
        return None, "engine='eager' asks for it"
    if x.dtype != torch.float32 or x.device.type not in ("cpu", "cuda"):
        name = str(x.dtype).removeprefix("torch.")
        return None, f"images are {name} on {x.device.type}, native code takes float32 and uint8 on cpu or cuda"
    if engine == "auto" and x.is_cuda:
        return None, "native code is not known to be faster than PyTorch on CUDA"
    pair: list[_Compiled] = []
    for who, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, (nn.Module, Chain)):
            return None, f"{who} is no nn.Module"
        if isinstance(network, nn.Module) and any(p.device != x.device for p in network.parameters()):
            return None, f"{who} is not on {x.device}"
        try:
            chain = network if isinstance(network, Chain) else automatic(network, tuple(x.shape[1:]), x.device)
        except UnsupportedModel as e:
            return None, f"{who} does not compile: {e}"
        if (chain.image, chain.device) != (tuple(x.shape[1:]), x.device):
            return None, f"{who} was compiled for images {list(chain.image)} on {chain.device}"
        ends = chain.plan[:, FIELDS.index("activation")] != ACTIVATIONS["none"]
        layers = range(len(chain.plan)) if isinstance(network, Chain) else ends.nonzero().flatten().tolist()
        if not _shows(network, chain, list(layers), x):
            return None, f"the activations of {who} are not those of its {len(layers)} ReLUs"
        pair.append(_Compiled(chain, list(layers)))
    sizes = [c.chain.plan[c.layers][:, [FIELDS.index("out_height"), FIELDS.index("out_width")]].tolist() for c in pair]
    if not sizes[0] or sizes[0] != sizes[1]:
        return None, f"the networks must have as many layers, of equal heights and widths; got {sizes[0]} and {sizes[1]}"
    if engine == "auto" and any(mostly_wide_linear(c.chain) for c in pair):
        return None, "most of the work is in wide linear layers, where PyTorch's matrix products are faster"
    return (pair[0], pair[1]), "every network compiles"


def _shows(network: HasActivations, chain: Chain, layers: list[int], x: Tensor) -> bool:
    """Whether `network.activations` are what these records return, by their values for x."""
    if isinstance(network, Chain):
        return True
    # As `tsrfast.compile` compares logits: PyTorch's convolutions on CUDA may be TF32, with 10 bits.
    allowed = 1e-2 if x.is_cuda else 1e-3
    found, own = network.activations(x), chain.activations(x, layers)
    return [a.shape for a in found] == [a.shape for a in own] and all(
        torch.allclose(a, b, rtol=0, atol=allowed * float(b.abs().max()), equal_nan=True)
        for a, b in zip(found, own, strict=True)
    )


def _native_moments(
    pair: tuple[_Compiled, _Compiled], images: Tensor, device: torch.device, precision: str
) -> list[ChannelCorrelation]:
    if precision not in ("auto", "float32") and not _on_cuda(device):
        raise InputError(f"tsrfast.correlate: precision must be 'auto' or 'float32' on {device}, got {precision!r}")
    if precision == "auto":
        precision = "split" if _on_cuda(device) else "float32"
    (student, layers), (teacher, teacher_layers) = pair
    total = [ChannelCorrelation() for _ in layers]
    for piece in images.split(PIECE_ON_CUDA if device.type == "cuda" else PIECE):
        x = _pixels(piece, device).reshape(len(piece), *student.entering).contiguous()
        nets = (student.plan, student.packed), (teacher.plan, teacher.packed)
        for layer, moments in zip(total, chain_correlation(x, *nets, layers, teacher_layers, precision=precision), strict=True):
            layer.update_moments(moments)
    return total


def _on_cuda(device: torch.device) -> bool:
    """Whether the CUDA engine, or its emulation, computes there."""
    return device.type == "cuda" or _native.emulator is not None
