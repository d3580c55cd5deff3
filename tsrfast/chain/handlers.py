"""What may be done to a value in a trace: each function of PyTorch that a chain can compute, with what must hold for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tsrfast.chain.tracing import Trace

MAX_KERNEL, MAX_STRIDE = 7, 4
Pair = int | Sequence[int]


def _pair(value: Pair) -> tuple[int, int]:
    """(height, width) of an argument that may be one number for both."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return (int(values[0]), int(values[-1]))


def _image(t: Trace) -> tuple[int, int, int]:
    shape = tuple(t.shape[1:])
    if len(shape) != 3:
        t.refuse(f"needs [N, C, H, W], got [N, {', '.join(map(str, shape))}]")
    return shape[0], shape[1], shape[2]


def _extent(t: Trace, size: int, kernel: int, stride: int, pad: int, ceil_mode: bool = False) -> int:
    room = size + 2 * pad - kernel
    if room < 0:
        t.refuse(f"kernel {kernel} must fit into {size} + 2 * {pad}")
    if ceil_mode and room % stride:
        t.refuse("ceil_mode must change nothing")
    return room // stride + 1


def _one_each(t: Trace, size: int, **tensors: Tensor | None) -> None:
    """Tensors that go with channels or features have one number for each."""
    for name, given in tensors.items():
        if given is not None and given.shape != (size,):
            t.refuse(f"{name} must have {size} numbers, got shape {tuple(given.shape)}")


