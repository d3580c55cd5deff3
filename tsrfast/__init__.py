"""Fast adversarial attacks and specialization analysis for networks in the teacher-student setting.

Sub-packages: `attacks`, `specialization`, `ops` (the native kernels), `reference` (the same in plain PyTorch), `nets`, `data`,
`training`, `suite`. They are imported on first use: ``import tsrfast`` pulls in torch and numpy only.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from types import ModuleType

import numpy as np  # noqa: F401  (torch's interchange with NumPy needs it loaded; see the design's import rule)
import torch  # noqa: F401  (before tsrfast._C, always: then OpenMP is torch's own libgomp)

__version__ = version("tsrfast")
_SUBPACKAGES = ("attacks", "data", "errors", "nets", "ops", "reference", "specialization", "suite", "training")
__all__ = ["__version__", *_SUBPACKAGES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"tsrfast.{name}")
    raise AttributeError(f"module 'tsrfast' has no attribute {name!r}")
