"""Uniform random numbers that depend on seed, image, draw and element alone (Philox 4x32-10, Salmon et al. 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError
from tsrfast.ops._register import check_dtype, register


def _kernel(seed: int, index: Tensor, count: int, draw: int) -> Tensor:
    check_dtype("philox_uniform", "index", index, (torch.int64,))
    if index.ndim != 1 or not index.is_contiguous():
        raise InputError(f"tsrfast.philox_uniform: index must be contiguous [N], got shape {tuple(index.shape)}")
    out = index.new_empty((index.shape[0], count), dtype=torch.float32)
    _native.call("philox_uniform", index, index.data_ptr(), out.data_ptr(), index.shape[0], count, seed & (2**64 - 1), draw)
    return out


_op = register(
    "philox_uniform(int seed, Tensor index, int count, int draw) -> Tensor",
    _kernel,
    lambda seed, index, count, draw: index.new_empty((index.shape[0], count), dtype=torch.float32),
)


def philox_uniform(seed: int, index: Tensor, count: int, *, draw: int = 0) -> Tensor:
    """`count` uniform numbers in [0, 1) for each image, the same in any batch, order, process and on any device.

    Args:
        seed: any int64.
        index: int64 ``[N]``, the images' numbers in their data set.
        count: numbers an image, 0 to 2^34.
        draw: which of 2^32 independent draws.

    Returns:
        float32 ``[N, count]``, multiples of 2^-24.

    Raises:
        InputError: wrong dtype or shape of `index`, `count` or `draw` out of range.

    Same as `tsrfast.reference.philox_uniform`. Kernels: ``csrc/{cpu,cuda}/philox_uniform``. No gradient.
    """
    if not 0 <= count <= 2**34:
        raise InputError(f"tsrfast.philox_uniform: count must be in 0..2^34, got {count}")
    if not 0 <= draw < 2**32:
        raise InputError(f"tsrfast.philox_uniform: draw must be in 0..2^32-1, got {draw}")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"tsrfast.philox_uniform: seed must be a 64-bit integer, got {seed}")
    out: Tensor = _op(seed, index, count, draw)
    return out
