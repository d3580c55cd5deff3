"""Random numbers keyed by image, for CIFAR images: PyTorch's own generator (its numbers depend on the batch; float32, one
state for all), the same Philox in plain PyTorch, and ours."""

from __future__ import annotations

import pytest
import torch

from tsrfast import ops, reference

COUNT = 3 * 32 * 32


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize("impl", ["torch", "torchrand", "tsrfast"])
def test_philox_uniform(measure, impl, n, device):
    index = torch.arange(n, device=device)
    assert torch.equal(ops.philox_uniform(0, index, COUNT), reference.philox_uniform(0, index, COUNT))
    generator = torch.Generator(device).manual_seed(0)
    run = {
        "torch": lambda: reference.philox_uniform(0, index, COUNT),
        "torchrand": lambda: torch.rand(n, COUNT, generator=generator, device=device),
        "tsrfast": lambda: ops.philox_uniform(0, index, COUNT),
    }[impl]
    measure(f"philox_uniform {device} {n}x3072", run, moved=4 * n * COUNT)
