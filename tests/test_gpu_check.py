"""bench/gpu_check.sh with tools that are not there: order, choice, failures, time limits, and what the record says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
import gpu_check  # noqa: E402

# An interpreter that does nothing but say so, write what a part would write, fail or hang, as the plan has it.
PYTHON = """#!{python} -S
import json, os, subprocess, sys, time
plan, words = json.loads(os.environ["FAKE_PLAN"]), " ".join(sys.argv[1:])
if words.split()[0].endswith("gpu_check.py"):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
if "get_device_name" in words:
    print(plan.get("gpu", "NVIDIA H200\\n90"))
    sys.exit(plan.get("gpu") == "")
if "find_spec" in words:
    print(plan.get("missing", ""))
    sys.exit()
if words.startswith("-c import "):
    sys.exit()
with open(os.environ["FAKE_CALLS"], "a") as calls:
    print(words.replace("\\n", " "), file=calls)
if "--about" not in words:
    print("said:", words)
def after(option):
    return next((w.split("=", 1)[-1] if "=" in w else sys.argv[k + 1] for k, w in enumerate(sys.argv) if w.startswith(option)), None)
made = plan["made"]
for word, content in made.items():
    if word in words and (after("--out") or after("--junitxml")):
        open(after("--out") or after("--junitxml"), "w").write(content if isinstance(content, str) else json.dumps(content))
if "--about" in words:
    print('{{"machine": {{"cpu": "c", "gpu": "NVIDIA H200"}}, "software": {{"torch": "2.9", "commit": "from git"}}}}')
if any(word in words for word in plan.get("hang", [])):
    child = subprocess.Popen(["sleep", "60"])
    print("child", child.pid, flush=True)
    time.sleep(60)
