"""Generated images with CIFAR-10's shape and patch statistics, for runs without any download.

A picture is a smooth colour field, a wave packet (a grating under a Gaussian window) somewhere, and a little noise:

    pixel[c, y, x] = brightness + field[c, y, x] + tint[c] * window(y, x) * cos(k . (y, x) + phase) + noise

The class is (direction of k, tint): five directions, and red in step with green and blue or against them. Place, phase,
wavelength, window, contrast, colour field, brightness and a second, weaker packet of any direction and tint are
nuisances. The phase is uniform, so each class has the same mean image and a linear classifier on pixels is left with
next to nothing, while convolutions with ReLUs find direction and tint.

Everything is smooth apart from the noise (standard deviation 1.2/255), so the 27 principal components of 3x3x3 patches
decay as CIFAR-10's do: 0.8 to 0.9 of the variance in the first (brightness), more than 0.999 in the first 17.

Image i of a split is a function of (seed, split, i) alone. Random numbers come straight from PCG64's bit stream and the
arithmetic is float64, so that the rounded pixels depend neither on the version of NumPy nor on the instruction set.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from tsrfast.data.dataset import Dataset, Split, count, fingerprint
from tsrfast.errors import InputError, unknown

DIRECTIONS, TINTS = 5, 2
SIZES = {"train": 8192, "test": 2048}
CLASSES = tuple(
    f"{180 * d // DIRECTIONS} degrees, {tint}"
    for tint in ("red with green and blue", "red against green and blue")
    for d in range(DIRECTIONS)
)

_SIDE = 32
_BLOCK = 256  # images from one generator; part of the definition of the data
_WAVES = 3  # smooth waves in the colour field
_NOISE = 1.2 * math.sqrt(12) / 255  # width of a uniform distribution with standard deviation 1.2/255


def load_synthetic(options: dict[str, int], *, train: int | None = None, test: int | None = None) -> Dataset:
    """Generated images uint8 [N, 3, 32, 32] in ten classes.

    Args:
        options: ``seed`` (default 0), ``train`` (8192), ``test`` (2048): the data set's sizes.
        train, test: at most the first so many images; where `options` gives no size, this is the size.

    Raises:
        InputError: an unknown option, or a size below 1.
    """
    for name, value in options.items():
        if name not in ("seed", "train", "test"):
            raise unknown("option of the synthetic data set", name, ("seed", "train", "test"))
        if name != "seed" and value < 1:
            raise InputError(f"tsrfast.data.load: synthetic {name} must be at least 1, got {value}")
    seed = options.get("seed", 0)
    splits = []
    for which, wanted in (("train", train), ("test", test)):
        if which in options:
            n = count(wanted, options[which])
        else:
            n = SIZES[which] if wanted is None else wanted
        splits.append(generate(seed, which, n))
    left, right = splits
    return Dataset(f"synthetic:seed={seed}", fingerprint(left, right), CLASSES, left, right)


def generate(seed: int, which: str, n: int) -> Split:
    """The first `n` images of the split `which` ("train" or "test") for `seed` (any integer >= 0)."""
    images = np.empty((n, 3, _SIDE, _SIDE), np.uint8)
    labels = np.empty(n, np.int64)
    split = list(SIZES).index(which)
    for block, start in enumerate(range(0, n, _BLOCK)):
        stop = min(start + _BLOCK, n)
        pixels, classes = _block(np.random.PCG64(np.random.SeedSequence([seed, split, block])))
        images[start:stop], labels[start:stop] = pixels[: stop - start], classes[: stop - start]
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _block(bits: np.random.PCG64) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    def uniform(low: float, high: float, *shape: int) -> NDArray[np.float64]:
        raw = bits.random_raw(math.prod((_BLOCK, *shape))) >> np.uint64(11)
        return low + (high - low) * (raw * 2.0**-53).reshape(_BLOCK, *shape)

    labels = np.floor(uniform(0, DIRECTIONS * TINTS)).astype(np.int64)
    axis = np.arange(_SIDE) - (_SIDE - 1) / 2

    # Each wave is cos(a + b) = cos a cos b - sin a sin b with a along rows and b along columns, so a picture is a sum
    # of few outer products: [side, 2 waves] @ [2 waves, side] for each image and channel.
    def packet(angle: NDArray[np.float64], red: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
        k, phase = 2 * np.pi / uniform(4.5, 8), uniform(0, 2 * np.pi)
        centre, width = uniform(-8, 8, 2), uniform(4, 7)
        rows, columns = (np.exp(-(((axis - centre[:, i, None]) / width[:, None]) ** 2) / 2) for i in (0, 1))
        a = (k * np.sin(angle))[:, None] * axis + phase[:, None]
        b = (k * np.cos(angle))[:, None] * axis
        tint = np.stack([red, np.ones(_BLOCK), np.ones(_BLOCK)], 1) * uniform(low, high)[:, None]
        return _outer(a, b, rows, columns)[:, None] * tint[:, :, None, None]

    direction = np.pi * (labels % DIRECTIONS) / DIRECTIONS + uniform(-0.22, 0.22)
    pixels = packet(direction, np.where(labels < DIRECTIONS, 1.0, -1.0), 0.14, 0.28)
    pixels += packet(uniform(0, np.pi), uniform(-1, 1), 0.0, 0.13)

    # The field: long waves, mostly of one brightness in all channels, a quarter of it colour.
    for _ in range(_WAVES):
        length, turn, shift = uniform(14, 50), uniform(0, 2 * np.pi), uniform(0, 2 * np.pi)
        a = (2 * np.pi / length * np.sin(turn))[:, None] * axis + shift[:, None]
        b = (2 * np.pi / length * np.cos(turn))[:, None] * axis
        gain = uniform(0.03, 0.17)[:, None] + uniform(-0.08, 0.08, 3)
        pixels += _outer(a, b)[:, None] * gain[:, :, None, None]
    pixels += (0.5 + uniform(-0.28, 0.28)[:, None] + uniform(-0.12, 0.12, 3))[:, :, None, None]

    raw = bits.random_raw(_BLOCK * 3 * _SIDE * _SIDE // 4).astype("<u8").view("<u2")
    pixels += ((raw + 0.5) * 2.0**-16 - 0.5).reshape(pixels.shape) * _NOISE
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8), labels


def _outer(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    rows: NDArray[np.float64] | float = 1.0,
    columns: NDArray[np.float64] | float = 1.0,
) -> NDArray[np.float64]:
    """rows[n, y] columns[n, x] cos(a[n, y] + b[n, x]) as [n, y, x]."""
    cosine = (np.cos(a) * rows)[:, :, None] * (np.cos(b) * columns)[:, None, :]
    return cosine - (np.sin(a) * rows)[:, :, None] * (np.sin(b) * columns)[:, None, :]
