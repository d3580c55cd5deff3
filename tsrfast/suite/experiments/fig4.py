"""Figure 4: distance between student and oracle filters inside and outside the input subspace, over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import AT, AT_AND_ST300, ST300, UNTRAINED, size_note, training_settings
from tsrfast.suite.experiments._specialization import eps_panels
from tsrfast.suite.lab import Lab, Student

SOURCE = "section 5.4, Fig. 4"


def distance_claims(
    means: dict[str, dict[Student, float]], at: Sequence[Student], st: Student, untrained: Student, source: str
) -> list[dict[str, Any]]:
    """What the paper says of the mean eps_in and eps_out of AT(50) to AT(300) and ST(300)."""
    claims = []
    for name, m in means.items():
        series = [m[s] for s in at]
        claims += [
            compare(f"mean {name} of AT(300) is below that of ST(300)", series[-1], "<", m[st], source=source, strong=True,
                    if_failed="Size: first-layer filters move slowly, and this is one seed of a short run; more epochs would decide."),
            monotone(f"mean {name} of AT falls with epochs", series, "decreasing", source=source,
                     if_failed="Size: with checkpoints so close together the best student of a node can change from one to the next, "
                     "which makes the mean jump. More epochs would decide."),
            compare(f"most of the fall of {name} happens early: from initialisation to AT(50) more than from there to AT(300)",
                    m[untrained] - series[0], ">", series[0] - series[-1], source=source + ' ("large drop within the first epochs")',
                    if_failed="Size: what stands for 50 epochs here is a fraction of one of the paper's epochs, so the early drop is "
                    "spread over all columns."),
        ]  # fmt: skip
    return claims


def run(lab: Lab) -> dict[str, Any]:
    """Two panels: sorted eps_in, sorted eps_out, first layer."""
    curves, cells, means = eps_panels(lab, (UNTRAINED, *AT_AND_ST300))
    return {
        "title": "Figure 4: adversarial training moves filters towards the oracle's, inside and outside the input subspace",
        "summary": "For each first-layer node of the oracle and its best student, the distance of the normalised filters inside the "
        "17-dimensional input subspace (eps_in) and outside it (eps_out), each sorted. Lower means better aligned.",
        "cells": cells,
        "curves": curves,
        "claims": distance_claims(means, AT, ST300, UNTRAINED, SOURCE),
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