sys.exit(any(word in words for word in plan.get("fail", [])))
"""
SANITIZER = '#!/bin/sh\necho "sanitizer $*" >> "$FAKE_CALLS"\ncase "$*" in *"$FAKE_SANITIZER_FAILS"*) exit 9;; esac\n'
TIMES = {"median_s": 0.3, "min_s": 0.29, "max_s": 0.31, "iqr_s": 0.01, "rounds": 5}
XML = (
    '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
    '<testcase classname="a" name="later"><skipped/></testcase></testsuite></testsuites>'
)
MADE = {
    "--junitxml": XML,
    "ceilings.py": {"copy_gb_per_s": 4000.0, "matmul_f16_tflop_per_s": 800.0},
    "race.json": {
        "oracle": {
            "10000": {
                "ours": "tsrfast float16",
                "ratios": {"eager, TF32": 5.25},
                "rows": {
                    "tsrfast float16": TIMES | {"useful_tflop_per_s": 240.0},
                    "eager, TF32": TIMES | {"median_s": 1.5},
                    "float16 autocast, channels_last, CUDA graph": {"absent": "OutOfMemoryError: too much"},
                },
            }
        }
    },
    "kernels.json": {"correlation": {"layers": {"rows": {"conv1 float32 NCHW": TIMES | {"gb_per_s": 3600.0}}}}},
    "gpu_precision.py": {"criteria": {"trained, float16": {"ascent": True, "log_ratio": False}}},
    "operators.json": {"benchmarks": {"pgd_step cuda": {"ratio": {"torch": 3.0}}}},
}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(*arguments, plan={...}) -> (exit status, record or None, its calls, what it printed)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {
        "python": PYTHON.format(python=sys.executable),
        "compute-sanitizer": SANITIZER,
        "nvidia-smi": "#!/bin/sh\necho 580.1\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*arguments: str, plan: dict | None = None, env: dict | None = None):
        calls.write_text("")
        out = tmp_path / "record.json"
        own = {
            "FAKE_PLAN": json.dumps({"made": MADE} | (plan or {})),
            "FAKE_CALLS": str(calls),
            "PYTHON": str(tools / "python"),
        }
        own |= {"FAKE_SANITIZER_FAILS": "nothing does", "PATH": f"{tools}:{os.environ['PATH']}"}
        command = [
            str(BENCH / "gpu_check.sh"),
            *arguments,
            "--out",
            str(out),
            "--work",
            str(tmp_path / "work"),
            "--commit",
            "abc",
        ]
        done = subprocess.run(command, env={**os.environ, **own, **(env or {})}, capture_output=True, text=True, timeout=100)
        record = json.loads(out.read_text()) if out.exists() else None
        return done.returncode, record, calls.read_text().splitlines(), done.stdout + done.stderr

    return run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outcomes(record):
    return {name: part["outcome"] for name, part in record["parts"].items()}


def test_everything_in_order(check, tmp_path):
    status, record, calls, said = check()
    assert status == 0, said
    assert outcomes(record) == dict.fromkeys(gpu_check.SHARES, "passed")
    words = [
        "pip install -v --no-build-isolation --no-deps",
        "_C.with_cuda",
        "--about",
        "-m cuda and not slow",
        "ceilings.py",
        "oracle chain",
    ]
    words += [
        "correlation generic",
        "gpu_precision.py",
        "operators.json",
        "--tool memcheck",
        "--tool racecheck",
        "--tool initcheck",
    ]
    found = [next(k for k, call in enumerate(calls) if word in call) for word in words]
    assert found == sorted(found)
    assert "CMAKE_CUDA_ARCHITECTURES=90a-real" in calls[0]
    assert "TSRFAST_CUDA=ON" in calls[0]
    assert "missing" not in said

    assert (record["schema"], record["kind"], record["complete"]) == (2, "gpu_check", True)
    assert record["machine"] == {"gpu": "NVIDIA H200", "driver": "580.1", "cpu": "c"}
    assert record["software"] == {"commit": "abc", "torch": "2.9"}
    assert record["tests"] == {"passed": 1, "failed": 1, "skipped": 1, "names of failed": ["a::bad"]}
    assert record["operators"] == {"pgd_step cuda": {"ratio": {"torch": 3.0}}}
    assert record["race"]["oracle"]["10000"]["rows"]["tsrfast float16"]["iqr_s"] == 0.01
    figures = {row["what"]: row for row in record["figures"]}
    attack = figures["oracle PGD-40, 10,000 images, float16"]
    assert (attack["measured"], attack["predicted"], attack["goal"], attack["holds"]) == (0.3, 0.325, "at most 0.35", True)
    assert figures["eager PyTorch (TF32) over it, 10,000 images"]["holds"] is False
    assert (
        figures["oracle PGD-40, 128 images, float16"] | {"measured": None, "holds": False}
        == figures["oracle PGD-40, 128 images, float16"]
    )
    assert figures["correlation of conv1, float32 NCHW, over copy bandwidth"]["measured"] == 0.9
    assert figures["its share of the dense float16 rate"]["measured"] == 0.3
    assert figures["float16, trained pair: log ratio of losses"]["holds"] is False
    for line in ("OutOfMemoryError: too much", "5.25", "30.0%", "MISSED", "held", "not measured", "driver 580.1", "commit abc"):
        assert line in said
    assert not list(tmp_path.glob("*.part"))


def test_parts_can_be_chosen(check):
    status, record, calls, _ = check("ceilings", "race")
    assert status == 0
    assert list(outcomes(record)) == ["ceilings", "race"]
    assert not record["complete"]
    assert not any("pip" in call for call in calls)
    assert record["machine"]["cpu"] == "c"
    status, record, *_ = check("--skip", "sanitize", "operators")
    assert list(outcomes(record)) == ["build", "tests", "ceilings", "race", "kernels", "precision"]
    status, _, _, said = check("everything")
    assert status == 2
    assert "there is no part 'everything'; there are build, tests" in said


def test_a_part_that_fails_does_not_lose_the_others(check):
    status, record, _, said = check(plan={"fail": ["gpu_precision", "memcheck"]}, env={"FAKE_SANITIZER_FAILS": "racecheck"})
    assert status == 1
    assert {name for name, o in outcomes(record).items() if o != "passed"} == {"precision", "sanitize"}
    assert record["parts"]["sanitize"]["steps"] == {"memcheck": "passed", "racecheck": "failed", "initcheck": "passed"}
    assert record["parts"]["sanitize"]["note"] == "racecheck failed"
    assert record["precision"]["criteria"]  # what it wrote before it failed
    assert record["operators"]
    assert "racecheck failed" in said


def test_a_build_that_fails_leaves_the_ceilings(check):
    status, record, calls, _ = check(plan={"fail": ["pip install -v"]})
    assert status == 1
    assert outcomes(record) == dict.fromkeys(gpu_check.SHARES, "skipped") | {"build": "failed", "ceilings": "passed"}
    assert record["parts"]["build"]["steps"] == {"install": "failed", "has CUDA kernels": "skipped"}
    assert record["parts"]["tests"]["note"] == "the build did not pass"
    assert record["ceilings"]
    assert not any("gpu_race" in call for call in calls)


def test_a_package_that_is_not_to_be_had(check):
    status, record, calls, _ = check("build", plan={"missing": "pyarrow", "fail": ["--retries"]})
    assert status == 1
    assert record["parts"]["build"]["steps"] == {
        "packages pyarrow": "failed",
        "install": "skipped",
        "has CUDA kernels": "skipped",
    }
    assert "pyarrow" in calls[0]


def test_installed_already(check):
    status, record, calls, _ = check("build", env={"SKIP_INSTALL": "1"})
    assert status == 0
    assert record["parts"]["build"]["steps"] == {"has CUDA kernels": "passed"}
    assert not any("pip" in call for call in calls)


def test_a_part_that_hangs_is_ended_with_its_children(check, tmp_path):
    start = time.monotonic()
    status, record, _, said = check(
        "ceilings", "race", "kernels", "--budget", "20", plan={"hang": ["oracle chain"]}, env={"SKIP_INSTALL": "1"}
    )
    assert time.monotonic() - start < 60
    assert status == 1
    assert outcomes(record) == {"ceilings": "passed", "race": "timed out", "kernels": "passed"}
    assert record["race"]["oracle"]  # written before it hung
    child = int((tmp_path / "work" / "race.log").read_text().split("child")[1].split()[0])
    assert not alive(child)
    assert "race: timed out" in said


def test_half_a_result_is_a_failure_of_its_own(check):
    status, record, *_ = check("ceilings", "kernels", plan={"made": MADE | {"ceilings.py": '{"copy_gb'}})
    assert status == 1
    assert outcomes(record) == {"ceilings": "failed", "kernels": "passed"}
    assert "not readable" in record["parts"]["ceilings"]["note"]


def test_no_sanitizer_and_no_gpu(check, tmp_path):
    (tmp_path / "tools" / "compute-sanitizer").unlink()
    if not Path("/usr/local/cuda/bin/compute-sanitizer").is_file():
        status, record, *_ = check("sanitize", env={"CUDA_HOME": "/nonexistent"})
        assert status == 1
        assert record["parts"]["sanitize"]["outcome"] == "skipped"
        assert "no compute-sanitizer" in record["parts"]["sanitize"]["note"]
    (tmp_path / "record.json").unlink(missing_ok=True)
    status, record, _, said = check(plan={"gpu": ""})
    assert (status, record) == (2, None)
    assert "no torch that sees a CUDA device" in said


def test_time_is_shared_and_within_the_budget():
    assert sum(gpu_check.SHARES.values()) == gpu_check.BUDGET == 540
    found = gpu_check.deadlines(["ceilings", "race"], 60)
    assert found["ceilings"] == pytest.approx(
        60 * gpu_check.SHARES["ceilings"] / (gpu_check.SHARES["ceilings"] + gpu_check.SHARES["race"])
    )
    assert found["race"] == pytest.approx(60)
    assert list(gpu_check.deadlines(list(gpu_check.SHARES), 540).values())[-1] == pytest.approx(540)
    assert all(hasattr(gpu_check.Check, part) for part in gpu_check.SHARES)
