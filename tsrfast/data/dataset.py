"""What a data set is here: two splits of uint8 images with int64 labels, class names, a fingerprint of the content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, in the data set's own order.

    Attributes:
        images: uint8 [N, C, H, W], N >= 1.
        labels: int64 [N], on the same device.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or self.images.numel() == 0:
            given = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise InputError(f"tsrfast.data.Split: images must be non-empty uint8 [N, C, H, W], got {given}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            given = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise InputError(f"tsrfast.data.Split: labels must be int64 [{len(self.images)}], got {given}")
        if self.labels.device != self.images.device:
            devices = f"images on {self.images.device}, labels on {self.labels.device}"
            raise InputError(f"tsrfast.data.Split: images and labels must share a device, got {devices}")

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: Tensor | slice | None = None) -> Tensor:
        """The images that `index` selects (default: all) as float32 [n, C, H, W] in [0, 1]: byte / 255."""
        chosen = self.images if index is None else self.images[index]
        return chosen.to(torch.float32) / 255


@dataclass(frozen=True, eq=False)
class Dataset:
    """A train and a test split of images of one shape.

    Attributes:
        name: what it is, without the path of this machine.
        fingerprint: `fingerprint(train, test)`, hex: equal exactly when the loaded content is.
        classes: names, in the order of the labels.
        train, test: the splits.
        sources: (file name, SHA-256 of the file) of every file read; empty for generated images.
        notes: what a reader should know about the sources, e.g. whether an archive is the published one.

    Raises:
        InputError: the splits' image shapes differ, or a label has no class.
    """

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    sources: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = tuple(self.train.images.shape[1:]), tuple(self.test.images.shape[1:])
        if shapes[0] != shapes[1]:
            what = f"train {shapes[0]}, test {shapes[1]}"
            raise InputError(f"tsrfast.data.Dataset: train and test images must have one shape, got {what}")
        for which, split in (("train", self.train), ("test", self.test)):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                allowed = f"0..{len(self.classes) - 1}"
                raise InputError(f"tsrfast.data.Dataset: {which} labels must be in {allowed}, got {low}..{high}")

    @property
    def record(self) -> dict[str, Any]:
        """What results say of it, as JSON."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "sizes": {"train": len(self.train), "test": len(self.test)},
            "sources": [{"file": name, "sha256": digest} for name, digest in self.sources],
            "notes": list(self.notes),
        }


def fingerprint(train: Split, test: Split) -> str:
    """SHA-256 (hex) of both splits as loaded: of each its name and shape, image bytes, labels as little-endian int64.

    The first 100 images of a set therefore have another fingerprint than all of it, and the same images read from
    another file format have the same one. Class names and file names do not enter.
    """
    digest = hashlib.sha256(b"tsrfast data 1\n")
    for which, split in (("train", train), ("test", test)):
        digest.update(f"{which} {'x'.join(map(str, split.images.shape))}\n".encode())
        digest.update(split.images.cpu().contiguous().numpy().data)
        digest.update(split.labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def count(wanted: int | None, available: int) -> int:
    """How many images to take of the `available` ones when the caller wants at most so many (None: all of them)."""
    return available if wanted is None else min(wanted, available)
