"""Images in Hugging Face's parquet layout: column ``img`` or ``image``, a struct{bytes, path}, and column ``label``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tsrfast.data.dataset import Split
from tsrfast.data.files import decode_image, read_bytes
from tsrfast.errors import InputError

_CHUNK = 1024  # rows read at a time: little is read in vain when few are wanted


def shards(folder: Path, which: str) -> list[Path]:
    """The files of one split in `folder`, in order: ``train-00000-of-00002.parquet``, ... or ``train.parquet``.

    Raises:
        InputError: numbered files of which some are missing or doubled.
    """
    found = sorted(p for p in folder.glob(f"{which}*.parquet") if re.fullmatch(rf"{which}(-.*)?\.parquet", p.name))
    numbers = [m.groups() for p in found if (m := re.search(r"-(\d+)-of-(\d+)", p.name))]
    if numbers and (len(numbers) != len(found) or [(int(i), int(n)) for i, n in numbers] != _all_of(len(found))):
        names = ", ".join(p.name for p in found)
        raise InputError(f"{folder}: the {which} parquet files must be one complete set of parts, got {names}")
    return found


def _all_of(n: int) -> list[tuple[int, int]]:
    return [(i, n) for i in range(n)]


def read_parquet(
    files: Sequence[Path], which: str, wanted: int | None, *, size: tuple[int, int] = (32, 32), classes: int = 10
) -> tuple[Split, list[tuple[str, str]]]:
    """At most the first `wanted` images (None: all) of the files, and (name, SHA-256) of each file that had to be read.

    Only the wanted rows are decoded.

    Args:
        which: the split's name, for error messages.
        size: the (width, height) that every image must have.
        classes: labels must be in 0..classes-1.

    Raises:
        InputError: a file is damaged, lacks a column, or has an image of another size or a label out of range.
        EnvironmentFault: a file cannot be read.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    sources: list[tuple[str, str]] = []
    for file in files:
        if wanted is not None and len(images) >= wanted:
            break
        data, digest = read_bytes(file)
        sources.append((file.name, digest))
        _append(images, labels, data, file, None if wanted is None else wanted - len(images), size, classes)
    names = ", ".join(file.name for file in files)
    if not images:
        raise InputError(f"{names}: must have at least one row, got none")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.tensor(labels, dtype=torch.int64)), sources


def _append(
    images: list[np.ndarray],
    labels: list[int],
    data: bytes,
    file: Path,
    limit: int | None,
    size: tuple[int, int],
    classes: int,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        column = _image_column(table.schema_arrow, file)
        rows = table.metadata.num_rows if limit is None else min(limit, table.metadata.num_rows)
        done = 0
        for batch in table.iter_batches(batch_size=_CHUNK, columns=[column, "label"]):
            batch = batch.slice(0, rows - done)
            blobs = pa.array(batch.column(column)).field("bytes").to_pylist()
            for row, (blob, label) in enumerate(zip(blobs, batch.column("label").to_pylist(), strict=True), start=done):
                where = f"{file}, row {row}"
                if blob is None:
                    raise InputError(f"{where}: {column}.bytes must hold the image file, got null")
                if label is None or not 0 <= label < classes:
                    raise InputError(f"{where}: label must be in 0..{classes - 1}, got {label}")
                images.append(decode_image(blob, where, size))
                labels.append(label)
            done += batch.num_rows
            if done >= rows:
                break
    except InputError:
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
    ) as e:  # OSError: a damaged page; ValueError: names that are not UTF-8
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{file}: truncated or not a parquet file ({first})") from e
    if done < rows:
        raise InputError(f"{file}: must have the {rows} rows that its footer states, got {done}")


def _image_column(schema: object, file: Path) -> str:
    import pyarrow as pa

    assert isinstance(schema, pa.Schema)
    column = next((name for name in ("img", "image") if name in schema.names), None)
    if column is None or "label" not in schema.names:
        names = ", ".join(schema.names)
        raise InputError(f"{file}: columns must include 'img' or 'image', and 'label', got {names or 'none'}")
    kind = schema.field(column).type
    inner = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if pa.types.is_struct(kind) else {}
    if "bytes" not in inner or not (pa.types.is_binary(inner["bytes"]) or pa.types.is_large_binary(inner["bytes"])):
        raise InputError(f"{file}: column {column} must be struct<bytes: binary, path: string>, got {kind}")
    if not pa.types.is_integer(schema.field("label").type):
        raise InputError(f"{file}: column label must hold integers, got {schema.field('label').type}")
    return column