def conv2d(
    t: Trace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    channels, height, width = _image(t)
    kernel, steps = (int(weight.shape[2]), int(weight.shape[3])), _pair(stride)
    if groups != 1:
        t.refuse(f"groups must be 1, got {groups}")
    if _pair(dilation) != (1, 1):
        t.refuse(f"dilation must be 1, got {dilation}")
    if weight.shape[1] != channels:
        t.refuse(f"in_channels must be {channels} as its input has, got {weight.shape[1]}")
    if max(kernel) > MAX_KERNEL:
        t.refuse(f"kernel_size must be at most {MAX_KERNEL}, got {kernel}")
    if max(steps) > MAX_STRIDE:
        t.refuse(f"stride must be at most {MAX_STRIDE}, got {steps}")
    if padding == "same" and not all(k % 2 for k in kernel):
        t.refuse(f"padding 'same' needs odd kernels, got {kernel}")
    if isinstance(padding, str):
        pad = (kernel[0] // 2, kernel[1] // 2) if padding == "same" else (0, 0)
    else:
        pad = _pair(padding)
    if pad[0] >= kernel[0] or pad[1] >= kernel[1]:
        t.refuse(f"padding must be less than the kernel {kernel}, got {pad}")
    _one_each(t, int(weight.shape[0]), bias=bias)
    size = [_extent(t, n, k, s, p) for n, k, s, p in zip((height, width), kernel, steps, pad, strict=True)]
    return t.record("conv", (int(weight.shape[0]), *size), (*kernel, *steps, *pad), (weight, bias))


def linear(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    features = tuple(t.shape[1:])
    if len(features) != 1:
        t.refuse(f"needs [N, D], got [N, {', '.join(map(str, features))}]: flatten it before")
    if weight.ndim != 2 or weight.shape[1] != features[0]:
        t.refuse(f"in_features must be {features[0]} as its input has, got {weight.shape[-1]}")
    _one_each(t, int(weight.shape[0]), bias=bias)
    return t.record("linear", (int(weight.shape[0]),), (), (weight, bias))


def batch_norm(
    t: Trace,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        t.refuse("must have running statistics and use them")
    _one_each(t, t.shape[1], running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    return t.record("batch_norm", t.shape[1:], (float(eps),), (running_mean, running_var, weight, bias))


def relu(t: Trace, x: Tensor, inplace: bool = False) -> Tensor:
    return t.record("activation", t.shape[1:], (0.0,))


def leaky_relu(t: Trace, x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if not 0 <= negative_slope < math.inf:
        t.refuse(f"negative_slope must be >= 0, got {negative_slope}")
    return t.record("activation", t.shape[1:], (float(negative_slope),))


def _pool(t: Trace, kind: str, kernel: Pair, stride: Pair | None, padding: Pair, ceil_mode: bool, count_pad: bool) -> Tensor:
    channels, height, width = _image(t)
    k, p = _pair(kernel), _pair(padding)
    s = k if stride is None else _pair(stride)
    if 2 * p[0] > k[0] or 2 * p[1] > k[1]:
        t.refuse(f"padding must be at most half of the kernel {k}, got {p}")
    out_h = _extent(t, height, k[0], s[0], p[0], ceil_mode)
    out_w = _extent(t, width, k[1], s[1], p[1], ceil_mode)
    return t.record(kind, (channels, out_h, out_w), (*k, *s, *p, int(count_pad)))


def avg_pool2d(
    t: Trace,
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    if divisor_override is not None:
        t.refuse(f"divisor_override must be None, got {divisor_override}")
    return _pool(t, "avg_pool", kernel_size, stride, padding, ceil_mode, count_include_pad)


def max_pool2d(
    t: Trace,
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if _pair(dilation) != (1, 1):
        t.refuse(f"dilation must be 1, got {dilation}")
    if return_indices:
        t.refuse("return_indices must be False")
    return _pool(t, "max_pool", kernel_size, stride, padding, ceil_mode, False)


def adaptive_avg_pool2d(t: Trace, x: Tensor, output_size: Any) -> Tensor:
    _, height, width = _image(t)
    wanted = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    out_h, out_w = height if wanted[0] is None else int(wanted[0]), width if wanted[1] is None else int(wanted[1])
    if min(out_h, out_w) < 1 or height % out_h or width % out_w:
        t.refuse(f"output_size must divide the input's {height}x{width}, got {out_h}x{out_w}")
    return _pool(t, "avg_pool", (height // out_h, width // out_w), None, 0, False, True)


def mean(t: Trace, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    channels, height, width = _image(t)
    if not isinstance(dim, Sequence) or sorted(d % 4 for d in dim) != [2, 3] or dtype not in (None, torch.float32):
        t.refuse("mean must be over (2, 3), height and width")
    pooled = _pool(t, "avg_pool", (height, width), None, 0, False, True)
    return pooled if keepdim else t.value((t.batch, channels))


def reshape(t: Trace, x: Tensor, *shape: Any, **named: Any) -> Tensor:
    return _reshaped(t, torch.empty(t.shape, device="meta").reshape(*shape, **named).shape)


def flatten(t: Trace, x: Tensor, *dims: int, **named: int) -> Tensor:
    return _reshaped(t, torch.empty(t.shape, device="meta").flatten(*dims, **named).shape)


def _reshaped(t: Trace, shape: torch.Size) -> Tensor:
    if shape != t.shape and (len(shape) != 2 or shape[0] != t.batch):
        t.refuse("a change of shape must be to [N, D]")
    return t.value(shape)


def dropout(t: Trace, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training:
        t.refuse("dropout is on in eval mode (training=True)")
    return t.value(t.shape)


def same(t: Trace, x: Tensor) -> Tensor:
    return t.value(t.shape)


def to(t: Trace, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x is not t.live:  # constant.to(value): as the value is
        return x.to(device=t.device, dtype=torch.float32)
    moved = torch.empty(0, dtype=torch.float32, device=t.device).to(*args, **kwargs)
    if moved.dtype != torch.float32 or moved.device != t.device:
        t.refuse(f"the chain computes in float32 on {t.device}; got {moved.dtype} on {moved.device}")
    return t.value(t.shape)


def _arithmetic(kind: str, swapped: str | None) -> Any:
    """`kind` with a constant on the right of the value, `swapped` with one on its left."""

    def handler(t: Trace, a: Any, b: Any) -> Tensor:
        name, constant = (kind, b) if a is t.live else (swapped, a)
        if name is None:
            t.refuse("division by a value is not supported")
        shape = tuple(t.shape[1:])
        if isinstance(constant, (int, float)) and not isinstance(constant, bool):
            return t.record(name, shape, (float(constant),))
        if not isinstance(constant, Tensor):
            t.refuse(f"{name} needs a number or a tensor, got {type(constant).__name__}")
        ndim = len(t.shape)
        aligned = (1,) * (ndim - constant.ndim) + tuple(constant.shape)
        if len(aligned) != ndim or aligned not in ((1,) * ndim, (1, shape[0], *(1,) * (ndim - 2))):
            t.refuse(f"{name} needs a constant of one element or one a channel, got shape {tuple(constant.shape)}")
        return t.record(name, shape, (), (constant,))

    return handler


_add, _sub, _mul = _arithmetic("add", "add"), _arithmetic("sub", "rsub"), _arithmetic("mul", "mul")
_div, _rsub = _arithmetic("div", None), _arithmetic("rsub", "sub")

HANDLERS = {
    torch.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), relu),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), leaky_relu),
    F.avg_pool2d: avg_pool2d,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
    F.max_pool2d_with_indices: lambda t, *args, **kwargs: t.refuse("return_indices must be False"),
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    **dict.fromkeys((torch.mean, Tensor.mean), mean),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), reshape),
    **dict.fromkeys((Tensor.flatten, torch.flatten), flatten),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout), dropout),
    **dict.fromkeys((Tensor.contiguous, Tensor.float, Tensor.clone, torch.clone), same),
    Tensor.to: to,
    **dict.fromkeys((torch.add, Tensor.add), _add),
    **dict.fromkeys((torch.sub, Tensor.sub), _sub),
    Tensor.__rsub__: _rsub,
    **dict.fromkeys((torch.mul, Tensor.mul), _mul),
    **dict.fromkeys((torch.div, Tensor.div, torch.true_divide, Tensor.true_divide), _div),
}
