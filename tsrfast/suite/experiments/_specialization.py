"""The two figures that the paper draws for every comparison: sorted BNC of each layer, and sorted distances of first-layer filters.

Untrained students get cells and no curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsrfast.specialization import eps_curves, mbnc, sorted_bnc
from tsrfast.suite.experiments._common import mean, number, style
from tsrfast.suite.lab import Lab, Student

Entries = list[dict[str, Any]]
MBNC = "MBNC: mean of BNC over teacher nodes"


def bnc_panels(
    lab: Lab, students: Sequence[Student], layers: Sequence[int] | None = None
) -> tuple[Entries, Entries, dict[Student, list[float]]]:
    """Sorted BNC (eq. 2, section 5.2), a panel a conv layer: curves, cells with their means (MBNC), and these by student, one a layer.

    `layers`: those to show; None: all.
    """
    curves, cells = [], []
    scores: dict[Student, list[float]] = {student: [] for student in students}
    for layer in layers if layers is not None else range(len(lab.correlation(students[0]))):
        for student in students:
            nc = lab.correlation(student)[layer]
            scores[student].append(mbnc(nc))
            cells.append(number(f"layer {layer}", _column(student), scores[student][-1], nc.count, group=MBNC))
            if student.epoch:
                curves.append(_curve(f"layer {layer}", student, sorted_bnc(nc).tolist(), "BNC"))
    return curves, cells, scores


def eps_panels(lab: Lab, students: Sequence[Student]) -> tuple[Entries, Entries, dict[str, dict[Student, float]]]:
    """Sorted eps_in and eps_out, first layer, of the best student filter of each oracle filter, a panel each: curves, cells with their
    means, and these by name and student."""
    curves, cells = [], []
    means: dict[str, dict[Student, float]] = {"eps_in": {}, "eps_out": {}}
    for which, (name, found) in enumerate(means.items()):
        for student in students:
            nc = lab.correlation(student)[0]
            y = eps_curves(nc.rho, *lab.subspace(student), dead_teacher=nc.dead_teacher)[which].tolist()
            found[student] = mean(y)
            cells.append(number(f"mean {name}", _column(student), found[student], len(y), group="Mean over oracle nodes"))
            if student.epoch:
                curves.append(_curve(name, student, y, "distance"))
    return curves, cells, means


def _curve(panel: str, student: Student, y: list[float], y_label: str) -> dict[str, Any]:
    return {
        "panel": panel, "name": student.name, "x": list(range(len(y))), "y": y, "style": style(student),
        "x_label": "teacher node (sorted)", "y_label": y_label, "kind": "line",
    }  # fmt: skip


def _column(student: Student) -> str:
    return "untrained" if student.epoch == 0 else student.name
