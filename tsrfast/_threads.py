"""Threads of the CPU: native kernels take them all, PyTorch where its sums would depend on them only one. Open to all rooms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_all: int | None = None  # while PyTorch is held to one


def threads() -> int:
    """Threads of native kernels: PyTorch's number, also while PyTorch itself is held to one."""
    return _all or torch.get_num_threads()


@contextmanager
def one_thread_for_torch(device: torch.device) -> Iterator[None]:
    """Inside, if `device` is the CPU, PyTorch computes on one thread of it, native kernels on as many as before.

    PyTorch cuts its sums by its threads, so that weights after a training depend on their number; results of native kernels do not.
    """
    global _all
    if device.type != "cpu":
        yield
        return
    before, before_torch = _all, torch.get_num_threads()
    _all = threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before_torch)
        _all = before
