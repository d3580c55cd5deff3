"""What experiments ask for: trained networks, attacked images, correlations. Each is a stage kept in the store."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsrfast._progress import Reporter
from tsrfast.attacks import Loss
from tsrfast.data import Dataset
from tsrfast.nets import ConvReLU, fold, load_checkpoint
from tsrfast.specialization import NormalizedCorrelation, PatchBasis, subspace_distance
from tsrfast.suite import stages
from tsrfast.suite.presets import PAPER_EPOCHS, Preset
from tsrfast.suite.stages import AttackSpec
from tsrfast.suite.store import Artifact, Store

# Training modes as the paper writes them.
MODES = {"at_oracle": "AT", "st_logit": "ST", "st_label": "ST-label"}


@dataclass(frozen=True)
class Student:
    """A trained student at one of the paper's epochs: the unit that tables and figures speak of.

    Attributes:
        mode: ``at_oracle``, ``st_logit`` or ``st_label``.
        epoch: 50, 100, 150, 200 or 300 in the paper's counting; 0 is the untrained network.
        run: 0, or the number of an independent run (another initialisation and order): 1 is the surrogate of table 1.
    """

    mode: str
    epoch: int
    run: int = 0

    @property
    def name(self) -> str:
        """As the paper writes it: AT(50), ST(300)."""
        return f"{MODES[self.mode]}({self.epoch})"


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

    @functools.cached_property
    def teacher(self) -> Artifact:
        """The unpruned teacher."""
        config = self._settings(
            "widths", "teacher_epochs", "teacher_optimizer", "teacher_lr", "teacher_batch_size", "teacher_weight_decay",
            "teacher_augment",
        )  # fmt: skip
        build = functools.partial(stages.train_teacher, self)
        return self.store.artifact("teacher", config, {}, build, resumable=True)

    @functools.cached_property
    def oracle(self) -> Artifact:
        """The oracle f*: teacher pruned, fine-tuned, shrunk and folded."""
        config = self._settings(
            "prune_ratios", "finetune_epochs", "finetune_lr", "teacher_optimizer", "teacher_batch_size", "teacher_weight_decay",
            "teacher_augment",
        )  # fmt: skip
        build = functools.partial(stages.make_oracle, self, self.teacher)
        return self.store.artifact("oracle", config, {"teacher": self.teacher}, build, resumable=True)

    @functools.cached_property
    def oracle_net(self) -> ConvReLU:
        """f* as a network on the device."""
        return self.load(self.oracle.folder / "oracle.safetensors")

    def run_of(self, mode: str, run: int) -> Artifact:
        """A student's training run: a checkpoint at every epoch of the preset."""
        config = self._settings("student_factor", "student_images", "epochs", "optimizer", "lr", "batch_size") | {
            "mode": mode,
            "run": run,
        }
        if mode == "at_oracle":
            config |= self._settings("eps", "train_steps", "train_step_size")
        build = functools.partial(stages.train_student, self, mode, run)
        return self.store.artifact("student", config, {"oracle": self.oracle}, build, resumable=True)

    @functools.cache  # noqa: B019  (a lab lives as long as its process)
    def checkpoint(self, student: Student) -> Path:
        """The checkpoint file of a student."""
        epochs = {0: 0, **dict(zip(PAPER_EPOCHS, self.preset.epochs, strict=True))}
        return self.run_of(student.mode, student.run).folder / f"epoch_{epochs[student.epoch]:04d}.safetensors"

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
        runs = {f"{s.name} run {s.run}": self.run_of(s.mode, s.run) for s in dict.fromkeys((victim, *students))}
        config = self._settings() | {
            "attack": dataclasses.asdict(attack),
            "images": images,
            "repetition": repetition,
            "victim": dataclasses.asdict(victim),
            "students": [dataclasses.asdict(s) for s in students],
        }
        inputs = {"oracle": self.oracle} | runs
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
        config = self._settings("correlation_images") | {"student": dataclasses.asdict(student)}
        inputs = {"oracle": self.oracle, "run": self.run_of(student.mode, student.run)}
        build = functools.partial(stages.correlate, self, student)
        return stages.load_correlation(self.store.artifact("correlation", config, inputs, build, resumable=False).folder)

    @functools.cached_property
    def basis(self) -> PatchBasis:
        """PCA of 3x3x3 patches of training images, 17 components."""
        build = functools.partial(stages.analyse_patches, self)
        return stages.load_basis(
            self.store.artifact("patches", self._settings("patch_images"), {}, build, resumable=False).folder
        )

    @functools.cache  # noqa: B019
    def subspace(self, student: Student) -> tuple[Tensor, Tensor]:
        """(eps_in, eps_out) between first-layer filters, both acting on raw pixels (normalisations folded)."""
        nets = (self.load(self.checkpoint(student)), self.oracle_net)
        w_student, w_teacher = (fold(net).state_dict()["convs.0.weight"].cpu() for net in nets)
        return subspace_distance(w_student, w_teacher, self.basis)

    def oracle_loss(self, objective: str) -> Loss:
        """The attack's loss of that name, with the oracle as its teacher where it needs one."""
        return stages.OBJECTIVES[objective](self.oracle_net)
