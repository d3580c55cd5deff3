"""The work behind the artifacts: each function fills a folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tsrfast._files import atomic_write
from tsrfast._progress import Update
from tsrfast.attacks import PGD, CrossEntropy, Loss, OracleCrossEntropy, OracleKL, OracleL2, OracleMargin
from tsrfast.chain import logits
from tsrfast.data import Split
from tsrfast.data.augment import Augment
from tsrfast.nets import (
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
from tsrfast.specialization import correlate as correlate_nets
from tsrfast.training import Objective, OracleAdversarial, TeacherLabels, TeacherLogits, TrueLabels, train

if TYPE_CHECKING:
    from tsrfast.suite.lab import Lab, Student

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
    """An attack of the evaluation; radii in pixel units. `objective` is a key of `OBJECTIVES`."""

    norm: str
    eps: float
    step_size: float
    steps: int
    objective: str = "oracle_l2"
    random_start: bool = True

    def build(self, loss: Loss, seed: int) -> PGD:
        """The attack object."""
        return PGD(
            norm=self.norm, eps=self.eps, step_size=self.step_size, steps=self.steps, loss=loss, random_start=self.random_start,
            seed=seed,
        )  # fmt: skip


def train_teacher(lab: Lab, folder: Path) -> None:
    """Cross-entropy on the data set's labels; BN after ReLU."""
    p = lab.preset
    model = init_(
        ConvReLU(p.widths, batch_norm=True, image=tuple(lab.data.train.images.shape[1:]), classes=len(lab.data.classes), mean=MEAN, std=STD),
        lab.derive("teacher"),
    )  # fmt: skip
    if p.teacher_epochs:
        _train_on_labels(lab, model, folder, "teacher", p.teacher_epochs, p.teacher_lr, None)
    save_checkpoint(folder / "teacher.safetensors", model, test_accuracy=_test_accuracy(lab, model))


def make_oracle(lab: Lab, teacher: Any, folder: Path) -> None:
    """Prune by fan-out, fine-tune under the masks, drop the pruned channels, fold BN and normalisation."""
    p = lab.preset
    model, record = load_checkpoint(teacher.folder / "teacher.safetensors")
    model.to(lab.device)
    masks = prune_masks(model, p.prune_ratios)
    apply_masks(model, masks)
    pruned = _test_accuracy(lab, model)
    if p.finetune_epochs:
        _train_on_labels(lab, model, folder, "oracle", p.finetune_epochs, p.finetune_lr, masks)
    model.eval()
    oracle = fold(shrink(model, masks))
    accuracy = {
        "teacher": record["test_accuracy"],
        "pruned": pruned,
        "fine-tuned": _test_accuracy(lab, model),
        "oracle": _test_accuracy(lab, oracle),
    }
    save_checkpoint(folder / "oracle.safetensors", oracle, test_accuracy=accuracy)
    atomic_write(folder / "accuracy.json", json.dumps(accuracy))


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


def train_student(lab: Lab, mode: str, run: int, folder: Path) -> None:
    """A student of 1.1 times the oracle's widths, without BN, on the oracle's outputs; checkpoints at the preset's epochs."""
    p = lab.preset
    oracle = lab.oracle_net
    # All modes of a run start from the same weights and see the images in the same order.
    model = init_(
        ConvReLU(
            student_widths(oracle.widths, p.student_factor), image=oracle.image, classes=oracle.classes, mean=MEAN, std=STD
        ),
        lab.derive("student", run),
    )
    data = lab.data.train
    if p.student_images is not None:
        data = Split(data.images[: p.student_images], data.labels[: p.student_images])
    attack = PGD(
        norm="linf", eps=p.eps, step_size=p.train_step_size, steps=p.train_steps, loss=OracleL2(oracle),
        seed=lab.derive("student attack", run),
    )  # fmt: skip
    objectives: dict[str, Objective] = {
        "st_logit": TeacherLogits(oracle),
        "st_label": TeacherLabels(oracle),
        "at_oracle": OracleAdversarial(oracle, attack),
    }
    with lab.reporter.task(f"student {mode}" + (f" (run {run})" if run else "")) as update:
        train(
            model.to(lab.device),
            objectives[mode],
            data,
            epochs=p.epochs[-1],
            batch_size=p.batch_size,
            lr=p.lr,
            optimizer=p.optimizer,
            seed=lab.derive("student order", run),
            save_at=(0, *p.epochs),
            folder=folder,
            checkpoint_every=CHECKPOINT_EVERY,
            on_progress=_training_progress(update),
        )


