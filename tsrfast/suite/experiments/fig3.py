"""Figure 3: sorted best normalized correlation of each layer, for adversarial training over epochs and standard training."""

from __future__ import annotations

from typing import Any

from tsrfast.specialization import mbnc, sorted_bnc, specialized_counts
from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import AT, AT_AND_ST300, ST300, UNTRAINED, number, size_note, style, training_settings
from tsrfast.suite.lab import Lab

SOURCE = "section 5.4, Fig. 3"


def run(lab: Lab) -> dict[str, Any]:
    """Four panels, one a conv layer: BNC_j = max_k rho_kj sorted ascending (eq. 2, section 5.2)."""
    layers = range(len(lab.oracle_net.widths))
    curves, cells, claims = [], [], []
    for layer in layers:
        panel = f"layer {layer}"
        for student in AT_AND_ST300:
            y = sorted_bnc(lab.correlation(student)[layer]).tolist()
            curves.append({
                "panel": panel, "name": student.name, "x": list(range(len(y))), "y": y, "style": style(student),
                "x_label": "teacher node (sorted)", "y_label": "BNC", "kind": "line",
            })  # fmt: skip
        for student in (UNTRAINED, *AT_AND_ST300):
            nc = lab.correlation(student)[layer]
            column = "untrained" if student == UNTRAINED else student.name
            cells.append(number(panel, column, mbnc(nc), nc.count, group="MBNC: mean of BNC over teacher nodes"))
        series = [mbnc(lab.correlation(s)[layer]) for s in AT]
        claims += [
            compare(f"layer {layer}: MBNC of AT(300) is above that of ST(300)", series[-1], ">", mbnc(lab.correlation(ST300)[layer]),
                    source=SOURCE,
                    if_failed="Size: after so few updates the layer has hardly begun to specialize, and clean images move it as much as "
                    "adversarial ones do; the difference is within what another seed changes. More epochs would decide."),
            monotone(f"layer {layer}: MBNC of AT rises with epochs", series, "increasing", source=SOURCE,
                     if_failed="Size: checkpoints lie a few hundred updates apart at a constant learning rate, where MBNC of a layer "
                     "goes up and down by about as much as it rises. More epochs, or means over seeds, would decide."),
        ]  # fmt: skip
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
