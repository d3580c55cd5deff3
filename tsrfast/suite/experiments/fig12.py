"""Figure 12: distance of filters inside and outside the input subspace after confidence-calibrated adversarial training."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import AT150, CCAT, size_note, training_settings
from tsrfast.suite.experiments._specialization import eps_panels
from tsrfast.suite.lab import Lab, Student

SOURCE = "section 5.6, Fig. 12"


def claims(means: dict[str, dict[Student, float]]) -> list[dict[str, Any]]:
    """AT is lowest, by the means of the curves."""
    return [
        compare(f"mean {name} of AT is below that of every CCAT", m[AT150], "<", min(m[s] for s in CCAT.values()), source=SOURCE,
                if_failed="Size: first-layer filters move slowly, and this is one seed of a short run; more epochs would decide.")
        for name, m in means.items()
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Two panels, first layer: CCAT with rho = 5, 10, 20, and AT."""
    curves, cells, means = eps_panels(lab, (*CCAT.values(), AT150))
    return {
        "title": "Figure 12: filters after confidence-calibrated adversarial training",
        "summary": "For each first-layer node of the oracle and its best student, the distance of the normalised filters inside the "
        "17-dimensional input subspace (eps_in) and outside it (eps_out), each sorted. The paper finds AT far lower in both.",
        "cells": cells,
        "curves": curves,
        "claims": claims(means),
        "settings": {
            **training_settings(lab),
            "components": lab.basis.components,
            "images for patches": lab.preset.patch_images,
        },
        "notes": [size_note(lab), "How CCAT is read: see Table 4."],
    }
