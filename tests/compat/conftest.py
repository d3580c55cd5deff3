"""A small network and images that the tests of drop-ins share; functions, as some tests make several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tsrfast.compat.art.estimators.classification import PyTorchClassifier


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


@pytest.fixture(scope="session")
def answered(net, batch) -> Any:
    def make(n=6):
        """A network in eval mode, images, and its answers, the first of which is changed."""
        model = net().eval()
        x, _ = batch(n)
        y = model(x).argmax(1)
        if n:
            y[0] = (y[0] + 1) % 10
        return model, x, y

    return make


# For ART: NumPy's arrays, and its generator.


@pytest.fixture(scope="session")
def wrapped(net) -> Any:
    def make(model=None, kind=PyTorchClassifier, loss=None, **kwargs):
        """A classifier of `kind`: the drop-in's or ART's."""
        scaling = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1])
        fields = {"clip_values": (0.0, 1.0), "device_type": "cpu", "preprocessing": scaling} | kwargs
        return kind(model or net(torch.float32).eval(), loss or nn.CrossEntropyLoss(), (3, 8, 8), 10, **fields)

    return make


@pytest.fixture(scope="session")
def images() -> Any:
    def make(n=8, seed=0, margin=0.0):
        """With pixels at least `margin` from the ends of the range."""
        x = np.random.RandomState(seed).randint(256, size=(n, 3, 8, 8)) / 255
        return (margin + (1 - 2 * margin) * x).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def generated() -> Any:
    def call(attack, *args, **kwargs):
        """(result, next number of NumPy's generator)"""
        np.random.seed(7)
        return attack.generate(*args, **kwargs), np.random.rand()

    return call


@pytest.fixture(scope="session")
def wrong(wrapped) -> Any:
    return lambda x, y: wrapped().predict(x).argmax(1) != y
