"""The work behind the artifacts: each function fills a folder.

Those that several processes share (`store.TOGETHER`) deal out whole batches, and the first process writes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from tsrfast._files import atomic_write
from tsrfast._progress import Update
from tsrfast.attacks import PGD, CrossEntropy, Loss, OracleCrossEntropy, OracleKL, OracleL2, OracleMargin
from tsrfast.chain import logits
from tsrfast.data import Split
from tsrfast.data.augment import Augment
from tsrfast.errors import InputError
from tsrfast.nets import (
    PRETRAINED_ORACLE,
    ConvReLU,
    apply_masks,
    fold,
    init_,
    load_checkpoint,
    prune_masks,
    save_checkpoint,
    shrink,
    student_widths,
)
from tsrfast.specialization import NormalizedCorrelation, PatchBasis, patch_basis
from tsrfast.specialization.correlation import accumulate
from tsrfast.suite.modes import MODES
from tsrfast.training import TrueLabels, TwoStarts, robust_features, train

if TYPE_CHECKING:
    from tsrfast.suite.lab import Lab, Student
    from tsrfast.suite.store import Artifact

# The input normalisation of the authors' code: inside the first layer of teacher and student.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

CHECKPOINT_EVERY = 10.0  # seconds of training that an interruption may cost

OBJECTIVES: dict[str, Callable[[nn.Module], Loss]] = {
    "oracle_l2": OracleL2,
    "oracle_cross_entropy": OracleCrossEntropy,
    "oracle_margin": OracleMargin,
    "oracle_kl": OracleKL,
    "cross_entropy": lambda teacher: CrossEntropy(),  # labels: argmax t(x), given by `attack`
}


@dataclass(frozen=True)
class AttackSpec:
    """An attack of the evaluation; radii in pixel units.

    `objective` is a key of `OBJECTIVES`. `side` ``in`` or ``out``: of two attempts, the one inside or outside of the patches' subspace
    (see `TwoStarts`).
    """

    norm: str
    eps: float
    step_size: float
    steps: int
    objective: str = "oracle_l2"
    random_start: bool = True
    side: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON, for the store."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "side" or v is not None}

    def build(self, loss: Loss, seed: int) -> PGD:
        """The attack object, without its `side`."""
        return PGD(
            norm=self.norm, eps=self.eps, step_size=self.step_size, steps=self.steps, loss=loss, random_start=self.random_start,
            seed=seed,
        )  # fmt: skip


def train_teacher(lab: Lab, widths: tuple[int, ...], folder: Path) -> None:
    """Cross-entropy on the data set's labels; BN after ReLU."""
    p = lab.preset
    model = init_(
        ConvReLU(widths, batch_norm=True, image=tuple(lab.data.train.images.shape[1:]), classes=len(lab.data.classes), mean=MEAN, std=STD),
        lab.derive("teacher"),
    )  # fmt: skip
    if p.teacher_epochs:
        _train_on_labels(lab, model, folder, "teacher", p.teacher_epochs, p.teacher_lr, None)
    save_checkpoint(folder / "teacher.safetensors", model, test_accuracy=_test_accuracy(lab, model))


def make_oracle(lab: Lab, teacher: Artifact, ratios: tuple[float, ...], folder: Path) -> None:
    """Prune by fan-out, fine-tune, drop the pruned channels (before or after: see `Preset.finetune_shrunk`), fold BN and normalisation."""
    p = lab.preset
    model, record = load_checkpoint(teacher.folder / "teacher.safetensors")
    model.to(lab.device)
    masks = prune_masks(model, ratios)
    apply_masks(model, masks)
    pruned = _test_accuracy(lab, model)
    if p.finetune_shrunk:
        model = shrink(model, masks)
    if p.finetune_epochs:
        _train_on_labels(lab, model, folder, "oracle", p.finetune_epochs, p.finetune_lr, None if p.finetune_shrunk else masks)
    model.eval()
    oracle = fold(model if p.finetune_shrunk else shrink(model, masks))
    accuracy = {
        "teacher": record["test_accuracy"],
        "pruned": pruned,
        "fine-tuned": _test_accuracy(lab, model),
        "oracle": _test_accuracy(lab, oracle),
    }
    save_checkpoint(folder / "oracle.safetensors", oracle, test_accuracy=accuracy)
    atomic_write(folder / "accuracy.json", json.dumps(accuracy))


