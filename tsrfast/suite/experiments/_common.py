"""What several experiments share: the students they speak of, cells, styles of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tsrfast.suite.lab import Accuracy, Lab, Student
from tsrfast.suite.modes import MODES
from tsrfast.suite.presets import PAPER_EPOCHS
from tsrfast.suite.stages import AttackSpec

AT = tuple(Student("at_oracle", t) for t in PAPER_EPOCHS)
ST = tuple(Student("st_logit", t) for t in PAPER_EPOCHS)
ST_LABEL = tuple(Student("st_label", t) for t in PAPER_EPOCHS)
ST300 = ST[-1]
AT_AND_ST300 = (*AT, ST300)
AT150, ST150, RFT150 = Student("at_oracle", 150), Student("st_logit", 150), Student("rft", 150)
CCAT = {rho: Student(f"ccat{rho}", 150) for rho in (5, 10, 20)}
UNTRAINED = Student("st_logit", 0)

# Modes whose curves are dashed, where the paper sets them against solid ones.
DASHED = ("st_label", "st_gauss", "st_aug", "at_aug")


def linf_pgd(lab: Lab, objective: str = "oracle_l2", side: str | None = None) -> AttackSpec:
    """The paper's attack (section 5.1) at the preset's size; with a `side`, in-plane or out-plane (section 5.4)."""
    p = lab.preset
    return AttackSpec("linf", p.eps, p.step_size, p.steps, objective, side=side)


def mean(values: Sequence[float]) -> float:
    """The mean, NaN of none."""
    return sum(values) / len(values) if values else math.nan


def cell(
    row: str, column: str, accuracy: Accuracy, published: float | None = None, *, group: str, **more: Any
) -> dict[str, Any]:
    """A table cell with a measured accuracy in %."""
    return {
        "row": row, "column": column, "group": group, "published": published,
        "measured": accuracy.mean, "std": accuracy.std, "n": accuracy.n, "unit": "%", **more,
    }  # fmt: skip


def number(
    row: str, column: str, value: float, n: int, *, group: str, unit: str = "", published: float | None = None
) -> dict[str, Any]:
    """A table cell with a number that was measured once."""
    return {
        "row": row,
        "column": column,
        "group": group,
        "published": published,
        "measured": value,
        "std": None,
        "n": n,
        "unit": unit,
    }


def style(student: Student) -> dict[str, Any]:
    """Light to dark with epochs, colour by mode."""
    family = "ST-logit" if student.mode == "st_logit" else MODES[student.mode].title
    shade = 0.0 if student.epoch == 0 else (PAPER_EPOCHS.index(student.epoch) + 1) / len(PAPER_EPOCHS)
    return {"family": family, "shade": shade, "dash": student.mode in DASHED}


def training_settings(lab: Lab, untrained: Student = UNTRAINED) -> dict[str, Any]:
    """What every experiment's settings begin with."""
    p = lab.preset
    return {
        "oracle widths": list(lab.oracle_net_of(untrained.nets).widths),
        "student widths": list(lab.load(lab.checkpoint(untrained)).widths),
        "images an epoch": len(lab.data.train) if p.student_images is None else min(p.student_images, len(lab.data.train)),
        "epochs for the paper's 50, 100, 150, 200, 300": list(p.epochs),
        "optimizer": p.optimizer,
        "lr": p.lr,
        "batch size": p.batch_size,
        "attack in training": {"norm": "linf", "eps": p.eps, "steps": p.train_steps, "step_size": p.train_step_size},
    }


def size_note(lab: Lab) -> str:
    """The difference from the paper that explains most numbers of the small presets."""
    p = lab.preset
    if p.name == "paper":
        return (
            "Optimiser, learning rate, batch size and seeds are not in the paper; the readings of its authors' code are taken."
        )
    images = training_settings(lab)["images an epoch"]
    return (
        f"Size: columns and curves carry the paper's epochs 50 to 300, which stand here for {', '.join(map(str, p.epochs))} epochs of "
        f"{images} images, on networks of {'-'.join(map(str, lab.oracle_net.widths))} channels (the paper's oracle: 45-32-32-20; "
        f"50,000 images an epoch). Compare orderings, not values."
    )
