"""Bytes of files and images in bytes: what the readers of the file formats share."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tsrfast.errors import EnvironmentFault, InputError


def existing(path: str | Path) -> Path:
    """`path` with ``~`` expanded.

    Raises:
        InputError: nothing is there.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise InputError(f"tsrfast.data.load: path must exist, got {str(path)!r}")
    return found


def read_bytes(path: Path) -> tuple[bytes, str]:
    """The file's content and its SHA-256 (hex), from one read, so that the checksum is of the bytes that get parsed.

    Raises:
        EnvironmentFault: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise EnvironmentFault(f"cannot read {path}: {e.strerror or e}") from e
    return data, hashlib.sha256(data).hexdigest()


def decode_image(data: bytes, where: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A PNG or JPEG file's bytes as uint8 [H, W, 3] (RGB; grey is repeated, transparency dropped).

    Args:
        where: names the image in error messages.
        size: the (width, height) that it must have; checked before anything is decoded.

    Raises:
        InputError: not a PNG or JPEG, damaged, of another size, or of more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if size is not None and image.size != size:
                wanted, given = ("x".join(map(str, pair)) for pair in (size, image.size))
                raise InputError(f"{where}: image must be {wanted} pixels, got {given}")
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to white without a word
                raise InputError(f"{where}: image must have 8 bits a channel, got mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        raise InputError(f"{where}: not a readable PNG or JPEG image ({e})") from e
