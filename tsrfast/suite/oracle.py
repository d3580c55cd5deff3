"""The oracle alone: trained, pruned, fine-tuned, and written with the record of its training, to be taken up by later runs."""

from __future__ import annotations

import hashlib
import json
import sys
import time
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
from tsrfast.suite.lab import NETS, Lab
from tsrfast.suite.presets import Preset
from tsrfast.suite.store import Artifact, Store
from tsrfast.training.trainer import METRICS

# What the oracle depends on, of a preset.
SETTINGS = (
    "train_images", "test_images", "widths", "prune_ratios", "teacher_epochs", "teacher_optimizer", "teacher_lr", "teacher_batch_size",
    "teacher_weight_decay", "teacher_augment", "finetune_epochs", "finetune_lr", "finetune_shrunk",
)  # fmt: skip


def write_oracle(preset: Preset, data_spec: str, out: Path, device: torch.device, seed: int, reporter: Reporter) -> Path:
    """Train the oracle of 4 layers as `reproduce` would (same preset, data and seed: bit for bit) and write it.

    `out`/oracle.safetensors is for ``--set oracle=FILE`` and `tsrfast.nets.load_checkpoint`; `out`/oracle.json says how it came about: data,
    settings, loss of every epoch, test accuracies, seconds, machine. Interrupted, the same call goes on; `out`/store is one that
    `reproduce` can use.

    Raises:
        InputError: a negative seed, unusable data, or a preset that names an oracle to take.
        EnvironmentFault: `out` cannot be written or is in use.
    """
    if preset.oracle is not None:
        raise InputError(f"--set oracle: must not be given where the oracle is to be trained, got {preset.oracle!r}")
    if seed < 0:
        raise InputError(f"--seed: must be an integer >= 0, got {seed}")
    store = Store(out / "store")
    try:
        remove_leftovers(out)
        with reporter.task("data"):
            data = load(data_spec, train=preset.train_images, test=preset.test_images)
        lab = Lab(data, preset, seed, device, store, reporter)
        with one_thread_for_torch(device):
            teacher, oracle = lab.teacher_of(NETS[0]), lab.oracle
    finally:
        store.close()
    weights = (oracle.folder / "oracle.safetensors").read_bytes()
    record = {
        "schema": 1,
        "tsrfast": tsrfast.__version__,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "preset": preset.name,
        "settings": {name: getattr(preset, name) for name in SETTINGS},
        "seed": seed,
        "data": data.record,
        "test_accuracy": json.loads((oracle.folder / "accuracy.json").read_text()),
        "teacher": _epochs(teacher),
        "fine-tuning": _epochs(oracle),
        "run": {
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "stages": store.log,
            "machine": describe_machine(device),
            "command": " ".join(["tsrfast", *sys.argv[1:]]),
        },
    }
    atomic_write(out / "oracle.json", json.dumps(record, indent=1, allow_nan=False))
    atomic_write(out / "oracle.safetensors", weights)
    return out / "oracle.safetensors"


def _epochs(stage: Artifact) -> list[dict[str, Any]]:
    """Epoch, step, lr and loss, a line for each epoch; none where nothing was trained."""
    path = stage.folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
