"""CIFAR-10 from Hugging Face parquet files."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tsrfast.data import load
from tsrfast.errors import InputError


@pytest.fixture
def folder(tmp_path, pictures, write_parquet):
    images, labels = pictures
    write_parquet(tmp_path / "train-00000-of-00002.parquet", images[:7], labels[:7])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", images[7:10], labels[7:10])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", images[10:], labels[10:])
    return tmp_path


def test_round_trip(folder, pictures):
    images, labels = map(torch.from_numpy, pictures)
    data = load(f"cifar10:{folder}")
    assert torch.equal(data.train.images, images[:10])
    assert torch.equal(data.train.labels, labels[:10])
    assert torch.equal(data.test.images, images[10:])
    assert torch.equal(data.test.labels, labels[10:])
    assert dict(data.sources) == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_same_fingerprint_as_batches(folder, write_batches):
    batches = write_batches(folder / "elsewhere")
    assert load(f"cifar10:{folder}").fingerprint == load(f"cifar10:{batches}").fingerprint


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_first_images_only(folder, pictures, monkeypatch, chunk):
    monkeypatch.setattr("tsrfast.data.parquet._CHUNK", chunk)
    broken = folder / "train-00001-of-00002.parquet"
    broken.write_bytes(b"never looked at")
    for n in (1, 3, 4, 7):
        data = load(f"cifar10:{folder}", train=n, test=1)
        assert torch.equal(data.train.images, torch.from_numpy(pictures[0][:n]))
        assert len(data.sources) == 2
    with pytest.raises(InputError, match=r"train-00001.*not a parquet file"):
        load(f"cifar10:{folder}", train=8)


def test_more_than_there_are(folder):
    assert len(load(f"cifar10:{folder}", train=11).train) == 10


def test_pair_and_image_column_and_jpeg(tmp_path, pictures, write_parquet):
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None] * 5 + 40, (2, 3, 32, 32))
    left = write_parquet(tmp_path / "a.parquet", smooth, [4, 0], column="image", kind="JPEG")
    right = write_parquet(tmp_path / "b.parquet", pictures[0], pictures[1], column="image")
    data = load(f"cifar10:{left},{right}")
    assert (data.train.images.int() - torch.from_numpy(smooth.copy()).int()).abs().max() <= 4
    assert torch.equal(data.test.images, torch.from_numpy(pictures[0]))
    with pytest.raises(InputError, match="as their folder or as the pair"):
        load(f"cifar10:{left}")


def test_missing_part(folder):
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="train parquet files must be one complete set of parts, got train-00001-of-00002"):
        load(f"cifar10:{folder}")


def test_damage_anywhere(folder):
    file = folder / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet: truncated or not a parquet file"):
            load(f"cifar10:{folder}")
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 60):  # a flipped byte is found, or harmless: never another exception
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        file.write_bytes(changed)
        with contextlib.suppress(InputError):
            load(f"cifar10:{folder}")


@pytest.mark.parametrize("label", [10, -1, None])
def test_label_out_of_range(folder, pictures, write_parquet, label):
    write_parquet(folder / "test-00000-of-00001.parquet", pictures[0][:2], [1, label])
    with pytest.raises(InputError, match=rf"test-00000-of-00001\.parquet, row 1: label must be in 0\.\.9, got {label}"):
        load(f"cifar10:{folder}")


def test_images_of_another_size_or_damaged(folder, pictures, write_parquet, encoded):
    path = folder / "test-00000-of-00001.parquet"
    write_parquet(path, pictures[0][:, :, :, :30], pictures[1])
    with pytest.raises(InputError, match="row 0: image must be 32x32 pixels, got 30x32"):
        load(f"cifar10:{folder}")
    png = encoded(pictures[0][0], "PNG")
    for blob, message in (
        (png[:-900], "not a readable"),
        (b"GIF89a", "not a readable"),
        (None, "must hold the image file, got null"),
    ):
        rows = pa.array([{"bytes": png}, {"bytes": blob}], pa.struct([("bytes", pa.binary())]))
        pq.write_table(pa.table({"img": rows, "label": [1, 2]}), path)
        with pytest.raises(InputError, match=f"test-00000-of-00001.parquet, row 1: .*{message}"):
            load(f"cifar10:{folder}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [1], "label": [1]}, "columns must include 'img' or 'image', and 'label', got picture, label"),
        ({"img": [{"bytes": b""}]}, "columns must include .* got img"),
        ({"img": [b"x"], "label": [1]}, "column img must be struct<bytes: binary, path: string>, got binary"),
        ({"img": [{"path": "x"}], "label": [1]}, "column img must be struct"),
        ({"img": [{"bytes": b"x"}], "label": ["cat"]}, "column label must hold integers, got string"),
        ({"img": pa.array([], pa.struct([("bytes", pa.binary())])), "label": pa.array([], pa.int64())}, "got none"),
    ],
)
def test_wrong_columns(folder, columns, message):
    pq.write_table(pa.table(columns), folder / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match=f"test-00000-of-00001.parquet: .*{message}"):
        load(f"cifar10:{folder}")
