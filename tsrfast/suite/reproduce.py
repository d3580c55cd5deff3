"""The main job: run experiments, write results.json, run.json and the report."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tsrfast
from tsrfast._files import atomic_write, remove_leftovers
from tsrfast._machine import describe_machine
from tsrfast._progress import Reporter
from tsrfast._threads import one_thread_for_torch
from tsrfast.data import load
from tsrfast.errors import InputError
from tsrfast.suite.experiments import EXPERIMENTS, chosen
from tsrfast.suite.lab import Lab
from tsrfast.suite.presets import Preset
from tsrfast.suite.processes import side_by_side
from tsrfast.suite.report import load_results, load_run, render
from tsrfast.suite.seeds import checked_seeds, over_seeds
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
    seed: int | Sequence[int],
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
        seed: of everything that is random; 0 or more. Of several, each gets a folder `out`/seed_K with results and report of its own,
            and those in `out` are over all of them (`tsrfast.suite.seeds.over_seeds`).
        reporter: where progress goes.
        jobs: processes of this machine in which independent stages are built side by side.
        ranks: processes that all make this call with equal arguments, and share every stage that can be split. The first one writes.

    Returns:
        The path of the report.

    Raises:
        InputError: unknown experiment, no seed, a negative one or one twice, unusable data, `jobs` below 1, or several jobs and ranks at once.
        EnvironmentFault: `out` cannot be written or is in use, or another process of this run was killed.
    """
    if jobs < 1 or (jobs > 1 and ranks.size > 1):
        raise InputError(f"--jobs: must be 1 or more, and 1 with torchrun, got {jobs} with {ranks.size} processes of torchrun")
    seeds = checked_seeds(seed)
    names = chosen(experiments)
    started = _Start()
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
        results = []
        for one in seeds:
            began, logged = _Start(), len(store.log)
            lab = Lab(data, preset, one, device, store, reporter)
            with one_thread_for_torch(device):  # forward passes round by it, too
                if jobs > 1:
                    side_by_side(lab, names, data_spec, jobs)
                results.append(_results(lab, names))
            if ranks.first and len(seeds) > 1:
                with reporter.task(f"report of seed {one}"):
                    _write(results[-1], out / f"seed_{one}", began.run(store.log[logged:], device))
        if not ranks.first:
            return out / "report.html"
        with reporter.task("report"):
            return _write(over_seeds(results), out, started.run(store.log, device))
    finally:
        store.close()


def _results(lab: Lab, names: Sequence[str]) -> dict[str, Any]:
    """What results.json holds, after all experiments have run."""
    results: dict[str, Any] = _without_nan({
        "schema": 1,
        "tsrfast": tsrfast.__version__,
        "preset": lab.preset.name,
        "seed": lab.seed,
        "data": lab.data.record,
        "device": lab.device.type,
        "settings": dataclasses.asdict(lab.preset),
        "experiments": {name: EXPERIMENTS[name](lab) for name in names},
    })  # fmt: skip
    return results


class _Start:
    """When a run began; what run.json holds at its end."""

    def __init__(self) -> None:
        self._clock, self._started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")

    def run(self, stages: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
        return {
            "started": self._started,
            "seconds": round(time.monotonic() - self._clock, 1),
            "stages": list(stages),
            "machine": describe_machine(device),
            "command": " ".join(["tsrfast", *sys.argv[1:]]),
        }


def _write(results: dict[str, Any], folder: Path, run: dict[str, Any]) -> Path:
    """results.json, run.json and the report, which is made from these files alone."""
    atomic_write(folder / "results.json", json.dumps(results, indent=1, allow_nan=False))
    atomic_write(folder / "run.json", json.dumps(run, indent=1))
    return render(load_results(folder / "results.json"), folder, run=load_run(folder / "run.json"))
