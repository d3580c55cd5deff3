"""What experiments ask for: trained networks, attacked images, correlations. Each is a stage kept in the store."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsrfast._progress import Reporter
from tsrfast.attacks import Loss
from tsrfast.data import Dataset, Split
from tsrfast.nets import ConvReLU, fold, load_checkpoint
from tsrfast.specialization import NormalizedCorrelation, PatchBasis, distance_to_patches, subspace_distance
from tsrfast.suite import stages
from tsrfast.suite.modes import MODES
from tsrfast.suite.presets import PAPER_EPOCHS, Preset
from tsrfast.suite.stages import AttackSpec
from tsrfast.suite.store import Artifact, Store

NETS = ("4 layers", "5 layers")


@dataclass(frozen=True)
class Student:
    """A trained student at one of the paper's epochs: the unit that tables and figures speak of.

    Attributes:
        mode: a key of `tsrfast.suite.modes.MODES`.
        epoch: 50, 100, 150, 200 or 300 in the paper's counting, up to the mode's last; 0 is the untrained network.
        run: 0, or the number of an independent run (another initialisation and order): 1 is the surrogate of table 1.
        nets: of `NETS`: how deep the oracle and the student are. Five layers have an oracle of their own.
    """

    mode: str
    epoch: int
    run: int = 0
    nets: str = NETS[0]

    @property
    def name(self) -> str:
        """As the paper writes it: AT(50), ST(300)."""
        return f"{MODES[self.mode].title}({self.epoch})"

    @property
    def title(self) -> str:
        """The name, and which run and nets where they are not the usual ones."""
        return self.name + (f" run {self.run}" if self.run else "") + (f" {self.nets}" if self.nets != NETS[0] else "")

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON, for the store."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "nets" or v != NETS[0]}


@dataclass(frozen=True)
class Accuracy:
    """Robust accuracy over repetitions, in %."""

    mean: float
    std: float
    n: int


class Lab:
    """One configuration of the suite: data, preset, seed, device, store."""

    def __init__(
        self, data: Dataset, preset: Preset, seed: int, device: torch.device, store: Store, reporter: Reporter
    ) -> None:
        self.data, self.preset, self.seed, self.device = data, preset, seed, device
        self.store, self.reporter = store, reporter
        self.ranks = store.ranks
        self.runs: dict[Student, Artifact] = {}
        """The training runs that were asked for so far, by their untrained student."""

    def derive(self, *what: object) -> int:
        """A seed of its own for every use: 31 bits of SHA-256 of the run's seed and what it is for."""
        return int.from_bytes(hashlib.sha256(repr((self.seed, *what)).encode()).digest()[:4], "big") >> 1

    def _settings(self, *names: str) -> dict[str, Any]:
        """The preset's values a stage depends on, and what every stage depends on."""
        return {
            **{name: getattr(self.preset, name) for name in names},
            "data": self.data.fingerprint,
            "seed": self.seed,
            "device": self.device.type,
        }

    # --- networks -------------------------------------------------------------------------------------------------------

    def _depth(self, nets: str) -> dict[str, Any]:
        """Widths and pruning ratios of the teacher: with 5 layers, one more of the last but one's size before the last (section 5.1)."""
        p = self.preset
        if nets == NETS[0]:
            return {"widths": p.widths, "prune_ratios": p.prune_ratios}
        return {"widths": (*p.widths[:-1], *p.widths[-2:]), "prune_ratios": (*p.prune_ratios[:-1], *p.prune_ratios[-2:])}

    @functools.cache  # noqa: B019  (a lab lives as long as its process)
    def teacher_of(self, nets: str) -> Artifact:
        """The unpruned teacher."""
        widths = self._depth(nets)["widths"]
        config = self._settings(
            "teacher_epochs", "teacher_optimizer", "teacher_lr", "teacher_batch_size", "teacher_weight_decay", "teacher_augment",
        ) | {"widths": widths}  # fmt: skip
        build = functools.partial(stages.train_teacher, self, widths)
        return self.store.artifact("teacher", config, {}, build, resumable=True)

    @functools.cache  # noqa: B019
    def oracle_of(self, nets: str) -> Artifact:
        """The oracle f*: teacher pruned, fine-tuned, shrunk and folded; of 4 layers the preset's own, if it names one."""
        if nets == NETS[0] and self.preset.oracle is not None:
            file = stages.digest_of_oracle(self.preset.oracle)
            given = {"file": file, "data": self.data.fingerprint, "device": self.device.type}
            take = functools.partial(stages.take_oracle, self, self.preset.oracle)
            return self.store.artifact("oracle", given, {}, take, resumable=False)
        teacher, ratios = self.teacher_of(nets), self._depth(nets)["prune_ratios"]
        config = self._settings(
            "finetune_epochs", "finetune_lr", "finetune_shrunk", "teacher_optimizer", "teacher_batch_size", "teacher_weight_decay", "teacher_augment",
        ) | {"prune_ratios": ratios}  # fmt: skip
        build = functools.partial(stages.make_oracle, self, teacher, ratios)
        return self.store.artifact("oracle", config, {"teacher": teacher}, build, resumable=True)

    @functools.cache  # noqa: B019
    def oracle_net_of(self, nets: str) -> ConvReLU:
        """f* as a network on the device."""
        return self.load(self.oracle_of(nets).folder / "oracle.safetensors")

    @property
    def oracle(self) -> Artifact:
        """The oracle of 4 layers."""
        return self.oracle_of(NETS[0])

    @property
    def oracle_net(self) -> ConvReLU:
        """The oracle of 4 layers as a network on the device."""
        return self.oracle_net_of(NETS[0])

    def epochs(self, mode: str) -> dict[int, int]:
        """The paper's epochs at which a mode's run has checkpoints -> epochs of the preset."""
        return {t: e for t, e in zip(PAPER_EPOCHS, self.preset.epochs, strict=True) if t <= MODES[mode].last}

    def run_of(self, student: Student) -> Artifact:
        """The training run of a student: a checkpoint at every epoch of the preset up to the mode's last."""
        mode = MODES[student.mode]
        epochs = list(self.epochs(student.mode).values())
        config = self._settings("student_factor", "student_images", "optimizer", "lr", "batch_size", *mode.settings)
        config |= {"epochs": epochs} | {k: v for k, v in student.identity.items() if k != "epoch"}
        build = functools.partial(stages.train_student, self, student)
        inputs = {"oracle": self.oracle_of(student.nets)} | mode.inputs(self, student)
        found = self.store.artifact("student", config, inputs, build, resumable=True)
        self.runs[dataclasses.replace(student, epoch=0)] = found
        return found

    @functools.cache  # noqa: B019
    def checkpoint(self, student: Student) -> Path:
        """The checkpoint file of a student."""
        epoch = {0: 0, **self.epochs(student.mode)}[student.epoch]
        return self.run_of(student).folder / f"epoch_{epoch:04d}.safetensors"

    @functools.cache  # noqa: B019
    def robust_images(self, student: Student) -> Artifact:
        """The students' training images as `student` sees them (eq. 35, see `tsrfast.training.robust_features`)."""
        config = self._settings("student_images", "rft_steps", "rft_step_size") | {"student": student.identity}
        inputs = {"oracle": self.oracle_of(student.nets), "run": self.run_of(student)}
        build = functools.partial(stages.make_robust_images, self, student)
        return self.store.artifact("robust_images", config, inputs, build, resumable=False)

    def robust_split(self, student: Student) -> Split:
        """The same as images and labels to train on."""
        return stages.load_split(self.robust_images(student).folder)

    def load(self, path: Path) -> ConvReLU:
        """A network from a checkpoint, on the device, in eval mode, in the fast memory format."""
        model, _ = load_checkpoint(path)
        model = model.to(self.device).eval()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    # --- attacks --------------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def predictions(
        self, students: tuple[Student, ...], attack: AttackSpec, images: int, repetition: int, source: Student | None
    ) -> dict[str, Tensor]:
        """Predictions on adversarial images (see `stages.attack`) made against `source`, or against the one student itself."""
        victim = source or students[0]
        runs = {f"{s.name} run {s.run}": self.run_of(s) for s in dict.fromkeys((victim, *students))}
        config = self._settings() | {
            "attack": attack.identity,
            "images": images,
            "repetition": repetition,
            "victim": victim.identity,
            "students": [s.identity for s in students],
        }
        inputs = {"oracle": self.oracle_of(victim.nets)} | runs | ({"patches": self.patches} if attack.side else {})
        build = functools.partial(stages.attack, self, students, victim, attack, images, repetition)
        artifact = self.store.artifact("attack", config, inputs, build, resumable=False)
        return stages.load_predictions(artifact.folder)

    def accuracy(
        self,
        student: Student,
        attack: AttackSpec,
        label: str = "t(x')",
        *,
        images: int | None = None,
        repetitions: int | None = None,
        together: tuple[Student, ...] = (),
        source: Student | None = None,
    ) -> Accuracy:
        """Robust accuracy in %: how often argmax s(x') is the label.

        Args:
            student: s.
            attack: how x' is made.
            label: ``t(x')`` (the paper's), ``t(x)`` or ``y``; ``clean`` compares s(x) with t(x).
            images, repetitions: other than the preset's.
            together, source: for transfer: all students judged on the images made against `source`.
        """
        values, n = [], 0
        for r in range(repetitions or self.preset.repetitions):
            p = self.predictions(together or (student,), attack, images or self.preset.eval_images, r, source)
            wanted = {
                "t(x')": p["teacher_adversarial"],
                "t(x)": p["teacher_clean"],
                "y": p["labels"],
                "clean": p["teacher_clean"],
            }
            given = p[f"{'clean' if label == 'clean' else 'adversarial'}/{student.name}"]
            values.append(100 * (given == wanted[label]).double().mean().item())
            n += len(given)
        spread = torch.tensor(values, dtype=torch.float64)
        return Accuracy(spread.mean().item(), spread.std(correction=0).item(), n)

    # --- specialization -------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def correlation(self, student: Student) -> list[NormalizedCorrelation]:
        """Normalized correlation of every conv layer with the oracle's, over test images."""
        config = self._settings("correlation_images") | {"student": student.identity}
        inputs = {"oracle": self.oracle_of(student.nets), "run": self.run_of(student)}
        build = functools.partial(stages.correlate, self, student)
        return stages.load_correlation(self.store.artifact("correlation", config, inputs, build, resumable=False).folder)

    @functools.cached_property
    def patches(self) -> Artifact:
        """PCA of 3x3x3 patches of training images."""
        build = functools.partial(stages.analyse_patches, self)
        return self.store.artifact("patches", self._settings("patch_images"), {}, build, resumable=False)

    @functools.cached_property
    def basis(self) -> PatchBasis:
        """The same as an object, 17 components."""
        return stages.load_basis(self.patches.folder)

    @property
    def distance(self) -> Callable[[Tensor], Tensor]:
        """How far images are from the subspace of natural patches."""
        return functools.partial(distance_to_patches, basis=self.basis)

    @functools.cache  # noqa: B019
    def subspace(self, student: Student) -> tuple[Tensor, Tensor]:
        """(eps_in, eps_out) between first-layer filters, both acting on raw pixels (normalisations folded)."""
        nets = (self.load(self.checkpoint(student)), self.oracle_net_of(student.nets))
        w_student, w_teacher = (fold(net).state_dict()["convs.0.weight"].cpu() for net in nets)
        return subspace_distance(w_student, w_teacher, self.basis)

    def oracle_loss(self, objective: str, nets: str = NETS[0]) -> Loss:
        """The attack's loss of that name, with the oracle as its teacher where it needs one."""
        return stages.OBJECTIVES[objective](self.oracle_net_of(nets))
