"""Compiled ReLU networks: forward, gradients and whole attacks on a plan and its packed parameters.

A plan is an int64 tensor ``[records, columns]`` (`FIELDS`, by the struct of csrc/core/chain.h; formulas there): each record maps
activations [C, H, W] to [C', H', W'] and may end in a ReLU. `tsrfast.compile` makes plans from modules. A plan is on the CPU, wherever the
rest is. The CPU engine computes in float32; 3x3 convolutions go through Winograd's F(4x4, 3x3) where the plan says so. The CUDA engine
sums directly, in one of three `PRECISIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast._threads import threads
from tsrfast.errors import EnvironmentFault, InputError, unknown
from tsrfast.ops._register import per_image, register
from tsrfast.ops.pgd_step import NORMS

FIELDS = (
    "kind", "channels", "height", "width", "out_channels", "out_height", "out_width", "kernel_h", "kernel_w",
    "stride_h", "stride_w", "pad_h", "pad_w", "activation", "weight", "bias", "slope", "winograd", "count_pad",
)  # fmt: skip
KINDS = {"conv": 0, "linear": 1, "affine": 2, "avg_pool": 3, "max_pool": 4}
ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2}
LOSSES = (
    "cross_entropy", "margin", "oracle_l2", "oracle_cross_entropy", "oracle_margin", "oracle_kl", "oracle_max_difference",
)  # fmt: skip
PRECISIONS = {"float32": 0, "split": 1, "float16": 2}
"""Of the products on CUDA; sums are float32. float32: as it says. split: operands as two float16 each, three products on tensor cores,
about 22 bits. float16: operands rounded to float16 (csrc/core/chain.h)."""

Network = tuple[Tensor, Tensor]
"""(plan, packed)"""


class ChainPGD(NamedTuple):
    """What `chain_pgd` returns."""

    x: Tensor
    loss: Tensor
    adversarial: Tensor
    closeness: Tensor
    bad: Tensor
    queries: Tensor
    iterates: Tensor | None


def _shape(plan: Tensor, record: int) -> tuple[int, ...]:
    """Of an image's results of `record`; of the input for -1. Features of a linear record have one dimension."""
    row = dict(zip(FIELDS, plan[max(record, 0)].tolist(), strict=True))
    side = "" if record < 0 else "out_"
    c, h, w = row[f"{side}channels"], row[f"{side}height"], row[f"{side}width"]
    return (c,) if row["kind"] == KINDS["linear"] else (c, h, w)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _kernels(like: Tensor) -> tuple[ModuleType, bool]:
    """The compiled functions for tensors where `like` is, and whether they are the CUDA engine's (or its emulation)."""
    if _native.emulator is not None:
        return _native.emulator.cuda, True
    if not like.is_cuda:
        return _native._C.cpu, False
    _native.check_cuda("chain")
    return _native._C.cuda, True


def _check_together(op: str, like_name: str, like: Tensor, **tensors: Tensor | None) -> None:
    """All on `like`'s device, which has an engine, and contiguous; plans on the CPU."""
    if not (like.is_cpu or like.is_cuda):
        raise EnvironmentFault(f"tsrfast.{op}: {like_name} must be on cpu or cuda, got {like.device}")
    for name, t in {like_name: like, **tensors}.items():
        if t is None:
            continue
        where = torch.device("cpu") if name.endswith("plan") else like.device
        if t.device != where:
            raise InputError(f"tsrfast.{op}: {name} must be on {where}, got {t.device}")
        if not t.is_contiguous():
            raise InputError(f"tsrfast.{op}: {name} must be contiguous, got strides {t.stride()}")


def _precision(op: str, precision: int, on_cuda: bool) -> list[int]:
    """What the CUDA engine is told; the CPU engine has one precision and is told nothing."""
    if on_cuda:
        return [precision]
    if precision != PRECISIONS["float32"]:
        name = next(n for n, number in PRECISIONS.items() if number == precision)
        raise InputError(f"tsrfast.{op}: precision must be 'float32' on the CPU, got {name!r}")
    return []


