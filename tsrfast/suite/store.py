"""Results of stages on disk, each under the hash of all that it depends on: computed once, reused by every later run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tsrfast
from tsrfast._files import atomic_write, lock, remove_leftovers
from tsrfast.errors import EnvironmentFault


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, and the key that stands for everything it was made from."""

    stage: str
    key: str
    folder: Path


@dataclass
class Store:
    """A folder of artifacts, used by one process at a time.

    A stage is built in ``<name>.work`` and renamed when it is complete, so that what lies under its final name is whole. A
    resumable stage finds its unfinished work again; the work of any other is thrown away.

    Raises:
        EnvironmentFault: the folder cannot be made or written, or another process is using it.
    """

    root: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    """What this process asked for: name, seconds, cached."""

    def __post_init__(self) -> None:
        self._lock = lock(self.root)

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def artifact(
        self,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        build: Callable[[Path], None],
        *,
        resumable: bool,
    ) -> Artifact:
        """The artifact of this stage, built by ``build(folder)`` if it is not there yet.

        Args:
            stage: name of the kind of stage.
            config: JSON values; with `inputs` and the package's version they make the key.
            inputs: the artifacts it is computed from.
            resumable: whether `build` can go on in a folder that an interrupted build left.
        """
        record = {
            "stage": stage,
            "tsrfast": tsrfast.__version__,
            "config": dict(config),
            "inputs": {name: a.key for name, a in inputs.items()},
        }
        text = json.dumps(record, sort_keys=True, indent=1)
        key = hashlib.sha256(text.encode()).hexdigest()
        done, work = self.root / f"{stage}-{key[:16]}", self.root / f"{stage}-{key[:16]}.work"
        began, cached = time.monotonic(), (done / "stage.json").exists()
        if not cached:
            try:
                if work.exists() and not resumable:
                    shutil.rmtree(work)
                work.mkdir(parents=True, exist_ok=True)
                remove_leftovers(work)
                build(work)
                atomic_write(work / "stage.json", text)
                os.replace(work, done)
            except OSError as e:
                raise EnvironmentFault(f"cannot write {work}: {e.strerror or e}") from e
        self.log.append({"name": f"{stage} {key[:8]}", "seconds": round(time.monotonic() - began, 2), "cached": cached})
        return Artifact(stage, key, done)
