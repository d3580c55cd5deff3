"""Figure 9: distance between student and oracle filters, standard training on logits against labels, over epochs."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import ST, ST_LABEL, UNTRAINED, size_note, training_settings
from tsrfast.suite.experiments._specialization import eps_panels
from tsrfast.suite.lab import Lab, Student

SOURCE = "section 5.5, Fig. 9"


def claims(means: dict[str, dict[Student, float]]) -> list[dict[str, Any]]:
    """What the paper says of the two targets, by the means of the curves; a fall is from 50 to 300 epochs."""
    size = (
        "Size: first-layer filters move slowly; what stands for 250 epochs here are a few short ones. More epochs would decide."
    )
    inside, outside = means["eps_in"], means["eps_out"]
    fall_in, fall_out = (m[ST_LABEL[0]] - m[ST_LABEL[-1]] for m in (inside, outside))
    return [
        compare("training on logits lowers eps_in: at 300 epochs it is below that at 50", inside[ST[-1]], "<", inside[ST[0]], source=SOURCE,
                if_failed=size),
        compare("training on logits lowers eps_out: at 300 epochs it is below that at 50", outside[ST[-1]], "<", outside[ST[0]], source=SOURCE,
                if_failed=size),
        compare("training on labels lowers eps_out: at 300 epochs it is below that at 50", outside[ST_LABEL[-1]], "<", outside[ST_LABEL[0]],
                source=SOURCE, if_failed=size),
        compare("training on labels lowers eps_out more than eps_in, from 50 to 300 epochs", fall_out, ">", fall_in, source=SOURCE,
                if_failed=size),
        compare("eps_in after 300 epochs on labels is above that on logits", inside[ST_LABEL[-1]], ">", inside[ST[-1]], source=SOURCE,
                if_failed=size + " Logits say more of an image than its label, so this order should come before the others."),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Two panels: sorted eps_in, sorted eps_out, first layer; logit solid, label dashed."""
    curves, cells, means = eps_panels(lab, (UNTRAINED, *ST, *ST_LABEL))
    return {
        "title": "Figure 9: labels teach filters nothing about the input subspace",
        "summary": "Distance of each first-layer filter of the oracle to its best student's, inside the input subspace (eps_in) and outside it "
        "(eps_out), after standard training on the oracle's logits and on its labels alone.",
        "cells": cells,
        "curves": curves,
        "claims": claims(means),
        "settings": {**training_settings(lab), "components": lab.basis.components},
        "notes": [
            size_note(lab),
            "The paper's remark in section 5.5 that robustness needs a large eps_in contradicts the rest of it; the claims follow the figure: lower "
            "is better aligned.",
        ],
    }