def _check_plan(op: str, name: str, plan: Tensor) -> None:
    if plan.dtype != torch.int64 or plan.ndim != 2 or plan.shape[1] != len(FIELDS) or not len(plan):
        raise InputError(
            f"tsrfast.{op}: {name} must be int64 [records, {len(FIELDS)}], got {plan.dtype} of shape {tuple(plan.shape)}"
        )


def _check_float(op: str, name: str, t: Tensor, shape: tuple[int, ...] | None = None) -> None:
    if t.dtype != torch.float32:
        raise InputError(f"tsrfast.{op}: {name} must be float32, got {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise InputError(f"tsrfast.{op}: {name} must have shape {shape}, got {tuple(t.shape)}")


def _check_images(op: str, name: str, x: Tensor, plan: Tensor) -> None:
    shape = _shape(plan, -1)
    _check_float(op, name, x)
    if tuple(x.shape[1:]) != shape:
        sizes = ", ".join(map(str, shape))
        raise InputError(f"tsrfast.{op}: {name} must have shape [N, {sizes}], got {list(x.shape)}")


def _net(op: str, name: str, plan: Tensor, packed: Tensor) -> tuple[int, int, int, int]:
    _check_plan(op, name, plan)
    _check_float(op, "packed", packed, (packed.numel(),))
    try:
        size = _kernels(packed)[0].chain_packed_size(plan.data_ptr(), len(plan), 2**62)
    except ValueError as e:
        raise InputError(f"tsrfast.{op}: {name}: {e}") from None
    if packed.numel() != size:
        raise InputError(f"tsrfast.{op}: packed must have the {size} values of {name}, got {packed.numel()}")
    if _kernels(packed)[1] and packed.data_ptr() % 16:
        raise InputError(f"tsrfast.{op}: packed must start at a multiple of 16 bytes, as chain_pack returns it")
    return plan.data_ptr(), len(plan), packed.data_ptr(), packed.numel()


def _workspace(x: Tensor, plan: Tensor, teacher: Tensor | None = None, rows: int = 1, precision: int = 0) -> Tensor:
    """On the CPU memory for each thread, whose size does not depend on the number of images; on CUDA for a bounded number of them."""
    kernels, on_cuda = _kernels(x)
    plans = (plan.data_ptr(), len(plan), _address(teacher), 0 if teacher is None else len(teacher))
    if on_cuda:
        return torch.empty(kernels.chain_workspace(*plans, len(x), rows, precision), dtype=torch.uint8, device=x.device)
    return torch.empty(kernels.chain_workspace(*plans) * threads(), dtype=torch.uint8, device="cpu")


@lru_cache(maxsize=8)
def _map(rows: bytes, records: int, parameters: int, device: torch.device, emulated: bool) -> Tensor:
    """Which parameter each packed value of the CUDA engine is; a matter of the plan alone, so worked out once."""
    plan = torch.frombuffer(bytearray(rows), dtype=torch.int64)
    kernels = _native.emulator.cuda if emulated and _native.emulator is not None else _native._C.cuda
    out = torch.empty(kernels.chain_map_size(plan.data_ptr(), records, parameters), dtype=torch.int32, device="cpu")
    kernels.chain_map(plan.data_ptr(), records, parameters, out.data_ptr(), out.numel())
    return out.to(device)


def _pack(plan: Tensor, weights: Tensor) -> Tensor:
    op = "chain_pack"
    _check_together(op, "weights", weights, plan=plan)
    _check_plan(op, "plan", plan)
    _check_float(op, "weights", weights, (weights.numel(),))
    kernels, on_cuda = _kernels(weights)
    try:
        size = kernels.chain_packed_size(plan.data_ptr(), len(plan), weights.numel())
    except ValueError as e:
        raise InputError(f"tsrfast.{op}: {e}") from None
    packed = weights.new_empty(size)
    args = [plan.data_ptr(), len(plan), weights.data_ptr(), weights.numel(), packed.data_ptr()]
    if on_cuda:
        rows = plan.numpy().tobytes()
        try:
            where = _map(rows, len(plan), weights.numel(), weights.device, _native.emulator is not None)
        except ValueError as e:
            raise InputError(f"tsrfast.{op}: {e}") from None
        args += [where.data_ptr(), where.numel()]
    _native.call(op, weights, *args)
    return packed


def _forward(x: Tensor, plan: Tensor, packed: Tensor, layers: Sequence[int], precision: int) -> list[Tensor]:
    op = "chain_forward"
    _check_together(op, "x", x, plan=plan, packed=packed)
    told = _precision(op, precision, _kernels(x)[1])
    net = _net(op, "plan", plan, packed)
    _check_images(op, "x", x, plan)
    for layer in layers:
        if not 0 <= layer < len(plan):
            raise InputError(f"tsrfast.{op}: layers must be in 0..{len(plan) - 1}, got {layer}")
    out = [x.new_empty((len(x), *_shape(plan, layer))) for layer in layers]
    if len(x):
        workspace = _workspace(x, plan, precision=precision)
        _native.call(
            op, x, *net, x.data_ptr(), list(layers), [t.data_ptr() for t in out], len(x), workspace.data_ptr(), *told
        )  # fmt: skip
    return out


def _gradient(x: Tensor, plan: Tensor, packed: Tensor, cotangent: Tensor, layer: int, precision: int) -> Tensor:
    op = "chain_gradient"
    _check_together(op, "x", x, plan=plan, packed=packed, cotangent=cotangent)
    told = _precision(op, precision, _kernels(x)[1])
    net = _net(op, "plan", plan, packed)
    _check_images(op, "x", x, plan)
    if not -1 <= layer < len(plan):
        raise InputError(f"tsrfast.{op}: layer must be in -1..{len(plan) - 1}, got {layer}")
    rows = cotangent.shape[1] if cotangent.ndim == 3 else 1
    classes = math.prod(_shape(plan, len(plan) - 1))
    _check_float(op, "cotangent", cotangent, (len(x), rows, classes))
    out = x.new_empty((len(x), rows, *_shape(plan, layer)))
    if out.numel():
        workspace = _workspace(x, plan, rows=rows, precision=precision)
        addresses = (x.data_ptr(), cotangent.data_ptr(), out.data_ptr(), len(x), rows, layer, workspace.data_ptr())
        _native.call(op, x, *net, *addresses, *told)
    return out


def _may_look(x: Tensor) -> bool:
    """Whether values may be read on the host: not while they are only being recorded into a CUDA graph."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _pgd(
    x0: Tensor,
    start: Tensor,
    plan: Tensor,
    packed: Tensor,
    teacher_plan: Tensor | None,
    teacher_packed: Tensor | None,
    labels: Tensor | None,
    loss: int,
    norm: int,
    step: Tensor | None,
    eps: Tensor | None,
    step_value: float,
    eps_value: float,
    lo: float,
    hi: float,
    sparsity: float,
    steps: int,
    targeted: bool,
    keep_best: bool,
    early_stop: bool,
    judge: bool,
    keep_iterates: bool,
    precision: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op, n = "chain_pgd", len(x0)
    _check_together(op, "x0", x0, start=start, student_plan=plan, packed=packed, teacher_plan=teacher_plan)
    _check_together(op, "x0", x0, teacher_packed=teacher_packed, labels=labels, step_size=step, eps=eps)
    told = _precision(op, precision, _kernels(x0)[1])
    if (teacher_plan is None) != (teacher_packed is None):
        raise InputError(f"tsrfast.{op}: teacher must be (plan, packed) or None, got one of the two")
    if steps < 0:
        raise InputError(f"tsrfast.{op}: steps must be an integer >= 0, got {steps}")
    net = _net(op, "student", plan, packed)
    _check_images(op, "x0", x0, plan)
    _check_float(op, "start", start, tuple(x0.shape))
    classes = math.prod(_shape(plan, len(plan) - 1))
    other = (0, 0, 0, 0)
    if teacher_plan is not None and teacher_packed is not None:
        other = _net(op, "teacher", teacher_plan, teacher_packed)
        shapes = [(math.prod(_shape(p, -1)), math.prod(_shape(p, len(p) - 1))) for p in (plan, teacher_plan)]
        if shapes[0] != shapes[1]:
            raise InputError(f"tsrfast.{op}: teacher must have the student's inputs and classes {shapes[0]}, got {shapes[1]}")
    elif LOSSES[loss].startswith("oracle"):
        raise InputError(f"tsrfast.{op}: teacher must be given for loss {LOSSES[loss]!r}, got None")
    if labels is None and not LOSSES[loss].startswith("oracle"):
        raise InputError(f"tsrfast.{op}: labels must be given for loss {LOSSES[loss]!r}, got None")
    if labels is not None:
        if labels.dtype != torch.int64 or labels.shape != x0.shape[:1]:
            raise InputError(f"tsrfast.{op}: labels must be int64 [{n}], got {labels.dtype} of shape {tuple(labels.shape)}")
        if n and _may_look(x0) and not bool(((labels >= 0) & (labels < classes)).all()):
            bad_label = labels[(labels < 0) | (labels >= classes)][0].item()
            raise InputError(f"tsrfast.{op}: labels must be in 0..{classes - 1}, got {bad_label}")
    x = torch.empty_like(x0)
    value, closeness, adversarial = x0.new_empty(n), x0.new_empty(n), x0.new_empty(n, dtype=torch.bool)
    bad, queries = (x0.new_empty(n, dtype=torch.int64) for _ in range(2))
    iterates = x0.new_empty((steps + 1, *x0.shape) if keep_iterates else 0)
    if x0.numel():
        workspace = _workspace(x0, plan, teacher_plan, precision=precision)
        _native.call(
            op, x0, *net, *other,
            *map(_address, (x0, start, x, labels, value, adversarial, closeness, bad, queries)),
            iterates.data_ptr() if keep_iterates else 0,
            _address(step), _address(eps), step_value, eps_value, lo, hi, sparsity, n, steps, norm, loss,
            targeted, keep_best, early_stop, judge, workspace.data_ptr(), *told,
        )  # fmt: skip
    return x, value, adversarial, closeness, bad, queries, iterates


def _untraceable(*_: object) -> Tensor:
    raise EnvironmentFault(
        "tsrfast: chain_pack, chain_forward and chain_gradient cannot be traced: their shapes are data of the plan"
    )


def _fake_pgd(x0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, steps, keep_iterates = len(x0), args[15], args[20]
    counts = x0.new_empty(n, dtype=torch.int64)
    flags = x0.new_empty(n, dtype=torch.bool)
    iterates = x0.new_empty((steps + 1, *x0.shape) if keep_iterates else 0)
    return torch.empty_like(x0), x0.new_empty(n), flags, x0.new_empty(n), counts, torch.empty_like(counts), iterates


_op_pack = register("chain_pack(Tensor plan, Tensor weights) -> Tensor", _pack, _untraceable)
_op_forward = register(
    "chain_forward(Tensor x, Tensor plan, Tensor packed, int[] layers, int precision) -> Tensor[]", _forward, _untraceable
)
_op_gradient = register(
    "chain_gradient(Tensor x, Tensor plan, Tensor packed, Tensor cotangent, int layer, int precision) -> Tensor",
    _gradient,
    _untraceable,
)
_op_pgd = register(
    "chain_pgd(Tensor x0, Tensor start, Tensor plan, Tensor packed, Tensor? teacher_plan, Tensor? teacher_packed, "
    "Tensor? labels, int loss, int norm, Tensor? step, Tensor? eps, float step_value, float eps_value, float lo, float hi, "
    "float sparsity, int steps, bool targeted, bool keep_best, bool early_stop, bool judge, bool keep_iterates, "
    "int precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pgd,
    _fake_pgd,
)


def chain_pack(plan: Tensor, weights: Tensor) -> Tensor:
    """Parameters in the order in which the engine reads them, for both directions; Winograd's kernels transformed.

    Args:
        plan: int64 ``[records, columns]``.
        weights: float32 ``[P]``, the parameters that the plan's offsets name: conv [O, C, kh, kw], linear [O, in], bias [O], affine
            scale [C] and shift [C], slope [1].

    Returns:
        float32 ``[Q]`` where `weights` are, for that device's engine: on the CPU valid at every instruction set; on CUDA also bits that
        are no float32 numbers.

    Raises:
        InputError: wrong dtype or shape, records that do not follow on each other, offsets outside of `weights`.

    Kernels: ``csrc/{cpu,cuda}/chain``. No gradient.
    """
    packed: Tensor = _op_pack(plan, weights)
    return packed


def _number(precision: str) -> int:
    if precision not in PRECISIONS:
        raise unknown("precision", precision, tuple(PRECISIONS))
    return PRECISIONS[precision]


def chain_forward(
    x: Tensor, plan: Tensor, packed: Tensor, layers: Sequence[int], *, precision: str = "float32"
) -> list[Tensor]:
    """Results of the records `layers`, after their activations.

    Args:
        x: float32 ``[N, C, H, W]`` (``[N, D]`` where the first record is linear), contiguous, on cpu or cuda.
        plan, packed: the network (`chain_pack`), packed where x is.
        layers: numbers of records; the logits are those of the last, ``len(plan) - 1``.
        precision: one of `PRECISIONS`; on the CPU float32.

    Returns:
        A float32 tensor for each: ``[N, C', H', W']``, or ``[N, O]`` of a linear record. An image's values depend neither on its
        batch nor on the number of threads, bit by bit. A NaN or infinity inside a network may spread to its neighbours within a
        Winograd tile of 4x4 pixels.

    Raises:
        InputError: wrong dtype, shape, strides, device or precision. EnvironmentFault: no kernel for x's device.

    Same as `tsrfast.reference.chain_forward` on the unpacked weights. Kernels: ``csrc/{cpu,cuda}/chain``. No gradient.
    """
    out: list[Tensor] = _op_forward(x, plan, packed, list(layers), _number(precision))
    return out


def chain_gradient(
    x: Tensor, plan: Tensor, packed: Tensor, cotangent: Tensor, layer: int = -1, *, precision: str = "float32"
) -> Tensor:
    """Vectors at the logits carried back: ``J^T v`` of the logits' Jacobian at x, many v for one forward pass.

    Args:
        x, plan, packed, precision: as in `chain_forward`.
        cotangent: float32 ``[N, R, classes]``, contiguous.
        layer: with respect to the results of that record; -1 for x itself. With the identity as `cotangent` the rows are V_l of
            the recursive gradient rule (Tian 2019, Lemma 1), at every position.

    Returns:
        float32 ``[N, R, ...]``, the rest as the results of `layer` or as x. Gradients of max pools go to the first largest.

    Raises:
        InputError: wrong dtype, shape, strides, device or precision. EnvironmentFault: no kernel for x's device.

    Same as `tsrfast.reference.chain_gradient` on the unpacked weights. Kernels: ``csrc/{cpu,cuda}/chain``.
    """
    out: Tensor = _op_gradient(x, plan, packed, cotangent, layer, _number(precision))
    return out


def chain_pgd(
    x0: Tensor,
    start: Tensor,
    student: Network,
    teacher: Network | None = None,
    labels: Tensor | None = None,
    *,
    loss: str,
    norm: str = "linf",
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    lo: float = 0.0,
    hi: float = 1.0,
    sparsity: float = 0.01,
    targeted: bool = False,
    keep: str = "last",
    early_stop: bool = False,
    judge: bool = True,
    iterates: bool = False,
    precision: str = "float32",
) -> ChainPGD:
    """Multi-step PGD (Madry et al. 2018; paper, section 5.1 and eq. 3) in one native call.

    At each of `steps` steps the loss is differentiated at the iterate and `pgd_step` is taken, image by image.

    Args:
        x0: clean images, float32 ``[N, ...]`` contiguous, in [lo, hi].
        start: where to begin, likewise; not checked against ball and box, into which the first step projects.
        student: (plan, packed) of the attacked network.
        teacher: the oracle's, for the oracle losses; None otherwise.
        labels: int64 ``[N]``, for ``cross_entropy`` and ``margin``.
        loss: one of `LOSSES` (formulas: csrc/core/chain_loss.h).
        norm, eps, step_size, lo, hi, targeted, sparsity: as in `pgd_step`, pixel units.
        steps: >= 0.
        keep: ``last`` iterate or the ``best``: adversarial before not, then the better loss.
        early_stop: an image is done at its first adversarial iterate, which is then its result.
        judge: look at the last iterate too (always so with `early_stop` or ``best``).
        iterates: return every iterate as well (memory for ``steps + 1`` batches).
        precision: as in `chain_forward`. float16 on CUDA runs the whole attack in one kernel for the networks that have one
            (csrc/cuda/chain_fused.cu).

    Returns:
        x: images like x0. loss: ``[N]`` there, NaN where nobody looked. adversarial: bool ``[N]``: the student's answer is not the
        label (oracle losses: the teacher's at x'), or is the target. closeness: ``[N]`` |s - t| / |t| of the logits at the start (NaN without
        teacher, or if nobody looked): the smaller, the more precision the attack needs. bad: int64 ``[N]`` gradient entries without a direction.
        queries: int64 ``[N]`` forward passes. iterates: ``[steps + 1, N, ...]`` before each step and at the end, or None; of an image
        that stopped early its last. Bitwise the same in any batch and with any number of threads.

    Raises:
        InputError: wrong dtype, shape, strides, device, precision or value, labels that are no classes, a missing teacher.
        EnvironmentFault: no kernel for x0's device.

    Same as `tsrfast.reference.chain_pgd` on the unpacked weights. Kernels: ``csrc/{cpu,cuda}/chain``. No gradient.
    """
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if keep not in ("last", "best"):
        raise unknown("keep", keep, ("last", "best"))
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"tsrfast.chain_pgd: steps must be an integer >= 0, got {steps!r}")
    if not lo <= hi:
        raise InputError(f"tsrfast.chain_pgd: lo must be <= hi, got lo={lo}, hi={hi}")
    if not 0 < sparsity <= 1:
        raise InputError(f"tsrfast.chain_pgd: sparsity must be in (0, 1], got {sparsity}")
    values: list[float] = []
    each: list[Tensor | None] = []
    for name, given in (("step_size", step_size), ("eps", eps)):
        value, one = per_image("chain_pgd", name, given, x0)
        if not (value >= 0 if one is None else not _may_look(x0) or bool((one >= 0).all())):
            raise InputError(f"tsrfast.chain_pgd: {name} must be >= 0, got {value if one is None else one.min().item():g}")
        finite = math.isfinite(value) if one is None else not _may_look(x0) or bool(one.isfinite().all())
        if name == "step_size" and not finite:
            raise InputError("tsrfast.chain_pgd: step_size must be finite, got an infinite one")
        values.append(value)
        each.append(one)
    x, value_at, adversarial, closeness, bad, queries, every = _op_pgd(
        x0, start, *student, *(teacher or (None, None)), labels, LOSSES.index(loss), NORMS[norm], *each, *values, lo, hi, sparsity,
        steps, targeted, keep == "best", early_stop, judge, iterates, _number(precision),
    )  # fmt: skip
    return ChainPGD(x, value_at, adversarial, closeness, bad, queries, every if iterates else None)


def has_fused_kernel(student: Tensor, teacher: Tensor | None, loss: str, norm: str, device: torch.device | None = None) -> bool:
    """Whether `chain_pgd` in float16 on that GPU (None: the current one) runs these plans' attack as one kernel, else layer by layer.

    False without CUDA kernels or a GPU.

    Raises:
        InputError: a plan is not one.
    """
    return _fused_covers("has_fused_kernel", "chain_fused_covers", student, teacher, device, LOSSES.index(loss), NORMS[norm])


def _fused_covers(op: str, name: str, student: Tensor, teacher: Tensor | None, device: torch.device | None, *more: int) -> bool:
    """The answer of the compiled function `name` on plans, for `op`; False where there is nobody to ask."""
    for who, plan in (("student", student), ("teacher", teacher)):
        if plan is not None:
            _check_plan(op, who, plan)
            _check_together(op, f"{who}_plan", plan)
    kernels = _native._C if _native.emulator is None else _native.emulator
    if not kernels.with_cuda or (_native.emulator is None and not torch.cuda.is_available()):
        return False
    where = 0
    if _native.emulator is None:
        where = torch.cuda.current_device() if device is None or device.index is None else device.index
    plans = (student.data_ptr(), len(student), _address(teacher), 0 if teacher is None else len(teacher))
    try:
        covers: bool = getattr(kernels.cuda, name)(*plans, *more, where)
    except ValueError as e:
        raise InputError(f"tsrfast.{op}: {e}") from None
    return covers
