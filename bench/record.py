"""Run the benchmarks and write what they measured, where and at which commit, as one small JSON file.

    OMP_NUM_THREADS=1 python bench/record.py --out bench/records/2026-01-31_cpu.json

On a machine that others use too, --benchmark-timer=time.process_time counts this process's own time (CPU only).
The file holds no paths and no host name. `bench/gpu_check.sh` calls this for one of its parts, and with --about.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tsrfast import __version__, _native

ROOT = Path(__file__).resolve().parent.parent


def first_line(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.splitlines()[0].strip() if run.stdout.strip() else ""


def cpu_name() -> str:
    try:
        return re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    about: dict[str, Any] = {
        "cpu": cpu_name(),
        "isa": _native._C.isa(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


def software() -> dict[str, Any]:
    changed = first_line("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "tsrfast": __version__,
        "commit": first_line("git", "rev-parse", "HEAD"),
        "changed since": None if changed is None else changed != "",
        "cuda kernels": _native._C.cuda_note,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """{group: {implementation: median in us, ..., "ratio": {rival: its median / ours}, "GB/s": ours}}"""
    groups: dict[str, Any] = {}
    for one in sorted(measured, key=lambda b: (b["group"], b["name"])):
        impl = next((part for part in one["param"].split("-") if re.fullmatch(r"torch\w*|copy", part)), "tsrfast")
        group = groups.setdefault(one["group"], {"median_us": {}, "ratio": {}})
        group["median_us"][impl] = float(f"{1e6 * one['stats']['median']:.4g}")
        if impl in ("tsrfast", "copy"):
            group.update(one.get("extra_info", {}))
    for group in groups.values():
        ours = group["median_us"].get("tsrfast")
        group["ratio"] = {k: float(f"{v / ours:.3g}") for k, v in group["median_us"].items() if ours and k != "tsrfast"}
    return groups


def run_benchmarks(arguments: list[str]) -> tuple[list[dict[str, Any]], bool]:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "benchmarks.json"
        # In another folder: `python -m pytest` in the root would import the source tree instead of what is installed.
        command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-q", f"--benchmark-json={made}", *arguments]
        passed = subprocess.run(command, cwd=folder).returncode == 0
        text = made.read_text() if made.exists() else ""
    return (json.loads(text)["benchmarks"] if text else []), passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="further arguments go to pytest")
    parser.add_argument("--out", type=Path, help="default: bench/records/<date>_<gpu or cpu>.json")
    parser.add_argument("--steps", type=Path, help="lines 'name<tab>outcome' of other checks, to be recorded")
    parser.add_argument("--about", action="store_true", help="measure nothing: print machine and software as JSON")
    known, rest = parser.parse_known_args()
    if known.about:
        print(json.dumps({"machine": machine(), "software": software()}))
        return 0
    measured, passed = run_benchmarks(rest)
    steps = dict(line.split("\t", 1) for line in known.steps.read_text().splitlines()) if known.steps else {}
    about = machine()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    outcome = {**steps, "benchmarks": "passed" if passed else "failed"}
    record = {
        "schema": 1,
        "date": today,
        "machine": about,
        "software": software(),
        "steps": outcome,
        "timer": measured[0]["options"]["timer"] if measured else None,
        "benchmarks": summary(measured),
    }
    name = re.sub(r"[^a-z0-9]+", "-", about.get("gpu", "cpu").lower())
    out = known.out or ROOT / "bench" / "records" / f"{today}_{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return 0 if all(v != "failed" for v in outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
