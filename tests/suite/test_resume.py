"""Killed at any moment, the same command goes on and ends with the same bytes."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tsrfast._progress import Reporter
from tsrfast.suite.report import load_run
from tsrfast.suite.reproduce import reproduce

CHOSEN = ("fig4", "table3")  # every kind of stage, in fewer attacks than all experiments
TABLES = ("fig4_cells", "fig4_eps_in", "fig4_eps_out", "table3_cells")
# Runs the command line, saving the training's state after every step, and kills itself (SIGKILL: no handler, no clean-up) just
# before the n-th rename of a file whose path matches: at that moment the new file lies half-done beside its final name.
DRIVER = """
import os, re, signal, sys
from tsrfast.cli import main
from tsrfast.suite import stages

pattern, nth = sys.argv.pop(1), int(sys.argv.pop(1))
rename, seen = os.replace, 0

def rename_or_die(source, target):
    global seen
    seen += bool(re.search(pattern, str(target)))
    if seen == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace, stages.CHECKPOINT_EVERY = rename_or_die, 0.0
main()
"""
MOMENTS = {
    "at the start": (r"/teacher-\w+\.work/metrics", 1),
    "in the middle of the teacher's second epoch": (r"/teacher-\w+\.work/state", 40),
    "in a student's training": (r"/student-\w+\.work/state", 60),
    "when an attack is done but not yet kept": (r"/attack-\w+$", 30),
    "while the results are written": (r"/results\.json$", 1),
}


def command(settings, out, *experiments):
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["reproduce", *experiments, "--preset", "smoke", "--out", str(out), *sets]


def products(out):
    """results.json, tables and figures: all but times (run.json, and the report that shows them)."""
    names = [p for p in out.rglob("*") if p.is_file() and "store" not in p.parts and p.name not in ("run.json", "report.html")]
    return {str(p.relative_to(out)): p.read_bytes() for p in names}


def test_killed_at_five_moments(tiny, tiny_settings, tmp_path):
    """All in one folder, each after the other, against a run that nothing interrupted: `tiny`, for two experiments."""
    out, whole_out = tmp_path / "killed", tmp_path / "whole"
    shutil.copytree(tiny.out / "store", whole_out / "store")
    reproduce(list(CHOSEN), tiny.lab.preset, "synthetic", whole_out, torch.device("cpu"), 0, Reporter())
    for moment, (pattern, nth) in MOMENTS.items():
        run = subprocess.run(
            [sys.executable, "-c", DRIVER, pattern, str(nth), *command(tiny_settings, out, *CHOSEN)],
            capture_output=True,
            check=False,
        )
        assert run.returncode == -signal.SIGKILL, (moment, run.stderr.decode())
        assert not (out / "results.json").exists(), moment
        assert not (out / "report.html").exists(), moment
    stages = {p.name for p in (out / "store").iterdir() if (p / "stage.json").exists()}
    subprocess.run([sys.executable, "-m", "tsrfast", *command(tiny_settings, out, *CHOSEN)], check=True, capture_output=True)
    killed, whole = products(out), products(whole_out)
    assert whole.keys() == {"results.json", "figures/fig4.png", *(f"csv/{name}.csv" for name in TABLES)}
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == []
    # Every stage was there already when the results were written, and has the bytes of the uninterrupted run.
    assert {p.name for p in (out / "store").iterdir() if p.is_dir()} == stages
    for stage in stages:
        for file in (out / "store" / stage).iterdir():
            assert not file.name.endswith(".part")
            if file.name != "state.safetensors":
                assert file.read_bytes() == (tiny.out / "store" / stage / file.name).read_bytes(), file


def test_a_second_run_is_all_cached_and_gives_the_same_bytes(tiny, tiny_settings):
    before = products(tiny.out)
    tiny.lab.store.close()
    arguments = [sys.executable, "-m", "tsrfast", *command(tiny_settings, tiny.out)]
    run = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert run.stdout == f"{tiny.out / 'report.html'}\n"
    assert products(tiny.out) == before
    stages = load_run(tiny.out / "run.json")["stages"]
    assert len(stages) > 100
    assert all(stage["cached"] for stage in stages)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["data:", "teacher:", "student at_oracle:", "attack AT(200)", "attack ST-label(100)"])
def test_killed_from_outside(tiny, tiny_settings, tmp_path, line):
    """`kill -9` from another process, as soon as that progress line appears."""
    arguments = [sys.executable, "-m", "tsrfast", *command(tiny_settings, tmp_path)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as running:
        for said in running.stderr:
            if said.startswith(line):
                running.kill()
                break
        running.stderr.read()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    subprocess.run(arguments, check=True, capture_output=True)
    assert products(tmp_path) == products(tiny.out)
