"""A step of an attack as a CUDA graph: recorded once, replayed for every step, and for the next batches too.

A small network on a GPU spends its time being launched, operation by operation; a replay is one launch. What is recorded holds addresses:
the images are copied into buffers that stay, and weights may change in place, but nothing may be somewhere else, or be decided anew, the
next time. Therefore each model is looked at before a recording is used again (`fingerprint`), and steps are watched before they are
recorded (`Watch`); where a step cannot be recorded, the reason is said, and steps are launched one by one.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tsrfast.attacks import steps as plain
from tsrfast.attacks.loop import Attempt, Batch, Recipe, check_labels, frozen, undisturbed
from tsrfast.attacks.losses import Loss
from tsrfast.attacks.steps import State, Steps, fill, room
from tsrfast.errors import InputError, unknown

ENGINES = ("auto", "chain", "graph", "eager")

# Recording takes four steps' time (two watched, one warm-up where it is recorded, the recording itself): with fewer steps than twice
# that, "auto" launches them one by one.
PAYS = 8
# More images than that keep a GPU busy, however they are launched, and a recording would hold the memory of a whole step.
LARGE = 1024
# Recordings that an attack keeps; the one that was not used for the longest time goes.
KEPT = 8
# Smaller batches than the largest that was recorded fill up one of its size, or of a half of it, a quarter, ..., but no smaller than that.
LEAST = 16


def check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)


# ---- the device


class Recorder(Protocol):
    """All that is asked of a device. One belongs to an attack, so that its recordings can share memory."""

    def against(self) -> str | None:
        """Why nothing can be recorded here; None: something can."""

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        """Runs `step`, records it, and returns what replays it on the stream that is current then.

        Raises:
            RuntimeError: it cannot be recorded. The device is as it was.
        """

    def turn(self) -> AbstractContextManager[None]:
        """Inside, buffers and recordings are this stream's: what was begun with them before, on whatever stream, comes first."""


class CudaRecorder:
    """CUDA graphs of one device. They share a memory pool: none keeps anything there from one replay to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def against(self) -> str | None:
        return None if self.device.type == "cuda" else f"x is on {self.device}, and only CUDA devices replay graphs"

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        outside, inside = torch.cuda.current_stream(index), torch.cuda.Stream(index)
        generator = torch.cuda.default_generators[index]
        numbers = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(index):
            try:
                inside.wait_stream(outside)
                with torch.cuda.stream(inside):
                    step()  # on the stream that records: libraries set themselves up for each stream
                # Other threads (of data loaders) may allocate meanwhile.
                with torch.cuda.graph(graph, pool=self.pool, stream=inside, capture_error_mode="thread_local"):
                    step()
            except BaseException:
                # A recording that fails leaves its stream current, the generator in the middle of it, and its pool still recording.
                torch.cuda.set_stream(outside)
                generator.graphsafe_set_state(numbers)
                self.pool = None
                raise
        outside.wait_stream(inside)
        return graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)
        try:
            yield
        finally:
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(self.device))


# What tests replace: there, a recorder of Python calls takes the place of a GPU.
recorder_for: Callable[[torch.device], Recorder] = CudaRecorder


def check_not_recording(device: torch.device) -> None:
    """Nobody records a graph of the attack: it looks at its images first, which cannot be recorded.

    Raises:
        InputError: somebody does.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "tsrfast.attacks: an attack must not run while a CUDA graph is captured: it checks its images, and captures its own "
            "steps; capture what comes before and after it"
        )


# ---- what can be recorded


class Watch(TorchDispatchMode):
    """Notes the first operation that a graph cannot hold: one whose result the host waits for, or a copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.complaint: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.complaint is None:
            self.complaint = complaint(func, args, kwargs or {})
        return func(*args, **kwargs or {})


def complaint(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a graph cannot hold this call of an ATen operator; None: it can."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    packet = func.overloadpacket
    copies = packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    where = {t.device for t in tensors if t.ndim or copies}  # else numbers of the host are arguments of kernels
    if copies and kwargs.get("device") is not None:
        where.add(torch.empty(0, device=kwargs["device"]).device)
    if len(where) > 1:
        return f"{func} copies between devices ({', '.join(sorted(map(str, where)))})"
    if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            return f"{func} selects by a mask, and how much depends on the data"
        return None
    if torch.Tag.data_dependent_output in func.tags:
        return f"{func} brings a value to the host"
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"{func} has a result whose size depends on the data"
    return None


def _networks(model: nn.Module, loss: Loss) -> tuple[nn.Module, ...]:
    return tuple(m for m in (model, *loss.models()) if isinstance(m, nn.Module))


def fingerprint(model: nn.Module, loss: Loss, device: torch.device) -> object:
    """What a recording takes for granted: where parameters and buffers are (not what they hold), what modules and the loss have as
    attributes, and settings of PyTorch. What lies inside an attribute that is neither tensor nor number nor a collection of a thousand
    at most is not seen."""
    settings = (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
    )
    modules = {m: None for network in _networks(model, loss) for m in network.modules()}
    parts = tuple((type(m), _described({k: v for k, v in vars(m).items() if k != "_modules"})) for m in modules)
    return settings, parts, _described(vars(loss))


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        try:
            return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
        except RuntimeError:  # it has no address
            return id(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
        return type(value), repr(value)
    if isinstance(value, (list, tuple, set, dict)) and len(value) > 1000:
        return type(value), id(value), len(value)
    if isinstance(value, (list, tuple, set)):
        return type(value), tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((repr(k), _described(v)) for k, v in value.items())
    return type(value), id(value)


def against(recipe: Recipe, x: Tensor | None) -> str | None:
    """Why steps are not to be recorded, as far as can be told before it is tried; None: they are."""
    if x is None:
        return "no images say on which device"
    why = recorder_for(x.device).against()
    if why is None and recipe.on_step is not None:
        why = "on_step is called between steps"
    if why is None and recipe.direction is not None and recipe.direction.diversity is not None:
        why = "diversity draws other numbers at each step"
    if why is not None or recipe.engine == "graph":
        return why
    if recipe.steps * recipe.restarts < PAYS:
        return f"fewer than {PAYS} steps do not pay for recording one"
    return f"{len(x)} images keep a GPU busy by themselves" if len(x) > LARGE else None


# ---- recordings


@dataclass(eq=False)
class Recording:
    """A step on its buffers. Holds neither model nor loss' networks."""

    steps: Steps
    layout: object
    classes: int
    replay: Callable[[], object]


