"""Figure 3: sorted best normalized correlation of each layer, for adversarial training over epochs and standard training."""

from __future__ import annotations

from typing import Any

from tsrfast.specialization import specialized_counts
from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import AT, AT_AND_ST300, ST300, UNTRAINED, number, size_note, training_settings
from tsrfast.suite.experiments._specialization import bnc_panels
from tsrfast.suite.lab import Lab

SOURCE = "section 5.4, Fig. 3"


def layer_claims(layer: int, at: list[float], st: float, source: str) -> list[dict[str, Any]]:
    """What the paper says of a layer, by the MBNC of AT(50) to AT(300) and of ST(300)."""
    return [
        compare(f"layer {layer}: MBNC of AT(300) is above that of ST(300)", at[-1], ">", st, source=source,
                if_failed="Size: after so few updates the layer has hardly begun to specialize, and clean images move it as much as "
                "adversarial ones do; the difference is within what another seed changes. More epochs would decide."),
        monotone(f"layer {layer}: MBNC of AT rises with epochs", at, "increasing", source=source,
                 if_failed="Size: checkpoints lie a few hundred updates apart at a constant learning rate, where MBNC of a layer "
                 "goes up and down by about as much as it rises. More epochs, or means over seeds, would decide."),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Four panels, one a conv layer: BNC_j = max_k rho_kj sorted ascending (eq. 2, section 5.2)."""
    curves, cells, scores = bnc_panels(lab, (UNTRAINED, *AT_AND_ST300))
    layers = range(len(scores[ST300]))
    claims = [c for layer in layers for c in layer_claims(layer, [scores[s][layer] for s in AT], scores[ST300][layer], SOURCE)]
    counted = {
        "Student nodes with NC > 0.9 (specialized)": lambda nc: specialized_counts(nc).specialized,
        "Student nodes with NC < 0.8 (unspecialized)": lambda nc: specialized_counts(nc).unspecialized,
        "Dead student nodes (activation does not vary)": lambda nc: int(nc.dead_student.sum()),
    }
    for group, value in counted.items():
        for layer in layers:
            for student in AT_AND_ST300:
                nc = lab.correlation(student)[layer]
                cells.append(number(f"layer {layer}", student.name, value(nc), nc.count, group=group))
            if group.startswith("Dead"):
                nc = lab.correlation(ST300)[layer]
                cells.append(number(f"layer {layer}", "oracle", int(nc.dead_teacher.sum()), nc.count, group=group))
    return {
        "title": "Figure 3: adversarial training specializes neurons, in every layer",
        "summary": "For each node of the oracle, the largest normalized correlation with any student node of the same layer (BNC), sorted. "
        "A higher curve means a more specialized student.",
        "cells": cells,
        "curves": curves,
        "claims": claims,
        "settings": {**training_settings(lab), "images for correlation": lab.preset.correlation_images},
        "notes": [
            size_note(lab),
            "Correlations are per channel over all images and positions of the test set; the paper does not say on which data.",
            "Curves are sorted ascending and independently; dead teacher nodes are left out and counted, dead student nodes correlate 0.",
        ],
    }
