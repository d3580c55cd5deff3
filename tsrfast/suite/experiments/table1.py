"""Table 1: students of adversarial and standard training under six attacks."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import AT_AND_ST300, cell, linf_pgd, size_note, training_settings
from tsrfast.suite.lab import Lab, Student
from tsrfast.suite.stages import AttackSpec

MAIN = "Robust accuracy"
# mean in %, and sigma^2 in fraction^2: columns AT(50) ... AT(300), ST(300).
PUBLISHED: dict[str, list[tuple[float, float]]] = {
    "l_inf PGD": [(78.79, 1.1e-4), (84.02, 4.2e-5), (87.57, 2.8e-5), (88.01, 8.2e-6), (88.20, 2.9e-5), (74.39, 4.2e-5)],
    "l_2 PGD": [(91.85, 7.3e-6), (95.98, 7.0e-6), (96.21, 4.7e-6), (95.95, 4.8e-6), (96.31, 5.4e-6), (94.01, 1.0e-5)],
    "l_1 PGD": [(92.30, 9.9e-6), (96.18, 6.5e-6), (96.56, 3.1e-6), (96.36, 3.0e-6), (96.59, 3.7e-6), (94.51, 4.8e-6)],
    "FGSM": [(90.65, 7.7e-6), (95.18, 4.7e-6), (95.55, 6.8e-6), (94.87, 5.3e-6), (95.28, 4.9e-6), (91.12, 2.1e-5)],
    "CW": [(78.89, 1.0e-4), (91.50, 4.9e-5), (91.96, 4.3e-5), (94.52, 2.2e-5), (92.63, 1.3e-5), (86.19, 2.7e-5)],
    "Blackbox-transfer": [(43.14, 2.6e-5), (45.31, 4.7e-5), (46.06, 4.2e-5), (46.68, 3.7e-5), (46.99, 2.1e-5), (43.48, 3.2e-5)],
}
WHITE_BOX = ("l_inf PGD", "CW", "FGSM", "l_2 PGD", "l_1 PGD")
SURROGATE = Student("st_logit", 300, run=1)
SOURCE = "Table 1"


def attacks(lab: Lab) -> dict[str, AttackSpec]:
    """The white-box rows; parameters beyond l_inf are not published."""
    p = lab.preset
    return {
        "l_inf PGD": linf_pgd(lab),
        "l_2 PGD": AttackSpec("l2", p.l2_eps, 2.5 * p.l2_eps / p.steps, p.steps),
        "l_1 PGD": AttackSpec("l1", p.l1_eps, 2.5 * p.l1_eps / p.steps, p.steps),
        "FGSM": AttackSpec("linf", p.eps, p.eps, 1, random_start=False),
        "CW": linf_pgd(lab, "oracle_margin"),
    }


READINGS = ("FGSM, one step of 0.01", "l_2 PGD, eps = 10/255", "l_1 PGD, eps = 10/255")


def other_readings(lab: Lab) -> dict[str, AttackSpec]:
    """The published l_1 and l_2 rows look as if every norm had the radius 10/255; FGSM as one step of 0.01."""
    p = lab.preset
    readings = (
        AttackSpec("linf", p.eps, 0.01, 1, random_start=False),
        AttackSpec("l2", p.eps, 2.5 * p.eps / p.steps, p.steps),
        AttackSpec("l1", p.eps, 2.5 * p.eps / p.steps, p.steps),
    )
    return dict(zip(READINGS, readings, strict=True))


def _rows(lab: Lab) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, list[float]]]:
    """All cells, and the measured values of the published rows and of their other readings."""
    cells: list[dict[str, Any]] = []
    values: dict[str, list[float]] = {}
    readings: dict[str, list[float]] = {}
    for row, published in PUBLISHED.items():
        for student, (mean, variance) in zip(AT_AND_ST300, published, strict=True):
            if row == "Blackbox-transfer":
                got = lab.accuracy(student, linf_pgd(lab), "t(x)", together=AT_AND_ST300, source=SURROGATE)
            else:
                got = lab.accuracy(student, attacks(lab)[row])
            values.setdefault(row, []).append(got.mean)
            cells.append(cell(row, student.name, got, mean, group=MAIN, published_std=100 * variance**0.5))
    for row, attack in other_readings(lab).items():
        for k, student in enumerate(AT_AND_ST300):
            published_row = PUBLISHED[row.split(",")[0]]
            got = lab.accuracy(student, attack)
            readings.setdefault(row, []).append(got.mean)
            cells.append(
                cell(row, student.name, got, published_row[k][0], group="Other readings of the unpublished radii and steps")
            )
    group = "Other labels: how often argmax s(x') is ..."
    for label in ("t(x)", "y"):
        for student in AT_AND_ST300:
            cells.append(cell(f"l_inf PGD, {label}", student.name, lab.accuracy(student, linf_pgd(lab), label), group=group))
    for label in ("t(x')", "t(x)", "y"):
        for student in AT_AND_ST300:
            got = lab.accuracy(student, linf_pgd(lab), label, together=AT_AND_ST300, source=SURROGATE)
            cells.append(cell(f"Blackbox-transfer, {label}", student.name, got, group=group))
    for student in AT_AND_ST300:
        cells.append(
            cell("clean images: s(x) = t(x)", student.name, lab.accuracy(student, linf_pgd(lab), "clean"), group=group)
        )
    return cells, values, readings


def _claims(values: dict[str, list[float]], readings: dict[str, list[float]]) -> list[dict[str, Any]]:
    linf = values["l_inf PGD"]
    size = "Size: these cells differ by a few points on a few hundred images, and students are far from converged. "
    claims = [
        monotone("AT rises with epochs under l_inf PGD", linf[:-1], "increasing", source=SOURCE, strong=True,
                 if_failed=size + "The rise from AT(50) to AT(300) is what such a size can show."),
        compare("AT(300) > ST(300) under l_inf PGD", linf[4], ">", linf[5], source=SOURCE, strong=True,
                if_failed="A faithful run must show this: look for a bug before anything else."),
        compare("AT(50) already beats ST(300) under l_inf PGD", linf[0], ">", linf[5], source=SOURCE + ", section 5.4",
                if_failed="Size: what stands for 50 epochs is one short pass here, while ST(300) has seen six times as many images. "
                "AT passes ST(300) at the next checkpoint that is higher."),
    ]  # fmt: skip
    weak = (
        "Size: this attack is weak, so the row follows agreement on clean images, and after few epochs ST, trained on clean images, is "
        "ahead there (last row of the third table). The longer AT runs are the sharper comparison."
    )
    for row, v in values.items():
        claims.append(compare(
            f"every AT from 100 epochs on beats ST(300) under {row}", min(v[1:5]), ">", v[5], source=SOURCE,
            if_failed=size if row == "l_inf PGD" else weak,
        ))  # fmt: skip
    for k, student in enumerate(AT_AND_ST300):
        claims.append(compare(
            f"{student.name}: l_inf PGD is the strongest white-box attack", linf[k], "<=",
            min(values[row][k] for row in WHITE_BOX[1:]), source=SOURCE, strong=True,
            if_failed="Reading: the radii of the other norms are not published; balls of l_2 0.5 and l_1 12 can be larger than that of "
            "l_inf 10/255. With 10/255 in every norm they are far weaker (second table).",
        ))  # fmt: skip
        claims.append(monotone(
            f"{student.name}: accuracy rises in the order l_inf PGD, CW, FGSM, l_2 PGD, l_1 PGD",
            [values[row][k] for row in WHITE_BOX], "increasing", source=SOURCE,
            if_failed="Reading: CW's objective is not published. The margin at t(x'), taken here, moves the student alone and leaves the "
            "oracle's answer where it is, so it costs less agreement with t(x') than FGSM, which drives both. And l_1 12 is stronger "
            "than l_2 0.5. The claim after this one has the reading that the published numbers suggest.",
        ))  # fmt: skip
        claims.append(monotone(
            f"{student.name}: the same without CW, with radius 10/255 in every norm and FGSM as one step of 0.01",
            [linf[k], *(readings[row][k] for row in READINGS)], "increasing", source=SOURCE + ", as its numbers suggest",
            if_failed=size + "l_2 and l_1 of radius 10/255 hardly change an image, so their rows differ by less than their spread.",
        ))  # fmt: skip
    transfer = values["Blackbox-transfer"]
    level = (
        "Reading: scored against t(x), since the published level of 43 to 47 % is out of reach where the oracle's answer moves along; so "
        "scored, the row follows agreement on clean images. Against t(x') (third table) it rises with epochs where AT does. What the paper "
        "attacked with and scored against is not published: an attack by cross-entropy against true labels on a surrogate trained on true "
        "labels would decide."
    )
    claims += [
        monotone("black-box accuracy of AT rises with epochs", transfer[:-1], "increasing", source=SOURCE, if_failed=level),
        compare("black-box accuracy of all students lies within 5 points", max(transfer) - min(transfer), "<", 5.0,
                source=SOURCE + " (43.14 to 46.99)", if_failed=level),
    ]  # fmt: skip
    return claims


def run(lab: Lab) -> dict[str, Any]:
    """Six attacks on AT at five epochs and on ST(300)."""
    cells, values, readings = _rows(lab)
    p = lab.preset
    return {
        "title": "Table 1: robust accuracy of adversarial and standard training",
        "summary": "How often the student gives the oracle's answer on adversarial images made to drive the two apart. "
        "AT(T): oracle-adversarial training for T epochs; ST(300): standard training on the oracle's logits.",
        "cells": cells,
        "curves": [],
        "claims": _claims(values, readings),
        "settings": {
            **training_settings(lab),
            "attacks": {row: vars(a) for row, a in {**attacks(lab), **other_readings(lab)}.items()},
            "surrogate": "ST-logit, another initialisation and order, same epochs as ST(300)",
            "repetitions": p.repetitions,
            "images a repetition": min(p.eval_images, len(lab.data.test)),
        },
        "notes": [
            size_note(lab),
            f"Evaluation takes {p.steps} steps of {p.step_size:g} (the paper: 40 steps of 0.01), in pixel space, from a random start, last "
            "iterate. The paper does not say in which space; in normalised units students are far more robust than published.",
            "The label is the oracle's answer on the adversarial image, t(x') (section 5.4); black-box transfer is scored against t(x), the "
            "reading that can give the published level. The third table has the others.",
            "The published spread is the root of sigma^2, read as a fraction squared; ours is over repetitions with fresh random starts on "
            "fresh random subsets of the test images.",
            "The paper's text says that AT beats ST(300) at 50 epochs already; its table shows this for l_inf only, so only that is claimed.",
        ],
    }  # fmt: skip
