"""Writers of tiny CIFAR-10 files in each format."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def _encoded(image: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """12 images uint8 [12, 3, 32, 32] and their labels: 2 for each of the six batches."""
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (12, 3, 32, 32), np.uint8), np.array([3, 0, 9, 1, 1, 5, 2, 8, 7, 4, 6, 9])


@pytest.fixture
def encoded() -> Callable[[np.ndarray, str], bytes]:
    return _encoded


@pytest.fixture
def write_batches(pictures: tuple[np.ndarray, np.ndarray]) -> Callable[..., Path]:
    images, labels = pictures

    def write(folder: Path, **changed: object) -> Path:
        """The six batches; `changed` replaces entries of data_batch_2."""
        folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(NAMES):
            rows = slice(2 * i, 2 * i + 2)
            batch = {
                b"batch_label": name.encode(),
                b"labels": labels[rows].tolist(),
                b"data": images[rows].reshape(2, 3072),
            }
            if name == "data_batch_2":
                batch |= {key.encode(): value for key, value in changed.items()}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        return folder

    return write


@pytest.fixture
def write_parquet() -> Callable[..., Path]:
    def write(path: Path, images: np.ndarray, labels: object, column: str = "img", kind: str = "PNG") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"bytes": _encoded(image, kind), "path": None} for image in images]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({column: pa.array(rows, struct), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, path, row_group_size=3)
        return path

    return write
