"""What `gpu_check.sh` does: the parts in turn, each in processes of its own within its share of the time, and one record of all.

    bench/gpu_check.sh [PART ...] [--skip PART ...] [--budget SECONDS] [--out FILE] [--work DIR] [--commit HASH]

The record is written again after each part, by renaming: what has been measured survives whatever comes later. A part gets its share of
the budget and what earlier parts have left over; then all its processes are ended, and the next begins. Parts that need the package are
skipped where its build failed. Outputs are in DIR/<part>.log (default runs/gpu). Only the standard library is needed here.

Exit status: 0, all chosen parts passed; 1, not all; 2, wrong arguments, or no torch that sees a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_report

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
BUDGET = 540.0  # seconds
GRACE = 5.0  # seconds from being asked to end to being ended
TAIL = 12  # lines of a part's output that are shown

PACKAGES = {  # module: package
    "scikit_build_core": "scikit-build-core", "pybind11": "pybind11", "numpy": "numpy", "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis", "safetensors": "safetensors", "typer": "typer",
    "rich": "rich", "matplotlib": "matplotlib", "jinja2": "jinja2", "pyarrow": "pyarrow", "PIL": "pillow",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command of a part.

    Attributes:
        name: in the record.
        command: None: what it needs is not there, and `why` says what.
        env: on top of ours.
        patience: share of the time that its part has left.
    """

    name: str
    command: list[str] | None
    env: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    patience: float = 1.0


