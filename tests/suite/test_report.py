"""The report: what is in `results.json` is on the page and in the CSV files, nothing else is, and nothing runs."""

import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from tsrfast._page import numerals
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.suite.report import load_results, load_run, render, validate

EPOCHS = (50, 100, 150, 200, 300)
ATTACKS = {
    "l_inf PGD": (78.79, 84.02, 87.57, 88.01, 88.20, 74.39),
    "l_2 PGD": (91.85, 95.98, 96.21, 95.95, 96.31, 94.01),
    "l_1 PGD": (92.30, 96.18, 96.56, 96.36, 96.59, 94.51),
    "FGSM": (90.65, 95.18, 95.55, 94.87, 95.28, 91.12),
    "CW": (78.89, 91.50, 91.96, 94.52, 92.63, 86.19),
    "Blackbox-transfer": (43.14, 45.31, 46.06, 46.68, 46.99, 43.48),
}
SETTINGS = {
    "teacher": {"widths": [64, 64, 64, 64], "pruned to": [45, 32, 32, 20], "epochs": 12, "fine-tuning epochs": 4},
    "student": {"widths": [50, 35, 35, 22], "epochs": [2, 4, 6, 8, 12], "optimiser": {"name": "SGD", "lr": 0.05}},
    "attack": {"norm": "linf", "eps": 10 / 255, "step_size": 0.01, "steps": 40, "objective": "oracle L2"},
    "deterministic": True,
}


