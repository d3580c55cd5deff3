"""A reproduction in several processes: stages side by side (``--jobs``), or every stage split (``torchrun``).

``--jobs`` shares out the threads, on which no result depends; torchrun gives each process one unless OMP_NUM_THREADS is set.
"""

from __future__ import annotations

import datetime
import functools
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tsrfast._machine import choose_device
from tsrfast._progress import Reporter, Update
from tsrfast._threads import one_thread_for_torch, threads
from tsrfast.data import Dataset, load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.suite.lab import Lab
from tsrfast.suite.plan import StandIns, walk
from tsrfast.suite.presets import Preset
from tsrfast.suite.store import Artifact, Store
from tsrfast.training import ALONE, Ranks

TIMEOUT = datetime.timedelta(minutes=30)  # for a process that neither answers nor dies

# --- torchrun -----------------------------------------------------------------------------------------------------------


class Quiet(Reporter):
    """Says nothing: one process speaks for all."""

    def say(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, name: str) -> Iterator[Update]:
        """As `Reporter.task`."""
        yield lambda done, total, note="", before=0: None


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that torchrun started, and this one's device; without torchrun, one process alone and `device`.

    Raises:
        InputError: a CUDA device is named by its number, which torchrun gives.
        EnvironmentFault: there are not as many CUDA devices as processes.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device: must be cpu or cuda with torchrun, which numbers the devices, got {device}")
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    yield Ranks(dist.get_rank(), dist.get_world_size()), device
    dist.destroy_process_group()  # not after a failure, where others may never answer: the end of this process tells them


# --- --jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A stage to build: what `Store.artifact` needs, and ``function(lab, *arguments, folder)`` that builds it."""

    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, Artifact]
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    resumable: bool
    flop: float


@dataclass(frozen=True)
class Setting:
    """What a worker needs to build stages as the process that started it would."""

    preset: Preset
    data: str
    root: Path
    device: torch.device
    seed: int
    threads: int


class _Relay(Reporter):
    """Has the process that started this one say it."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._live, self._pipe = False, pipe

    def say(self, text: str) -> None:
        """One line."""
        self._pipe.send(text.strip())


class _Listed(StandIns):
    """Notes how stages are built, under the names that they have in the run's own store."""

    def __init__(self, stand_ins: Path, data: Dataset, preset: Preset, kept: Path) -> None:
        super().__init__(stand_ins, data, preset, kept)
        self.tasks: dict[str, Task] = {}

    def artifact(
        self,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        build: Callable[[Path], None],
        *,
        resumable: bool,
    ) -> Artifact:
        """As `StandIns.artifact`."""
        found = super().artifact(stage, config, inputs, build, resumable=resumable)
        planned = self.planned[found.key]
        if found.key not in self.tasks and not planned.cached:
            assert isinstance(build, functools.partial)
            _, *arguments = map(self._kept_as, build.args)
            kept = {name: self._kept_as(a) for name, a in inputs.items()}
            self.tasks[found.key] = Task(
                stage, found.key, dict(config), kept, build.func, tuple(arguments), resumable, planned.flop
            )
        return found

    def _kept_as(self, value: Any) -> Any:
        return Artifact(value.stage, value.key, self._kept / value.folder.name) if isinstance(value, Artifact) else value


def tasks(lab: Lab, experiments: Sequence[str]) -> list[Task]:
    """The stages that the experiments will ask for and that are not there yet, each after those it needs."""
    with tempfile.TemporaryDirectory() as temporary:
        listed = _Listed(Path(temporary), lab.data, lab.preset, lab.store.root)
        try:
            walk(experiments, listed.lab(lab.seed, lab.device), listed)
        finally:
            listed.close()
    return list(listed.tasks.values())


