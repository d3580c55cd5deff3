"""The paper's training modes, one table: what a student is trained to do, on which images, for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tsrfast.attacks import PGD, CrossEntropy, Loss, OracleL2, OracleMaxDifference
from tsrfast.data import Split
from tsrfast.training import AdversarialLabels, Objective, OracleAdversarial, TeacherLabels, TeacherLogits, TwoStarts
from tsrfast.training.objectives.ccat import CCAT, Backtracking

if TYPE_CHECKING:
    from tsrfast.suite.lab import Lab, Student
    from tsrfast.suite.store import Artifact

ATTACK = ("eps", "train_steps", "train_step_size")
AUGMENTATION = ("crop", "flip", "rotate")


@dataclass(frozen=True)
class Mode:
    """A training mode. The functions take the lab and the student (of which the run and the nets count).

    Attributes:
        title: as the paper writes it.
        objective: the loss.
        settings: the preset's settings it depends on, beside those of every student.
        augment: augmentations of each training image, see `tsrfast.data.augment.Augment`.
        last: the paper's epoch at which it ends.
        inputs: artifacts it is computed from, beside the oracle.
        data: images to train on, other than the students' usual ones.
        start: a checkpoint to start from, instead of fresh weights.
    """

    title: str
    objective: Callable[[Lab, Student], Objective]
    settings: tuple[str, ...] = ()
    augment: tuple[str, ...] = ()
    last: int = 300
    inputs: Callable[[Lab, Student], dict[str, Artifact]] = lambda lab, student: {}
    data: Callable[[Lab, Student], Split] | None = None
    start: Callable[[Lab, Student], Path] | None = None


def pgd(lab: Lab, student: Student, loss: Loss) -> PGD:
    """The attack in training, at the preset's size."""
    p = lab.preset
    seed = lab.derive("student attack", student.run)
    return PGD(norm="linf", eps=p.eps, step_size=p.train_step_size, steps=p.train_steps, loss=loss, seed=seed)


def _logits(lab: Lab, student: Student) -> Objective:
    return TeacherLogits(lab.oracle_net_of(student.nets))


def _labels(lab: Lab, student: Student) -> Objective:
    return TeacherLabels(lab.oracle_net_of(student.nets))


def _oracle_adversarial(lab: Lab, student: Student) -> Objective:
    oracle = lab.oracle_net_of(student.nets)
    return OracleAdversarial(oracle, pgd(lab, student, OracleL2(oracle)))


def _oracle_adversarial_labels(lab: Lab, student: Student) -> Objective:
    oracle = lab.oracle_net_of(student.nets)
    return AdversarialLabels(oracle, pgd(lab, student, OracleL2(oracle)), "at_oracle_label")


def _data_adversarial(lab: Lab, student: Student) -> Objective:
    return AdversarialLabels(lab.oracle_net_of(student.nets), pgd(lab, student, CrossEntropy()), "at_data")


def _in_or_out(side: str) -> Callable[[Lab, Student], Objective]:
    def objective(lab: Lab, student: Student) -> Objective:
        oracle = lab.oracle_net_of(student.nets)
        attack = pgd(lab, student, OracleL2(oracle))
        return OracleAdversarial(oracle, TwoStarts(attack, lab.distance, side, seed=attack.seed))

    return objective


def _ccat_as_written(lab: Lab, student: Student) -> Objective:
    """Section 5.6 to the letter: the paper's attack, no clean half. Any rho: labels at the rim of the ball are uniform."""
    oracle = lab.oracle_net_of(student.nets)
    return CCAT(oracle, pgd(lab, student, OracleMaxDifference(oracle)), 10, lab.preset.eps, clean_share=0.0)


def _ccat(rho: float) -> Callable[[Lab, Student], Objective]:
    def objective(lab: Lab, student: Student) -> Objective:
        p, oracle = lab.preset, lab.oracle_net_of(student.nets)
        attack = Backtracking(
            loss=OracleMaxDifference(oracle), eps=p.eps, step_size=p.train_step_size, steps=p.train_steps,
            seed=lab.derive("student attack", student.run),
        )  # fmt: skip
        return CCAT(oracle, attack, rho, p.eps)

    return objective


def _patches(lab: Lab, student: Student) -> dict[str, Artifact]:
    return {"patches": lab.patches}


def _robust(student: Student) -> Student:
    """Whose features robust-feature training takes (appendix A.11)."""
    return dataclasses.replace(student, mode="at_oracle", epoch=150)


def _half_trained(student: Student) -> Student:
    """Where robust-feature training starts."""
    return dataclasses.replace(student, mode="st_logit", epoch=150)


def _half_way(lab: Lab, student: Student) -> Path:
    return lab.checkpoint(_half_trained(student))


def _robust_features(lab: Lab, student: Student) -> dict[str, Artifact]:
    return {"images": lab.robust_images(_robust(student)), "start": lab.run_of(_half_trained(student))}


MODES = {
    "at_oracle": Mode("AT", _oracle_adversarial, ATTACK),
    "st_logit": Mode("ST", _logits),
    "st_label": Mode("ST-label", _labels),
    "at_oracle_label": Mode("AT-label", _oracle_adversarial_labels, ATTACK),
    "at_data": Mode("AT-data", _data_adversarial, ATTACK),
    "at_in": Mode("AT-in", _in_or_out("in"), ATTACK, last=150, inputs=_patches),
    "at_out": Mode("AT-out", _in_or_out("out"), ATTACK, last=150, inputs=_patches),
    **{f"ccat{rho}": Mode(f"CCAT-{rho}", _ccat(rho), ATTACK, last=150) for rho in (5, 10, 20)},
    "ccat_as_written": Mode("CCAT as written", _ccat_as_written, ATTACK, last=150),
    "rft": Mode(
        "RFT", _logits, last=150, inputs=_robust_features,
        data=lambda lab, student: lab.robust_split(_robust(student)),
        start=_half_way,
    ),
    "st_gauss": Mode("ST-gauss", _logits, augment=("gaussian",)),
    "st_aug": Mode("ST-aug", _logits, augment=AUGMENTATION),
    "at_aug": Mode("AT-aug", _oracle_adversarial, ATTACK, augment=AUGMENTATION),
}  # fmt: skip
