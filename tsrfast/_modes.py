"""Networks' train/eval mode, set for a while. Open to all rooms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has the mode it had."""
    modules = {m: m.training for model in models for m in model.modules()}
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m, training in modules.items():
            m.training = training
