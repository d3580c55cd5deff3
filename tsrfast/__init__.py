"""Fast adversarial attacks and specialization analysis for networks in the teacher-student setting.

`compile` turns a small ReLU network into a `Chain` that native code runs; `UnsupportedModel` says why it could not.

Sub-packages: `attacks`, `chain`, `specialization`, `ops` (the native kernels), `reference` (the same in plain PyTorch), `nets`,
`data`, `training`, `suite`, `compat` (drop-ins for other attack libraries). All of it is imported on first use: ``import tsrfast``
pulls in torch and numpy only.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

import numpy as np  # noqa: F401  (torch's interchange with NumPy needs it loaded; see the design's import rule)
import torch  # noqa: F401  (before tsrfast._C, always: then OpenMP is torch's own libgomp)

__version__ = version("tsrfast")
_SUBPACKAGES = (
    "attacks",
    "chain",
    "compat",
    "data",
    "errors",
    "nets",
    "ops",
    "reference",
    "specialization",
    "suite",
    "training",
)
_NAMES = {"Chain": "chain", "UnsupportedModel": "errors", "compile": "chain"}
__all__ = ["Chain", "UnsupportedModel", "__version__", "compile", *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"tsrfast.{_NAMES[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"tsrfast.{name}")
    raise AttributeError(f"module 'tsrfast' has no attribute {name!r}")
