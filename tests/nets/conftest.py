"""The libraries whose nets ours are compared with, where they are installed; and weights that anyone can make again."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def torchvision_models() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    # Built for another PyTorch (CUDA's, from PyPI) its operators do not load, and then importing it fails at these two; the nets
    # need none of them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    import torchvision.models

    return torchvision.models


@pytest.fixture(scope="session")
def robustbench() -> Callable[[str], ModuleType]:
    """A file of RobustBench's architectures as a module; the package itself imports much more."""
    found = importlib.util.find_spec("robustbench")
    if found is None or found.origin is None:
        pytest.skip("robustbench is not installed")
    folder = Path(found.origin).parent / "model_zoo" / "architectures"

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"robustbench_{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def weights() -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Float64 tensors of the names and shapes of a state dict, which are a function of these alone, and fit for a deep net."""

    def draw(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for i, name in enumerate(sorted(shapes)):
            shape = shapes[name].shape
            v = torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            if name.endswith("num_batches_tracked"):
                v = torch.tensor(7)
            elif len(shape) == 4:
                v = v * (2 / v[0].numel()) ** 0.5
            elif len(shape) == 2:
                v = v / shape[1] ** 0.5
            elif name.endswith(".running_var"):
                v = 1 + 0.5 * v.tanh()
            elif name.endswith(".weight"):
                v = 0.7 + 0.2 * v.tanh()
            else:
                v = 0.1 * v
            made[name] = v
        return made

    return draw


@pytest.fixture(scope="session")
def digest() -> Callable[[nn.Module], str]:
    """Of names and shapes of all parameters and buffers."""

    def of(net: nn.Module) -> str:
        lines = sorted(f"{name} {list(t.shape)}" for name, t in net.state_dict().items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    return of


@pytest.fixture(scope="session")
def images() -> Callable[[int], Tensor]:
    """Two images of this size, float64."""
    return lambda size: torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
