"""Files appear whole or not at all: written beside their final name, flushed, then renamed; and folders that one process has to itself."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tsrfast.errors import EnvironmentFault


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; rename it to `path` on success, remove it on failure.

    Raises:
        EnvironmentFault: the folder cannot be made or written, or the disk is full.
    """
    final = Path(path)
    temp: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".part")
        os.close(handle)
        temp = Path(name)
        yield temp
        with open(temp, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temp, final)
    except OSError as e:
        if temp is not None:
            temp.unlink(missing_ok=True)
        raise EnvironmentFault(f"cannot write {final}: {e.strerror or e}") from e
    except BaseException:
        if temp is not None:
            temp.unlink(missing_ok=True)
        raise


def lock(folder: Path) -> TextIO:
    """Make `folder` if there is none, and keep other processes out of it until what is returned is closed, or this process ends.

    Raises:
        EnvironmentFault: the folder cannot be made or written, or is locked already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / ".lock", "w")  # noqa: SIM115  (held by the caller)
    except OSError as e:
        raise EnvironmentFault(f"cannot write {folder}: {e.strerror or e}") from e
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        held.close()
        if isinstance(e, BlockingIOError):
            raise EnvironmentFault(
                f"{folder} is in use by another tsrfast process; wait for it or choose another --out"
            ) from None
        raise EnvironmentFault(f"cannot lock {folder}: {e.strerror or e}") from e
    return held


def remove_leftovers(*folders: Path) -> None:
    """Remove what kills in the middle of `atomic_path` left in `folders`, which nobody else may be writing to."""
    for folder in folders:
        for part in folder.glob(".*.part"):
            part.unlink()


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` by atomic rename.

    Raises:
        EnvironmentFault: as `atomic_path`.
    """
    with atomic_path(path) as temp:
        temp.write_bytes(data.encode() if isinstance(data, str) else data)