def sample():
    """Results as the quick preset makes them: five experiments, every kind of cell, curve and claim."""
    rng = random.Random(7)
    models = [(f"AT({t})", {"family": "AT", "shade": i / 4, "dash": False}) for i, t in enumerate(EPOCHS)]
    models.append(("ST(300)", {"family": "ST-logit", "shade": 0.75, "dash": False}))

    spectrum = [round(8.2 * math.exp(-0.42 * k) + 0.002, 6) for k in range(27)]
    rho = [rng.uniform(-0.3, 1) for _ in range(2250)]
    scatter = [max(0.0, 1.25 - 0.75 * r + rng.gauss(0, 0.16)) for r in rho]
    fig2 = experiment(
        "Figure 2: the patches’ spectrum, and specialization against the in-plane distance",
        summary="Left: natural patches lie close to a 17-dimensional plane. Right: nodes that correlate with a "
        "teacher's node point the same way inside that plane.\n\nThe paper's Pearson score is lost in its image.",
        curves=[
            curve(
                "patch spectrum",
                "eigenvalue",
                list(range(1, 28)),
                spectrum,
                {"family": "data", "shade": 0.6},
                "component",
                "eigenvalue",
                kind="bar",
                log_y=True,
                marks=[{"x": 17.5, "text": "17 components"}],
            ),
            curve(
                "correlation and distance",
                "ST(300)",
                rho,
                scatter,
                {"family": "ST-logit", "shade": 0.7},
                "normalised correlation",
                "in-plane distance",
                kind="scatter",
                annotation="Pearson r = −0.61 (n = 2250)",
            ),
        ],
        claims=[
            claim("17 components carry nearly all the variance", 0.99891, ">", 0.99, True, "paper, Section 5.4", True),
            claim(
                "correlation and distance are strongly negatively correlated", -0.6138, "<", -0.5, True, "paper, Figure 2", True
            ),
        ],
    )
    fig3 = experiment(
        "Figure 3: sorted best correlations, layer by layer",
        summary="Every teacher node's best correlation with a student node, sorted. AT lifts the curve.",
        curves=[
            curve(
                f"layer {layer}",
                name,
                list(range(n)),
                [round(min(1, 0.35 + 0.1 * i - 0.06 * layer + 0.5 * (k / n) ** 0.7), 4) for k in range(n)],
                style,
                "teacher node (sorted)",
                "best correlation",
            )
            for layer, n in enumerate((45, 32, 32, 20), 1)
            for i, (name, style) in enumerate(models[-1:] + models[:-1])
        ],
        claims=[
            claim(
                "mean best correlation rises with the epochs of AT, layer 1",
                [0.71, 0.76, 0.79, 0.81, 0.812],
                "increasing",
                None,
                True,
                "paper, Figure 3",
                True,
            ),
            claim(
                "AT(300) lies above ST(300) in layer 4",
                0.4411,
                ">",
                0.4462,
                False,
                "paper, Figure 3",
                False,
                "Within the spread of three seeds (0.02); layer 4 has twelve live nodes at this size.",
            ),
        ],
    )
    fig4 = experiment(
        "Figure 4: distance to the teacher inside and outside the plane",
        summary="AT is much closer to the teacher in both, and most of it happens in the first epochs.",
        curves=[
            curve(
                panel,
                name,
                list(range(45)),
                [round((1.1 - 0.13 * i) * (0.15 + 0.85 * k / 44) * scale, 4) for k in range(45)],
                style,
                "teacher node (sorted)",
                label,
            )
            for panel, label, scale in (("in-plane", "ε_in", 1.0), ("out-of-plane", "ε_out", 0.6))
            for i, (name, style) in enumerate(models[-1:] + models[:-1])
        ],
        claims=[claim("mean ε_in of AT(300) lies below ST(300)", 0.31, "<", 0.72, True, "paper, Figure 4", True)],
    )
    cells = []
    for row, values in ATTACKS.items():
        for j, (column, published) in enumerate(zip([m for m, _ in models], values, strict=True)):
            missing = row == "Blackbox-transfer"
            measured = None if missing else round(published - 17 + 1.4 * j - 4 * (j == 5) + rng.gauss(0, 1), 4)
            cells.append(
                cell(
                    row,
                    column,
                    published,
                    measured,
                    None if missing else 0.8123,
                    None if missing else 600,
                    published_std=0.65 if row == "l_inf PGD" else None,
                    note="the surrogate is not trained in this preset" if missing else None,
                )
            )
    for row in ("l_inf PGD", "l_2 PGD", "l_1 PGD", "FGSM"):
        for name, _ in models:
            cells.append(cell(row, name, None, round(rng.uniform(55, 90), 3), 0.5, 600, group="radius 10/255 in every norm"))
    table1 = experiment(
        "Table 1: AT and ST under six attacks",
        cells=cells,
        settings=SETTINGS,
        summary="Robust accuracy: how often student and teacher agree on an adversarial image of the student.",
        claims=[
            claim("AT(300) > ST(300) under l_inf PGD", 76.2, ">", 51.3, True, "paper, Table 1", True),
            claim(
                "AT rises with epochs under l_inf PGD",
                [61.2, 68.4, 71.0, 74.9, 76.2],
                "increasing",
                None,
                True,
                "paper, Table 1",
                True,
            ),
            claim(
                "accuracy under FGSM is below that under l_2 PGD for AT(50)",
                74.02,
                "<",
                73.95,
                False,
                "paper, Table 1",
                False,
                "One step of 10/255 is far weaker than the published drop suggests; the "
                "paper's FGSM is probably one step of 0.01 <(see the notes)>.",
            ),
            claim("black-box accuracy is nearly flat", None, "in", [43, 47], None, "paper, Table 1"),
        ],
        notes=[
            "eps and step size are read in pixels [0, 1]; the paper does not say, and other units halve the attack.",
            "l_1 and l_2 radii are unpublished: eps 12 and 0.5 in the main table, 10/255 in the second.",
        ],
    )
    published3 = {"logit": (23.12, 30.72, 36.72, 48.52, 62.77), "label": (19.08, 20.81, 22.34, 23.42, 25.79)}
    cells = [
        cell(row, str(t), v, round(v + 12 + rng.gauss(0, 3), 2), 1.25, 600)
        for row, values in published3.items()
        for t, v in zip(EPOCHS, values, strict=True)
    ]
    for model in ("logit", "label"):
        for objective in ("oracle L2", "CE against t(x')", "CE against t(x)", "KL"):
            for label in ("t(x')", "t(x)", "y"):
                paper = (objective, label) == ("oracle L2", "t(x')")
                cells.append(
                    cell(
                        objective,
                        label,
                        None,
                        round(rng.uniform(2, 70), 2),
                        None,
                        600 if paper else 300,
                        group=f"ST-{model}(300): attack objective × label of success",
                        note="the paper's reading" if paper else None,
                    )
                )
    table3 = experiment(
        "Table 3: standard training with logits and with labels",
        cells=cells,
        settings=SETTINGS,
        summary="Students that see the teacher's logits become more robust than students that see its labels.",
        claims=[
            claim(
                "logit > label at 300 epochs",
                58.1,
                ">",
                61.7,
                False,
                "paper, Table 3",
                True,
                "The literal objective lets a label student win: see the matrix.",
            )
        ],
    )
    experiments = {"fig2": fig2, "fig3": fig3, "fig4": fig4, "table1": table1, "table3": table3}
    data = {"name": "cifar10", "fingerprint": "3f9ac0d1" * 8, "sizes": {"train": 10000, "test": 2000}}
    return {
        "schema": 1,
        "tsrfast": "0.1.0",
        "preset": "quick",
        "seed": 0,
        "data": data,
        "device": "cpu",
        "experiments": experiments,
    }


