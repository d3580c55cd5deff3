"""Figure 7: distance between student and oracle filters after in-plane, out-plane and standard adversarial training."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import UNTRAINED, size_note, training_settings
from tsrfast.suite.experiments._specialization import eps_panels
from tsrfast.suite.lab import Lab, Student

IN, OUT, STANDARD = Student("at_in", 150), Student("at_out", 150), Student("at_oracle", 150)
SOURCE = "section 5.4, Fig. 7"


def claims(means: dict[str, dict[Student, float]]) -> list[dict[str, Any]]:
    """In-plane training aligns filters best, by the means of the curves."""
    return [
        compare(f"mean {name} is lower after in-plane training than after {other} training", m[IN], "<", m[student], source=SOURCE,
                if_failed="Size: the two candidates of an image differ little (table 2), and first-layer filters move slowly. More epochs, or means "
                "over seeds, would decide.")
        for name, m in means.items()
        for other, student in (("out-plane", OUT), ("standard", STANDARD))
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Two panels: sorted eps_in, sorted eps_out, first layer, 150 epochs."""
    curves, cells, means = eps_panels(lab, (UNTRAINED, IN, OUT, STANDARD))
    return {
        "title": "Figure 7: in-plane adversarial training aligns filters best, in both directions",
        "summary": "Distance of each first-layer filter of the oracle to its best student's, inside the input subspace (eps_in) and outside it "
        "(eps_out), for students trained on adversarial images closer to the subspace, farther from it, or as they come.",
        "cells": cells,
        "curves": curves,
        "claims": claims(means),
        "settings": {**training_settings(lab), "components": lab.basis.components},
        "notes": [
            size_note(lab),
            "How in-plane and out-plane images are chosen: see table 2. The choice can steer the first layer only.",
        ],
    }
