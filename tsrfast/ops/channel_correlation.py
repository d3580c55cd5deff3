"""Moments of two networks' channels, batch by batch: what normalised correlation is made of.

A sample is one position of one image; a network's channel c has the values x_c over all samples (Yang et al., AISTATS
2021, section 3: the inner product of standardised activations). The sums of two batches are joined exactly by the
pairwise update of Chan, Golub and LeVeque (1979), in float64, so a data set may be cut into batches in any way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError
from tsrfast.ops._register import check_dtype, register

_OP = "channel_correlation"


class CorrelationState(NamedTuple):
    """Moments of n samples; float64, on the activations' device. All zeros is the state of no samples."""

    n: Tensor  # []
    mean_student: Tensor  # [Cs]
    mean_teacher: Tensor  # [Ct]
    m2_student: Tensor  # [Cs] sum of squared distances from the mean
    m2_teacher: Tensor  # [Ct]
    cross: Tensor  # [Cs, Ct] sum of products of distances from the means


def _strides(name: str, x: Tensor) -> tuple[int, int, int]:
    """Strides of image, channel, position, where H and W are one dimension of positions."""
    if x.shape[2:].numel() == 1:
        return x.stride(0), x.stride(1), x.stride(0)
    (_, _, h, w), (image, channel, down, right) = x.shape, x.stride()
    if h > 1 and w > 1 and down != w * right:
        raise InputError(
            f"tsrfast.{_OP}: {name}'s rows must follow each other in memory (contiguous or channels_last; "
            f"use .contiguous()), got strides {x.stride()}"
        )
    return image, channel, right if w > 1 else down


def _check(student: Tensor, teacher: Tensor) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        check_dtype(_OP, name, x)
        if x.ndim not in (2, 4):
            raise InputError(f"tsrfast.{_OP}: {name} must be [N, C] or [N, C, H, W], got shape {tuple(x.shape)}")
        if x.shape[1] == 0:
            raise InputError(f"tsrfast.{_OP}: {name} must have at least one channel, got shape {tuple(x.shape)}")
    if student.shape[:1] + student.shape[2:] != teacher.shape[:1] + teacher.shape[2:]:
        raise InputError(
            f"tsrfast.{_OP}: teacher must have student's N, H and W (student is {tuple(student.shape)}), "
            f"got {tuple(teacher.shape)}"
        )
    if teacher.dtype != student.dtype:
        raise InputError(f"tsrfast.{_OP}: teacher must be {student.dtype} as student is, got {teacher.dtype}")
    if teacher.device != student.device:
        raise InputError(f"tsrfast.{_OP}: teacher must be on student's device {student.device}, got {teacher.device}")


def _size(student: Tensor, teacher: Tensor) -> int:
    cs, ct = student.shape[1], teacher.shape[1]
    return 1 + 2 * (cs + ct) + cs * ct


def _kernel(student: Tensor, teacher: Tensor) -> Tensor:
    _check(student, teacher)
    images, positions = student.shape[0], student.shape[2:].numel()
    s, t = _strides("student", student), _strides("teacher", teacher)
    if images <= 1 or all(x[0] == positions * x[2] for x in (s, t)):  # one long image: no seams to look out for
        images, positions = 1, images * positions
    shape = (images, student.shape[1], teacher.shape[1], positions, _native.DTYPES[student.dtype])
    need = torch.empty((), dtype=torch.int64, device="cpu")
    _native.call("channel_correlation_workspace", student, need.data_ptr(), *shape)
    workspace = student.new_empty(int(need), dtype=torch.uint8)
    out = student.new_empty(_size(student, teacher), dtype=torch.float64)
    addresses = (student.data_ptr(), teacher.data_ptr(), *s, *t, out.data_ptr(), workspace.data_ptr(), len(workspace))
    _native.call(_OP, student, *addresses, *shape)
    return out


_op = register(
    "channel_correlation(Tensor student, Tensor teacher) -> Tensor",
    _kernel,
    lambda student, teacher: student.new_empty(_size(student, teacher), dtype=torch.float64),
)


def channel_correlation(student: Tensor, teacher: Tensor) -> CorrelationState:
    """Count, means, centred second moments and centred cross moments of one batch, in one pass over it.

    Args:
        student: activations ``[N, Cs, H, W]`` or ``[N, Cs]``, float32, bfloat16, float16 or float64; contiguous,
            channels_last or any strides under which H and W are one dimension. Read in place.
        teacher: ``[N, Ct, H, W]`` or ``[N, Ct]``, dtype and device as `student`.

    Returns:
        The batch's moments over its n = N H W samples. Products are float32 within tiles of some hundred samples (on CUDA: of
        some thousand, and with 16 significant bits where activations have 16 bits; float64 for float64 activations), taken
        relative to a value near the tile's mean, and summed in float64: a mean of thousands of standard deviations does no
        harm. A value that is not finite (or whose square is not, in float32) makes its channel's moments NaN or infinite. The
        result does not depend on the number of threads.

    Raises:
        InputError: wrong number of dimensions, dtype, strides; `teacher`'s N, H, W, dtype or device differ from `student`'s.

    Same as `tsrfast.reference.channel_correlation`. Kernels: ``csrc/{cpu,cuda}/channel_correlation``. No gradient.
    """
    cs, ct = student.shape[1], teacher.shape[1]
    count, mean_s, mean_t, m2_s, m2_t, cross = _op(student, teacher).split([1, cs, ct, cs, ct, cs * ct])
    return CorrelationState(count[0], mean_s, mean_t, m2_s, m2_t, cross.view(cs, ct))


def merge(a: CorrelationState, b: CorrelationState) -> CorrelationState:
    """The state of `a`'s and `b`'s samples together (Chan, Golub and LeVeque 1979).

    Args:
        a, b: states of the same channels on the same device.

    Returns:
        A new state. Equal to ``merge(b, a)`` up to rounding; a state of no samples changes nothing.

    Raises:
        InputError: the states are of different channels or devices.

    Same as `tsrfast.reference.merge`.
    """
    if a.cross.shape != b.cross.shape or a.cross.device != b.cross.device:
        raise InputError(
            f"tsrfast.{_OP}.merge: b must have a's channels {tuple(a.cross.shape)} on {a.cross.device}, "
            f"got {tuple(b.cross.shape)} on {b.cross.device}"
        )
    count = a.n + b.n
    part = b.n / count.clamp(min=1)
    weight = a.n * part
    ds, dt = b.mean_student - a.mean_student, b.mean_teacher - a.mean_teacher
    return CorrelationState(
        count,
        a.mean_student + part * ds,
        a.mean_teacher + part * dt,
        a.m2_student + b.m2_student + weight * ds * ds,
        a.m2_teacher + b.m2_teacher + weight * dt * dt,
        a.cross + b.cross + weight * torch.outer(ds, dt),
    )
