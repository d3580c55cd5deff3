"""Any labelled images in folders: ``PATH/train/<class>/*.png`` and ``PATH/test/<class>/*.png`` (or .jpg, .jpeg)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from tsrfast.data.dataset import Dataset, Split, count, fingerprint
from tsrfast.data.files import decode_image, existing, read_bytes
from tsrfast.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LAYOUT = "PATH/train/<class>/*.png|jpg and PATH/test/<class>/*.png|jpg"


def load_folder(path: str, *, train: int | None = None, test: int | None = None) -> Dataset:
    """Images uint8 [N, 3, H, W] of one size; classes are the names of the folders in ``train``, sorted.

    The order within a split is the first file of every class, then the second, and so on (file names sorted), so that
    the first n images are balanced. Hidden files and other file types are ignored. `sources` has one checksum a split,
    over relative names and contents of the files read.

    Args:
        train, test: the first so many images only (None: all).

    Raises:
        InputError: another layout, a class without images, different classes or sizes, a damaged image.
        EnvironmentFault: a file cannot be read.
    """
    root = existing(path)
    missing = [name for name in ("train", "test") if not (root / name).is_dir()]
    if missing:
        what = f"missing {' and '.join(missing)} in {root}"
        raise InputError(f"tsrfast.data.load: folder:PATH must have the layout {_LAYOUT}, {what}")
    classes, test_classes = _classes(root / "train"), _classes(root / "test")
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise InputError(f"{root}: train and test must have the same classes, only one has {odd}")
    left, left_source = _split(root, "train", classes, train, None)
    height, width = left.images.shape[2:]
    right, right_source = _split(root, "test", classes, test, (width, height))
    name = f"folder:{root.resolve().name}"
    return Dataset(name, fingerprint(left, right), classes, left, right, sources=(left_source, right_source))


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        what = f"got no class folders in {folder}"
        raise InputError(f"tsrfast.data.load: folder:PATH must have the layout {_LAYOUT}, {what}")
    return names


def _split(
    root: Path, which: str, classes: tuple[str, ...], wanted: int | None, size: tuple[int, int] | None
) -> tuple[Split, tuple[str, str]]:
    files: list[tuple[int, int, Path]] = []  # rank within the class, label, file
    for label, name in enumerate(classes):
        entries = sorted((root / which / name).iterdir())
        mine = [p for p in entries if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.name.startswith(".")]
        if not mine:
            raise InputError(f"{root / which / name}: must hold *.png or *.jpg images, got none")
        files += [(rank, label, p) for rank, p in enumerate(mine)]
    files.sort(key=lambda entry: entry[:2])
    files = files[: count(wanted, len(files))]
    digest = hashlib.sha256()
    images: list[np.ndarray] = []
    for _, _, file in files:
        data, content = read_bytes(file)
        digest.update(f"{content} {file.relative_to(root).as_posix()}\n".encode())
        images.append(decode_image(data, str(file), size))
        size = size or (images[0].shape[1], images[0].shape[0])
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for _, label, _ in files], dtype=torch.int64)
    return Split(pixels, labels), (f"{which} ({len(files)} files)", digest.hexdigest())
