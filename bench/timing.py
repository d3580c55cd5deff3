"""How scripts here take times: side by side in one process, in an order that rotates, as medians."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def timed(run: Callable[[], object], repeat: int = 1) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, averaged over `repeat`; CPU is of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat


def rotated(names: Sequence[str], by: int) -> list[str]:
    """`names` from number `by` on, around the end."""
    k = by % len(names)
    return [*names[k:], *names[:k]]


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, repeat: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """Time all `runs` once a round, each round starting with another one: {name: `summary`}."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for r in range(rounds):
        for name in rotated(list(runs), r):
            seconds[name].append(timed(runs[name], repeat[name] if repeat else 1))
    return {name: summary(values) for name, values in seconds.items()}


def summary(seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of wall and CPU seconds, and the spread of wall seconds: (largest - smallest) / median."""
    wall, cpu = ([pair[k] for pair in seconds] for k in (0, 1))
    median = statistics.median(wall)
    return {
        "wall_s": digits(median),
        "cpu_s": digits(statistics.median(cpu)),
        "spread": digits((max(wall) - min(wall)) / median, 2),
        "all_wall_s": [digits(t) for t in wall],
    }


def digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")


def fma_peak(seconds: float = 0.3) -> float:
    """GFLOP/s of the fastest of many float32 matmuls 1024^3."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(lambda: a @ b)[0])
    return digits(2e-9 * 1024**3 / best)


def one_line(error: BaseException) -> str:
    """An error for the record: its first line, without paths."""
    text = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"(?<![\w.])(/[\w.+@-]+)+/?", "PATH", f"{type(error).__name__}: {text}")[:300]
