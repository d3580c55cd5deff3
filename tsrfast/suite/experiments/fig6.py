"""Figure 6: specialization of each layer with and without data augmentation, adversarial and standard training."""

from __future__ import annotations

from typing import Any

from tsrfast.specialization import SpecializedCounts, mbnc, specialized_counts
from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import ST300, number, size_note, style, training_settings
from tsrfast.suite.experiments._specialization import MBNC
from tsrfast.suite.lab import Lab, Student

AT300, AT_AUG, ST_AUG = Student("at_oracle", 300), Student("at_aug", 300), Student("st_aug", 300)
STUDENTS = (AT300, AT_AUG, ST300, ST_AUG)
RATIO = "Unspecialized over specialized student nodes"
SOURCE = "section 5.4, Fig. 6"


def ratio(counts: SpecializedCounts) -> float:
    """#unspecialized / #specialized; where none is specialized, half a node is counted, which is above all that one node can give."""
    return counts.unspecialized / max(counts.specialized, 0.5)


def claims(layer: int, score: dict[Student, float], ratios: dict[Student, float]) -> list[dict[str, Any]]:
    """What the paper says of a layer; each comparison of two modes holds with and without the other factor (smaller gap of the two)."""
    pairs = {
        "AT against ST": ((AT300, ST300), (AT_AUG, ST_AUG)),
        "with against without augmentation": ((AT_AUG, AT300), (ST_AUG, ST300)),
    }
    size = (
        "Size: after few epochs the layer has hardly begun to specialize, and augmented images are harder to follow than plain ones; the gain from "
        "more varied images comes when the plain ones are learned. More epochs would decide."
    )
    found = []
    for what, two in pairs.items():
        found += [
            compare(f"layer {layer}: MBNC is higher, {what} (smaller gap)", min(score[a] - score[b] for a, b in two), ">", 0.0, source=SOURCE,
                    if_failed=size),
            compare(f"layer {layer}: fewer unspecialized per specialized node, {what} (smaller gap)",
                    min(ratios[b] - ratios[a] for a, b in two), ">", 0.0, source=SOURCE, if_failed=size),
        ]  # fmt: skip
    return found


def run(lab: Lab) -> dict[str, Any]:
    """Left: MBNC by layer. Right: #(NC < 0.8) / #(NC > 0.9) by layer. Four runs of 300 epochs."""
    layers = list(range(len(lab.oracle_net.widths)))
    cells, found = [], []
    lines: dict[str, dict[Student, list[float]]] = {MBNC: {}, RATIO: {}}
    for layer in layers:
        score: dict[Student, float] = {}
        ratios: dict[Student, float] = {}
        for student in STUDENTS:
            nc = lab.correlation(student)[layer]
            counts = specialized_counts(nc)
            score[student], ratios[student] = mbnc(nc), ratio(counts)
            rows = {
                MBNC: score[student], RATIO: ratios[student], "Student nodes with NC > 0.9 (specialized)": counts.specialized,
                "Student nodes with NC < 0.8 (unspecialized)": counts.unspecialized,
            }  # fmt: skip
            cells += [number(f"layer {layer}", student.name, value, nc.count, group=group) for group, value in rows.items()]
        for name, values in ((MBNC, score), (RATIO, ratios)):
            for student in STUDENTS:
                lines[name].setdefault(student, []).append(values[student])
        found += claims(layer, score, ratios)
    families = {AT300: "AT", AT_AUG: "AT", ST300: "ST-logit", ST_AUG: "ST-logit"}
    curves = [
        {
            "panel": name, "name": student.name, "x": layers, "y": y, "style": style(student) | {"family": families[student]},
            "x_label": "layer", "y_label": name.partition(":")[0], "kind": "line",
        }
        for name, series in lines.items() for student, y in series.items()
    ]  # fmt: skip
    return {
        "title": "Figure 6: augmentation specializes neurons, and adversarial training more so",
        "summary": "Left: mean best normalized correlation of each layer. Right: how many student nodes are unspecialized for each specialized one. "
        "Solid: plain images; dashed: cropped, flipped and rotated ones.",
        "cells": cells,
        "curves": curves,
        "claims": found,
        "settings": {
            **training_settings(lab), "images for correlation": lab.preset.correlation_images,
            "augmentation": {"crop": "padding 4", "flip": 0.5, "rotation": "within 15 degrees"},
        },
        "notes": [
            size_note(lab),
            "The magnitudes of the augmentations are not published. The oracle answers on the augmented image.",
            "The paper counts nodes; read as student nodes. Where no node is specialized the ratio has no value: half a node is counted then, and "
            "both counts are in the tables.",
        ],
    }  # fmt: skip
