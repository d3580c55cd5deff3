"""The steps of a trace become the records of a plan: activations ride on the record before them, and what multiplies and shifts
channels (batch normalisation, normalisation) goes into the weights of a convolution or linear layer wherever that is the same function.

Folds are computed in float64 and rounded to float32 once; weights that nothing is folded into stay as they are, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsrfast.chain.tracing import Shape, Step
from tsrfast.ops.chain import ACTIVATIONS, FIELDS, KINDS


@dataclass(eq=False)
class Record:
    """A row of the plan before its parameters have their places.

    `weight`: conv [O, C, kh, kw], linear [O, D], affine [C]; `bias`: [O] or [C]; None: zeros.
    """

    kind: str
    names: list[str]
    entering: Shape
    leaving: Shape
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    count_pad: int = 0
    weight: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "none"
    slope: float = 0.0
    winograd: int = 0
    offsets: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        activation = [] if self.activation == "none" else [self.activation]
        return "+".join([*self.names, *activation])


def build(steps: list[Step], winograd: bool, device: torch.device) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The plan int64 ``[records, len(FIELDS)]`` on the CPU, its parameters float32 ``[*]`` on `device`, and the records' names."""
    with torch.no_grad(), device:  # whatever the default device is
        records = fold(steps)
        weights = _place(records)
    for r in records:
        r.winograd = int(winograd and r.kind == "conv" and winograd_pays(r))
    plan = torch.tensor([_row(r) for r in records], dtype=torch.int64, device="cpu")
    return plan, weights, tuple(r.name for r in records)


def fold(steps: list[Step]) -> list[Record]:
    """The records of `steps`, parameters in float32 where nothing was folded into them, else in float64."""
    records: list[Record] = []
    for step in steps:
        last = records[-1] if records else None
        if step.kind == "activation":
            if last is None or last.activation != "none":
                last = Record("affine", [], step.entering, step.leaving, weight=_full(step, 1), bias=_full(step, 0))
                records.append(last)
            last.activation, last.slope = ("relu", 0.0) if step.numbers[0] == 0 else ("leaky_relu", step.numbers[0])
        elif step.kind in ("conv", "linear"):
            record = Record(step.kind, [step.name], step.entering, step.leaving, weight=step.tensors[0], bias=step.tensors[1])
            if step.kind == "conv":
                record.kernel, record.stride, record.pad = _pairs(step.numbers)
            records.append(record)
        elif step.kind in ("avg_pool", "max_pool"):
            kernel, stride, pad = _pairs(step.numbers)
            count_pad = int(step.numbers[6])
            records.append(Record(step.kind, [step.name], step.entering, step.leaving, kernel, stride, pad, count_pad))
        else:
            scale, shift = _scale_and_shift(step)
            if last is not None and last.weight is not None and last.activation == "none" and len(scale) == last.leaving[0]:
                _after(last, scale, shift)
                last.names.append(step.name)
            else:
                records.append(Record("affine", [step.name], step.entering, step.leaving, weight=scale, bias=shift))
    return _fold_forward(records)


