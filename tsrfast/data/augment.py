"""Augmentations of whole batches, as functions of given random numbers, and `Augment`, which draws those by counter.

Yang et al., AISTATS 2021, section 5.4 (crop, flip, rotation; magnitudes unpublished, the usual CIFAR-10 ones here) and
5.5 (Gaussian, sigma 0.1). Each function takes images [N, C, H, W], float, and `u`, float32 [N, k], uniform in [0, 1):
row n decides what happens to image n, by operations whose result for one image does not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tsrfast.errors import InputError, unknown
from tsrfast.ops import philox_uniform

# The position in this tuple is part of the random stream of each augmentation.
NAMES = ("crop", "flip", "rotate", "gaussian")


def random_crop(x: Tensor, u: Tensor, padding: int = 4) -> Tensor:
    """Zero-pad by `padding` on each side, then cut out a window of the old size at one of (2 padding + 1)^2 places.

    Args:
        x: [N, C, H, W], float.
        u: [N, 2]: row and column of the window.

    Raises:
        InputError: a shape or dtype does not fit, or `padding` is negative.
    """
    _check("random_crop", x, u, 2)
    if padding < 0:
        raise InputError(f"tsrfast.data.augment.random_crop: padding must be at least 0, got {padding}")
    n, c, h, w = x.shape
    offset = (u.double() * (2 * padding + 1)).long()  # in float32 the product can round up to a whole number
    rows = offset[:, 0, None] + torch.arange(h, device=x.device)
    columns = offset[:, 1, None] + torch.arange(w, device=x.device)
    padded = functional.pad(x, (padding, padding, padding, padding))
    window = padded.gather(2, rows[:, None, :, None].expand(n, c, h, padded.shape[3]))
    return window.gather(3, columns[:, None, None, :].expand(n, c, h, w))


def horizontal_flip(x: Tensor, u: Tensor, probability: float = 0.5) -> Tensor:
    """Mirror left and right the images with u < `probability`.

    Args:
        x: [N, C, H, W], float.
        u: [N, 1].

    Raises:
        InputError: a shape or dtype does not fit, or `probability` is not in [0, 1].
    """
    _check("horizontal_flip", x, u, 1)
    if not 0 <= probability <= 1:
        raise InputError(f"tsrfast.data.augment.horizontal_flip: probability must be in [0, 1], got {probability}")
    return torch.where((u.double() < probability)[:, :, None, None], x.flip(3), x)


def rotate(x: Tensor, u: Tensor, degrees: float = 15.0) -> Tensor:
    """Turn about the centre by an angle uniform in +-`degrees` (u = 1/2: none, larger: counter-clockwise).

    Bilinear between pixel centres, zero outside the image (`grid_sample`, align_corners=False).

    Args:
        x: [N, C, H, W], float.
        u: [N, 1].

    Raises:
        InputError: a shape or dtype does not fit, or `degrees` is not a finite number >= 0.
    """
    _check("rotate", x, u, 1)
    if not (math.isfinite(degrees) and degrees >= 0):
        raise InputError(f"tsrfast.data.augment.rotate: degrees must be finite and at least 0, got {degrees}")
    h, w = x.shape[2:]
    angle = ((2 * u.double() - 1) * math.radians(degrees))[:, :, None]
    # In pixels from the centre, so that a picture that is not square is turned and not sheared, as affine_grid would;
    # element by element, where affine_grid's matrix product may round differently in another batch size.
    y = torch.arange(h, device=x.device, dtype=torch.float64)[None, :, None] - (h - 1) / 2
    z = torch.arange(w, device=x.device, dtype=torch.float64)[None, None, :] - (w - 1) / 2
    from_x = (z * angle.cos() - y * angle.sin()) * (2 / w)
    from_y = (z * angle.sin() + y * angle.cos()) * (2 / h)
    grid = torch.stack([from_x, from_y], 3).to(x.dtype)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def gaussian(x: Tensor, u: Tensor, sigma: float = 0.1) -> Tensor:
    """x + N(0, sigma^2) on every value, not clipped to [0, 1] (paper, section 5.5).

    Box-Muller in float64, two normal numbers from two uniform ones.

    Args:
        x: [N, C, H, W], float.
        u: [N, 2 ceil(CHW / 2)].
        sigma: in pixel units.

    Raises:
        InputError: a shape or dtype does not fit, or `sigma` is not a finite number >= 0.
    """
    values = math.prod(x.shape[1:])
    half = (values + 1) // 2
    _check("gaussian", x, u, 2 * half)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise InputError(f"tsrfast.data.augment.gaussian: sigma must be finite and at least 0, got {sigma}")
    radius = (-2 * torch.log1p(-u[:, :half].double())).sqrt()  # log(1 - u): u can be 0 and is never 1
    angle = 2 * math.pi * u[:, half:].double()
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :values]
    return x + (sigma * normal).to(x.dtype).view_as(x)


@dataclass(frozen=True)
class Augment:
    """Augmentations in the order of `names`; the result for an image depends on (seed, epoch, its index) alone.

    Attributes:
        names: some of "crop", "flip", "rotate", "gaussian", each at most once; empty: `x` comes back as it is.
        seed: any integer in 0..2^63-1; the streams differ from those of an attack with the same seed.
        padding, probability, degrees, sigma: see `random_crop`, `horizontal_flip`, `rotate`, `gaussian`.

    Raises:
        InputError: an unknown or repeated name, or a seed out of range.
    """

    names: tuple[str, ...] = ("crop", "flip", "rotate")
    seed: int = 0
    padding: int = 4
    probability: float = 0.5
    degrees: float = 15.0
    sigma: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InputError(f"tsrfast.data.augment.Augment: names must be a sequence of names, got {self.names!r}")
        object.__setattr__(self, "names", tuple(self.names))
        for name in self.names:
            if name not in NAMES:
                raise unknown("augmentation", str(name), NAMES)
        if len(set(self.names)) < len(self.names):
            raise InputError(f"tsrfast.data.augment.Augment: names must not repeat, got {self.names}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"tsrfast.data.augment.Augment: seed must be in 0..2^63-1, got {self.seed}")

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        """The augmented batch, shaped like `x`.

        Args:
            x: [N, C, H, W], float, pixels in [0, 1].
            index: int64 [N], the images' numbers in their data set.
            epoch: 0..2^30-1.

        Raises:
            InputError: `x`, `index` or `epoch` does not fit.
        """
        if index.dtype != torch.int64 or index.shape != x.shape[:1]:
            given = f"{index.dtype} {tuple(index.shape)}"
            raise InputError(f"tsrfast.data.augment.Augment: index must be int64 [{len(x)}], got {given}")
        if not 0 <= epoch < 2**30:
            raise InputError(f"tsrfast.data.augment.Augment: epoch must be in 0..2^30-1, got {epoch}")
        index = index.to(x.device).contiguous()
        key = _key(self.seed)
        for name in self.names:
            count = {"crop": 2, "flip": 1, "rotate": 1, "gaussian": 2 * ((math.prod(x.shape[1:]) + 1) // 2)}[name]
            u = philox_uniform(key, index, count, draw=len(NAMES) * epoch + NAMES.index(name))
            if name == "crop":
                x = random_crop(x, u, self.padding)
            elif name == "flip":
                x = horizontal_flip(x, u, self.probability)
            elif name == "rotate":
                x = rotate(x, u, self.degrees)
            else:
                x = gaussian(x, u, self.sigma)
        return x


def _key(seed: int) -> int:
    """The Philox key for augmentations: attacks use the seed itself, with draws that count from 0 as well."""
    return int.from_bytes(hashlib.sha256(f"tsrfast augment {seed}".encode()).digest()[:8], "big") >> 1


def _check(function: str, x: Tensor, u: Tensor, count: int) -> None:
    where = f"tsrfast.data.augment.{function}"
    if x.ndim != 4 or not x.is_floating_point():
        raise InputError(f"{where}: x must be floating-point [N, C, H, W], got {x.dtype} {tuple(x.shape)}")
    if u.shape != (len(x), count) or u.dtype != torch.float32:
        raise InputError(f"{where}: u must be float32 [{len(x)}, {count}], got {u.dtype} {tuple(u.shape)}")
    if u.device != x.device:
        raise InputError(f"{where}: u must be on {x.device}, got {u.device}")
