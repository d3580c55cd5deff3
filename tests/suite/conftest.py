"""One tiny run of the whole suite, shared by the tests that look at what it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tsrfast._progress import Reporter
from tsrfast.data import load
from tsrfast.suite.lab import Lab
from tsrfast.suite.presets import preset
from tsrfast.suite.reproduce import reproduce
from tsrfast.suite.store import Store

SETTINGS = {
    "train_images": 512, "student_images": 128, "test_images": 160, "widths": "8,8,8,8", "teacher_epochs": 6, "teacher_batch_size": 16,
    "teacher_lr": "cosine:0.003", "epochs": "1,2,3,4,6", "batch_size": 16, "lr": "constant:0.003", "train_steps": 1, "steps": 2,
    "repetitions": 2, "eval_images": 24, "matrix_images": 24, "eval_batch_size": 24, "correlation_images": 40, "patch_images": 40,
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    out: Path
    results: dict[str, Any]
    lab: Lab
    """On the run's store: everything it asks for is there already."""


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """Overrides of the smoke preset that make a run of some seconds."""
    return [f"{key}={value}" for key, value in SETTINGS.items()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_settings: list[str]) -> Tiny:
    out, sizes, reporter = tmp_path_factory.mktemp("tiny"), preset("smoke", tiny_settings), Reporter()
    reproduce([], sizes, "synthetic", out, torch.device("cpu"), 0, reporter)
    results = json.loads((out / "results.json").read_text())
    data = load("synthetic", train=sizes.train_images, test=sizes.test_images)
    return Tiny(out, results, Lab(data, sizes, 0, torch.device("cpu"), Store(out / "store"), reporter))
