"""Figure 16: distance of filters inside and outside the input subspace after robust-feature training."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import AT150, RFT150, ST150, ST300, size_note, training_settings
from tsrfast.suite.experiments._specialization import eps_panels
from tsrfast.suite.lab import Lab, Student

SOURCE = "appendix A.11, Fig. 16"


def claims(means: dict[str, dict[Student, float]]) -> list[dict[str, Any]]:
    """RFT(150) against ST(300), by the means of the curves."""
    inside, outside = means["eps_in"], means["eps_out"]
    size = "Size: first-layer filters move slowly, and this is one seed of a short run; more epochs would decide."
    return [
        compare("mean eps_in of RFT(150) is closer to ST(300) than to ST(150)", abs(inside[RFT150] - inside[ST300]), "<",
                abs(inside[RFT150] - inside[ST150]), source=SOURCE + ' ("similar")', if_failed=size),
        compare("mean eps_out of RFT(150) is below that of ST(300)", outside[RFT150], "<", outside[ST300], source=SOURCE,
                if_failed=size + " RFT(150) is as many updates from initialisation as ST(300), but half of them on other images."),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Two panels, first layer."""
    curves, cells, means = eps_panels(lab, (RFT150, ST150, ST300, AT150))
    return {
        "title": "Figure 16: filters after training on robust features",
        "summary": "For each first-layer node of the oracle and its best student, the distance of the normalised filters inside the "
        "17-dimensional input subspace (eps_in) and outside it (eps_out), each sorted. The paper finds RFT(150) like ST(300) in eps_in and "
        "slightly better in eps_out.",
        "cells": cells,
        "curves": curves,
        "claims": claims(means),
        "settings": {
            **training_settings(lab),
            "components": lab.basis.components,
            "images for patches": lab.preset.patch_images,
        },
        "notes": [size_note(lab), "How RFT is read: see Table 5."],
    }
