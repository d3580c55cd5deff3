"""The main job: run experiments, write results.json, run.json and the report."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tsrfast
from tsrfast import _native
from tsrfast._files import atomic_write, remove_leftovers
from tsrfast.data import load
from tsrfast.errors import EnvironmentFault, InputError, unknown
from tsrfast.suite.experiments import EXPERIMENTS
from tsrfast.suite.lab import Lab
from tsrfast.suite.presets import Preset
from tsrfast.suite.progress import Reporter
from tsrfast.suite.report import load_results, load_run, render
from tsrfast.suite.store import Store


def choose_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: no such device name.
        EnvironmentFault: CUDA was asked for and is not there, or the kernels were built without it.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise unknown("device", kind, ("cpu", "cuda"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: must be cpu, cuda or cuda:N, got {name!r}") from None
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(
                f"--device {name}: there is no such CUDA device here ({count} found); --device cpu works everywhere"
            )
        if not _native._C.with_cuda:
            raise EnvironmentFault(f"--device {name}: tsrfast was built without CUDA kernels ({_native._C.cuda_note})")
    return device


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
        experiments: names from `EXPERIMENTS`.
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
        if name not in EXPERIMENTS:
            raise unknown("experiment", name, EXPERIMENTS)
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
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "instruction set": _native._C.isa(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            },
            "command": " ".join(["tsrfast", *sys.argv[1:]]),
        }
        atomic_write(out / "run.json", json.dumps(run, indent=1))
        with reporter.task("report"):
            return render(load_results(out / "results.json"), out, run=load_run(out / "run.json"))
    finally:
        store.close()
