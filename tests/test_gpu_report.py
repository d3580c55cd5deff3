"""bench/gpu_report.py: goals, tables, and that the README says of GPUs what the records say, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import gpu_race  # noqa: E402
import gpu_report as report  # noqa: E402
from gpu_contestants import EAGER, FLOAT16, GRAPHS, OURS, RIVALS  # noqa: E402

FIGURES = {
    "gpu": "H200",
    "figures": [
        {"what": "time", "unit": "s", "value": "race/oracle/128/s", "predicted": 2, "range": [1, 3], "at_most": 4},
        {
            "what": "bandwidth",
            "unit": "share",
            "value": "kernels/0/gb",
            "over": "ceilings/copy",
            "predicted": 0.9,
            "at_least": 0.8,
        },
        {"what": "rate", "unit": "TFLOP/s", "value": "rate", "predicted": 10, "range": [9, 11]},
        {"what": "strong", "unit": "criterion", "value": "strong", "at_least": 1},
    ],
}
RECORD = {
    "kind": "gpu_check", "complete": True, "date": "2027-01-02", "machine": {"gpu": "NVIDIA H200", "driver": "1"},
    "software": {"torch": "2", "commit": "c"}, "parts": {"race": {"outcome": "passed", "seconds": 1.0, "limit_s": 2.0}},
    "race": {"oracle": {"128": {"s": 3.5}}}, "kernels": [{"gb": 3000}], "ceilings": {"copy": 4000}, "rate": 12, "strong": True,
}  # fmt: skip


def test_figures_and_goals():
    rows = report.figures(RECORD, FIGURES)
    assert [row["measured"] for row in rows] == [3.5, 0.75, 12, 1]
    assert [row["holds"] for row in rows] == [True, False, None, True]
    assert [report.verdict(row) for row in rows] == ["held", "MISSED", "not as predicted", "held"]
    nothing = report.figures({**RECORD, "race": {}, "ceilings": {}, "rate": None, "strong": False}, FIGURES)
    assert [row["measured"] for row in nothing] == [None, None, None, 0]
    assert [report.verdict(row) for row in nothing] == ["not measured", "not measured", "", "MISSED"]


def test_predictions_are_for_one_gpu():
    rows = report.figures({**RECORD, "machine": {"gpu": "NVIDIA A100"}}, FIGURES)
    assert [row["measured"] for row in rows] == [3.5, 0.75, 12, 1]
    assert all(row.keys() == {"what", "unit", "measured"} for row in rows)


@pytest.mark.parametrize(
    ("path", "value"),
    [("a/b", 1.5), ("a/0", None), ("l/1", 2), ("l/2", None), ("l/x", None), ("s", None), ("a", None), ("t", 1)],
)
def test_lookup(path, value):
    assert report.lookup({"a": {"b": 1.5}, "l": [1, 2], "s": "text", "t": True}, path) == value


def test_block_of_the_readme(tmp_path):
    assert report.block([], FIGURES) == report.UNMEASURED
    made = report.block([(Path("x/r.json"), RECORD)], FIGURES)
    assert "NVIDIA H200, 2027-01-02 ([record](bench/records/r.json)).\n" in made
    assert "| time | 3.5 s | 2 | at most 4 | held |" in made
    assert "| bandwidth | 75.0% | 90.0% | at least 0.8 | MISSED |" in made
    assert "| strong | yes | - | at least 1 | held |" in made
    failed = {**RECORD, "parts": {"tests": {"outcome": "timed out"}, "race": {"outcome": "passed"}}}
    assert "Not passed: tests." in report.block([(Path("r.json"), failed)], FIGURES)
    readme = f"before\n{report.BEGIN}old\n{report.END}after\n"
    assert report.with_block(readme, made) == f"before\n{report.BEGIN}{made}{report.END}after\n"
    with pytest.raises(ValueError, match="both marks once"):
        report.with_block(readme + report.BEGIN, made)

    later = {**RECORD, "date": "2027-01-03"}
    for name, record in {"a": later, "b": RECORD, "c": {**later, "complete": False}, "d": {"schema": 1}, "e": []}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert [path.name for path, _ in report.newest(tmp_path)] == ["a.json"]


def test_readme_is_what_the_records_say():
    """`python bench/gpu_report.py --readme` was run after the last change of a record or of the predictions."""
    readme = report.README.read_text()
    assert report.with_block(readme, report.block(report.newest(report.RECORDS), report.predictions())) == readme


def test_predictions_name_what_is_measured():
    """Every path fits what gpu_race, gpu_precision and ceilings write; those of figures with a goal are spelled like contestants."""
    names = {one.name for one in (*OURS["cuda"], *RIVALS)}
    assert {FLOAT16.name, EAGER.name, GRAPHS.name} <= names
    sizes = {"oracle": gpu_race.FULL.images, "generic": gpu_race.FULL.generic_images}
    seen = set()
    for figure in report.predictions()["figures"]:
        part, *path = figure["value"].split("/")
        assert part in ("race", "kernels", "ceilings", "precision")
        if part == "race":
            assert path[0] == "oracle"
            assert int(path[1]) in sizes["oracle"]
            assert path[3] in names
            seen.add(path[3])
        if path[0] == "generic":
            assert int(path[1]) in sizes["generic"]
        if path[:2] == ["correlation", "layers"]:
            assert path[3].split()[0] in gpu_race.LAYERS
        if part == "ceilings":
            source = (BENCH / "ceilings.cu").read_text() + (BENCH / "ceilings.py").read_text()
            assert path[0] in source
            assert path[-1] in source or "KiB" in path[-1]
        assert ("predicted" in figure) or ("at_most" in figure) or ("at_least" in figure)
    assert {FLOAT16.name, EAGER.name, GRAPHS.name} <= seen


def test_command(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(RECORD | {"kernels": {}}))
    command = [sys.executable, str(BENCH / "gpu_report.py")]
    run = subprocess.run([*command, str(tmp_path / "record.json")], capture_output=True, text=True)
    assert run.returncode == 0
    assert "oracle PGD-40, 10,000 images, float16 [s]" in run.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2