class Check:
    """One run of the chosen parts.

    Args:
        python: the interpreter of all parts.
        work: for logs and results; wiped clean of earlier results.
        arch: architecture for CMake, of the GPU at hand.
    """

    def __init__(self, python: str, work: Path, arch: str) -> None:
        self.python, self.work, self.arch = python, work, arch
        work.mkdir(parents=True, exist_ok=True)
        for old in (*work.glob("*.json"), *work.glob("*.log"), *work.glob("*.xml")):
            old.unlink()

    # --- what the parts run

    def build(self) -> list[Step]:
        missing = self.missing_packages()
        fetch = [self.python, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "10", *missing]
        steps = [Step(f"packages {' '.join(missing)}", fetch)] if missing else []
        if not os.environ.get("SKIP_INSTALL"):
            defines = {"TSRFAST_CUDA": "ON", "CMAKE_CUDA_FLAGS": "-Xptxas=-v", "CMAKE_CUDA_ARCHITECTURES": self.arch}
            options = [f"-Ccmake.define.{name}={value}" for name, value in defines.items()]
            command = [
                self.python,
                "-m",
                "pip",
                "install",
                "-v",
                "--no-build-isolation",
                "--no-deps",
                "--no-index",
                *options,
                str(ROOT),
            ]
            steps.append(Step("install", command))
        code = "from tsrfast import _native; raise SystemExit(not _native._C.with_cuda)"
        return [*steps, Step("has CUDA kernels", [self.python, "-c", code])]

    def tests(self) -> list[Step]:
        more = [f"--junitxml={self.work / 'tests.xml'}", "--continue-on-collection-errors"]
        more += ["-n", "6"] if self.imports("xdist") else []  # a GPU takes several processes; a fault ends only one of them
        return [Step("pytest", [*self.pytest(), str(ROOT / "tests"), "-m", "cuda and not slow", *more])]

    def ceilings(self) -> list[Step]:
        return [Step("ceilings", [self.python, str(BENCH / "ceilings.py"), "--out", str(self.work / "ceilings.json")])]

    def race(self) -> list[Step]:
        return [Step("race", self.racing("race", "oracle", "chain"))]

    def kernels(self) -> list[Step]:
        return [Step("race", self.racing("kernels", "correlation", "generic"))]

    def precision(self) -> list[Step]:
        command = [self.python, str(BENCH / "gpu_precision.py"), "--out", str(self.work / "precision.json"), *self.pair()]
        return [Step("precision", command)]

    def operators(self) -> list[Step]:
        options = ["-k", "cuda", "--benchmark-max-time=0.2", "--benchmark-min-rounds=3"]
        command = [self.python, str(BENCH / "record.py"), "--out", str(self.work / "operators.json"), *options]
        return [Step("benchmarks", command)]

    def sanitize(self) -> list[Step]:
        homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
        places = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes)]
        found = next((p for p in places if p and Path(p).is_file()), None)
        # Without PyTorch's cache each tensor is an allocation of its own, and running past its end is seen.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        small = [*self.pytest(), "-x", str(ROOT / "tests" / "ops"), "-m", "cuda and not slow", "-k", "is_the_reference"]
        why = "no compute-sanitizer on PATH, in CUDA_HOME or /usr/local/cuda"
        steps = []
        for tool, patience in {"memcheck": 1 / 3, "racecheck": 1 / 2, "initcheck": 1.0}.items():
            watch = [str(found), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *small]
            steps.append(Step(tool, watch if found else None, env, why, patience))
        return steps

    def pytest(self) -> list[str]:
        return [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def pair(self) -> list[str]:
        return ["--pair", str(self.work / "pair")]

    def racing(self, name: str, *parts: str) -> list[str]:
        out = str(self.work / f"{name}.json")
        return [self.python, str(BENCH / "gpu_race.py"), "--out", out, *self.pair(), "--parts", *parts]

    def missing_packages(self) -> list[str]:
        code = f"import importlib.util as u; print(*(p for m, p in {PACKAGES}.items() if u.find_spec(m) is None))"
        run = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        tools = [t for t in ("cmake", "ninja") if not shutil.which(t) and not self.imports(t)]
        return [*run.stdout.split(), *tools]

    def imports(self, module: str) -> bool:
        return subprocess.run([self.python, "-c", f"import {module}"], capture_output=True).returncode == 0

    # --- running them

    def run(self, part: str, limit: float) -> dict[str, Any]:
        """All steps of a part, also after one that failed: {"outcome", "seconds", "limit_s", "steps", "note"}."""
        start = time.monotonic()
        steps: list[Step] = getattr(self, part)()
        said: dict[str, str] = {}
        for step in steps:
            left = limit - (time.monotonic() - start)
            if step.command is None or (part == "build" and "failed" in said.values()):
                said[step.name] = "skipped"
            else:
                said[step.name] = self.one(step, self.work / f"{part}.log", step.patience * left)
        outcome = next((o for o in ("timed out", "failed", "skipped") if o in said.values()), "passed")
        why = {step.why for step in steps if step.command is None}
        about = [f"{name} {o}" for name, o in said.items() if o != "passed" and len(steps) > 1]
        return {
            "outcome": outcome, "seconds": round(time.monotonic() - start, 1), "limit_s": round(limit, 1), "steps": said,
            "note": "; ".join([*about, *why]),
        }  # fmt: skip

    def one(self, step: Step, log: Path, limit: float) -> str:
        """passed, failed or timed out; its processes are gone afterwards."""
        if limit <= 0 or step.command is None:
            return "timed out"
        # From another folder: in the root, `python -m pytest` would import the source tree instead of what is installed.
        with log.open("ab") as out:
            try:
                process = subprocess.Popen(
                    step.command, cwd=self.work, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **step.env},
                    start_new_session=True,
                )  # fmt: skip
            except OSError as e:
                out.write(f"{e}\n".encode())
                return "failed"
            try:
                return "passed" if process.wait(limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                return "timed out"
            finally:
                end_group(process)

    # --- what they found

    def results(self, part: str) -> dict[str, Any]:
        """What a part adds to the record."""
        if part == "tests":
            return counts(self.work / "tests.xml")
        if part == "build":
            return {"kernel_resources": self.resources(), **self.about()}
        made = self.work / f"{part}.json"
        if not made.exists():
            return {}
        found = json.loads(made.read_text())
        return {part: found["benchmarks"] if part == "operators" else found}

    def about(self) -> dict[str, Any]:
        run = subprocess.run([self.python, str(BENCH / "record.py"), "--about"], capture_output=True, text=True, cwd=self.work)
        found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {}
        return found

    def resources(self) -> list[str]:
        """Lines of what kernels take, as tests/native/kernel_resources.py reads the build's log."""
        tool, log = ROOT / "tests" / "native" / "kernel_resources.py", self.work / "build.log"
        run = subprocess.run([sys.executable, str(tool), str(log)], capture_output=True, text=True)
        return (run.stdout + run.stderr).splitlines() if run.returncode in (0, 1) else []


# Shares of the budget, in the order in which the parts run. `needs`: the installed package.
SHARES = {
    "build": 230, "tests": 70, "ceilings": 20, "race": 115, "kernels": 25, "precision": 40, "operators": 20, "sanitize": 20
}  # fmt: skip
NEED_NO_BUILD = ("build", "ceilings")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and its children: asked, and after a while not asked."""
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # asked first: pytest then still writes what it has found
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def counts(junit: Path) -> dict[str, Any]:
    """{"tests": {"passed", "failed", "skipped", "names of failed"}} of pytest's XML."""
    if not junit.exists():
        return {}
    cases = list(ET.parse(junit).iter("testcase"))
    failed = [
        f"{c.get('classname')}::{c.get('name')}" for c in cases if any(c.find(k) is not None for k in ("failure", "error"))
    ]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "tests": {
            "passed": len(cases) - len(failed) - skipped,
            "failed": len(failed),
            "skipped": skipped,
            "names of failed": failed,
        }
    }


