"""Results of stages on disk, each under the hash of all that it depends on: computed once, reused by every later run."""

from __future__ import annotations

import fcntl
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
from tsrfast.training import ALONE, Ranks

# Stages that all processes of a torchrun work on; the others' batches cannot be cut, or are not worth it: the first process does them.
TOGETHER = ("student", "robust_images", "attack", "correlation")
PATIENCE = 0.05  # seconds between two looks at what the first process does


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, and the key that stands for everything it was made from."""

    stage: str
    key: str
    folder: Path


@dataclass
class Store:
    """A folder of artifacts, used by one run at a time.

    A stage is built in ``<name>.work`` and renamed when it is complete, so that what lies under its final name is whole. A
    resumable stage finds its unfinished work again; the work of any other is thrown away.

    With several `ranks`, all make the same calls in the same order. The first one alone locks and writes; in stages that are `TOGETHER` the
    others' ``build`` runs too (and must write nothing), at others they wait until the artifact is there.

    Raises:
        EnvironmentFault: the folder cannot be made or written, another run is using it, or the first of the ranks has stopped.
    """

    root: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    """What this process asked for: name, seconds, cached."""
    ranks: Ranks = ALONE
    locked: bool = False
    """Whether the folder is locked already, for this process, by the one that started it."""
    built: dict[str, float] = field(default_factory=dict)
    """Stages that other processes have built for this one: key -> seconds."""

    def __post_init__(self) -> None:
        self._lock = lock(self.root) if self.ranks.first and not self.locked else None
        self.ranks.barrier()

    def close(self) -> None:
        """Let another run use the folder."""
        if self._lock is not None:
            self._lock.close()

    def fileno(self) -> int:
        """The descriptor that holds the lock: while a process has it open, no other run gets the folder."""
        assert self._lock is not None
        return self._lock.fileno()

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
                if self.ranks.first:
                    self._build(work, build, text, done, resumable)
                else:
                    if stage in TOGETHER:
                        build(work)
                    self._wait_for(done)
            except OSError as e:
                raise EnvironmentFault(f"cannot write {work}: {e.strerror or e}") from e
        cached = cached and key not in self.built
        seconds = self.built.pop(key, time.monotonic() - began)
        self.log.append({"name": f"{stage} {key[:8]}", "seconds": round(seconds, 2), "cached": cached})
        return Artifact(stage, key, done)

    def _build(self, work: Path, build: Callable[[Path], None], text: str, done: Path, resumable: bool) -> None:
        if work.exists() and not resumable:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(work)
        build(work)
        atomic_write(work / "stage.json", text)
        os.replace(work, done)

    def _wait_for(self, done: Path) -> None:
        """Until the first process has put the artifact there. It may take hours: nothing but its lock says that it lives."""
        with open(self.root / ".lock") as held:
            while not (done / "stage.json").exists():
                try:
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(PATIENCE)
                    continue
                if not (done / "stage.json").exists():
                    raise EnvironmentFault("the first process of this run has stopped; the same command goes on from here")
