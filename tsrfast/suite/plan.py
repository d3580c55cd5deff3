"""What a reproduction would run, what it costs, and what is there already: ``tsrfast reproduce ... --plan``.

The experiments are walked through with a store whose stages are stand-ins: files of the right shapes with nothing in them. So the list
and the keys are those of the run itself, whatever experiments come to ask for.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tsrfast._machine import describe_machine
from tsrfast._progress import Reporter, Update
from tsrfast.data import Dataset, Split, load
from tsrfast.nets import ConvReLU, fold, prune_masks, save_checkpoint, shrink, student_widths
from tsrfast.suite.experiments import EXPERIMENTS, chosen
from tsrfast.suite.lab import Lab, Student
from tsrfast.suite.modes import MODES
from tsrfast.suite.presets import Preset
from tsrfast.suite.report import load_run
from tsrfast.suite.seeds import checked_seeds
from tsrfast.suite.stages import MEAN, STD, read_oracle
from tsrfast.suite.store import Artifact, Store

# Mode -> attacks on each image of a batch, and whether their gradient goes through the oracle too. Others train on what they are given.
ATTACKS: dict[str, tuple[float, bool]] = {
    "at_oracle": (1, True), "at_aug": (1, True), "at_oracle_label": (1, True), "at_data": (1, False), "at_in": (2, True), "at_out": (2, True),
    "ccat5": (0.5, True), "ccat10": (0.5, True), "ccat20": (0.5, True), "ccat_as_written": (1, True),
}  # fmt: skip
SEEN = 8  # images of the stand-in data set: experiments may look at some
PROBE_SECONDS = 0.3  # of measured steps, after the first one


@dataclass(frozen=True)
class Planned:
    """A stage that a run asks for.

    Attributes:
        stage, key: as in the store.
        title: what it is, with the repetitions of one attack, or all correlations, alike.
        size: how often, on what.
        flop: floating-point operations (2 a multiply-accumulate) of its networks.
        kind: stages of one kind run at about one rate.
        cached: whether its artifact is there.
        experiment: the first one that asks for it.
    """

    stage: str
    key: str
    title: str
    size: str
    flop: float
    kind: str
    cached: bool
    experiment: str

    @property
    def name(self) -> str:
        """As in run.json."""
        return f"{self.stage} {self.key[:8]}"


@dataclass(frozen=True)
class Rate:
    """FLOP a second of a kind of stage, and where it is from: ``recorded`` or ``measured``."""

    flop: float
    source: str


@dataclass(frozen=True)
class Plan:
    """All stages in the order in which they are asked for, and rates of the kinds that are still to run."""

    heading: str
    experiments: tuple[str, ...]
    stages: tuple[Planned, ...]
    rates: dict[str, Rate]

    def seconds(self, stages: Sequence[Planned]) -> float:
        """Estimated time of those that are not there yet, one after the other."""
        return sum(s.flop / self.rates[s.kind].flop for s in stages if s.flop and not s.cached)

    def text(self) -> str:
        """For people: a block an experiment, a line for all stages alike, totals."""
        lines = [self.heading]
        for experiment in dict.fromkeys(s.experiment for s in self.stages):
            lines += ["", experiment]
            groups: dict[tuple[str, str], list[Planned]] = {}
            for s in self.stages:
                if s.experiment == experiment:
                    groups.setdefault((s.title, s.size), []).append(s)
            for (title, size), group in groups.items():
                many = f"{len(group)} x " if len(group) > 1 else ""
                lines.append(f"  {title:<44}  {many + size:<48}  {_flop(group):>11}  {self._state(group)}")
        left = [s for s in self.stages if not s.cached]
        if shared := [name for name in self.experiments if name not in {s.experiment for s in self.stages}]:
            lines += ["", f"nothing beyond these: {', '.join(shared)}"]
        lines += ["", f"total: {len(self.stages)} stages, {_pflop(self.stages)}"]
        lines.append(
            f"cached: {len(self.stages) - len(left)}; to run: {len(left)}, {_pflop(left)}, "
            f"about {_duration(self.seconds(left))} in one process on this device"
        )
        if self.rates:
            found = ", ".join(f"{kind} {rate.flop / 1e9:.3g} ({rate.source})" for kind, rate in self.rates.items())
            lines.append(f"rates in GFLOP/s: {found}")
        return "\n".join(lines)

    def _state(self, group: Sequence[Planned]) -> str:
        left = [s for s in group if not s.cached]
        if not left:
            return "cached"
        some = f", {len(group) - len(left)} cached" if len(left) < len(group) else ""
        return f"about {_duration(self.seconds(left))}{some}"


def plan(
    experiments: list[str],
    preset: Preset,
    data_spec: str,
    out: Path,
    device: torch.device,
    seed: int | Sequence[int],
    reporter: Reporter,
) -> Plan:
    """What `tsrfast.suite.reproduce.reproduce` with the same arguments would do. Nothing is written to `out`.

    Times are from `out`/run.json, for kinds of stages of which it has some of this plan, and else from some steps of the networks
    themselves on this device.

    Raises:
        InputError: unknown experiment, no seed, a negative one or one twice, unusable data.
        EnvironmentFault: no room for temporary files.
    """
    names, seeds = chosen(experiments), checked_seeds(seed)
    with reporter.task("data"):
        data = load(data_spec, train=preset.train_images, test=preset.test_images)
    with tempfile.TemporaryDirectory() as temporary:
        listed = StandIns(Path(temporary), data, preset, out / "store")
        try:
            for one in seeds:
                walk(names, listed.lab(one, device), listed)
        finally:
            listed.close()
    stages = tuple(listed.planned.values())
    wanted = dict.fromkeys(s.kind for s in stages if s.flop and not s.cached)
    rates = {kind: rate for kind, rate in recorded_rates(stages, out).items() if kind in wanted}
    if missing := [kind for kind in wanted if kind not in rates]:
        with reporter.task("measuring some steps"):
            rates |= measured_rates(missing, names, data, preset, device, seeds[0])
    what = ", ".join(names) if len(names) < 6 else f"{len(names)} experiments"
    sizes = f"{data.name} ({len(data.train):,} + {len(data.test):,} images)"
    heading = (
        f"Plan: {what}, preset {preset.name}, {sizes}, seed {', '.join(map(str, seeds))}, on {describe_machine(device)['device']}. "
        "A stage is listed under the first experiment that asks for it."
    )
    return Plan(heading, tuple(names), stages, {kind: rates[kind] for kind in wanted})


def walk(names: Sequence[str], lab: Lab, store: StandIns) -> None:
    """Let the experiments ask `lab`, whose store `store` is, for everything they want."""
    for name in names:
        store.experiment = name
        EXPERIMENTS[name](lab)


# --- stand-ins ----------------------------------------------------------------------------------------------------------


class StandIns(Store):
    """A store that notes what it is asked for and builds stand-ins.

    Args:
        root: of the stand-ins.
        data, preset: of the run.
        kept: where the run's own store is, if there is one.
    """

    def __init__(self, root: Path, data: Dataset, preset: Preset, kept: Path) -> None:
        super().__init__(root)
        self.planned: dict[str, Planned] = {}
        self.experiment = ""
        self._data, self._preset, self._kept = data, preset, kept
        self._nets: dict[str, ConvReLU] = {}
        self._made: dict[tuple[tuple[int, ...], bool], ConvReLU] = {}

    def lab(self, seed: int, device: torch.device) -> Lab:
        """A lab that asks for what the run's asks for, and sees few images."""
        few = (Split(s.images[:SEEN], s.labels[:SEEN]) for s in (self._data.train, self._data.test))
        data = dataclasses.replace(self._data, train=next(few), test=next(few))
        return Lab(data, self._preset, seed, device, self, Reporter())

    def artifact(
        self,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        build: Callable[[Path], None],
        *,
        resumable: bool,
    ) -> Artifact:
        """A stand-in of this stage, under the key that the stage has."""
        nets = self._networks(stage, config, inputs)
        images = min(self._preset.eval_images, self._preset.student_images or len(self._data.train))
        fill = functools.partial(_stand_in, stage, config, nets, images)
        found = super().artifact(stage, config, inputs, fill, resumable=False)
        if found.key not in self.planned:
            if stage in ("teacher", "oracle", "student"):
                self._nets[found.key] = nets[0]
            title, size, flop, kind = describe(stage, config, nets, self._data, self._preset)
            cached = (self._kept / found.folder.name / "stage.json").exists()
            self.planned[found.key] = Planned(stage, found.key, title, size, flop, kind, cached, self.experiment)
            self.asked(self.planned[found.key], build)
        return found

    def asked(self, planned: Planned, build: Callable[[Path], None]) -> None:
        """Called when a stage is asked for the first time."""

    def _networks(self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> tuple[ConvReLU, ...]:
        """The network that a stage makes or works on, then the oracle (of "oracle": the teacher) it is held against."""
        if stage == "teacher":
            return (self._net(tuple(config["widths"]), True),)
        if stage == "oracle" and self._preset.oracle is not None and not inputs:
            return (read_oracle(self.lab(0, torch.device("cpu")), self._preset.oracle),)
        if stage == "oracle":
            teacher = self._nets[inputs["teacher"].key]
            return fold(shrink(teacher, prune_masks(teacher, config["prune_ratios"]))), teacher
        if stage == "patches":
            return ()
        oracle = self._nets[inputs["oracle"].key]
        if stage == "student":
            return self._net(student_widths(oracle.widths, config["student_factor"]), False), oracle
        if stage != "attack":
            return self._nets[inputs["run"].key], oracle
        students = [Student(**s) for s in (config["victim"], *config["students"])]
        victim, *others = (self._nets[inputs[f"{s.name} run {s.run}"].key] for s in students)
        return victim, oracle, *others

    def _net(self, widths: tuple[int, ...], batch_norm: bool) -> ConvReLU:
        if (widths, batch_norm) not in self._made:
            image, classes = tuple(self._data.train.images.shape[1:]), len(self._data.classes)
            self._made[widths, batch_norm] = ConvReLU(
                widths, batch_norm=batch_norm, image=image, classes=classes, mean=MEAN, std=STD
            )
        return self._made[widths, batch_norm]


def _stand_in(stage: str, config: Mapping[str, Any], nets: tuple[ConvReLU, ...], images: int, folder: Path) -> None:
    """The files that experiments and other stages read; so many robust-feature images."""
    tensors: dict[str, Tensor] = {}
    if stage == "oracle":
        save_checkpoint(folder / "oracle.safetensors", nets[0])
    elif stage == "student":
        first, *more = (folder / f"epoch_{epoch:04d}.safetensors" for epoch in (0, *config["epochs"]))
        save_checkpoint(first, nets[0])
        for path in more:
            shutil.copyfile(first, path)
    elif stage == "robust_images":
        tensors = {
            "images": torch.zeros(images, *nets[0].image, dtype=torch.uint8),
            "labels": torch.zeros(images, dtype=torch.int64),
        }
        save_file(tensors, folder / "images.safetensors")
    elif stage == "attack":
        judged = [f"{when}/{Student(**s).name}" for s in config["students"] for when in ("clean", "adversarial")]
        tensors = {
            k: torch.zeros(1, dtype=torch.int64) for k in ("index", "labels", "teacher_clean", "teacher_adversarial", *judged)
        }
        save_file(tensors | {"loss": torch.zeros(1)}, folder / "predictions.safetensors")
    elif stage == "correlation":
        for layer, (student, teacher) in enumerate(zip(nets[0].widths, nets[1].widths, strict=True)):
            tensors |= {
                f"{layer}/rho": torch.eye(student, teacher, dtype=torch.float64), f"{layer}/count": torch.tensor(1),
                f"{layer}/dead_student": torch.zeros(student, dtype=torch.bool), f"{layer}/dead_teacher": torch.zeros(teacher, dtype=torch.bool),
            }  # fmt: skip
        save_file(tensors, folder / "correlation.safetensors")
    elif stage == "patches":
        size, kind = 27, torch.float64
        tensors = {
            "mean": torch.zeros(size, dtype=kind),
            "eigenvalues": torch.ones(size, dtype=kind),
            "vectors": torch.eye(size, dtype=kind),
        }
        save_file(tensors, folder / "patches.safetensors")
        (folder / "patches.json").write_text('{"components": 17}')


# --- costs --------------------------------------------------------------------------------------------------------------


def forward_macs(net: ConvReLU) -> int:
    """Multiply-accumulates of a forward pass of one image. A gradient in the input costs as much, one in the weights as much again."""
    _, height, width = net.image
    channels = (net.image[0], *net.widths)
    maps = enumerate(itertools.pairwise(channels), 1)
    return net.head.weight.numel() + sum(9 * a * b * (height - 2 * k) * (width - 2 * k) for k, (a, b) in maps)


def describe(
    stage: str, config: Mapping[str, Any], nets: tuple[ConvReLU, ...], data: Dataset, p: Preset
) -> tuple[str, str, float, str]:
    """Title, size, FLOP and kind of a stage; `nets` as `StandIns` finds them."""
    macs = [forward_macs(net) for net in nets]
    widths = ["-".join(map(str, net.widths)) for net in nets]
    test, train = len(data.test), len(data.train)
    seen = min(p.student_images or train, train)
    if stage == "oracle" and len(nets) == 1:
        return f"oracle {widths[0]}", "given", 0.0, "teacher training"
    if stage in ("teacher", "oracle"):
        epochs = p.teacher_epochs if stage == "teacher" else p.finetune_epochs
        trained = macs[0 if p.finetune_shrunk else -1]
        return f"{stage} {widths[0]}", _epochs(epochs, train), 2 * 3 * trained * epochs * train, "teacher training"
    if stage == "patches":
        n, (channels, height, width) = min(p.patch_images, train), data.train.images.shape[1:]
        return "patch PCA", f"{n:,} images", 2 * n * (height - 2) * (width - 2) * (9 * channels) ** 2, "correlation"
    s, t = macs[:2]
    if stage == "student":
        student, epochs = Student(config["mode"], 0, config["run"]), config["epochs"][-1]
        attacks, through_oracle = ATTACKS.get(student.mode, (0, False))
        image = 3 * s + t + attacks * p.train_steps * 2 * (s + t * through_oracle)
        often = {0.5: "half by ", 1: "", 2: "2 x "}
        size = _epochs(epochs, seen) + (f", {often[attacks]}PGD-{p.train_steps}" if attacks else "")
        kind = "standard training" if not attacks else "CCAT" if student.mode.startswith("ccat") else "adversarial training"
        run = f" run {student.run}" if student.run else ""
        return f"student {MODES[student.mode].title} {widths[0]}{run}", size, 2 * image * epochs * seen, kind
    if stage == "robust_images":
        return (
            f"robust images {widths[0]}",
            f"{seen:,} images, {p.rft_steps} steps",
            2 * seen * p.rft_steps * 2 * (s + t),
            "robust images",
        )
    if stage == "correlation":
        n, (_, height, width) = min(p.correlation_images or test, test), nets[0].image
        pairs = zip(nets[0].widths, nets[1].widths, strict=True)
        products = sum(a * b * (height - 2 * k) * (width - 2 * k) for k, (a, b) in enumerate(pairs, 1))
        return "correlation", f"{n:,} images", 2 * n * (s + t + products), "correlation"
    n, a = min(config["images"], test), config["attack"]
    through_oracle, side = a["objective"].startswith("oracle"), a.get("side")
    steps = a["steps"] * (2 if side else 1)
    image = steps * 2 * (s + t * through_oracle) + s + 3 * t + 2 * sum(macs[2:])  # x' and x are shown to all
    title = f"attack {a['norm']} {a['eps']:.3g}, {a['objective']}" + (f", {side}-plane" if side else "")
    return title, f"{n:,} images, {steps} step{'s' * (steps != 1)} of {a['step_size']:.3g}", 2 * image * n, "attack"


def _epochs(epochs: int, images: int) -> str:
    return f"{epochs} epoch{'s' * (epochs != 1)} of {images:,} images"


# --- times --------------------------------------------------------------------------------------------------------------


def recorded_rates(stages: Sequence[Planned], out: Path) -> dict[str, Rate]:
    """Rates of the stages of this plan that the last run in `out` computed."""
    if not (out / "run.json").exists():
        return {}
    took = {s["name"]: s["seconds"] for s in (load_run(out / "run.json") or {}).get("stages", []) if not s["cached"]}
    totals: dict[str, list[float]] = {}
    for s in stages:
        if s.name in took:
            total = totals.setdefault(s.kind, [0.0, 0.0])
            total[0] += s.flop
            total[1] += took[s.name]
    return {kind: Rate(flop / seconds, "recorded") for kind, (flop, seconds) in totals.items() if flop > 0 and seconds > 0}


def measured_rates(
    kinds: Sequence[str], names: Sequence[str], data: Dataset, preset: Preset, device: torch.device, seed: int
) -> dict[str, Rate]:
    """Rates of the first stage of each kind, for a moment: the same networks and batches, with attacks of fewer steps."""
    few = dataclasses.replace(
        preset,
        train_steps=min(preset.train_steps, 4), steps=min(preset.steps, 4), rft_steps=min(preset.rft_steps, 4),
        eval_batch_size=min(preset.eval_batch_size, 100 if device.type == "cpu" else 500),
        eval_images=400, matrix_images=400, correlation_images=min(preset.correlation_images or 500, 500), patch_images=min(preset.patch_images, 100),
        teacher_epochs=max(preset.teacher_epochs, 1), finetune_epochs=max(preset.finetune_epochs, 1),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        store, watch = _Probe(Path(temporary) / "store", data, few, kinds), Stopwatch()
        store.watch = watch
        try:
            walk(names, Lab(data, few, seed, device, store, watch), store)
        finally:
            store.close()
    return {kind: Rate(flop, "measured") for kind, flop in store.rates.items()}


class _Enough(Exception):
    """Ends a stage in its middle."""


class Stopwatch(Reporter):
    """Says nothing; times the steps of a task after its first, and ends it when that is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.seconds = math.nan, math.nan
        """Of the last task: which part of it was timed, and the time."""

    def say(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def task(self, name: str) -> Iterator[Update]:
        """As `Reporter.task`."""
        began, first = time.monotonic(), None

        def update(done: int, total: int, note: str = "", before: int = 0) -> None:
            nonlocal first
            now = time.monotonic()
            if first is None:
                first = (now, done)
                return
            self.share, self.seconds = (done - first[1]) / total, now - first[0]
            if self.seconds >= PROBE_SECONDS:
                raise _Enough

        self.share = math.nan
        yield update
        if math.isnan(self.share):  # it said nothing about its steps, or had only one
            self.share, self.seconds = 1.0, time.monotonic() - began


class _Probe(StandIns):
    """Builds the first stage of each kind in truth, as far as the stopwatch lets it."""

    watch: Stopwatch

    def __init__(self, root: Path, data: Dataset, preset: Preset, kinds: Sequence[str]) -> None:
        super().__init__(root, data, preset, root / "none")
        self.rates: dict[str, float] = {}
        self._kinds, self._scratch = kinds, root.parent

    def asked(self, planned: Planned, build: Callable[[Path], None]) -> None:
        """Measure it, if its kind is wanted and new."""
        unmeasured = (
            planned.stage in ("oracle", "patches") or "RFT" in planned.title
        )  # need what is only a stand-in, or are not typical
        if planned.kind not in self._kinds or planned.kind in self.rates or unmeasured:
            return
        with suppress(_Enough):
            build(Path(tempfile.mkdtemp(dir=self._scratch)))
        self.rates[planned.kind] = planned.flop * self.watch.share / max(self.watch.seconds, 1e-9)


# --- text ---------------------------------------------------------------------------------------------------------------


def _pflop(stages: Sequence[Planned]) -> str:
    total = sum(s.flop for s in stages) / 1e15
    return f"{total:,.0f} PFLOP" if total >= 100 else f"{total:.3g} PFLOP"


def _flop(stages: Sequence[Planned]) -> str:
    total = sum(s.flop for s in stages)
    unit, name = next((u, n) for u, n in ((1e15, "PFLOP"), (1e12, "TFLOP"), (0, "GFLOP")) if total >= u)
    return f"{total / (unit or 1e9):.3g} {name}"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}" if seconds >= 20 * unit else f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
