"""The data set specification, splits and fingerprints."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tsrfast.data import Dataset, Split, fingerprint, load
from tsrfast.errors import EnvironmentFault, InputError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar", "unknown data set 'cifar'; did you mean 'cifar10'"),
        ("Synthetic:seed=1", "did you mean 'synthetic'"),
        ("imagenet:/x", r"unknown data set 'imagenet' \(allowed: cifar10, folder, synthetic\)"),
        ("cifar10", "spec must name a path, cifar10:PATH, got 'cifar10'"),
        ("folder:", "spec must name a path, folder:PATH"),
        ("cifar10:/no/such/place", "path must exist, got '/no/such/place'"),
        ("cifar10:a.parquet,b.parquet", r"path must exist, got 'a\.parquet'"),
        ("synthetic:sed=3", "unknown option of the synthetic data set 'sed'; did you mean 'seed'"),
        ("synthetic:seed=x", "options must be NAME=INTEGER separated by commas, got 'seed=x'"),
        ("synthetic:seed=-1", "NAME=INTEGER"),
        ("synthetic:", "NAME=INTEGER"),
        ("synthetic:seed=1,,test=2", "NAME=INTEGER"),
        ("synthetic:seed=1,seed=2", "option seed must be given once"),
        ("synthetic:train=0", "synthetic train must be at least 1, got 0"),
        (Path("synthetic"), "spec must be a string"),
    ],
)
def test_wrong_spec(spec, message):
    with pytest.raises(InputError, match=message):
        load(spec)


def test_bare_path(tmp_path):
    with pytest.raises(InputError, match=f"cifar10:{tmp_path} or folder:{tmp_path}"):
        load(str(tmp_path))


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3"])
def test_wrong_sizes(n):
    with pytest.raises(InputError, match="test must be a positive integer or None"):
        load("synthetic", test=n)


def test_unreadable_file_is_the_machines_fault(tmp_path, write_batches, monkeypatch):
    folder = write_batches(tmp_path)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*data_batch_1: Permission denied"):
        load(f"cifar10:{folder}")


def test_home_folder(tmp_path, write_batches, monkeypatch):
    write_batches(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("cifar10:~/mine").train) == 10


def test_pixels():
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    split = Split(images, torch.tensor([0, 1, 2, 3]))
    assert len(split) == 4
    whole = split.pixels()
    assert whole.dtype == torch.float32
    assert (whole.min(), whole.max()) == (0, 1)
    assert torch.equal((whole * 255).round().to(torch.uint8), images)
    assert torch.equal(split.pixels(torch.tensor([3, 0])), whole[[3, 0]])
    assert torch.equal(split.pixels(slice(1, 3)), whole[1:3])
    assert torch.equal(split.pixels(split.labels > 1), whole[2:])


def test_split_and_dataset_check_their_tensors():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(InputError, match="images must be non-empty uint8"):
        Split(images.float(), labels)
    with pytest.raises(InputError, match="images must be non-empty uint8"):
        Split(images[:0], labels[:0])
    with pytest.raises(InputError, match=r"labels must be int64 \[2\], got torch.int32"):
        Split(images, labels.int())
    with pytest.raises(InputError, match=r"labels must be int64 \[2\]"):
        Split(images, labels[:1])
    split = Split(images, labels)
    with pytest.raises(InputError, match=r"test labels must be in 0\.\.1, got 0\.\.2"):
        Dataset("x", "", ("a", "b"), split, Split(images, labels * 2))
    with pytest.raises(InputError, match="must have one shape"):
        Dataset("x", "", ("a", "b"), split, Split(images[:, :, :3], labels))


def test_fingerprint():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.tensor([1, 0]))
    text = b"tsrfast data 1\n"
    for which in (b"train", b"test"):
        text += which + b" 2x3x4x5\n" + bytes(images.flatten().tolist()) + b"\1" + bytes(15)
    known = fingerprint(split, split)
    assert known == hashlib.sha256(text).hexdigest()
    strided = Split(images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), split.labels)
    assert fingerprint(strided, split) == known
    for images_, labels_ in (
        (images ^ (torch.arange(5) == 4), split.labels),
        (images, split.labels.flip(0)),
        (images.reshape(2, 3, 5, 4), split.labels),
        (images[:1], split.labels[:1]),
    ):
        other = Split(images_.contiguous(), labels_)
        assert fingerprint(split, other) != known
        assert fingerprint(other, split) != known