def oracle_file(name: str) -> Path:
    """The file that `Preset.oracle` means."""
    return PRETRAINED_ORACLE if name == "pretrained" else Path(name)


def digest_of_oracle(path: str) -> str:
    """SHA-256 of the file.

    Raises:
        InputError: there is none that can be read.
    """
    try:
        return hashlib.sha256(oracle_file(path).read_bytes()).hexdigest()
    except OSError as e:
        raise InputError(f"--set oracle: must be a file, got {path!r}: {e.strerror or e}") from e


def read_oracle(lab: Lab, path: str) -> ConvReLU:
    """A network from `save_checkpoint` as an oracle of 4 layers: batch normalisation and the input's folded.

    Raises:
        InputError: not such a file, or not a `ConvReLU` of 4 convolutions for the data's images and classes.
    """
    model, _ = load_checkpoint(oracle_file(path))
    wanted = (tuple(lab.data.train.images.shape[1:]), len(lab.data.classes), len(lab.preset.widths))
    if not isinstance(model, ConvReLU) or (model.image, model.classes, len(model.widths)) != wanted:
        image, classes, layers = wanted
        raise InputError(
            f"--set oracle: must be a ConvReLU of {layers} convolutions for images {list(image)} and {classes} classes, got "
            f"{type(model).__name__}{f' {model.config}' if isinstance(model, ConvReLU) else ''}"
        )
    return fold(model)


def take_oracle(lab: Lab, path: str, folder: Path) -> None:
    """The oracle out of a file."""
    oracle = read_oracle(lab, path).to(lab.device)
    save_checkpoint(folder / "oracle.safetensors", oracle, test_accuracy={"oracle": _test_accuracy(lab, oracle)})


def _train_on_labels(
    lab: Lab, model: ConvReLU, folder: Path, name: str, epochs: int, lr: str, masks: list[Tensor] | None
) -> None:
    p = lab.preset
    with lab.reporter.task(name) as update:
        train(
            model.to(lab.device),
            TrueLabels(),
            lab.data.train,
            epochs=epochs,
            batch_size=p.teacher_batch_size,
            lr=lr,
            optimizer=p.teacher_optimizer,
            momentum=0.9 if p.teacher_optimizer == "sgd" else 0.0,
            weight_decay=p.teacher_weight_decay,
            seed=lab.derive(name, "order"),
            augment=Augment(names=("crop", "flip"), seed=lab.derive(name, "augment")) if p.teacher_augment else None,
            after_step=None if masks is None else functools.partial(apply_masks, masks=masks),
            folder=folder,
            checkpoint_every=CHECKPOINT_EVERY,
            on_progress=_training_progress(update),
        )


def train_student(lab: Lab, student: Student, folder: Path) -> None:
    """A student of 1.1 times the oracle's widths, without BN, trained by its mode; checkpoints at the preset's epochs."""
    p, mode = lab.preset, MODES[student.mode]
    epochs = list(lab.epochs(student.mode).values())
    with lab.reporter.task(f"student {student.mode}{student.title.removeprefix(student.name)}") as update:
        train(
            _fresh_student(lab, student).to(lab.device),
            mode.objective(lab, student),
            student_split(lab) if mode.data is None else mode.data(lab, student),
            epochs=epochs[-1],
            batch_size=p.batch_size,
            lr=p.lr,
            optimizer=p.optimizer,
            seed=lab.derive("student order", student.run),
            augment=Augment(names=mode.augment, seed=lab.derive("student augment", student.run)) if mode.augment else None,
            save_at=(0, *epochs),
            folder=folder,
            checkpoint_every=CHECKPOINT_EVERY,
            on_progress=_training_progress(update),
            ranks=lab.ranks,
        )


