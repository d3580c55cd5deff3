"""Figure 14: how many student nodes specialize in each node of the oracle, over three training seeds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tsrfast.specialization import specialization_frequency
from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import mean, number, size_note, style, training_settings
from tsrfast.suite.lab import Lab, Student

RUNS = (0, 1, 2)
STUDENTS = {mode: tuple(Student(mode, 300, run) for run in RUNS) for mode in ("st_logit", "at_oracle")}
SOURCE = "appendix, Fig. 14"


def dispersion(counts: Tensor) -> float:
    """Variance over mean of the counts of teacher nodes: 1 where student nodes pick at random; NaN where nobody picked."""
    value = counts.double()
    return (value.var(correction=0) / value.mean()).item()


def claims(frequency: dict[Student, list[Tensor]]) -> list[dict[str, Any]]:
    """The paper's words in numbers of our choice: evenly over teacher nodes, and the same for every seed; counts of all layers."""
    found = []
    for students in STUDENTS.values():
        name = students[0].name
        spread = [dispersion(torch.cat(frequency[s])) for s in students]
        reached = [100 * mean([(c > 0).double().mean().item() for c in frequency[s]]) for s in students]
        found += [
            compare(f"{name}: specialized nodes spread over teacher nodes no less evenly than at random (largest dispersion of the seeds)",
                    max(spread, key=lambda v: math.inf if math.isnan(v) else v), "<=", 1.0, source=SOURCE,
                    if_failed="Size: first-layer nodes that answer to brightness correlate with many others, while in later layers none is above 0.9 "
                    "yet. A long run would decide."),
            compare(f"{name}: teacher nodes reached, in % (mean over layers), differ by less than 20 points among seeds", max(reached) - min(reached),
                    "<", 20.0, source=SOURCE,
                    if_failed=f"Size: a layer of {len(frequency[students[0]][-1])} nodes makes steps of several points. Wider nets would decide."),
        ]  # fmt: skip
    return found


def run(lab: Lab) -> dict[str, Any]:
    """A panel for each seed and layer: number of student nodes with NC > 0.9 for each teacher node."""
    layers = range(len(lab.oracle_net.widths))
    curves, cells = [], []
    frequency = {
        s: [specialization_frequency(nc) for nc in lab.correlation(s)] for students in STUDENTS.values() for s in students
    }
    for run_number in RUNS:
        for layer in layers:
            for students in STUDENTS.values():
                student = students[run_number]
                counts = frequency[student][layer]
                curves.append({
                    "panel": f"seed {run_number}, layer {layer}", "name": student.name, "x": list(range(len(counts))), "y": counts.tolist(),
                    "style": style(student) | {"shade": 0.7}, "x_label": "teacher node", "y_label": "student nodes with NC > 0.9", "kind": "bar",
                })  # fmt: skip
                column, n = f"{student.name} seed {run_number}", len(counts)
                reached = 100 * (counts > 0).double().mean().item()
                cells += [
                    number(f"layer {layer}", column, counts.double().mean().item(), n, group="Student nodes with NC > 0.9 for a teacher node, mean"),
                    number(f"layer {layer}", column, reached, n, group="Teacher nodes with at least one", unit="%"),
                    number(f"layer {layer}", column, dispersion(counts), n, group="Dispersion: variance over mean"),
                ]  # fmt: skip
    return {
        "title": "Figure 14: specialized nodes spread evenly over the oracle's nodes, whatever the seed",
        "summary": "For each node of the oracle, how many student nodes of the same layer have a normalized correlation above 0.9 with it, for three "
        "independent trainings.",
        "cells": cells,
        "curves": curves,
        "claims": claims(frequency),
        "settings": {**training_settings(lab), "images for correlation": lab.preset.correlation_images, "seeds": len(RUNS)},
        "notes": [
            size_note(lab),
            "The paper does not say how the students were trained; both standard and adversarial training are shown. It has a row for each layer and "
            "a column for each seed; here a row is a seed.",
            "The paper says that the bars are roughly uniform and alike; the numbers that stand for these words are ours. The dispersion has no "
            "value where no node is specialized.",
        ],
    }  # fmt: skip
