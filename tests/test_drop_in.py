"""The comparison of bench/drop_in.py: what its table says of given times, and a tiny run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import drop_in  # noqa: E402


def row(attack: str, library: str, images: int, **seconds: float) -> dict:
    reached = {"loss": 1.0, "fooled": 0.5, "mean_l2": 0.1}
    return {"attack": attack, "library": library, "images": images} | {k: reached | {"cpu_s": s} for k, s in seconds.items()}


def test_standings_compare_the_fastest_an_image():
    rows = [
        row("PGD", "a", 10, original=1.0, drop_in=0.5),
        row("PGD", "b", 2, original=0.15, drop_in=0.2),
        row("PGD", "tsrfast", 10, drop_in=0.3),
        row("CW", "a", 10, original=1.0) | {"drop_in": {"absent": "why"}},
    ]
    assert drop_in.standings(rows) == {
        "PGD": {"fastest_original": "b", "ms": 75, "fastest_of_ours": "tsrfast", "our_ms": 30, "ratio": 2.5}
    }


def test_scripts_are_the_same_lines_for_both():
    seen = []

    class Library:
        def __getattr__(self, name):
            seen.append(name)
            return lambda net, **given: lambda x, y: given

    run = drop_in.torchattacks("PGD", eps=0.5, steps="steps")
    assert run(lambda name: Library(), None, None, None, 7) == {"eps": 0.5, "steps": 7}
    assert seen == ["PGD"]


def test_a_tiny_run(tmp_path):
    command = [sys.executable, str(BENCH / "drop_in.py"), "--smoke", "--rounds", "2", "--out", str(tmp_path)]
    command += ["--workloads", "student", "--only", "torchattacks", "cleverhans", "--data", "synthetic:train=64,test=64"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "drop_in.json").read_text())["workloads"]["student"]
    assert {r["library"] for r in result["rows"]} == {"torchattacks", "cleverhans", "tsrfast"}
    for r in result["rows"]:
        assert r["drop_in"]["cpu_s"] > 0
        # An original that is not installed is said to be absent, never timed.
        theirs = r.get("original", {})
        assert ("cpu_s" in theirs) is not ("absent" in theirs) or r["library"] == "tsrfast"
        if "cpu_s" in theirs:
            assert r["drop_in"]["fooled"] == theirs["fooled"]
            assert r["ratio"] == pytest.approx(theirs["cpu_s"] / r["drop_in"]["cpu_s"], rel=0.01)
    assert "PGD linf" in run.stdout


def test_wrong_arguments(tmp_path):
    for wrong, message in (
        (["--only", "nothing"], "--only must be part of"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ):
        command = [sys.executable, str(BENCH / "drop_in.py"), "--smoke", "--out", str(tmp_path), *wrong]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert message in run.stderr
