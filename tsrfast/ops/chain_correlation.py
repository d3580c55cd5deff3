"""Moments of two compiled networks' channels, straight from their images: activations stay in a thread's or a block's own memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast._threads import threads
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.ops._register import register
from tsrfast.ops.chain import (
    FIELDS,
    KINDS,
    PRECISIONS,
    Network,
    _check_images,
    _check_together,
    _fused_covers,
    _kernels,
    _net,
    _number,
    _precision,
    _shape,
    chain_forward,
)
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge

_OP = "chain_correlation"

# Of both networks' activations at a time, where CUDA goes layer by layer; 1300 images of the paper's networks.
_BATCH_BYTES = 2**30


def _check_layers(plan: Tensor, teacher_plan: Tensor, layers: Sequence[int], teacher_layers: Sequence[int]) -> None:
    for name, p, given in (("layers_student", plan, layers), ("layers_teacher", teacher_plan, teacher_layers)):
        for layer in given:
            if not 0 <= layer < len(p):
                raise InputError(f"tsrfast.{_OP}: {name} must be in 0..{len(p) - 1}, got {layer}")
    if not layers:
        raise InputError(f"tsrfast.{_OP}: layers_student must name at least one layer, got none")
    if len(layers) != len(teacher_layers):
        raise InputError(
            f"tsrfast.{_OP}: layers_teacher must be as many as layers_student ({len(layers)}), got {len(teacher_layers)}"
        )
    for s, t in zip(layers, teacher_layers, strict=True):
        ours, theirs = _shape(plan, s), _shape(teacher_plan, t)
        if _sides(ours) != _sides(theirs):
            raise InputError(
                f"tsrfast.{_OP}: layers_teacher must have the height and width of layers_student "
                f"(record {s}: {list(ours)}), got record {t}: {list(theirs)}"
            )


def _sides(shape: Sequence[int]) -> tuple[int, ...]:
    """Height and width of a channel; features have one position."""
    return tuple(shape[1:]) or (1, 1)


def _convolutions(plan: Tensor) -> list[int]:
    found: list[int] = (plan[:, FIELDS.index("kind")] == KINDS["conv"]).nonzero().flatten().tolist()
    return found


def _flat(state: CorrelationState) -> Tensor:
    return torch.cat([m.flatten() for m in state])


def _state(moments: Tensor, cs: int, ct: int) -> CorrelationState:
    count, mean_s, mean_t, m2_s, m2_t, cross = moments.split([1, cs, ct, cs, ct, cs * ct])
    return CorrelationState(count[0], mean_s, mean_t, m2_s, m2_t, cross.view(cs, ct))


def _by_layers(
    x: Tensor, student: Network, teacher: Network, layers: Sequence[int], teacher_layers: Sequence[int], precision: str
) -> list[Tensor]:
    """Through memory: both networks' activations of some images, then their moments, then the next images."""
    values = sum(math.prod(_shape(net[0], i)) for net, at in ((student, layers), (teacher, teacher_layers)) for i in at)
    total: list[CorrelationState] | None = None
    for batch in x.split(max(1, _BATCH_BYTES // (values * x.element_size()))):
        ours, theirs = (
            dict(zip(at, chain_forward(batch.reshape(-1, *_shape(net[0], -1)), *net, at, precision=precision), strict=True))
            for net, at in ((student, sorted(set(layers))), (teacher, sorted(set(teacher_layers))))
        )
        seen = [
            channel_correlation(*(a.reshape(*a.shape[:2], *_sides(a.shape[1:])) for a in (ours[i], theirs[j])))
            for i, j in zip(layers, teacher_layers, strict=True)
        ]
        total = seen if total is None else [merge(a, b) for a, b in zip(total, seen, strict=True)]
    assert total is not None  # split gives one batch of no images
    return [_flat(state) for state in total]


def _correlation(
    x: Tensor,
    plan: Tensor,
    packed: Tensor,
    teacher_plan: Tensor,
    teacher_packed: Tensor,
    layers: Sequence[int],
    teacher_layers: Sequence[int],
    precision: int,
) -> list[Tensor]:
    _check_together(
        _OP, "x", x, student_plan=plan, student_packed=packed, teacher_plan=teacher_plan, teacher_packed=teacher_packed
    )
    kernels, on_cuda = _kernels(x)
    _precision(_OP, precision, on_cuda)
    nets = (*_net(_OP, "student", plan, packed), *_net(_OP, "teacher", teacher_plan, teacher_packed))
    _check_images(_OP, "x", x, plan)
    inputs = [math.prod(_shape(p, -1)) for p in (plan, teacher_plan)]
    if inputs[0] != inputs[1]:
        raise InputError(f"tsrfast.{_OP}: teacher must have the student's {inputs[0]} inputs, got {inputs[1]}")
    _check_layers(plan, teacher_plan, layers, teacher_layers)
    channels = [(_shape(plan, s)[0], _shape(teacher_plan, t)[0]) for s, t in zip(layers, teacher_layers, strict=True)]
    if on_cuda and not _fused(plan, teacher_plan, layers, teacher_layers, precision, x.device):
        name = next(n for n, number in PRECISIONS.items() if number == precision)
        return _by_layers(x, (plan, packed), (teacher_plan, teacher_packed), layers, teacher_layers, name)
    moments = [x.new_zeros(1 + 2 * (cs + ct) + cs * ct, dtype=torch.float64) for cs, ct in channels]
    if len(x):
        where = (x.device.index or 0) if on_cuda else threads()
        plans = (plan.data_ptr(), len(plan), teacher_plan.data_ptr(), len(teacher_plan))
        size = kernels.chain_correlation_workspace(*plans, list(layers), list(teacher_layers), len(x), where)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        _native.call(
            _OP, x, *nets, x.data_ptr(), list(layers), list(teacher_layers), [m.data_ptr() for m in moments], len(x),
            workspace.data_ptr(), size,
        )  # fmt: skip
    return moments


def _fused(
    plan: Tensor,
    teacher_plan: Tensor,
    layers: Sequence[int],
    teacher_layers: Sequence[int],
    precision: int,
    device: torch.device,
) -> bool:
    if precision != PRECISIONS["float16"]:
        return False
    every = list(layers) == _convolutions(plan) and list(teacher_layers) == _convolutions(teacher_plan)
    return every and has_fused_correlation(plan, teacher_plan, device)


def _untraceable(*_: object) -> list[Tensor]:
    raise EnvironmentFault("tsrfast: chain_correlation cannot be traced: its shapes are data of the plans")


_op = register(
    "chain_correlation(Tensor x, Tensor student_plan, Tensor student_packed, Tensor teacher_plan, Tensor teacher_packed, "
    "int[] layers_student, int[] layers_teacher, int precision) -> Tensor[]",
    _correlation,
    _untraceable,
)


def chain_correlation(
    x: Tensor,
    student: Network,
    teacher: Network,
    layers_student: Sequence[int],
    layers_teacher: Sequence[int],
    *,
    precision: str = "float32",
) -> list[CorrelationState]:
    """Moments of pairs of layers while images pass through both networks: `channel_correlation` of `chain_forward`'s results.

    Normalised correlation (Yang et al., AISTATS 2021, section 3) is made of them.

    Args:
        x: float32 ``[N, C, H, W]`` as the student takes it (``[N, D]`` where its first record is linear), contiguous, on cpu or cuda.
            N may be 0.
        student, teacher: (plan, packed), packed where x is; of as many inputs each.
        layers_student, layers_teacher: numbers of records, one of each network for a pair, whose results have the same height and width;
            in any order.
        precision: one of `tsrfast.ops.chain.PRECISIONS`; on the CPU float32.

    Returns:
        For each pair the moments of its n = N H W samples, float64, where x is.

        On the CPU activations stay in the threads' own memory, whose size does not depend on N; the result does not depend on the number
        of threads, bit by bit. So do, on CUDA in ``float16``, those of networks with a fused kernel (`has_fused_correlation`) if the
        layers are all of their convolutions, in order. Any other call on CUDA goes layer by layer in the same precision: activations of a
        bounded number of images at a time pass through the GPU's memory.

        Activations that are not finite make their channels' moments NaN or infinite (in ``float16`` from 65520 on; the fused kernel may
        then give NaN in channels that they are summed into). The fused kernel sums without a shift: a correlation is off by about
        4e-6 (1 + (mean / std)^2), and a channel whose std is below 1e-3 of its root mean square counts as constant: second moments 0.

    Raises:
        InputError: wrong dtype, shape, strides, device or precision, no layers, or layers that do not fit each other.
        EnvironmentFault: no kernel for x's device.

    Same as `tsrfast.reference.chain_correlation` on the unpacked weights. Kernels: ``csrc/{cpu,cuda}/chain_correlation``. No gradient.
    """
    moments = _op(x, *student, *teacher, list(layers_student), list(layers_teacher), _number(precision))
    channels = (
        (_shape(student[0], s)[0], _shape(teacher[0], t)[0]) for s, t in zip(layers_student, layers_teacher, strict=True)
    )
    return [_state(m, *sizes) for m, sizes in zip(moments, channels, strict=True)]


def has_fused_correlation(student: Tensor, teacher: Tensor, device: torch.device | None = None) -> bool:
    """Whether `chain_correlation` in float16 on that GPU (None: the current one) runs these plans' convolutions as one kernel.

    Args:
        student, teacher: int64 ``[records, columns]``.

    Returns:
        False without CUDA kernels or a GPU.

    Raises:
        InputError: a plan is not one.
    """
    return _fused_covers("has_fused_correlation", "chain_correlation_covers", student, teacher, device)