def _fresh_student(lab: Lab, student: Student) -> ConvReLU:
    """The network before training. All modes of a run start from the same weights, but for those that start from another mode's."""
    start = MODES[student.mode].start
    if start is not None:
        return load_checkpoint(start(lab, student))[0]
    oracle = lab.oracle_net_of(student.nets)
    widths = student_widths(oracle.widths, lab.preset.student_factor)
    model = ConvReLU(widths, image=oracle.image, classes=oracle.classes, mean=MEAN, std=STD)
    return init_(model, lab.derive("student", student.run))


def student_split(lab: Lab) -> Split:
    """The images that students are trained on, all modes of a run in the same order."""
    data, n = lab.data.train, lab.preset.student_images
    return data if n is None else Split(data.images[:n], data.labels[:n])


def make_robust_images(lab: Lab, student: Student, folder: Path) -> None:
    """The students' training images as `student` sees them. images.safetensors: uint8 images, int64 labels."""
    p = lab.preset
    with lab.reporter.task(f"robust features of {student.title}") as update:
        split = robust_features(
            lab.load(lab.checkpoint(student)),
            lab.oracle_net_of(student.nets),
            student_split(lab),
            steps=p.rft_steps,
            step_size=p.rft_step_size,
            seed=lab.derive("robust features", student.run),
            batch_size=p.eval_batch_size,
            on_progress=lambda done, of: update(done, of, "images"),
            ranks=lab.ranks,
        )
    if lab.ranks.first:
        atomic_write(folder / "images.safetensors", save({"images": split.images, "labels": split.labels}))


def load_split(folder: Path) -> Split:
    """What `make_robust_images` wrote."""
    t = load((folder / "images.safetensors").read_bytes())
    return Split(t["images"], t["labels"])


def attack(
    lab: Lab, students: tuple[Student, ...], victim: Student, spec: AttackSpec, images: int, repetition: int, folder: Path
) -> None:
    """Attack `victim` on a fresh random subset of the test set; what all `students` and the oracle say about the images.

    predictions.safetensors: int64 ``[n]``: index, labels (of the data set), teacher_clean, teacher_adversarial, and for each student
    clean/<name> and adversarial/<name>; float32 loss.
    """
    test, oracle = lab.data.test, lab.oracle_net_of(victim.nets)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(lab.derive("evaluation", repetition)))
    index = order[:images].sort().values
    # The start of an image is the same for every student: their accuracies are paired.
    loss = lab.oracle_loss(spec.objective, victim.nets)
    pgd = spec.build(loss, lab.derive("attack", repetition))
    make = pgd if spec.side is None else TwoStarts(pgd, lab.distance, spec.side, seed=pgd.seed)
    nets = {s.name: lab.load(lab.checkpoint(s)) for s in students}
    source = nets.get(victim.name) if victim in students else None
    source = source if source is not None else lab.load(lab.checkpoint(victim))
    parts: list[dict[str, Tensor]] = []
    side = "" if spec.side is None else f" {spec.side}-plane"
    name = f"attack {victim.title} {spec.norm} eps={spec.eps:.3g} x{spec.steps} {spec.objective}{side}"
    with lab.reporter.task(name) as update:
        for at in range(0, len(index), lab.preset.eval_batch_size)[lab.ranks.part]:
            part = index[at : at + lab.preset.eval_batch_size]
            x = test.pixels(part).to(lab.device).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                teacher_clean = oracle(x).argmax(1)
            x_adv = make(source, x, teacher_clean, index=part.to(lab.device))
            row = {"index": part, "labels": test.labels[part], "teacher_clean": teacher_clean}
            with torch.no_grad():
                row["loss"] = loss(x_adv, source(x_adv), teacher_clean)[0].float()
                row["teacher_adversarial"] = oracle(x_adv).argmax(1)
                for student, net in nets.items():
                    row[f"clean/{student}"] = net(x).argmax(1)
                    row[f"adversarial/{student}"] = net(x_adv).argmax(1)
            parts.append({k: v.cpu() for k, v in row.items()})
            update(at + len(part), len(index), "images")
    parts = lab.ranks.together(parts)
    if lab.ranks.first:
        atomic_write(folder / "predictions.safetensors", save({k: torch.cat([p[k] for p in parts]) for k in parts[0]}))


