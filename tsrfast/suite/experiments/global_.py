"""Specialization and robustness over all students: the claim that ties the paper together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tsrfast.specialization import Pearson, mbnc, pearson, spearman
from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import (
    AT,
    ST,
    ST_LABEL,
    cell,
    linf_pgd,
    mean,
    number,
    size_note,
    style,
    training_settings,
)
from tsrfast.suite.lab import NETS, Lab, Student

# Modes that share a colour; the others have their own.
KINDS = {
    "at_in": "AT in- or out-plane", "at_out": "AT in- or out-plane", "st_aug": "augmented", "at_aug": "augmented", "ccat5": "CCAT",
    "ccat10": "CCAT", "ccat20": "CCAT",
}  # fmt: skip
ON_LABELS = ("st_label", "at_oracle_label", "at_data", "ccat5", "ccat10", "ccat20")
# Modes by what their students are trained on: within such a family the scale of logits and the attack in training are the same.
FAMILIES = {
    "logits, standard": ("st_logit", "st_gauss", "st_aug", "rft"),
    "logits, adversarial": ("at_oracle", "at_aug", "at_in", "at_out"),
    "labels, standard": ("st_label",),
    "labels, adversarial": ("at_oracle_label", "at_data"),
    "labels, CCAT": ("ccat5", "ccat10", "ccat20"),
}
OURS = ("ccat_as_written",)  # modes that are not the paper's
BASE = (AT[0], ST[0], ST_LABEL[0])
SOURCE = "sections 1 and 5"


def students(lab: Lab) -> list[Student]:
    """Every checkpoint of the runs that experiments before this one asked for, and of AT, ST and ST-label, of four layers, trained.

    Not of "CCAT as written", which learns nothing by design: it would only lengthen the correlation's low end.
    """
    for student in BASE:
        lab.run_of(student)
    runs = sorted((s for s in lab.runs if s.nets == NETS[0] and s.mode not in OURS), key=lambda s: (s.mode, s.run))
    return [Student(s.mode, t, s.run) for s in runs for t in lab.epochs(s.mode)]


def claims(found: Pearson) -> list[dict[str, Any]]:
    """The rank correlation of mean MBNC and robust accuracy."""
    return [
        compare("MBNC (mean over layers) and robust accuracy rise together: Spearman's rank correlation above 0.6", found.r, ">", 0.6,
                source=SOURCE, strong=True,
                if_failed="Reading: modes trained on labels have logits of another scale than the oracle's, for which the attack on logits is a weak "
                "one (table 3), so they stand high with little specialization; the correlation without them is beside it. Where that fails as "
                "well: size."),
    ]  # fmt: skip


def _rank_correlation(points: Iterable[tuple[float, float]]) -> Pearson:
    pairs = torch.tensor(list(points), dtype=torch.float64)
    return spearman(pairs[:, 0], pairs[:, 1])


def within(points: dict[Student, tuple[float, float]]) -> dict[str, Pearson]:
    """The rank correlation within each family that has students, and, last, of all pairs of ranks that each family gives its own."""
    found, ranks = {}, []
    for name, modes in FAMILIES.items():
        mine = [p for s, p in points.items() if s.mode in modes]
        if mine:
            found[f"within: {name}"] = _rank_correlation(mine)
            ranks.append(_centred_ranks(mine))
    both = torch.cat(ranks)
    return found | {"within families, pooled": pearson(both[:, 0], both[:, 1])}


def _centred_ranks(points: Iterable[tuple[float, float]]) -> Tensor:
    """Ranks of both numbers, from -1 to 1 in steps that depend on how many there are, ties sharing their mean."""
    pairs = torch.tensor(list(points), dtype=torch.float64)
    pairs = pairs[~pairs.isnan().any(1)]
    above = (pairs[:, None] > pairs[None]).double().sum(1) - (pairs[:, None] < pairs[None]).double().sum(1)
    return above / len(pairs)


def run(lab: Lab) -> dict[str, Any]:
    """A point for each student: robust accuracy against MBNC."""
    everybody = students(lab)
    points: dict[Student, tuple[float, float]] = {}
    cells, curves = [], []
    by_layer = {s: [mbnc(nc) for nc in lab.correlation(s)] for s in everybody}
    for s in everybody:
        got = lab.accuracy(s, linf_pgd(lab), images=lab.preset.matrix_images, repetitions=1)
        points[s] = (mean(by_layer[s]), got.mean)
        cells += [
            cell(s.title, "robust accuracy", got, group="Students"),
            number(s.title, "MBNC, mean over layers", points[s][0], len(by_layer[s]), group="Students"),
        ]
    kind = {s: KINDS.get(s.mode, str(style(s)["family"])) for s in everybody}
    drawn = [s for s in everybody if not math.isnan(points[s][0])]
    for name in dict.fromkeys(kind[s] for s in drawn):
        mine = [s for s in drawn if kind[s] == name]
        curves.append({
            "panel": "Specialization and robustness", "name": name, "x": [points[s][0] for s in mine], "y": [points[s][1] for s in mine],
            "style": {"family": name, "shade": 0.75}, "x_label": "MBNC, mean over layers", "y_label": "robust accuracy, %", "kind": "scatter",
        })  # fmt: skip
    whole = _rank_correlation(points.values())
    families = within(points)
    for first in curves[:1]:
        pooled = families["within families, pooled"]
        first["annotation"] = f"Spearman {whole.r:.3f} (n = {whole.n}); within families, pooled: {pooled.r:.3f}"
    rows = {"all students": whole}
    rows["students trained on logits"] = _rank_correlation(p for s, p in points.items() if s.mode not in ON_LABELS)
    for layer in range(len(by_layer[everybody[0]])):
        at_layer = [(by_layer[s][layer], points[s][1]) for s in everybody]
        rows[f"all students, MBNC of layer {layer}"] = _rank_correlation(at_layer)
    rows |= families
    cells += [
        number(row, "Spearman", r.r, r.n, group="Rank correlation of MBNC and robust accuracy") for row, r in rows.items()
    ]
    return {
        "title": "All students: specialization and robustness go together",
        "summary": "Every checkpoint of every student of this run with four layers: how specialized its nodes are (mean best normalized correlation, "
        "mean over layers) and how robust it is under the l_inf attack.",
        "cells": cells,
        "curves": curves,
        "claims": claims(whole),
        "settings": {
            **training_settings(lab),
            "attack": linf_pgd(lab).identity,
            "images": min(lab.preset.matrix_images, len(lab.data.test)),
            "students": len(everybody),
        },
        "notes": [
            size_note(lab),
            "The paper prints no number for this. The students are those that the experiments before this one used, and always AT, ST and ST-label; "
            "checkpoints of one training are not independent of one another. The degenerate "
            "variant of CCAT (table 4), which is not the paper's, is left out. MBNC is not defined, and no point drawn, where a layer's oracle "
            "nodes are all dead.",
            "Within families: the students that are trained on the same targets in the same way. Their logits have one scale, so that the attack is "
            "as strong on all of them. High there but not over all students: what separates families is the attack's reading (table 3), not how "
            "specialized nodes are. Low there too: size, or specialization does not decide. Pooled: each student's ranks are taken among its own "
            "family, so that no difference between families counts.",
        ],
    }
