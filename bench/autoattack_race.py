"""AutoAttack standard: tsrfast against the authors' code (package pyautoattack), on a small network, in one process.

    OMP_NUM_THREADS=1 python bench/autoattack_race.py [--images 256] [--norm linf] [--rounds 3] [--out FILE.json]

The network is conv 3-16-32, stride 2, with random weights, and labels are what it answers; eps is the one at which half of the images
withstand a short targeted APGD.
Both attack all images in batches of 250, one after the other in every round, in an order that rotates; figures are this
process's CPU seconds, medians over rounds, of the whole evaluation and of each attack. Robust accuracies are to be within one image
(the random numbers differ). The goal is 2.5 times less CPU time.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from record import machine, software, versions_of
from timing import digits, interleave
from torch import Tensor, nn

from tsrfast._files import atomic_write
from tsrfast.attacks import APGDTargeted
from tsrfast.attacks.autoattack import AutoAttack
from tsrfast.attacks.cascade import Progress

BATCH, GOAL = 250, 2.5
NORMS = {"linf": "Linf", "l2": "L2"}


def problem(images: int, norm: str) -> tuple[nn.Module, Tensor, Tensor, float]:
    """Network, images, labels, and an eps that half of the images withstand."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 10),
    )
    model, x = nn.Sequential(*layers).eval().requires_grad_(False), torch.rand(images, 3, 32, 32)
    y = model(x).argmax(1)
    low, high = 0.0, {"linf": 0.05, "l2": 2.0}[norm]
    for _ in range(10):
        eps = (low + high) / 2
        attack = APGDTargeted(norm=norm, eps=eps, steps=10)
        low, high = (low, eps) if attack.run(model, x, y).success.double().mean() > 0.5 else (eps, high)
    return model, x, y, eps


class Marks(logging.Handler):
    """CPU seconds at the lines of the original's log that end an attack."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.at: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith("robust accuracy after "):
            self.at[line.split()[3].rstrip(":").lower()] = time.process_time()


def ours(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> tuple[float, dict[str, float]]:
    """Robust accuracy, and CPU seconds at the end of each attack."""
    at: dict[str, float] = {}

    def mark(p: Progress) -> None:
        at[p.stage] = time.process_time()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = AutoAttack(norm=norm, eps=eps).evaluate(model, x, y, batch_size=BATCH, progress=mark)
    return result.robust_accuracy, at


def theirs(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> tuple[float, dict[str, float]]:
    import pyautoattack

    logger, marks = logging.getLogger("auto-attack"), Marks()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(marks)
    try:
        attack = pyautoattack.AutoAttack(model, norm=NORMS[norm], eps=eps, seed=0)
        adv, _ = attack.run_standard_evaluation(x, y, batch_size=BATCH)
    finally:
        logger.removeHandler(marks)
    with torch.no_grad():
        return (model(adv).argmax(1) == y).double().mean().item(), marks.at


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--images", type=int, default=256)
    about.add_argument("--norm", choices=NORMS, default="linf")
    about.add_argument("--rounds", type=int, default=3)
    about.add_argument("--out", type=Path)
    given = about.parse_args()
    model, x, y, eps = problem(given.images, given.norm)
    contestants = {"tsrfast": ours, "pyautoattack": theirs}
    found: dict[str, dict[str, Any]] = {name: {"robust": set(), "attacks": []} for name in contestants}

    def run(name: str) -> None:
        began = time.process_time()
        robust, at = contestants[name](model, x, y, given.norm, eps)
        ends = [began, *at.values()]
        found[name]["robust"].add(robust)
        found[name]["attacks"].append({k: b - a for k, a, b in zip(at, ends, ends[1:], strict=False)})

    warm = slice(0, 8)
    for attack in contestants.values():
        attack(model, x[warm], y[warm], given.norm, eps)
    times = interleave({name: lambda name=name: run(name) for name in contestants}, given.rounds)
    rows = {
        name: {
            **times[name],
            "robust_accuracy": sorted(found[name]["robust"]),
            "attacks_cpu_s": {
                k: digits(statistics.median(one[k] for one in found[name]["attacks"])) for k in found[name]["attacks"][0]
            },
        }
        for name in contestants
    }
    ratio = digits(rows["pyautoattack"]["cpu_s"] / rows["tsrfast"]["cpu_s"], 3)
    gap = abs(rows["pyautoattack"]["robust_accuracy"][0] - rows["tsrfast"]["robust_accuracy"][0])
    record = {
        "what": "AutoAttack standard", "images": given.images, "norm": given.norm, "eps": eps, "batch": BATCH, "rounds": given.rounds,
        "machine": machine(), "software": {**software(), **versions_of(["pyautoattack"])}, "contestants": rows,
        "ratio": ratio, "goal": GOAL, "goal_met": ratio >= GOAL, "same_robust_accuracy": gap * given.images <= 1.01,
    }  # fmt: skip
    text = json.dumps(record, indent=1)
    if given.out is not None:
        atomic_write(given.out, text + "\n")
    print(text)
    sys.exit(0 if record["same_robust_accuracy"] else 1)


if __name__ == "__main__":
    main()