RUN = {
    "started": "2026-01-02 03:04:05",
    "seconds": 611.4,
    "command": "tsrfast reproduce --preset quick",
    "machine": {"cpu": "two cores", "memory": "8 GiB"},
    "stages": [{"name": "teacher", "seconds": 77.0, "cached": False}, {"name": "students", "seconds": 0.2, "cached": True}],
}


def experiment(title="t", summary="s", cells=(), curves=(), claims=(), settings=None, notes=()):
    return {
        "title": title,
        "summary": summary,
        "cells": list(cells),
        "curves": list(curves),
        "claims": list(claims),
        "settings": settings or {},
        "notes": list(notes),
    }


def cell(row, column, published, measured, std, n, group="main", unit="%", **more):
    return {
        "row": row,
        "column": column,
        "published": published,
        "measured": measured,
        "std": std,
        "n": n,
        "group": group,
        "unit": unit,
        **{k: v for k, v in more.items() if v is not None},
    }


def curve(panel, name, x, y, style=None, x_label="x", y_label="y", **more):
    return {"panel": panel, "name": name, "x": x, "y": y, "style": style or {}, "x_label": x_label, "y_label": y_label, **more}


def claim(text, left, relation, right, holds, source="paper", strong=False, analysis=None):
    return {
        "text": text,
        "left": left,
        "relation": relation,
        "right": right,
        "holds": holds,
        "source": source,
        "strong": strong,
        "analysis": analysis,
    }


def only(**parts):
    return {**sample(), "experiments": {"one": experiment(**parts)}}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects ids, links, sources and the visible text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.hrefs, self.sources, self.tags, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key == "href":
                self.hrefs.append(value)
            if key in ("src", "srcset", "poster", "action", "data"):
                self.sources.append(value)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = render(sample(), folder, run=RUN)
    return folder, Page(path.read_text("utf-8")), path.read_text("utf-8")


def test_every_cell_is_on_the_page(rendered):
    text = rendered[1].text.replace("\N{MINUS SIGN}", "-")
    for e in sample()["experiments"].values():
        assert e["title"] in text
        for c in e["cells"]:
            for key in ("measured", "published", "std", "published_std"):
                if c.get(key) is not None:
                    assert f"{c[key]:.2f}" in text
            if c["measured"] is not None and c["published"] is not None:
                assert f"({c['measured'] - c['published']:+.2f})" in text
            assert c["row"] in text
            assert c["column"] in text
        for note in e["notes"]:
            assert note in text


def test_a_cell_stands_in_its_row_and_column(tmp_path):
    cells = [cell("r1", "c1", 1.0, 11.0, None, 5), cell("r2", "c2", None, 22.0, None, 5)]
    text = render(only(cells=cells), tmp_path).read_text("utf-8")
    rows = re.findall(r"<tr><th scope=\"row\">(r\d)</th>(.*?)</tr>", text, re.S)
    found = {row: [re.sub(r"<[^>]*>|\s", "", c) for c in re.findall(r"<td>(.*?)</td>", body, re.S)] for row, body in rows}
    assert found == {"r1": ["11.00published1.00difference(+10.00)", ""], "r2": ["", "22.00\N{EN DASH}notpublished"]}


def test_claims_are_counted_and_shown_with_their_numbers(rendered):
    _, page, html = rendered
    text = page.text
    claims = [c for e in sample()["experiments"].values() for c in e["claims"]]
    held, failed = sum(c["holds"] is True for c in claims), sum(c["holds"] is False for c in claims)
    assert f"{held} of {len(claims)} published claims hold here; {failed} fail; 1 was not run." in text
    strong = [c for c in claims if c["strong"]]
    assert html.count('class="verdict held"') == held + sum(c["holds"] is True for c in strong)
    assert html.count('class="verdict failed"') == failed + sum(c["holds"] is False for c in strong)
    for part in (
        "76.2 > 51.3",
        "61.2 → 68.4 → 71 → 74.9 → 76.2 (increasing)",
        "0.4411 > 0.4462",
        "74.02 < 73.95",
        "\N{EN DASH} in [43, 47]",
        "\N{MINUS SIGN}0.6138 < \N{MINUS SIGN}0.5",
    ):
        assert part in text
    assert all(c["analysis"] in text for c in claims if c["analysis"])
    first = text.index("AT(300) > ST(300) under l_inf PGD")
    assert first < text.index("Figure 2: the patches", text.index("Figure 2: the patches") + 1)  # strong ones on top


