"""Table 4: confidence-calibrated adversarial training against adversarial training."""

from __future__ import annotations

from typing import Any

import torch

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import AT150, CCAT, cell, linf_pgd, number, size_note, style, training_settings
from tsrfast.suite.lab import Lab, Student
from tsrfast.suite.modes import MODES
from tsrfast.suite.stages import student_split
from tsrfast.training import CCAT as Calibrated

SOURCE = "section 5.6, Table 4"
AS_WRITTEN = Student("ccat_as_written", 150)
COLUMNS = {**{f"CCAT (rho = {rho})": student for rho, student in CCAT.items()}, "AT": AT150, "CCAT as written": AS_WRITTEN}
PUBLISHED = {"CCAT (rho = 5)": 47.25, "CCAT (rho = 10)": 52.04, "CCAT (rho = 20)": 49.33, "AT": 84.07}
FAR = 10.0  # points; the paper's text gives no number, its table 32


def _attained(lab: Lab, mode: str) -> torch.Tensor:
    """|delta|_inf / eps of the first training images, attacked as the mode does, at CCAT's student with rho = 10; sorted."""
    objective, student = MODES[mode].objective(lab, CCAT[10]), lab.load(lab.checkpoint(CCAT[10]))
    assert isinstance(objective, Calibrated)
    split, parts = student_split(lab), []
    n = min(lab.preset.eval_images, len(split))
    for at in range(0, n, lab.preset.eval_batch_size):
        index = torch.arange(at, min(at + lab.preset.eval_batch_size, n))
        x = split.pixels(index).to(lab.device).contiguous(memory_format=torch.channels_last)
        moved = objective.attack(student, x, torch.zeros_like(index).to(lab.device), index=index.to(lab.device))
        parts.append((moved - x).abs().flatten(1).amax(1).cpu() / objective.eps)
    return torch.cat(parts).double().clamp(max=1).sort().values


def _reach(lab: Lab) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How far the two attacks go, and what confidence that leaves: curves and cells."""
    curves, cells = [], []
    for mode, name in (("ccat10", "CCAT's attack"), ("ccat_as_written", "PGD, as written")):
        d = _attained(lab, mode)
        shown = {
            "mean distance, in eps": (d.mean(), ""),
            # Within the rounding of a pixel to float32.
            "at the rim, where the label is uniform whatever rho": (100 * (d > 1 - 1e-5).double().mean(), "%"),
            **{f"mean confidence lambda, rho = {rho}": ((1 - d).pow(rho).mean(), "") for rho in CCAT},
        }
        cells += [
            number(row, name, value.item(), len(d), group="Attacked training images", unit=unit)
            for row, (value, unit) in shown.items()
        ]
        curves.append({
            "panel": "How far the attack in training goes", "name": name, "x": list(range(len(d))), "y": d.tolist(),
            "style": {**style(CCAT[10]), "family": name, "dash": mode != "ccat10"},
            "x_label": "training image (sorted)", "y_label": "distance / eps", "kind": "line",
        })  # fmt: skip
    return curves, cells


def claims(five: float, ten: float, twenty: float, at: float) -> list[dict[str, Any]]:
    """What the paper says, by the robust accuracies in % of CCAT with rho = 5, 10, 20 and of AT."""
    noise = (
        "Reading: where nearly every attacked image reaches the rim (last table), labels there are uniform for every rho, and the three are "
        "one training. An attack that stays inside the ball would decide. Size: rho only decides how fast a label fades inside the ball, and "
        "the published values lie within 5 points of each other; after so few updates their order is within the sampling error. Means over "
        "seeds at full size would decide. "
    )
    reading = (
        "Reading: CCAT's labels sum to 1 and carry no scale, so its students answer as label-trained ones do, which the attack on the distance "
        "of logits moves little (table 3). The same comparison under an attack by cross-entropy would decide."
    )
    best = max(five, ten, twenty)
    return [
        compare("rho = 10 is more robust than rho = 20", ten, ">", twenty, source=SOURCE, if_failed=noise),
        compare("rho = 20 is more robust than rho = 5", twenty, ">", five, source=SOURCE, if_failed=noise),
        compare("AT is more robust than every CCAT", at, ">", best, source=SOURCE, if_failed=reading),
        compare(f"far more: by at least {FAR:g} points", at - best, ">=", FAR, source=SOURCE + " (32 points there)", if_failed=noise + reading),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """CCAT for three values of rho, AT, and CCAT without what the original has and the paper does not mention."""
    cells, values = [], {}
    for column, student in COLUMNS.items():
        got = lab.accuracy(student, linf_pgd(lab))
        values[column] = got.mean
        cells.append(cell("l_inf PGD", column, got, PUBLISHED.get(column), group="Robust accuracy"))
    for label in ("t(x)", "clean"):
        row = "clean images: s(x) = t(x)" if label == "clean" else f"l_inf PGD, agrees with {label}"
        cells += [
            cell(row, column, lab.accuracy(student, linf_pgd(lab), label), group="Other labels")
            for column, student in COLUMNS.items()
        ]
    curves, reach = _reach(lab)
    return {
        "title": "Table 4: confidence-calibrated adversarial training",
        "summary": "CCAT trains with cross-entropy on soft labels that fade to uniform as the adversarial image leaves the clean one; rho says how "
        "fast. The paper finds rho = 10 best and all of them far below adversarial training on logits.",
        "cells": cells + reach,
        "curves": curves,
        "claims": claims(*(values[column] for column in PUBLISHED)),
        "settings": {
            **training_settings(lab),
            "attack": linf_pgd(lab).identity,
            "repetitions": lab.preset.repetitions,
            "images a repetition": min(lab.preset.eval_images, len(lab.data.test)),
        },
        "notes": [
            size_note(lab),
            "Section 5.6 gives objective and soft labels only. As in the original (Stutz et al. 2020), half of each batch is clean, and the attack "
            "has momentum 0.9, backtracking (a step that lowers the objective is not taken and divides the step by 1.5), and starts at any distance "
            "from the image. The label is argmax t(x).",
            '"CCAT as written" trains on attacked images alone, by the PGD of section 5.1: nearly all of them reach the rim of the ball, where '
            "lambda is 0 for every rho (last table and figure), so that it is told nothing about any image.",
            "The original's attack is not enough to give rho an effect: with 40 steps of 0.01 it reached the rim on all of 64 images in a trial "
            "with standard students, as PGD did; with few steps it stops short. The clean half is what teaches.",
        ],
    }  # fmt: skip
