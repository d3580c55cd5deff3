"""Several seeds as one: means, spreads, verdicts on means, and the refusal of what does not belong together."""

import copy
import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsrfast._progress import Reporter
from tsrfast.errors import InputError
from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.presets import preset
from tsrfast.suite.report import load_results, render, validate
from tsrfast.suite.reproduce import reproduce
from tsrfast.suite.seeds import checked_seeds, over_seeds

POINTS = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))


def cell(measured, row="r", **more):
    return {"row": row, "column": "c", "published": 50.0, "measured": measured, "std": 1.0, "n": 10, "unit": "%", **more}


def curve(x, y, **more):
    return {"panel": "p", "name": "AT", "x": x, "y": y, **more}


def results(seed, cells=(), curves=(), claims=(), notes=(), settings=None):
    experiment = {
        "title": "t", "summary": "s", "cells": list(cells), "curves": list(curves), "claims": list(claims), "notes": list(notes),
        "settings": settings or {},
    }  # fmt: skip
    data = {"name": "d", "fingerprint": "f", "sizes": {"train": 1}}
    common = {"schema": 1, "tsrfast": "0", "preset": "quick", "device": "cpu", "data": data, "settings": {"steps": 3}}
    made = {**common, "seed": seed, "experiments": {"table1": experiment}}
    validate(made)
    return made


def joined(*each):
    whole = over_seeds(each)
    validate(whole)
    return whole["experiments"]["table1"]


@given(values=st.lists(POINTS, min_size=2, max_size=5))
def test_cells_have_mean_and_spread_over_seeds(values):
    [got] = joined(*(results(s, [cell(v)]) for s, v in enumerate(values)))["cells"]
    assert got["measured"] == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert got["std"] == pytest.approx(statistics.pstdev(values), abs=1e-6)
    assert (got["n"], got["published"]) == (10 * len(values), 50.0)


def test_cells_are_matched_by_their_place_and_undefined_ones_are_named():
    a = results(3, [cell(1.0, "first"), cell(2.0, "second"), cell(None, "third", note="why")])
    b = results(5, [cell(6.0, "second"), cell(3.0, "first"), cell(4.0, "third", note="why")])
    cells = {c["row"]: c for c in joined(a, b)["cells"]}
    assert [cells[r]["measured"] for r in ("first", "second", "third")] == [2.0, 4.0, 4.0]
    assert (cells["third"]["n"], cells["third"]["note"]) == (10, "why; not defined with seed 3")
    [nowhere] = joined(results(0, [cell(None)]), results(1, [cell(None)]))["cells"]
    assert (nowhere["measured"], nowhere["std"], nowhere["n"]) == (None, None, None)


def test_curves_are_means_at_the_same_x_points_together_in_a_scatter_and_kept_apart_else():
    lines = (curve([1, 2], [10.0, None], annotation="r = 0.1"), curve([1, 2], [20.0, 4.0], annotation="r = 0.2"))
    [mean] = joined(*(results(s, curves=[c]) for s, c in enumerate(lines)))["curves"]
    assert (mean["x"], mean["y"]) == ([1, 2], [15.0, None])
    assert "annotation" not in mean  # it speaks of one training
    clouds = (curve([1.0], [2.0], kind="scatter", annotation="all"), curve([3.0], [4.0], kind="scatter", annotation="all"))
    [points] = joined(*(results(s, curves=[c]) for s, c in enumerate(clouds)))["curves"]
    assert (points["x"], points["y"], points["annotation"]) == ([1.0, 3.0], [2.0, 4.0], "all")
    apart = joined(results(0, curves=[curve([1], [1.0])]), results(7, curves=[curve([2], [1.0])]))["curves"]
    assert [c["name"] for c in apart] == ["AT, seed 0", "AT, seed 7"]