def _pairs(numbers: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    kh, kw, sh, sw, ph, pw = (int(n) for n in numbers[:6])
    return (kh, kw), (sh, sw), (ph, pw)


def _scale_and_shift(step: Step) -> tuple[Tensor, Tensor]:
    """Float64 ``[C]`` each, with which the step computes scale * x + shift."""
    one, zero = _full(step, 1), _full(step, 0)
    if step.kind == "batch_norm":
        mean, variance, weight, bias = (None if t is None else t.double() for t in step.tensors)
        assert mean is not None
        assert variance is not None
        scale = (variance + step.numbers[0]).rsqrt() * (one if weight is None else weight)
        return scale, (zero if bias is None else bias) - mean * scale
    given = step.tensors[0] if step.tensors else None
    value = _full(step, step.numbers[0]) if given is None else given.double().flatten().expand(step.entering[0])
    return {
        "add": (one, value),
        "sub": (one, -value),
        "rsub": (-one, value),
        "mul": (value, zero),
        "div": (one / value, zero),
    }[step.kind]


def _full(step: Step, value: float) -> Tensor:
    """One float64 for each channel that enters."""
    return torch.full((step.entering[0],), value, dtype=torch.float64)


def _after(record: Record, scale: Tensor, shift: Tensor) -> None:
    """Let `record`, which has weights and no activation, compute scale * (what it did) + shift, too."""
    assert record.weight is not None
    record.weight = record.weight.double() * scale.reshape(-1, *[1] * (record.weight.ndim - 1))
    record.bias = shift if record.bias is None else record.bias.double() * scale + shift


def _before(record: Record, scale: Tensor, shift: Tensor) -> None:
    """Let `record`, a linear layer or a convolution without padding, compute on scale * x + shift."""
    assert record.weight is not None
    weight = record.weight.double().reshape(len(record.weight), len(scale), -1)  # features are in (C, H, W) order
    added = (weight * shift[:, None]).sum((1, 2))
    record.bias = added if record.bias is None else record.bias.double() + added
    record.weight = (weight * scale[:, None]).reshape(record.weight.shape)


def _fold_forward(records: list[Record]) -> list[Record]:
    """Move each affine record into the convolution or linear layer that follows, if it is the same function there.

    It is not where zeros are padded in between (they would be shifted, too) or anything but an average stands between.
    """
    kept: list[Record] = []
    for i, r in enumerate(records):
        target = next(
            (f for f in records[i + 1 :] if not (f.kind == "avg_pool" and f.pad == (0, 0) and f.activation == "none")), None
        )
        if (
            r.kind == "affine"
            and r.activation == "none"
            and target is not None
            and target.kind in ("conv", "linear")
            and target.pad == (0, 0)
            and target.entering[0] % r.leaving[0] == 0
        ):
            assert r.weight is not None
            assert r.bias is not None
            _before(target, r.weight, r.bias)
            target.names[:0] = r.names
        else:
            kept.append(r)
    return kept


def winograd_pays(r: Record) -> bool:
    """Whether Winograd F(4x4,3x3) is quicker than the direct sum, for a 3x3 convolution with stride 1.

    Multiplications: 9 a pair of channels and output, against 36 a pair of channels and tile of 4x4 outputs, of which those
    beyond the border are wasted; transforming a tile costs about 150 for each input and 110 for each output channel.
    """
    if r.kernel != (3, 3) or r.stride != (1, 1):
        return False
    c, (o, height, width) = r.entering[0], r.leaving
    tiles = -(-height // 4) * -(-width // 4)
    return tiles * (36 * c * o + 150 * c + 110 * o) < 9 * c * o * height * width


def _place(records: list[Record]) -> Tensor:
    """All parameters in one float32 tensor; the records learn their offsets."""
    parts: list[tuple[int, Tensor]] = []
    total = 0
    for r in records:
        own: dict[str, Tensor] = {}
        if r.weight is not None:
            own["weight"] = r.weight
            own["bias"] = r.weight.new_zeros(r.leaving[0]) if r.bias is None else r.bias
        if r.activation == "leaky_relu":
            own["slope"] = torch.tensor([r.slope], dtype=torch.float64)
        for name, values in own.items():
            r.offsets[name] = total
            parts.append((total, values))
            total += values.numel()
    weights = torch.empty(total, dtype=torch.float32)
    for offset, values in parts:
        weights[offset : offset + values.numel()].view(values.shape).copy_(values)
    return weights


def _row(r: Record) -> list[int]:
    row = {
        "kind": KINDS[r.kind],
        **dict(zip(("channels", "height", "width"), r.entering, strict=True)),
        **dict(zip(("out_channels", "out_height", "out_width"), r.leaving, strict=True)),
        **dict(zip(("kernel_h", "kernel_w"), r.kernel, strict=True)),
        **dict(zip(("stride_h", "stride_w"), r.stride, strict=True)),
        **dict(zip(("pad_h", "pad_w"), r.pad, strict=True)),
        "activation": ACTIVATIONS[r.activation],
        **{name: r.offsets.get(name, -1) for name in ("weight", "bias", "slope")},
        "winograd": r.winograd,
        "count_pad": r.count_pad,
    }
    return [row[f] for f in FIELDS]
