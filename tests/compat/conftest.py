"""A small network and images that the tests of drop-ins share; functions, as some tests make several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def net() -> Any:
    def make(dtype=torch.float64, gate=nn.SiLU, seed=0):
        """In train mode. SiLU: does not compile."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Conv2d(3, 6, 3), gate(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
            return nn.Sequential(*layers).to(dtype)

    return make


@pytest.fixture(scope="session")
def batch() -> Any:
    def make(n=8, dtype=torch.float64, seed=0):
        r = torch.Generator().manual_seed(seed)
        x = torch.randint(256, (n, 3, 8, 8), generator=r).to(dtype) / 255
        return x, torch.randint(10, (n,), generator=r)

    return make


@pytest.fixture(scope="session")
def seeded() -> Any:
    def call(function, *args, **kwargs):
        """(result, state of the generator afterwards)"""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return function(*args, **kwargs), torch.get_rng_state()

    return call


@pytest.fixture(scope="session")
def tiny() -> Any:
    """For recorded numbers: nothing in it is drawn."""

    def make(dtype=torch.float64):
        m = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        for k, p in enumerate(m.parameters()):
            p.data = (torch.arange(p.numel(), dtype=torch.float64) * 1.7 + k).sin().reshape(p.shape)
        x = torch.tensor([[0.1, 0.4, 0.6, 0.98], [0.02, 0.5, 0.3, 0.7]], dtype=torch.float64)
        return m.to(dtype), x.reshape(2, 1, 2, 2).to(dtype), torch.tensor([0, 3])

    return make
