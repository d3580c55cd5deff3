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
from tsrfast.errors import InputError, unknown
from tsrfast.suite.experiments import EXPERIMENTS
from tsrfast.suite.lab import Lab
from tsrfast.suite.presets import Preset
from tsrfast.suite.report import load_results, load_run, render
from tsrfast.suite.store import Store


def _without_nan(value: Any) -> Any:
    """`value` with null for every NaN: a quantity that is not defined, such as the correlation of constants."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def reproduce(
    experiments: list[str], preset: Preset, data_spec: str, out: Path, device: torch.device, seed: int, reporter: Reporter
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

    Returns:
        The path of the report.

    Raises:
        InputError: unknown experiment, unusable data.
        EnvironmentFault: `out` cannot be written or is in use.
    """
    for name in experiments:
        if name not in EXPERIMENTS and name != "all":
            raise unknown("experiment", name, [*EXPERIMENTS, "all"])
    if "all" in experiments:
        experiments = []
    if seed < 0:
        raise InputError(f"--seed: must be 0 or more, got {seed}")
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    store = Store(out / "store")  # before the data are read: an unusable folder is said at once
    try:
        remove_leftovers(out, out / "csv", out / "figures")
        with reporter.task("data"):
            data = load(data_spec, train=preset.train_images, test=preset.test_images)
        if data_spec == "synthetic":
            reporter.say(
                "generated images; for real ones: --data cifar10:PATH (batches folder, cifar-10-python.tar.gz or parquet files)"
            )
        lab = Lab(data, preset, seed, device, store, reporter)
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
            "experiments": {name: EXPERIMENTS[name](lab) for name in experiments or EXPERIMENTS},
        }
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