def test_claims_are_judged_on_means_and_each_seed_is_shown():
    ones = [compare("a > b", left, ">", 2.0, source="s", strong=True, if_failed="size") for left in (5.0, 1.0)]
    [held] = joined(*(results(s, claims=[c]) for s, c in enumerate(ones)))["claims"]
    assert (held["left"], held["right"], held["holds"], held["analysis"], held["strong"]) == (3.0, 2.0, True, None, True)
    assert held["seeds"] == [
        {"seed": 0, "left": 5.0, "right": 2.0, "holds": True},
        {"seed": 1, "left": 1.0, "right": 2.0, "holds": False},
    ]
    orders = [monotone("rises", v, "increasing", source="s", if_failed="size") for v in ([1.0, 2.0, 3.0], [1.0, 3.0, 1.0])]
    [failed] = joined(*(results(s, claims=[c]) for s, c in enumerate(orders)))["claims"]
    assert (failed["left"], failed["holds"], failed["analysis"]) == ([1.0, 2.5, 2.0], False, "size")


def test_a_claim_on_a_number_that_one_seed_lacks_does_not_hold():
    ones = [compare("a > b", left, ">", 2.0, source="s", if_failed="size") for left in (5.0, math.nan)]
    [claim] = joined(*(results(s, claims=[c]) for s, c in enumerate(ones)))["claims"]
    assert (claim["left"], claim["holds"], claim["analysis"]) == (None, False, "size")


def test_notes_and_settings_that_differ_are_all_there():
    a, b = (
        results(0, notes=["both", "only 0"], settings={"k": 1, "l": {"m": 1}}),
        results(1, notes=["both"], settings={"k": 1, "l": {"m": 2}}),
    )
    e = joined(a, b)
    assert e["notes"][1:] == ["both", "Seed 0: only 0"]
    assert "seeds 0, 1" in e["notes"][0]
    assert e["settings"] == {"k": 1, "l": {"m": [1, 2]}}


def test_one_seed_is_left_as_it_is():
    one = results(4, [cell(1.0)])
    assert over_seeds([one]) == one


def test_what_does_not_belong_together_is_refused():
    a, b = results(0), results(1)
    with pytest.raises(InputError, match="at least one, got none"):
        over_seeds([])
    with pytest.raises(InputError, match="different seeds"):
        over_seeds([a, a])
    with pytest.raises(InputError, match="one seed each"):
        over_seeds([over_seeds([a, b]), results(2)])
    for change, match in (({"preset": "smoke"}, "preset"), ({"settings": {}}, "settings"), ({"device": "cuda"}, "device")):
        with pytest.raises(InputError, match=match):
            over_seeds([a, {**b, **change}])
    other = copy.deepcopy(b)
    other["experiments"]["fig3"] = other["experiments"]["table1"]
    with pytest.raises(InputError, match="same experiments"):
        over_seeds([a, other])


def test_seeds_are_checked():
    assert checked_seeds(3) == [3]
    assert checked_seeds((0, 1, 2)) == [0, 1, 2]
    for wrong in (-1, [], [1, 1], [0, -2]):
        with pytest.raises(InputError, match="--seed"):
            checked_seeds(wrong)


def test_a_run_over_two_seeds_is_that_of_each_and_their_means(tmp_path, tiny_settings):
    sizes = preset("smoke", tiny_settings)
    both, alone = tmp_path / "both", tmp_path / "alone"
    reproduce(["fig8"], sizes, "synthetic", both, torch.device("cpu"), [0, 1], Reporter())
    reproduce(["fig8"], sizes, "synthetic", alone, torch.device("cpu"), 1, Reporter())
    assert (both / "seed_1" / "results.json").read_bytes() == (alone / "results.json").read_bytes()
    each = [load_results(both / f"seed_{s}" / "results.json") for s in (0, 1)]
    assert load_results(both / "results.json") == json.loads(json.dumps(over_seeds(each)))
    assert each[0]["experiments"] != each[1]["experiments"]
    assert {s["seed"] for s in load_results(both / "results.json")["experiments"]["fig8"]["claims"][0]["seeds"]} == {0, 1}


def test_the_report_shows_every_seed(tmp_path):
    ones = [compare("a > b", left, ">", 2.0, source="s", strong=True) for left in (5.0, 1.0)]
    page = render(over_seeds([results(s, claims=[c]) for s, c in enumerate(ones)]), tmp_path).read_text()
    assert "<dt>Seeds</dt><dd>0, 1</dd>" in page
    assert "seed 0 holds" in page
    assert "seed 1 fails: 1 &gt; 2" in page