def said(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def atomic_write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def gpu(python: str) -> dict[str, str]:
    """{"gpu", "arch"}, arch as CMake spells it; empty where torch sees no CUDA device."""
    code = "import torch; print(torch.cuda.get_device_name()); print(*torch.cuda.get_device_capability(), sep='')"
    lines = (said(python, "-c", code) or "").splitlines()
    if len(lines) != 2:
        return {}
    return {"gpu": lines[0], "arch": f"{lines[1]}{'a' if lines[1] == '90' else ''}-real"}


def deadlines(parts: Sequence[str], budget: float) -> dict[str, float]:
    """Seconds after the start by which each part has to be done."""
    whole, passed, found = sum(SHARES[part] for part in parts), 0.0, {}
    for part in parts:
        passed += SHARES[part]
        found[part] = budget * passed / whole
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {' '.join(SHARES)}; default all")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds, default {BUDGET:g}")
    parser.add_argument(
        "--out", type=Path, help="default: bench/records/<date>_<gpu>.json; runs/gpu/record.json unless all parts run"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="for outputs and the trained pair")
    parser.add_argument("--commit", help="of a copy without .git")
    arguments = parser.parse_args()
    for name in (*arguments.parts, *arguments.skip):
        if name not in SHARES:
            parser.error(f"there is no part {name!r}; there are {', '.join(SHARES)}")
    if not arguments.budget > 0:
        parser.error(f"--budget must be positive, got {arguments.budget:g}")
    parts = [part for part in SHARES if (not arguments.parts or part in arguments.parts) and part not in arguments.skip]
    python = os.environ.get("PYTHON") or sys.executable
    device = gpu(python)
    if not device:
        parser.error(f"{python} has no torch that sees a CUDA device")

    start = time.monotonic()
    work = arguments.work.resolve()
    check = Check(python, work, device["arch"])
    record: dict[str, Any] = {
        "schema": 2, "kind": gpu_report.KIND, "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {"gpu": device["gpu"], "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")},
        "software": {"commit": arguments.commit or said("git", "rev-parse", "HEAD")},
        "parts": {},
    }  # fmt: skip
    name = re.sub(r"[^a-z0-9]+", "-", device["gpu"].lower())
    whole = parts == list(SHARES)
    out = arguments.out or (ROOT / "bench" / "records" / f"{record['date']}_{name}.json" if whole else work / "record.json")
    if "build" not in parts:
        add(record, check.about(), arguments.commit)
    for part, deadline in deadlines(parts, arguments.budget).items():
        print(f"\n=== {part}", flush=True)
        if part not in NEED_NO_BUILD and record["parts"].get("build", {}).get("outcome", "passed") != "passed":
            done = {"outcome": "skipped", "seconds": 0.0, "limit_s": 0.0, "steps": {}, "note": "the build did not pass"}
        else:
            done = check.run(part, start + deadline - time.monotonic())
            show_tail(work / f"{part}.log")
            try:
                add(record, check.results(part), arguments.commit)
            except (OSError, ValueError, KeyError, ET.ParseError) as e:  # a file whose writer was ended
                done |= {"outcome": "failed", "note": f"{done['note']} results are not readable: {type(e).__name__}".strip()}
        record["parts"][part] = done
        record["complete"] = list(record["parts"]) == list(SHARES)
        record["figures"] = gpu_report.figures(record, gpu_report.predictions())
        record["seconds"] = round(time.monotonic() - start, 1)
        atomic_write(out, json.dumps(record, indent=1) + "\n")
        print(f"{part}: {done['outcome']} {done['note']}", flush=True)
    text = gpu_report.table(record, gpu_report.predictions())
    print(f"\n{text}\n\nwrote {out}")
    return 0 if all(done["outcome"] == "passed" for done in record["parts"].values()) else 1


def add(record: dict[str, Any], found: Mapping[str, Any], commit: str | None) -> None:
    """A part's results; what is known of machine and software is completed, not replaced by nothing."""
    for key, value in found.items():
        if key in ("machine", "software"):
            record[key] = record[key] | {k: v for k, v in value.items() if v is not None}
            if commit and key == "software":
                record[key]["commit"] = commit
        else:
            record[key] = value


def show_tail(log: Path) -> None:
    if log.exists():
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
