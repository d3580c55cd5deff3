"""The real CIFAR-10, where TSRFAST_DATA names a folder with cifar10/*.parquet and cifar10/lossless-subset/."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tsrfast.data import load

ROOT = Path(os.environ.get("TSRFAST_DATA", "/nonexistent")) / "cifar10"
LOSSLESS = ROOT / "lossless-subset" / "cifar-10-batches-py"
needs_lossless = pytest.mark.skipif(not LOSSLESS.is_dir(), reason="TSRFAST_DATA/cifar10/lossless-subset is not there")
needs_parquet = pytest.mark.skipif(not list(ROOT.glob("train-*.parquet")), reason="TSRFAST_DATA/cifar10 is not there")


@needs_lossless
def test_lossless_statistics():
    data = load(f"cifar10:{LOSSLESS}")
    means = data.train.pixels().double().mean((0, 2, 3))
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]).double(), rtol=0, atol=0.003)
    assert data.train.labels.bincount(minlength=10).min() > 400
    assert len(data.train.labels.bincount()) == 10


@needs_lossless
@needs_parquet
def test_parquet_and_batches_are_the_same_images():
    exact = load(f"cifar10:{LOSSLESS}", train=1000, test=1000)
    copy = load(f"cifar10:{ROOT}", train=1000, test=1000)
    for left, right in ((exact.train, copy.train), (exact.test, copy.test)):
        assert torch.equal(left.labels, right.labels)
        error = (left.pixels() - right.pixels()).square().mean((1, 2, 3))
        assert float(-10 * error.median().log10()) > 28  # dB; unrelated images have about 9


@needs_parquet
@pytest.mark.slow
def test_whole_parquet_copy():
    data = load(f"cifar10:{ROOT}")
    assert (len(data.train), len(data.test)) == (50000, 10000)
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
