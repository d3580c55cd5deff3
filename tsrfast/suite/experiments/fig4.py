"""Figure 4: distance between student and oracle filters inside and outside the input subspace, over epochs."""

from __future__ import annotations

from typing import Any

from tsrfast.specialization import eps_curves
from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import AT, AT_AND_ST300, ST300, UNTRAINED, number, size_note, style, training_settings
from tsrfast.suite.lab import Lab, Student

SOURCE = "section 5.4, Fig. 4"


def _curves(lab: Lab, student: Student) -> tuple[list[float], list[float]]:
    """Sorted eps_in and eps_out of the best student k(j) of each oracle node j."""
    nc = lab.correlation(student)[0]
    eps_in, eps_out = eps_curves(nc.rho, *lab.subspace(student), dead_teacher=nc.dead_teacher)
    return eps_in.tolist(), eps_out.tolist()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def run(lab: Lab) -> dict[str, Any]:
    """Two panels: sorted eps_in, sorted eps_out, first layer."""
    curves, cells, claims = [], [], []
    means: dict[str, dict[Student, float]] = {}
    for which, name in enumerate(("eps_in", "eps_out")):
        for student in (UNTRAINED, *AT_AND_ST300):
            y = _curves(lab, student)[which]
            means.setdefault(name, {})[student] = _mean(y)
            column = "untrained" if student == UNTRAINED else student.name
            cells.append(number(f"mean {name}", column, _mean(y), len(y), group="Mean over oracle nodes"))
            if student != UNTRAINED:
                curves.append({
                    "panel": name, "name": student.name, "x": list(range(len(y))), "y": y, "style": style(student),
                    "x_label": "teacher node (sorted)", "y_label": "distance", "kind": "line",
                })  # fmt: skip
        m = means[name]
        series = [m[s] for s in AT]
        claims += [
            compare(f"mean {name} of AT(300) is below that of ST(300)", series[-1], "<", m[ST300], source=SOURCE, strong=True,
                    if_failed="Size: first-layer filters move slowly, and this is one seed of a short run; more epochs would decide."),
            monotone(f"mean {name} of AT falls with epochs", series, "decreasing", source=SOURCE,
                     if_failed="Size: with checkpoints so close together the best student of a node can change from one to the next, "
                     "which makes the mean jump. More epochs would decide."),
            compare(f"most of the fall of {name} happens early: from initialisation to AT(50) more than from there to AT(300)",
                    m[UNTRAINED] - series[0], ">", series[0] - series[-1], source=SOURCE + ' ("large drop within the first epochs")',
                    if_failed="Size: what stands for 50 epochs here is a fraction of one of the paper's epochs, so the early drop is "
                    "spread over all columns."),
        ]  # fmt: skip
    return {
        "title": "Figure 4: adversarial training moves filters towards the oracle's, inside and outside the input subspace",
        "summary": "For each first-layer node of the oracle and its best student, the distance of the normalised filters inside the "
        "17-dimensional input subspace (eps_in) and outside it (eps_out), each sorted. Lower means better aligned.",
        "cells": cells,
        "curves": curves,
        "claims": claims,
        "settings": {
            **training_settings(lab),
            "components": lab.basis.components,
            "images for patches": lab.preset.patch_images,
        },
        "notes": [
            size_note(lab),
            "Filters without bias, each normalised to unit length, input normalisation folded in; the two curves of a student are sorted "
            "independently.",
        ],
    }
