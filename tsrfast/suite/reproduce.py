"""The main job: run experiments, write results.json, run.json and the report."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tsrfast
from tsrfast._files import atomic_write, remove_leftovers
from tsrfast._machine import describe_machine
from tsrfast._progress import Reporter
from tsrfast.data import load
from tsrfast.errors import InputError
from tsrfast.suite.experiments import EXPERIMENTS, chosen
from tsrfast.suite.lab import Lab
from tsrfast.suite.presets import Preset
from tsrfast.suite.processes import side_by_side
from tsrfast.suite.report import load_results, load_run, render
from tsrfast.suite.store import Store
from tsrfast.training import ALONE, Ranks


def _without_nan(value: Any) -> Any:
    """`value` with null for every NaN: a quantity that is not defined, such as the correlation of constants."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def reproduce(
    experiments: list[str],
    preset: Preset,
    data_spec: str,
    out: Path,
    device: torch.device,
    seed: int,
    reporter: Reporter,
    *,
    jobs: int = 1,
    ranks: Ranks = ALONE,
) -> Path:
    """Run `experiments` (all when empty) and write `out`/results.json, run.json and report.html.

    What was computed before in the same `out` is reused, so an interrupted run goes on where it was.

    Args:
        experiments: names from `EXPERIMENTS`, or ``all``.
        preset: sizes.
        data_spec: see `tsrfast.data.load`.
        out: folder for results and, in `out`/store, artifacts.
        device: where to compute.
        seed: of everything that is random; 0 or more.
        reporter: where progress goes.
        jobs: processes of this machine in which independent stages are built side by side.
        ranks: processes that all make this call with equal arguments, and share every stage that can be split. The first one writes.

    Returns:
        The path of the report.

    Raises:
        InputError: unknown experiment, unusable data, `jobs` below 1, or several jobs and ranks at once.
        EnvironmentFault: `out` cannot be written or is in use, or another process of this run was killed.
    """
    if jobs < 1 or (jobs > 1 and ranks.size > 1):
        raise InputError(f"--jobs: must be 1 or more, and 1 with torchrun, got {jobs} with {ranks.size} processes of torchrun")
    names = chosen(experiments, seed)
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    store = Store(out / "store", ranks=ranks)  # before the data are read: an unusable folder is said at once
    try:
        if ranks.first:
            remove_leftovers(out, out / "csv", out / "figures")
        with reporter.task("data"):
            data = load(data_spec, train=preset.train_images, test=preset.test_images)
        if data_spec == "synthetic":
            reporter.say(
                "generated images; for real ones: --data cifar10:PATH (batches folder, cifar-10-python.tar.gz or parquet files)"
            )
        lab = Lab(data, preset, seed, device, store, reporter)
        if jobs > 1:
            side_by_side(lab, names, data_spec, jobs)
        results = {
            "schema": 1,
            "tsrfast": tsrfast.__version__,
            "preset": preset.name,
            "seed": seed,
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "sizes": {"train": len(data.train), "test": len(data.test)},
                "sources": [{"file": name, "sha256": digest} for name, digest in data.sources],
                "notes": list(data.notes),
            },
            "device": device.type,
            "settings": dataclasses.asdict(preset),
            "experiments": {name: EXPERIMENTS[name](lab) for name in names},
        }
        if not ranks.first:
            return out / "report.html"
        text = json.dumps(_without_nan(results), indent=1, allow_nan=False)
        atomic_write(out / "results.json", text)
        run: dict[str, Any] = {
            "started": started,
            "seconds": round(time.monotonic() - began, 1),
            "stages": store.log,
            "machine": describe_machine(device),
            "command": " ".join(["tsrfast", *sys.argv[1:]]),
        }
        atomic_write(out / "run.json", json.dumps(run, indent=1))
        with reporter.task("report"):
            return render(load_results(out / "results.json"), out, run=load_run(out / "run.json"))
    finally:
        store.close()