def test_numbers_that_differ_look_different(tmp_path):
    results = only(claims=[claim("close", 0.999912, ">", 0.999911, True), claim("in", 0.5, "in", [0, 1], True)])
    text = Page(render(results, tmp_path).read_text("utf-8")).text
    assert "0.999912 > 0.999911" in text
    assert "0.5 in [0, 1]" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numerals.duration(59.97), "1 min 00 s"),
        (numerals.duration(0.44), "0.4 s"),
        (numerals.duration(7800), "2 h 10 min"),
        (numerals.fixed(-12345.678, 2), "\N{MINUS SIGN}12,345.68"),
        (numerals.fixed(4.2e-5, 2), "4.2e\N{MINUS SIGN}05"),
        (numerals.signed(-0.001, 2), "0.00"),
        (numerals.signed(3, 1), "+3.0"),
        (numerals.decimals([78.79, 1.0], "%"), 2),
        (numerals.decimals([3, 2250], ""), 0),
        (numerals.decimals([0.61], ""), 3),
        (numerals.apart([12345.67, 3, 3.0]), ["12,346", "3", "3"]),
        (numerals.apart([]), []),
    ],
)
def test_numbers_as_text(text, expected):
    assert text == expected


def test_a_missing_measurement_is_a_dash(tmp_path):
    cells = [cell("r", "c", 43.14, None, None, None), cell("r", "d", 45.31, None, None, None)]
    text = Page(render(only(cells=cells), tmp_path).read_text("utf-8")).text
    assert text.count("not run") == 2
    assert "43.14" in text
    assert "None" not in text
    assert "nan" not in text


def test_the_page_is_self_contained_and_balanced(rendered):
    _, page, html = rendered
    assert page.sources
    assert all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert len(page.sources) == 3
    assert all(h.startswith("#") or h == "data:," for h in page.hrefs)
    assert {h[1:] for h in page.hrefs if h.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[^\"]*", "", html))


def test_the_page_is_accessible(rendered):
    _, page, html = rendered
    assert ("html", {"lang": "en"}) in page.tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == sum(tag == "caption" for tag, _ in page.tags) == 6
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_text_from_the_results_is_escaped(tmp_path):
    bad = '<script>alert("x")</script>'
    results = only(
        title=bad,
        summary=bad,
        notes=[bad],
        settings={bad: {bad: bad}},
        cells=[cell(bad, bad, 1.0, 2.0, 0.1, 5, group=bad, unit=bad, note=bad)],
        curves=[curve(bad, bad + " $\\frac", [0, 1], [0, 1], annotation=bad, marks=[{"x": 0, "text": bad}])],
        claims=[claim(bad, 1, ">", 0, False, source=bad, strong=True, analysis=bad)],
    )
    results["data"] = {"name": bad, "fingerprint": bad, "sizes": {bad: 1}}
    page = Page(render(results, tmp_path, run={"command": bad, "machine": {bad: bad}}).read_text("utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(bad) > 10


def test_same_results_same_bytes(rendered, tmp_path):
    folder = rendered[0]
    code = (
        "import sys\nfrom tsrfast.suite.report import *\n"
        "render(load_results(sys.argv[1]), sys.argv[2], run=load_run(sys.argv[3]))"
    )
    (tmp_path / "results.json").write_text(json.dumps(sample()))
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    # another process with another hash seed and a user's own matplotlib settings
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nsavefig.dpi: 30\n")
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "results.json", tmp_path / "out", tmp_path / "run.json"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "5", "MATPLOTLIBRC": str(tmp_path)},
    )
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    again = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == again
    assert len(files) == 1 + 3 + 2 + 8
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
        if name.suffix == ".png":
            with Image.open(folder / name) as picture:
                assert "Software" not in picture.info


def test_csv_round_trip(rendered):
    folder = rendered[0]
    for name, e in sample()["experiments"].items():
        if e["cells"]:
            read = rows(folder / "csv" / f"{name}_cells.csv")
            wanted = [{k: c.get(k) for k in read[0]} for c in e["cells"]]
            for row in read:
                for key in ("published", "published_std", "measured", "std", "n"):
                    row[key] = float(row[key]) if row[key] else None
                row["note"] = row["note"] or None
            assert read == wanted
    points = rows(folder / "csv" / "fig3_layer_2.csv")
    wanted = [
        (c["name"], x, y)
        for c in sample()["experiments"]["fig3"]["curves"]
        if c["panel"] == "layer 2"
        for x, y in zip(c["x"], c["y"], strict=True)
    ]
    assert [(p["curve"], int(p["x"]), float(p["y"])) for p in points] == wanted


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode())))


