"""The compiled module, and where a tensor's kernels are. The only file that imports it."""

from __future__ import annotations

import os
from types import ModuleType

import torch  # before _C: then OpenMP is torch's own libgomp, whatever _C was linked with

from tsrfast._threads import threads
from tsrfast.errors import EnvironmentFault, InputError

try:
    from tsrfast import _C
except ImportError as e:  # a source tree that was not built, or a build for another Python
    raise ImportError("tsrfast._C is not built here; in a checkout: pip install --no-build-isolation -e .") from e

# Element types by the tags of csrc/core/dtype.h.
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# tests/conftest.py sets this to tsrfast._emu: CPU tensors then run the CUDA kernels, emulated.
emulator: ModuleType | None = None


def set_isa(name: str) -> None:
    """Force the instruction set of the CPU kernels: ``portable``, ``avx2``, ``avx512`` or ``avx512bf16``.

    Raises:
        InputError: the name is unknown, or this CPU cannot run it.
    """
    try:
        _C.set_isa(name)
    except ValueError as e:
        raise InputError(str(e)) from None


if "TSRFAST_ISA" in os.environ:
    set_isa(os.environ["TSRFAST_ISA"])


def check_cuda(name: str) -> None:
    """The build has CUDA kernels, or an EnvironmentFault that says why not."""
    if not _C.with_cuda:
        raise EnvironmentFault(
            f"tsrfast.{name}: built without CUDA kernels ({_C.cuda_note}); "
            "reinstall with pip install -C cmake.define.TSRFAST_CUDA=ON ."
        )


def call(name: str, like: torch.Tensor, *args: int | float | list[int]) -> None:
    """Run kernel `name` where `like` lives; tensors in `args` are given as `data_ptr()`.

    Raises:
        EnvironmentFault: there is no kernel for that device (never a silent detour to another one).
    """
    if emulator is not None:
        getattr(emulator.cuda, name)(*args, 0, 0)
    elif like.is_cpu:
        getattr(_C.cpu, name)(*args, threads())
    elif like.is_cuda:
        check_cuda(name)
        with torch.cuda.device(like.device):  # torch's guard: going back, C++'s own would set up a GPU that nobody uses
            getattr(_C.cuda, name)(*args, like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    else:
        raise EnvironmentFault(f"tsrfast.{name}: no kernel for device {like.device} (there are cpu and cuda)")