def side_by_side(lab: Lab, experiments: Sequence[str], data: str, jobs: int) -> None:
    """Build the stages of `experiments` in `jobs` processes; whoever asks for them then finds them in the store.

    A stage is given to one process, once those it needs are there; of those that are ready, the one on which most work waits. The threads of
    this process are shared out among them. Results are those of one process. The workers hold the store's lock with this process, and end
    when it does, however it ends.

    Raises:
        InputError, EnvironmentFault, ...: what a worker met.
        EnvironmentFault: a worker was killed.
    """
    with lab.reporter.task("list of stages"):
        waiting = {task.key: task for task in tasks(lab, experiments)}
    urgency = _urgency(list(waiting.values()))
    workers: list[_Worker] = []
    missing, total = set(waiting), len(waiting)
    try:
        each = max(1, threads() // jobs)
        workers += [_Worker(number, lab, data, each) for number in range(1, min(jobs, total) + 1)]
        with lab.reporter.task("stages") as update:
            while missing:
                ready = [t for t in waiting.values() if not missing & {a.key for a in t.inputs.values()}]
                idle = [w for w in workers if w.task is None]
                for worker, task in zip(idle, sorted(ready, key=lambda t: -urgency[t.key]), strict=False):
                    worker.give(waiting.pop(task.key))
                spoken = wait([w.pipe for w in workers])
                for worker in [w for w in workers if w.pipe in spoken]:
                    said = worker.answer()
                    if isinstance(said, str):
                        lab.reporter.say(f"[{worker.number}] {said}")
                    else:
                        done, lab.store.built[done] = said
                        missing.remove(done)
                        update(total - len(missing), total, "stages")
    finally:
        for worker in workers:
            worker.end()


def _urgency(tasks: Sequence[Task]) -> dict[str, float]:
    """The work of the longest chain of stages that begins with a stage: key -> FLOP."""
    own = {task.key: task.flop for task in tasks}
    longest = dict(own)
    for task in reversed(tasks):
        for needed in task.inputs.values():
            if needed.key in own:
                longest[needed.key] = max(longest[needed.key], own[needed.key] + longest[task.key])
    return longest


class _Worker:
    """A process that builds stages, as seen from the one that started it."""

    def __init__(self, number: int, lab: Lab, data: str, threads: int) -> None:
        device = lab.device
        if device == torch.device("cuda"):
            device = torch.device("cuda", (number - 1) % torch.cuda.device_count())
        self.number = number
        self.task: Task | None = None
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from tsrfast.suite.processes import work; work({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # all it has to say comes through the pipe; standard error is for faults
            pass_fds=[theirs.fileno(), lab.store.fileno()],
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
        theirs.close()
        self._send(Setting(lab.preset, data, lab.store.root, device, lab.seed, threads))

    def give(self, task: Task) -> None:
        """Have it build a stage."""
        self.task = task
        self._send(task)

    def answer(self) -> str | tuple[str, float]:
        """A line to print, or key and seconds of the stage that it has built; raises what it met."""
        try:
            said = self.pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"gone with exit code {code}"
            at = "" if self.task is None else f" in stage {self.task.stage} {self.task.key[:8]}"
            raise EnvironmentFault(
                f"process {self.number} of --jobs was {how}{at}; the same command goes on from here"
            ) from None
        if isinstance(said, BaseException):
            raise said
        if not isinstance(said, str):
            self.task = None
        return said  # type: ignore[no-any-return]

    def end(self) -> None:
        """Whatever it is doing: what it has not finished is taken up or done again."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()

    def _send(self, message: Setting | Task) -> None:
        with suppress(ConnectionError):  # it is gone: `answer` says so
            self.pipe.send(message)


def work(descriptor: int) -> None:
    """A worker: through the pipe come stages, and go lines, key and seconds of each stage, or the exception it met."""
    pipe: Connection = Connection(descriptor)
    given: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, given), daemon=True).start()
    warnings.showwarning = lambda message, *place, **more: pipe.send(f"warning: {message}")
    try:
        setting: Setting = given.get()
        torch.set_num_threads(setting.threads)
        data = load(setting.data, train=setting.preset.train_images, test=setting.preset.test_images)
        store = Store(setting.root, locked=True)
        lab = Lab(data, setting.preset, setting.seed, setting.device, store, _Relay(pipe))
        with one_thread_for_torch(setting.device):
            while True:
                task: Task = given.get()
                build = functools.partial(task.function, lab, *task.arguments)
                store.artifact(task.stage, task.config, task.inputs, build, resumable=task.resumable)
                pipe.send((task.key, store.log[-1]["seconds"]))
    except Exception as e:
        if not isinstance(e, (InputError, EnvironmentFault, MemoryError, torch.OutOfMemoryError)):
            traceback.print_exc()  # where it arose: what is raised again elsewhere does not say
        pipe.send(e)


def _listen(pipe: Connection, given: queue.SimpleQueue[Any]) -> None:
    """Hand on what comes. When the other end is gone, so is this process: nobody waits for its work any more."""
    try:
        while True:
            given.put(pipe.recv())
    except (EOFError, ConnectionError):
        os._exit(0)
