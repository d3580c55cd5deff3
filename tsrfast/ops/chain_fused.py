"""Fused attacks (the whole of `chain_pgd` in one CUDA kernel) for networks that have no such kernel in the build.

What to compile and taking what was compiled; the compiling itself: `tsrfast.chain.fuse`. Kernel: csrc/cuda/chain_fused.cuh.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from tsrfast import _native
from tsrfast.errors import EnvironmentFault, InputError


def fused_kernel(student: Tensor, teacher: Tensor | None) -> tuple[str, int]:
    """The kernel for attacks on these plans: its name in C++, and its bytes of shared memory.

    Raises:
        InputError: no fused kernel can take the networks; the message says why.
        EnvironmentFault: built without CUDA kernels.
    """
    try:
        name, size = _kernels().chain_fused_kernel(*_plans(student, teacher))
    except ValueError as e:
        raise InputError(f"tsrfast.chain.fuse: {e}") from None
    return name, size


def fused_headers() -> dict[str, str]:
    """Names, as they include each other, and texts of what that kernel is made of: those that the native module was built from."""
    headers: dict[str, str] = _kernels().chain_fused_headers()
    return headers


def fused_ready(student: Tensor, teacher: Tensor | None, capability: tuple[int, int]) -> bool:
    """Whether the kernel is at hand for GPUs of that compute capability, from the build or through `load_fused`."""
    ready: bool = _kernels().chain_fused_ready(*_plans(student, teacher), 10 * capability[0] + capability[1])
    return ready


def load_fused(student: Tensor, teacher: Tensor | None, cubin: bytes, symbol: str, device: int) -> None:
    """From now on this process has the kernel: `symbol` of `cubin`, compiled from `fused_headers` for that device's architecture.

    Raises:
        EnvironmentFault: the device does not take it.
    """
    try:
        _kernels().chain_fused_load(*_plans(student, teacher), cubin, symbol, device)
    except RuntimeError as e:
        raise EnvironmentFault(str(e)) from None


def _kernels() -> ModuleType:
    if _native.emulator is None:
        _native.check_cuda("chain.fuse")
        return _native._C.cuda
    return _native.emulator.cuda


def _plans(student: Tensor, teacher: Tensor | None) -> tuple[int, int, int, int]:
    return student.data_ptr(), len(student), *((0, 0) if teacher is None else (teacher.data_ptr(), len(teacher)))