@dataclass(eq=False)
class Known:
    """A model, its recordings, the latest last, and what could not be recorded and why."""

    model: weakref.ref[nn.Module]
    mark: object
    recordings: list[Recording] = field(default_factory=list)
    refused: dict[object, str] = field(default_factory=dict)
    restless: str | None = None


class Graphs:
    """The recordings of one attack, at most `KEPT`. They live as long as the attack, but none longer than its model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.known: dict[int, Known] = {}
        self.recorders: dict[torch.device, Recorder] = {}

    def attempt(self, model: nn.Module, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int) -> Attempt:
        """One run of the loop from `start` (see `loop.Engine`).

        Raises:
            InputError: ``engine="graph"``, and a step cannot be recorded.
        """
        recipe = plain.plain_numbers(recipe)
        with self.lock:  # buffers are for one at a time
            recorder = self.recorders.setdefault(start.device, recorder_for(start.device))
            with recorder.turn():
                launcher = Replaying(self, recorder, self._of(model, recipe, start.device), model, recipe)
                return plain.run(launcher, model, recipe, batch, start, judge, restart)

    def drop(self) -> None:
        """Forget all recordings, and give their memory back."""
        with self.lock:
            for known in list(self.known.values()):
                known.recordings.clear()
            self.recorders.clear()

    def add(self, to: Known, recording: Recording) -> None:
        every = [(k, r) for k in self.known.values() for r in k.recordings]
        if len(every) >= KEPT:
            oldest = next(((k, r) for k, r in every if k is not to), every[0])
            oldest[0].recordings.remove(oldest[1])
        to.recordings.append(recording)

    def _of(self, model: nn.Module, recipe: Recipe, device: torch.device) -> Known:
        key, mark = id(model), fingerprint(model, recipe.loss, device)
        known = self.known.pop(key, None)
        if known is None or known.model() is not model:
            known = Known(weakref.ref(model, lambda _: self.known.pop(key, None)), mark)
        elif known.mark != mark:
            known.recordings.clear()
            known.refused.clear()
            known.mark = mark
        self.known[key] = known  # the latest last
        return known


class Replaying:
    """A `steps.Launcher` that replays recordings, and makes those that are missing."""

    def __init__(self, graphs: Graphs, recorder: Recorder, known: Known, model: nn.Module, recipe: Recipe) -> None:
        self.graphs, self.recorder, self.known, self.model, self.recipe = graphs, recorder, known, model, recipe
        self.one_by_one = plain.OneByOne(model, recipe)
        self.ungraphed: str | None = None
        self.replay: Callable[[], object] | None = None
        self.layout: object = None

    def begin(self, state: State) -> Steps:
        rows = torch.arange(len(state["x"]), device=state["x"].device)
        self.layout = _layout(state)
        kept = self._fitting(len(rows))
        found = self._recorded(state, rows) if kept is None else kept
        if kept is not None:  # a new one has been checked when it was made
            for name, labels in {"y": state.get("y"), **self._loss(state, rows).per_image()}.items():
                check_labels(labels, kept.classes, name)
        if isinstance(found, str):
            if self.recipe.engine == "graph":
                raise InputError(f"tsrfast.attacks: engine must be 'auto' or 'eager' for this call, got 'graph': {found}")
            self.ungraphed = found
        return self._use(found, state, rows)

    def size(self, standing: int) -> int:
        if self.replay is None:
            return standing
        found = self._fitting(standing)
        return self._target(standing) if found is None else found.steps.size

    def gather(self, state: State, rows: Tensor, left: int) -> Steps:
        found: Recording | str | None = None
        if self.replay is not None:
            found = self._fitting(len(rows)) or (self._recorded(state, rows) if left >= PAYS else None)
        return self._use(found, state, rows)

    def advance(self, steps: Steps, number: int, first: bool) -> None:
        if self.replay is None:
            self.one_by_one.advance(steps, number, first)
        else:
            self.replay()

    def _use(self, found: Recording | str | None, state: State, rows: Tensor) -> Steps:
        if not isinstance(found, Recording):
            self.replay = None
            whole = len(rows) == len(state["x"])
            return self.one_by_one.begin(state) if whole else self.one_by_one.gather(state, rows, 0)
        self.replay = found.replay
        self.known.recordings.remove(found)
        self.known.recordings.append(found)  # the latest last
        self._load(found.steps, state, rows)
        return found.steps

    def _loss(self, state: State, rows: Tensor) -> Loss:
        return self.recipe.loss.only(state["places"][rows])

    def _load(self, steps: Steps, state: State, rows: Tensor) -> None:
        fill(steps.state, state, rows)
        steps.count = len(rows)
        mine = steps.loss.per_image()
        for name, value in self._loss(steps.state, torch.arange(steps.size, device=rows.device)).per_image().items():
            mine[name].copy_(value)

    def _alike(self) -> list[Recording]:
        return [r for r in self.known.recordings if r.layout == self.layout]

    def _target(self, count: int) -> int:
        """The size of a recording for so many images."""
        size = max((r.steps.size for r in self._alike()), default=count)
        while (half := (size + 1) // 2) >= max(count, LEAST):
            size = half
        return max(size, count)

    def _fitting(self, count: int) -> Recording | None:
        """The smallest recording for so many images, if they fill more than half of it or a new one would be as large."""
        most = max(self._target(count), 2 * count - 1)
        fits = [r for r in self._alike() if count <= r.steps.size <= most]
        return min(fits, key=lambda r: r.steps.size, default=None)

    def _recorded(self, state: State, rows: Tensor) -> Recording | str:
        """A new recording, or why there is none."""
        size = self._target(len(rows))
        key = (self.layout, size)
        refused = self.known.restless or self.known.refused.get(key)
        if refused is None:
            try:
                made = self._record(state, rows, size)
            except torch.OutOfMemoryError:
                if self.recipe.engine == "graph":
                    raise
                self.graphs.drop()
                made = "there was not enough memory to record a step"
            except InputError as e:  # of this call: not to be remembered; launched one by one, the step says the same, or works
                if self.recipe.engine == "graph":
                    raise
                return str(e)
            if isinstance(made, Recording):
                self.graphs.add(self.known, made)
                return made
            self.known.refused[key] = refused = made
        return refused

    def _record(self, state: State, rows: Tensor, size: int) -> Recording | str:
        loss, device = self.recipe.loss, state["x"].device
        buffers = room(state, size)
        fill(buffers, state, rows)
        # Its own copies of what the loss has for each image.
        steps = Steps(self.recipe, loss.only(buffers["places"]), buffers, len(rows))
        with frozen(*_networks(self.model, loss)), undisturbed(device):
            seen = steps.step(self.model, 0, first=True)  # what is made at the first call is made by then
            self.known.mark = mark = fingerprint(self.model, loss, device)
            with Watch() as watch:
                steps.step(self.model, 0)
            if watch.complaint is not None:
                return f"a step cannot be recorded: {watch.complaint}"
            if fingerprint(self.model, loss, device) != mark:
                self.known.restless = (
                    "a call changes attributes of the model or the loss, and may do something else the next time"
                )
                return self.known.restless
            classes = seen.logits.shape[1]
            del seen
            outer = sys.exc_info()[1]
            try:
                replay = self.recorder.record(lambda: steps.step(self.model, 0))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                return f"a step cannot be recorded: {_first_line(_root(e, outer))}"
        # What the recording is of holds the networks; the replay does not need them.
        bare = dataclasses.replace(self.recipe, loss=Loss())
        kept = Steps(bare, _Fields(steps.loss), buffers, 0)
        return Recording(kept, self.layout, classes, replay)


class _Fields(Loss):
    """What a loss has for each image, without its networks."""

    def __init__(self, loss: Loss) -> None:
        self.fields = dict(loss.per_image())

    def per_image(self) -> dict[str, Tensor]:
        return self.fields


def _layout(state: State) -> object:
    return tuple((name, t.shape[1:], t.stride()[1:], t.dtype) for name, t in sorted(state.items()))


def _root(e: BaseException, outer: BaseException | None) -> BaseException:
    """What went wrong first: that a recording cannot be ended is what comes of it."""
    while e.__context__ is not None and e.__context__ is not outer:
        e = e.__context__
    return e


def _first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"


_graphs: dict[int, Graphs] = {}
_graphs_lock = threading.Lock()


def graphs_of(attack: object) -> Graphs:
    """The recordings of an attack; they go when it goes."""
    key = id(attack)
    with _graphs_lock:
        if key not in _graphs:
            _graphs[key] = Graphs()
            weakref.finalize(attack, _graphs.pop, key, None).atexit = False
        return _graphs[key]
