"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) from any of its usual files.

``cifar10:PATH`` takes, with what lies directly in PATH before what lies below it:

1. PATH is a file: ``cifar-10-python.tar.gz`` (any tar.gz with its members), or a pair ``TRAIN.parquet,TEST.parquet``;
2. PATH holds ``data_batch_1`` ... ``test_batch`` (the folder cifar-10-batches-py itself);
3. PATH holds ``cifar-10-python.tar.gz``;
4. PATH holds ``train-*.parquet`` and ``test-*.parquet`` (or ``train.parquet`` and ``test.parquet``);
5. PATH/cifar-10-batches-py holds the batches;
6. PATH/data holds the parquet files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch

from tsrfast.data.batches import read_batch
from tsrfast.data.dataset import Dataset, Split, count, fingerprint
from tsrfast.data.files import existing, read_bytes
from tsrfast.data.parquet import read_parquet, shards
from tsrfast.errors import InputError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Of cifar-10-python.tar.gz, as stated on https://www.cs.toronto.edu/~kriz/cifar.html
PUBLISHED_MD5 = "c58f30108f718f92721af3b95e74349a"

_ARCHIVE = "cifar-10-python.tar.gz"
_FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_BATCHES = (*_TRAIN, "test_batch")
_LARGEST_MEMBER = 64 << 20  # bytes; a batch of 10,000 images has 31 MB

_Sources = list[tuple[str, str]]
_Reader = Callable[[str], tuple[bytes, str]]  # a batch's name -> its bytes and how to call it in messages


def load_cifar10(path: str, *, train: int | None = None, test: int | None = None) -> Dataset:
    """CIFAR-10 from `path` (see the module's text for what that may be): images uint8 [N, 3, 32, 32], ten classes.

    Args:
        train, test: at most the first so many images (None: all).

    Raises:
        InputError: nothing usable at `path`, or a damaged or suspicious file.
        EnvironmentFault: a file cannot be read.
    """
    notes: tuple[str, ...] = ()
    first, comma, second = path.partition(",")
    if comma and first.endswith(".parquet") and second.endswith(".parquet"):
        splits, sources = _from_parquet([existing(first)], [existing(second)], train, test)
    else:
        place = existing(path)
        if place.is_file():
            if place.suffix == ".parquet":
                raise InputError(
                    f"tsrfast.data.load: cifar10 parquet files must be given as their folder or as the pair "
                    f"TRAIN.parquet,TEST.parquet, got {path!r}"
                )
            splits, sources, notes = _from_archive(place, train, test)
        elif (place / _TRAIN[0]).is_file():
            splits, sources = _from_folder(place, train, test)
        elif (place / _ARCHIVE).is_file():
            splits, sources, notes = _from_archive(place / _ARCHIVE, train, test)
        elif (parts := shards(place, "train")) and (rest := shards(place, "test")):
            splits, sources = _from_parquet(parts, rest, train, test)
        elif (place / _FOLDER).is_dir():
            splits, sources = _from_folder(place / _FOLDER, train, test)
        elif (parts := shards(place / "data", "train")) and (rest := shards(place / "data", "test")):
            splits, sources = _from_parquet(parts, rest, train, test)
        else:
            raise InputError(
                f"tsrfast.data.load: cifar10:PATH must hold {_FOLDER}/, {_ARCHIVE} or train-*.parquet with "
                f"test-*.parquet (in PATH or PATH/data), got {path!r}"
            )
    return Dataset("cifar10", fingerprint(*splits), CLASSES, *splits, sources=tuple(sources), notes=notes)


def _from_parquet(
    train_files: list[Path], test_files: list[Path], train: int | None, test: int | None
) -> tuple[tuple[Split, Split], _Sources]:
    left, left_sources = read_parquet(train_files, "train", train)
    right, right_sources = read_parquet(test_files, "test", test)
    return (left, right), left_sources + right_sources


def _from_folder(folder: Path, train: int | None, test: int | None) -> tuple[tuple[Split, Split], _Sources]:
    missing = [name for name in _BATCHES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: must hold {_TRAIN[0]} ... {_BATCHES[-1]}, missing {', '.join(missing)}")
    sources: _Sources = []

    def read(name: str) -> tuple[bytes, str]:
        data, digest = read_bytes(folder / name)
        sources.append((name, digest))
        return data, str(folder / name)

    return (_join(read, _TRAIN, "train", train), _join(read, _BATCHES[5:], "test", test)), sources


def _from_archive(file: Path, train: int | None, test: int | None) -> tuple[tuple[Split, Split], _Sources, tuple[str, ...]]:
    data, digest = read_bytes(file)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    verdict = "the published archive" if md5 == PUBLISHED_MD5 else f"not the published archive ({PUBLISHED_MD5})"
    members = _members(data, file)

    def read(name: str) -> tuple[bytes, str]:
        return members.pop(name), f"{file}, member {name}"

    splits = _join(read, _TRAIN, "train", train), _join(read, _BATCHES[5:], "test", test)
    return splits, [(file.name, digest)], (f"{file.name}: MD5 {md5}, {verdict}",)


def _members(data: bytes, file: Path) -> dict[str, bytes]:
    """The six batches in an archive, in memory. Nothing is written: links and odd paths could do no harm, but no such
    archive is what it claims to be."""
    found: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as plain, tarfile.open(fileobj=plain, mode="r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                refused = f"{file}: refused, member {member.name!r}"
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{refused} lies outside the archive's folder")
                if not (member.isfile() or member.isdir()):
                    raise InputError(f"{refused} is neither a file nor a folder")
                if member.size > _LARGEST_MEMBER:
                    raise InputError(f"{refused} has {member.size} bytes, allowed {_LARGEST_MEMBER}")
                if member.isfile() and path.name in _BATCHES:
                    if path.name in found:
                        raise InputError(f"{refused} is there twice")
                    stream = archive.extractfile(member)
                    found[path.name] = stream.read() if stream else b""
            # tarfile stops at its end mark; gzip compares its checksum at the end of the file, a little further on.
            if len(plain.read(_LARGEST_MEMBER)) == _LARGEST_MEMBER:
                raise InputError(f"{file}: refused, the archive goes on after its end")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        raise InputError(f"{file}: truncated or not a tar.gz archive ({e})") from e
    missing = [name for name in _BATCHES if name not in found]
    if missing:
        raise InputError(f"{file}: must have the members {_TRAIN[0]} ... test_batch, missing {', '.join(missing)}")
    return found


def _join(read: _Reader, names: tuple[str, ...], which: str, wanted: int | None) -> Split:
    """At most the first `wanted` images of the named batches in order; batches behind the last wanted image are not parsed."""
    splits: list[Split] = []
    have = 0
    for name in names:
        if wanted is not None and have >= wanted:
            break
        splits.append(read_batch(*read(name)))
        have += len(splits[-1])
    n = count(wanted, have)
    return Split(torch.cat([s.images for s in splits])[:n].clone(), torch.cat([s.labels for s in splits])[:n].clone())