def attack(
    lab: Lab, students: tuple[Student, ...], victim: Student, spec: AttackSpec, images: int, repetition: int, folder: Path
) -> None:
    """Attack `victim` on a fresh random subset of the test set; what all `students` and the oracle say about the images.

    predictions.safetensors: int64 ``[n]``: index, labels (of the data set), teacher_clean, teacher_adversarial, and for each student
    clean/<name> and adversarial/<name>; float32 loss.
    """
    test, oracle = lab.data.test, lab.oracle_net
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(lab.derive("evaluation", repetition)))
    index = order[:images].sort().values
    # The start of an image is the same for every student: their accuracies are paired.
    pgd = spec.build(lab.oracle_loss(spec.objective), lab.derive("attack", repetition))
    nets = {s.name: lab.load(lab.checkpoint(s)) for s in students}
    source = nets.get(victim.name) if victim in students else None
    source = source if source is not None else lab.load(lab.checkpoint(victim))
    parts: list[dict[str, Tensor]] = []
    name = f"attack {victim.name} {spec.norm} eps={spec.eps:.3g} x{spec.steps} {spec.objective}"
    with lab.reporter.task(name) as update:
        for at in range(0, len(index), lab.preset.eval_batch_size):
            part = index[at : at + lab.preset.eval_batch_size]
            x = test.pixels(part).to(lab.device).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                teacher_clean = oracle(x).argmax(1)
            result = pgd.run(source, x, teacher_clean, index=part.to(lab.device))
            row = {"index": part, "labels": test.labels[part], "teacher_clean": teacher_clean, "loss": result.loss.float()}
            with torch.no_grad():
                row["teacher_adversarial"] = oracle(result.x_adv).argmax(1)
                for student, net in nets.items():
                    row[f"clean/{student}"] = net(x).argmax(1)
                    row[f"adversarial/{student}"] = net(result.x_adv).argmax(1)
            parts.append({k: v.cpu() for k, v in row.items()})
            update(at + len(part), len(index), "images")
    atomic_write(folder / "predictions.safetensors", save({k: torch.cat([p[k] for p in parts]) for k in parts[0]}))


def load_predictions(folder: Path) -> dict[str, Tensor]:
    """What `attack` wrote."""
    return load_file(folder / "predictions.safetensors")


def correlate(lab: Lab, student: Student, folder: Path) -> None:
    """Normalized correlation of a student's conv layers with the oracle's on the first test images."""
    test = lab.data.test
    n = len(test) if lab.preset.correlation_images is None else min(lab.preset.correlation_images, len(test))
    with lab.reporter.task(f"correlation {student.name}"):
        layers = correlate_nets(
            lab.load(lab.checkpoint(student)), lab.oracle_net, test.pixels(slice(n)), batch_size=lab.preset.eval_batch_size
        )
    tensors: dict[str, Tensor] = {}
    for k, nc in enumerate(layers):
        tensors |= {
            f"{k}/rho": nc.rho, f"{k}/dead_student": nc.dead_student, f"{k}/dead_teacher": nc.dead_teacher,
            f"{k}/count": torch.tensor(nc.count),
        }  # fmt: skip
    atomic_write(folder / "correlation.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))


def load_correlation(folder: Path) -> list[NormalizedCorrelation]:
    """What `correlate` wrote, one entry a layer."""
    t = load_file(folder / "correlation.safetensors")
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
    t = load_file(folder / "patches.safetensors")
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
