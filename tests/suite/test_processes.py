"""Several processes: the same tables as one, whoever is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tsrfast._files import lock
from tsrfast._progress import Reporter
from tsrfast.data import load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU
from tsrfast.suite import processes
from tsrfast.suite.presets import preset
from tsrfast.suite.report import load_results, load_run
from tsrfast.suite.reproduce import reproduce
from tsrfast.training import CCAT, Ranks, TrueLabels, train

# Every kind of stage: adversarial and standard training, robust images, attacks, correlations, patches.
CHOSEN = ("fig4", "table5")
SETTINGS = {
    "train_images": 256, "student_images": 63, "test_images": 96, "widths": "8,8,8,8", "teacher_epochs": 2, "teacher_batch_size": 32,
    "epochs": "1,2,3,4,5", "batch_size": 24, "train_steps": 1, "steps": 2, "rft_steps": 2, "repetitions": 1, "eval_images": 24,
    "matrix_images": 24, "eval_batch_size": 8, "correlation_images": 24, "patch_images": 24,
}  # fmt: skip
OVERRIDES = [f"{key}={value}" for key, value in SETTINGS.items()]
FIRST_STAGES = ("teacher-", "oracle-", "patches-")

# Sums of float32 in another order: measured 3e-8 here; 4e-6 after an epoch, and 4e-4 after six, of the longer steps of tests/suite/conftest.py.
AFTER_ONE_EPOCH = 3e-6

# A process of a torchrun without torchrun, which would end the others; with "function number", it kills itself (SIGKILL) before that call.
DRIVER = """
import os, signal, sys
import tsrfast.training.ranks as ranks
from tsrfast.cli import main

name, number = sys.argv.pop(1), int(sys.argv.pop(1))
if name == "replace":
    holder, pattern = os, "/attack-"
else:
    holder, pattern = ranks.Ranks, ""
call, calls = getattr(holder, name), 0

def call_or_die(*arguments):
    global calls
    calls += pattern in str(arguments[-1]) and (not pattern or os.path.isdir(arguments[0]))
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)

