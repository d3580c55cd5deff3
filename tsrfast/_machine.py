"""The machine: which device a command line asks for, and what to write down about where a run took place."""

from __future__ import annotations

import platform

import torch

from tsrfast import _native
from tsrfast._threads import threads
from tsrfast.errors import EnvironmentFault, InputError, unknown


def choose_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: no such device name.
        EnvironmentFault: CUDA was asked for and is not there, or the kernels were built without it.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise unknown("device", kind, ("cpu", "cuda"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: must be cpu, cuda or cuda:N, got {name!r}") from None
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(
                f"--device {name}: there is no such CUDA device here ({count} found); --device cpu works everywhere"
            )
        if not _native._C.with_cuda:
            raise EnvironmentFault(f"--device {name}: tsrfast was built without CUDA kernels ({_native._C.cuda_note})")
    return device


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """For `run.json`."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads(),
        "instruction set": _native._C.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