def load_predictions(folder: Path) -> dict[str, Tensor]:
    """What `attack` wrote."""
    return load((folder / "predictions.safetensors").read_bytes())


def correlate(lab: Lab, student: Student, folder: Path) -> None:
    """Normalized correlation of a student's conv layers with the oracle's on the first test images."""
    test = lab.data.test
    n = len(test) if lab.preset.correlation_images is None else min(lab.preset.correlation_images, len(test))
    batches = test.pixels(slice(n)).split(lab.preset.eval_batch_size)
    with lab.reporter.task(f"correlation {student.title}"):
        net, oracle = lab.load(lab.checkpoint(student)), lab.oracle_net_of(student.nets)
        mine = [[layer.to("cpu") for layer in accumulate(net, oracle, batch, len(batch))] for batch in batches[lab.ranks.part]]
        seen, *others = lab.ranks.together(mine)
    for more in others:
        for layer, other in zip(seen, more, strict=True):
            layer.merge_state(other)
    if not lab.ranks.first:
        return
    tensors: dict[str, Tensor] = {}
    for k, nc in enumerate(layer.compute() for layer in seen):
        tensors |= {
            f"{k}/rho": nc.rho, f"{k}/dead_student": nc.dead_student, f"{k}/dead_teacher": nc.dead_teacher,
            f"{k}/count": torch.tensor(nc.count),
        }  # fmt: skip
    atomic_write(folder / "correlation.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))


def load_correlation(folder: Path) -> list[NormalizedCorrelation]:
    """What `correlate` wrote, one entry a layer."""
    t = load((folder / "correlation.safetensors").read_bytes())
    return [
        NormalizedCorrelation(t[f"{k}/rho"], t[f"{k}/dead_student"], t[f"{k}/dead_teacher"], int(t[f"{k}/count"]))
        for k in range(len(t) // 4)
    ]


def analyse_patches(lab: Lab, folder: Path) -> None:
    """PCA of the patches of the first training images, in raw pixels."""
    with lab.reporter.task("patch PCA"):
        basis = patch_basis(lab.data.train.pixels(slice(lab.preset.patch_images)))
    atomic_write(
        folder / "patches.safetensors",
        save({"mean": basis.mean, "eigenvalues": basis.eigenvalues, "vectors": basis.vectors.contiguous()}),
    )
    atomic_write(folder / "patches.json", json.dumps({"components": basis.components}))


def load_basis(folder: Path) -> PatchBasis:
    """What `analyse_patches` wrote."""
    t = load((folder / "patches.safetensors").read_bytes())
    return PatchBasis(
        t["mean"], t["eigenvalues"], t["vectors"], json.loads((folder / "patches.json").read_text())["components"]
    )


def _test_accuracy(lab: Lab, model: nn.Module) -> float:
    """Accuracy in % on the test set's labels; the model's mode is left as it was."""
    test, right = lab.data.test, 0
    model.to(lab.device)
    for at in range(0, len(test), 500):
        index = slice(at, at + 500)
        x = test.pixels(index).to(lab.device).contiguous(memory_format=torch.channels_last)
        right += int((logits(model, x).argmax(1).cpu() == test.labels[index]).sum())
    return 100 * right / len(test)


def _training_progress(update: Update) -> Callable[[int, int, dict[str, float]], None]:
    return lambda step, total, numbers: update(step, total, f"steps, loss {numbers['loss']:.4f}")