setattr(holder, name, call_or_die)
main()
"""


def arguments(out, *more):
    sets = [word for setting in OVERRIDES for word in ("--set", setting)]
    return ["reproduce", *CHOSEN, "--preset", "smoke", "--out", str(out), *sets, *more]


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def files(out):
    """Everything but times (run.json, and the report that shows them), and the training states."""
    left_out = ("run.json", "report.html", "state.safetensors", ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in left_out}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if one[name] != other[name]]


def begin(whole, out):
    """A run in `out` that has the stages that no processes share already."""
    for stage in (whole / "store").iterdir():
        if stage.name.startswith(FIRST_STAGES):
            subprocess.run(["cp", "-r", stage, out / "store"], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By one process with three threads; all others here have one each."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("whole")
    torch.set_num_threads(3)
    reproduce(list(CHOSEN), preset("smoke", OVERRIDES), "synthetic", out, torch.device("cpu"), 0, Reporter())
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def split(whole, tmp_path_factory):
    """By two processes that share every stage."""
    out = tmp_path_factory.mktemp("split")
    (out / "store").mkdir()
    begin(whole, out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "tsrfast"]
    run = subprocess.run([*torchrun, *arguments(out)], env=one_thread(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{out / 'report.html'}\n"  # one process speaks
    assert run.stderr.count("student at_oracle: ") == 1
    return out


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- stages side by side ------------------------------------------------------------------------------------------------


def test_side_by_side_and_killed_gives_the_same_bytes(whole, tmp_path):
    """The process that hands out the work is killed: its workers end, and the same command goes on."""
    words = [sys.executable, "-m", "tsrfast", *arguments(tmp_path, "--jobs", "2")]
    with subprocess.Popen(words, env=one_thread(), stderr=subprocess.PIPE, text=True) as running:
        said = next(line for line in running.stderr if "student" in line)
        running.kill()
    assert said.startswith(("[1] student", "[2] student"))
    assert not (tmp_path / "results.json").exists()
    for _ in range(200):  # a worker keeps the folder for itself until it has ended
        try:
            lock(tmp_path / "store").close()
            break
        except EnvironmentFault:
            time.sleep(0.05)
    subprocess.run(words, env=one_thread(), check=True, capture_output=True)
    assert differing(files(whole), files(tmp_path)) == []
    built = [s for s in load_run(tmp_path / "run.json")["stages"] if not s["cached"]]
    assert len(built) > 10
    assert all(s["seconds"] > 0 for s in built)


def go(out, jobs, *more):
    return reproduce(
        list(CHOSEN), preset("smoke", [*OVERRIDES, *more]), "synthetic", out, torch.device("cpu"), 0, Reporter(), jobs=jobs
    )


def test_a_killed_worker_and_an_error_in_one_are_said(whole, tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    begin(whole, tmp_path)
    with pytest.raises(InputError, match="loss must stay finite"):
        go(tmp_path, 2, "lr=constant:1e30")
    give = processes._Worker.give

    def give_and_kill(worker, task):
        give(worker, task)
        if task.stage == "student":
            worker._process.kill()

    monkeypatch.setattr(processes._Worker, "give", give_and_kill)
    said = r"process \d of --jobs was killed by signal 9 in stage student \w{8}; the same command goes on from here"
    with pytest.raises(EnvironmentFault, match=said):
        go(tmp_path, 2)
    lock(tmp_path / "store").close()  # nobody is left


def test_what_most_work_waits_for_comes_first():
    def task(key, flop, *inputs):
        needed = {i: processes.Artifact("s", i, None) for i in inputs}
        return processes.Task("s", key, {}, needed, print, (), False, flop)

    made = [task("a", 1, "cached"), task("b", 5, "a"), task("c", 2, "a"), task("d", 4, "c"), task("e", 3)]
    assert processes._urgency(made) == {"a": 7, "b": 5, "c": 6, "d": 4, "e": 3}


def test_numbers_of_processes_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--jobs: must be 1 or more"):
        go(tmp_path, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with (
        pytest.raises(InputError, match="--device: must be cpu or cuda with torchrun"),
        processes.joined(torch.device("cuda:0")),
    ):
        pass
    with pytest.raises(InputError, match="and 1 with torchrun, got 2 with 2 processes"):
        reproduce([], preset("smoke"), "synthetic", tmp_path, torch.device("cpu"), 0, Reporter(), jobs=2, ranks=Ranks(0, 2))


# --- every stage split --------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_up_to_rounding(whole, split):
    trained = [p.parent.name for p in sorted((whole / "store").glob("student-*/metrics.jsonl"))]
    assert len(trained) == 3
    for student in trained:
        one, two = whole / "store" / student, split / "store" / student
        # Adam does not see a wrong factor in the gradients, which are summed as the losses are; so the losses.
        a, b = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two))
        assert a == pytest.approx(b, rel=1e-4)
        before, after, other = (load_file(run / f"epoch_000{e}.safetensors") for run, e in ((one, 0), (one, 1), (two, 1)))
        assert farthest(before, after) > 300 * AFTER_ONE_EPOCH
        # RFT's images are rounded to 8 bits: one that comes out otherwise is a larger difference.
        if '"rft"' not in (one / "stage.json").read_text():
            assert farthest(after, other) < AFTER_ONE_EPOCH


def farthest(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_processes_give_the_tables_of_one(whole, split):
    cells = [
        [c for e in load_results(out / "results.json")["experiments"].values() for c in e["cells"]] for out in (whole, split)
    ]
    apart = [abs(a["measured"] - b["measured"]) / (100 if a["unit"] == "%" else 1) for a, b in zip(*cells, strict=True)]
    assert sum(d > 1e-3 for d in apart) <= len(apart) / 10
    assert max(apart) < 0.1


def test_with_the_same_networks_the_rest_is_the_same_bit_for_bit(split, tmp_path):
    """Attacks, correlations and robust images of two processes, made again by one."""
    (tmp_path / "store").mkdir()
    for stage in (split / "store").glob("*-*"):
        if stage.name.startswith((*FIRST_STAGES, "student-")):
            subprocess.run(["cp", "-r", stage, tmp_path / "store"], check=True)
    torch.set_num_threads(1)
    go(tmp_path, 1)
    assert differing(files(split), files(tmp_path)) == []


def pair(out, *deaths):
    """Two processes without torchrun to end them; exit codes, and what each said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = one_thread() | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *death, *arguments(out)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, death in enumerate(deaths)
    ]
    said = [process.communicate(timeout=60)[1] for process in running]
    return [process.returncode for process in running], said


def test_either_of_two_processes_killed(whole, split, tmp_path):
    """In the middle of a training, and when an attack is done but not yet kept: the other ends, and the same command goes on."""
    (tmp_path / "store").mkdir()
    begin(whole, tmp_path)
    lives = ("replace", "-1")
    codes, said = pair(tmp_path, lives, ("sum_gradients", "5"))
    assert codes == [1, -signal.SIGKILL], said
    assert "tsrfast: another process of this run has stopped or does not answer" in said[0]
    codes, said = pair(tmp_path, ("replace", "3"), lives)
    assert codes == [-signal.SIGKILL, 1], said
    assert "tsrfast: the first process of this run has stopped; the same command goes on from here" in said[1]
    assert not (tmp_path / "results.json").exists()
    codes, said = pair(tmp_path, lives, lives)
    assert codes == [0, 0], said
    assert differing(files(split), files(tmp_path)) == []


def test_a_batch_with_statistics_of_its_own_is_not_cut():
    data = load("synthetic", train=8, test=8).train
    normalised = ConvReLU((4,), batch_norm=True)
    with pytest.raises(InputError, match="model must have no batch normalisation with 2 processes"):
        train(normalised, TrueLabels(), data, epochs=1, batch_size=4, lr=0.1, ranks=Ranks(0, 2))


def test_ccat_is_cut_only_where_the_halves_stay_whole():
    objective = CCAT(torch.nn.Identity(), print, 10, 0.1)
    assert [count for count in range(1, 17) if objective.splits(count, 2)] == [4, 8, 12, 16]
    assert CCAT(torch.nn.Identity(), print, 10, 0.1, clean_share=0.0).splits(6, 2)