def test_panels_whose_names_collide_get_files_of_their_own(tmp_path):
    render(
        only(
            cells=[cell("r", "c", 1, 2, None, 1)],
            curves=[curve(p, "a", [0], [i]) for i, p in enumerate(("Cells", "cells", "ε", "η"))],
        ),
        tmp_path,
    )
    assert {p.name for p in (tmp_path / "csv").iterdir()} == {
        "one_cells.csv",
        "one_cells_2.csv",
        "one_cells_3.csv",
        "one_curves.csv",
        "one_curves_2.csv",
    }


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"cells": [cell("r", "c", None, 1.5, None, 1)]},
        {"curves": [curve("p", "a", [], [])]},
        {"curves": [curve("p", "a", [0, 1, 2], [1e-3, None, 0], log_y=True)]},
        {"curves": [curve("p", "a", [0, 1], [0, -1], log_y=True, kind="bar")]},
        {"curves": [curve(f"p{i}", "a", [1], [1], kind=k) for i, k in enumerate(("line", "bar", "scatter", "bar", "bar"))]},
        {"curves": [curve("p", n, [0, 1], [1, 2], kind="bar", style={"family": "new"}) for n in "ab"]},
    ],
)
@pytest.mark.filterwarnings("error")
def test_experiments_with_little_in_them(tmp_path, parts):
    text = Page(render(only(**parts), tmp_path).read_text("utf-8")).text
    assert "No claims were evaluated." in text
    assert (tmp_path / "figures" / "one.png").exists() == bool(parts.get("curves"))


def test_no_experiments(tmp_path):
    assert "no experiments" in Page(render({**sample(), "experiments": {}}, tmp_path).read_text("utf-8")).text


def test_run_is_optional_and_apart(rendered, tmp_path):
    text = rendered[1].text
    assert text.index("This run") > text.index("Table 3: standard training", text.index("Settings"))
    assert "10 min 11 s" in text
    assert "from the store" in text
    without = Page(render(sample(), tmp_path).read_text("utf-8")).text
    assert "This run" not in without
    assert load_run(tmp_path / "run.json") is None
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is not valid JSON"):
        load_run(tmp_path / "run.json")


def test_load_results_round_trip(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(sample()))
    assert load_results(tmp_path / "results.json") == sample()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ("\udcff", "not valid JSON"),
        ('{"schema": 2}', "schema must be 1, got 2"),
        ("{}", "schema must be 1, got none"),
        ('{"schema": 1}', "must have 'tsrfast'"),
        ("[" * 100000, "not valid JSON"),
        (json.dumps(sample()).replace("74.39", "NaN", 1), "NaN is not JSON"),
        (json.dumps(sample()).replace("74.39", "1e999", 1), "must be finite, got inf"),
        (json.dumps(sample()).replace("74.39", "1" + "0" * 400, 1), "must be finite"),
    ],
)
def test_unusable_results(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=re.escape(message)) as e:
        load_results(tmp_path / "results.json")
    assert "results.json" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(InputError, match="must be a JSON file"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("experiments", "table1", "cells", 3, "measured"), "61", r"table1\.cells\[3\]\.measured must be a number"),
        (("experiments", "table1", "cells", 3, "measured"), True, "must be a number, got True"),
        (("experiments", "table1", "cells", 3, "std"), float("nan"), "must be finite"),
        (("experiments", "table1", "cells", 1, "column"), "AT(50)", "a place of its own"),
        (("experiments", "fig3", "curves", 0, "y"), [1], "equally long, got 45 and 1"),
        (("experiments", "fig3", "curves", 0, "kind"), "lines", "did you mean 'line'"),
        (("experiments", "fig3", "claims", 0, "relation"), "increases", "did you mean 'increasing'"),
        (("experiments", "fig3", "claims", 0, "holds"), "yes", "holds must be true or false"),
        (("experiments", "../fig3"), experiment(), "an experiment's name must be"),
        (("data", "sizes", "train"), "many", "must be a whole number"),
    ],
)
def test_results_that_do_not_follow_the_schema(tmp_path, place, value, message):
    results = sample()
    inner = results
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(InputError, match=message):
        validate(results)
    with pytest.raises(InputError):
        render(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        render(sample(), tmp_path / "out")


def test_importing_the_report_draws_in_nothing_heavy():
    code = "import sys, tsrfast.suite.report; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
