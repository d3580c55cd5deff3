"""`global`'s families of students: the correlation within each, and how its picture tells them apart."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from tsrfast.suite.experiments import global_
from tsrfast.suite.experiments._common import style
from tsrfast.suite.lab import Student
from tsrfast.suite.modes import MODES
from tsrfast.suite.report import figures, load_results, render

RECORDS = sorted((Path(__file__).resolve().parents[2] / "bench" / "records").glob("quick_*.json"))


def test_every_mode_is_in_one_family():
    members = [mode for modes in global_.FAMILIES.values() for mode in modes]
    assert sorted([*members, *global_.OURS]) == sorted(MODES)
    on_labels = [mode for name, modes in global_.FAMILIES.items() if name.startswith("labels") for mode in modes]
    assert sorted(on_labels) == sorted(global_.ON_LABELS)


def family(mode, *points):
    return {Student(mode, t): p for t, p in zip((50, 100, 150, 200, 300), points, strict=False)}


def test_what_separates_families_does_not_count_within():
    """Rising in each, falling from one to the other: no correlation at all, and a perfect one within."""
    points = family("at_oracle", (0.1, 80), (0.2, 81), (0.3, 82)) | family(
        "st_label", (0.7, 10), (0.8, 11), (0.9, 12), (0.95, 12)
    )
    found = global_.within(points)
    assert list(found) == ["within: logits, adversarial", "within: labels, standard", "within families, pooled"]
    assert [r.n for r in found.values()] == [3, 4, 7]
    first, second, pooled = (r.r for r in found.values())
    assert first == pytest.approx(1)
    assert second == pytest.approx(global_._rank_correlation([(1, 1), (2, 2), (3, 3), (4, 3)]).r)
    assert pooled > 0.95
    assert global_._rank_correlation(points.values()).r < 0
    # Turned round in one family, it shows there.
    turned = global_.within(points | family("at_oracle", (0.3, 80), (0.2, 81), (0.1, 82)))
    assert turned["within: logits, adversarial"].r == pytest.approx(-1)
    assert turned["within families, pooled"].r < 0.5


def test_few_or_undefined_students():
    found = global_.within(family("rft", (0.5, 50)) | family("ccat5", (math.nan, 1), (0.2, 2), (0.3, 3)))
    assert math.isnan(found["within: logits, standard"].r)
    assert found["within: labels, CCAT"] == global_._rank_correlation([(0.2, 2), (0.3, 3)])
    assert found["within families, pooled"].n == 3


def test_cells_are_the_students(tiny):
    e = tiny.results["experiments"]["global"]
    rows = {c["row"]: c for c in e["cells"] if c["column"] == "Spearman"}
    sizes = {row: c["n"] for row, c in rows.items() if row.startswith("within: ")}
    assert set(sizes) == {f"within: {name}" for name in global_.FAMILIES} - {
        "within: labels, adversarial"
    }  # no experiment has these
    assert all(n >= 3 for n in sizes.values())
    assert sum(sizes.values()) == rows["all students"]["n"] == rows["within families, pooled"]["n"] == e["settings"]["students"]
    (claim,) = e["claims"]  # the paper's is still the one over all
    assert claim["left"] == rows["all students"]["measured"]
    students = {c["row"]: {} for c in e["cells"] if c["group"] == "Students"}
    for c in e["cells"]:
        if c["group"] == "Students":
            students[c["row"]][c["column"]] = c["measured"]
    points = [tuple(v.values())[::-1] for name, v in students.items() if name.startswith("ST-label(")]
    assert rows["within: labels, standard"]["measured"] == pytest.approx(global_._rank_correlation(points).r)


# --- the picture --------------------------------------------------------------------------------------------------------

# Linear RGB as the colour-blind see it (Machado et al. 2009, severity 1).
SIGHT = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, sight):
    """CIE L*a*b* of an sRGB colour."""
    v = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(sight, dtype=torch.float64) @ linear).clamp(0, 1)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=torch.float64)
    f = (to_xyz @ seen / torch.tensor([0.9505, 1.0, 1.089], dtype=torch.float64)).clamp_min(1e-12).pow(1 / 3)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT.values(), ids=SIGHT)
def test_colours_are_distinct_to_everybody(sight):
    seen = [lab(colour, sight) for colour in figures.COLOURS]
    assert min(float((a - b).norm()) for a, b in itertools.combinations(seen, 2)) > 10
    assert min(float((a - lab("#ffffff", sight)).norm()) for a in seen) > 30


def test_families_have_colours_and_markers_of_their_own():
    kinds = list(dict.fromkeys(global_.KINDS.get(m, style(Student(m, 50))["family"]) for m in MODES if m not in global_.OURS))
    looks = figures.looks([{"name": name} for name in kinds]).values()
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == len(kinds)


def test_a_lone_scatter_keeps_its_familys_colour(tiny):
    """Figure 2's."""
    fig2 = figures.draw(tiny.results["experiments"]["fig2"])
    colours = Image.open(io.BytesIO(fig2.png)).convert("RGB").getcolors(1 << 24)
    assert any(b > r + 40 for _, (r, _, b) in colours)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_old_records_still_render(path, tmp_path):
    results = load_results(path)
    page = render(results, tmp_path).read_text()
    assert all(e["title"].partition(":")[0] in page for e in results["experiments"].values())
    if "global" in results["experiments"]:
        assert (tmp_path / "figures" / "global.png").stat().st_size > 10_000
