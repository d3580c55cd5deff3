"""PGD-40 on a trained teacher-student pair: tsrfast against PyTorch, compiled PyTorch and attack libraries, in one process.

    OMP_NUM_THREADS=2 python bench/race.py --data cifar10:PATH --out DIR

writes DIR/race.json, DIR/race.png and prints a table. The first run trains the pair (some minutes) and keeps it in DIR/pair.
Libraries take part where they are installed: ``pip install --no-deps -r tests/compat/originals.txt`` gives them all. torch.compile needs a C++
compiler and Python's headers.

How it measures: every contestant first attacks all images once, which warms it up, and what comes out must be the same attack as the
eager loop's: few pixels differ, and the mean loss, evaluated by an eager float32 forward pass, is equal. Who fails that, or raises,
becomes a row with the reason and is not timed. Then all run once a round, in an order that rotates. Wall time and this process's CPU
time are recorded; figures are medians. Useful GFLOP/s count multiply-adds of a direct convolution, forward and input gradient; an
algorithm that needs fewer (Winograd) can exceed the FMA peak, which is the best rate of a 1024^3 float32 matmul in PyTorch,
on the same threads in the same run. The machine should be idle: one other busy core makes 2-thread times four times as long.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import (
    CONTESTANTS,
    EAGER,
    EPS,
    LOSSES,
    STEP_SIZE,
    TSRFAST,
    Contestant,
    Pair,
    Recipe,
    flop,
    judge,
    quality,
    trained_pair,
)
from race_report import plot, table
from record import machine, software, versions_of
from timing import digits, fma_peak, interleave, one_line, timed
from torch import Tensor

from tsrfast._files import atomic_write
from tsrfast.data import Dataset, load
from tsrfast.errors import EnvironmentFault, InputError

PARTS = ("race", "scaling", "threads", "memory")
# The same attack: signs of gradients near zero flip under any other rounding, and move a pixel; its loss stays.
SAME_PIXELS = {"float32": 0.10, "bfloat16": 0.50}
SAME_LOSS = {"float32": 0.005, "bfloat16": 0.02}
# Ratios of medians to reach.
GOALS = {"fastest float32 PyTorch": 1.8, "eager": 2.5, "two threads over one": 1.85}


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    recipe: Recipe
    test_images: int
    batch: int
    steps: int
    rounds: int
    scaling_images: tuple[int, ...]
    scaling_image_steps: int
    scaling_steps: tuple[int, ...]
    thread_images: tuple[int, ...]
    thread_steps: int
    memory_images: Mapping[str, tuple[int, ...]]
    memory_steps: int
    warm_images: int
    """A timing lasts at least as long as this many images take: small batches are repeated."""


FULL = Sizes(
    Recipe([45, 32, 32, 20], [50, 35, 35, 22], images=10000, teacher_epochs=4, student_epochs=6), test_images=1000,
    batch=128, steps=40, rounds=5,
    scaling_images=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), scaling_image_steps=5, scaling_steps=(5, 10, 20, 30, 40),
    thread_images=(1, 128), thread_steps=10,
    memory_images={EAGER.name: (128, 1024), TSRFAST.name: (128, 1024, 10000)}, memory_steps=3, warm_images=64,
)  # fmt: skip
SMOKE = Sizes(
    Recipe([4, 4], [5, 5], images=64, teacher_epochs=1, student_epochs=1), test_images=64,
    batch=4, steps=2, rounds=2,
    scaling_images=(1, 2, 4), scaling_image_steps=1, scaling_steps=(1, 2),
    thread_images=(1, 4), thread_steps=1,
    memory_images={TSRFAST.name: (4,)}, memory_steps=1, warm_images=1,
)  # fmt: skip


# --- the parts ----------------------------------------------------------------------------------------------------------


def compare(x: Tensor, mine: tuple[float, float], eager: Tensor, theirs: tuple[float, float], dtype: str) -> dict[str, Any]:
    """What a contestant made, beside what the eager loop made.

    Args:
        x, eager: both one's adversarial images.
        mine, theirs: `judge` of them.
        dtype: which deviations are allowed.

    Raises:
        ArithmeticError: it is not the same attack.
    """
    differ = ((x - eager).abs() > 1e-6).float().mean().item()
    row = {"pixels_differ": digits(differ, 3), "mean_loss": digits(mine[0], 6), "success": digits(mine[1])}
    loss = abs(mine[0] / theirs[0] - 1)
    if not (differ <= SAME_PIXELS[dtype] and loss <= SAME_LOSS[dtype]):  # NaN does not pass
        raise ArithmeticError(
            f"not the same attack: {differ:.1%} of the pixels differ, mean loss {mine[0]:.6g} for {theirs[0]:.6g}"
        )
    return row


def race(pair: Pair, loss: str, x: Tensor, y: Tensor, sizes: Sizes, entrants: Sequence[Contestant]) -> dict[str, Any]:
    """All contestants on one loss: {"flop", "gflops_peak", "rows": {name: measurements, or {"absent": reason}}, "ratios"}."""
    rows: dict[str, Any] = {}
    runs: dict[str, Callable[[], object]] = {}
    expected = EAGER.build(pair, loss, sizes.steps)(x, y)
    standard = judge(pair, loss, expected, y)
    for one in (c for c in entrants if loss in c.losses):
        start = time.perf_counter()
        try:
            run = one.build(pair, loss, sizes.steps)
            made = run(x, y).detach()
            rows[one.name] = compare(made, judge(pair, loss, made, y), expected, standard, one.dtype)
        except ImportError as e:
            rows[one.name] = {"absent": f"not installed ({one_line(e)})"}
        except Exception as e:  # whatever a compiler or a library raises: the others still race
            rows[one.name] = {"absent": one_line(e)}
        else:
            runs[one.name] = lambda run=run: run(x, y)  # type: ignore[misc]
        rows[one.name]["first_run_s"] = digits(time.perf_counter() - start, 3)
        print(f"  {loss}: {one.name}: {rows[one.name].get('absent', 'same attack')}", file=sys.stderr)
    peak = [fma_peak()]
    measured = interleave(runs, sizes.rounds)
    peak.append(fma_peak())
    nets = (pair.student, pair.teacher) if loss == "oracle" else (pair.student,)
    work = sizes.steps * len(x) * sum(flop(net, x.shape[1:]) for net in nets)
    for name, times in measured.items():
        rows[name] |= times | {"useful_gflops": digits(1e-9 * work / times["wall_s"])}
    return {"flop": work, "matmul_gflops": max(peak), "rows": rows, **standings(rows, entrants)}


def standings(rows: Mapping[str, Any], entrants: Sequence[Contestant]) -> dict[str, Any]:
    """The fastest float32 way without tsrfast, and tsrfast's ratios to every other: its median over ours, or {} without ours."""
    medians = {name: row["wall_s"] for name, row in rows.items() if "wall_s" in row}
    others = [c.name for c in entrants if c.family != "tsrfast" and c.dtype == "float32" and c.name in medians]
    fastest = min(others, key=lambda name: medians[name])
    ours = medians.get(TSRFAST.name)
    ratios = {name: digits(t / ours, 3) for name, t in medians.items() if name != TSRFAST.name} if ours else {}
    return {"fastest_float32_pytorch": fastest, "ratios": ratios}


def repeats(images: int, sizes: Sizes) -> int:
    return max(1, sizes.warm_images // images)


def both(pair: Pair, steps: int, images: int, batch: Callable[[int], tuple[Tensor, Tensor]]) -> dict[str, Callable[[], object]]:
    """tsrfast and the eager loop on the oracle loss, warmed up."""
    x, y = batch(images)
    runs: dict[str, Callable[[], object]] = {}
    for one in (TSRFAST, EAGER):
        one.build(pair, "oracle", 1)(x, y)
        run = one.build(pair, "oracle", steps)
        runs[one.name] = lambda run=run: run(x, y)  # type: ignore[misc]
    return runs


def scaling(pair: Pair, batch: Callable[[int], tuple[Tensor, Tensor]], sizes: Sizes) -> dict[str, Any]:
    """Wall seconds against images and against steps, with the exponent k of cost ~ size^k over the larger half of the sizes."""
    axes = {
        "images": [(n, sizes.scaling_image_steps, n) for n in sizes.scaling_images],
        "steps": [(steps, steps, sizes.batch) for steps in sizes.scaling_steps],
    }
    found: dict[str, Any] = {"loss": "oracle", "steps_at_images": sizes.scaling_image_steps, "images_at_steps": sizes.batch}
    for axis, points in axes.items():
        # A round goes through all sizes, so that a slow spell of the machine does not bend the line at one of them.
        runs, repeat = {}, {}
        for size, steps, n in points:
            for name, run in both(pair, steps, n, batch).items():
                runs[f"{name} {size}"] = run
                repeat[f"{name} {size}"] = repeats(n, sizes)
        times = interleave(runs, min(3, sizes.rounds), repeat)
        at = [point[0] for point in points]
        found[axis] = {"at": at}
        for name in (TSRFAST.name, EAGER.name):
            seconds = [times[f"{name} {a}"]["wall_s"] for a in at]
            half = len(at) // 2
            found[axis][name] = {"wall_s": seconds, "exponent": exponent(at[half - 1 :], seconds[half - 1 :])}
    return found


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of a straight line through log(seconds) against log(size): 1 where cost is linear."""
    logs = torch.tensor([sizes, seconds], dtype=torch.float64).log()
    dx, dy = logs - logs.mean(1, keepdim=True)
    return digits(((dx * dy).sum() / dx.square().sum()).item(), 3)


def threads(pair: Pair, batch: Callable[[int], tuple[Tensor, Tensor]], sizes: Sizes) -> dict[str, Any]:
    """Wall seconds with one and with two threads, and their ratio: {..., "images": {images: {name: ...}}}."""
    before = torch.get_num_threads()
    found: dict[str, Any] = {}
    for n in sizes.thread_images:
        runs = both(pair, sizes.thread_steps, n, batch)
        seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in runs for count in (1, 2)}
        for _ in range(sizes.rounds):
            for count in (1, 2):
                torch.set_num_threads(count)
                for name, run in runs.items():
                    run()  # the first one with this many threads starts or parks them
                    seconds[name, count].append(timed(run, repeats(n, sizes))[0])
        torch.set_num_threads(before)
        found[str(n)] = {}
        for name in runs:
            one, two = (statistics.median(seconds[name, count]) for count in (1, 2))
            found[str(n)][name] = {"one_s": digits(one), "two_s": digits(two), "ratio": digits(one / two, 3)}
    return {"loss": "oracle", "steps": sizes.thread_steps, "images": found}


def memory(sizes: Sizes) -> dict[str, Any]:
    """Peak memory of an attack, in a process of its own each (`probe`): {..., "MiB": {name: {images: ...}}, "law": {name: ...}}.

    The law is of the first and the last count: growth = ``fixed`` MiB + ``copies`` times the size of the images.
    """
    found: dict[str, Any] = {}
    law: dict[str, Any] = {}
    for name, counts in sizes.memory_images.items():
        found[name] = {}
        for n in counts:
            command = [sys.executable, __file__, *sys.argv[1:], "--probe", name, str(n)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                last = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
                found[name][str(n)] = {"absent": one_line(RuntimeError(last))}
            else:
                found[name][str(n)] = json.loads(run.stdout)
        points = [row for row in found[name].values() if "growth" in row]
        if len(points) > 1:
            first, last = points[0], points[-1]
            copies = (last["growth"] - first["growth"]) / (last["images"] - first["images"])
            law[name] = {"copies": digits(copies, 3), "fixed": digits(first["growth"] - copies * first["images"], 3)}
    return {"loss": "oracle", "steps": sizes.memory_steps, "MiB": found, "law": law}


def probe(pair: Pair, name: str, x: Tensor, y: Tensor, steps: int) -> dict[str, float]:
    """How far resident memory peaks above its value before the attack, in MiB (Linux).

    ``growth`` is that peak; ``images`` the size of the images that are returned; ``beyond`` the rest: workspace and copies.
    """
    one = next(c for c in CONTESTANTS if c.name == name)
    run = one.build(pair, "oracle", steps)
    run(x[:1], y[:1])  # libraries are loaded, weights packed
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, proc(5)
    before = _status("VmRSS")
    made = run(x, y)
    growth, images = _status("VmHWM") - before, made.numel() * made.element_size() / 2**20
    return {"growth": digits(growth), "images": digits(images), "beyond": digits(growth - images)}


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    return int(re.findall(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def goals(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, what came out, and whether that is enough; only of parts that ran."""
    found = []

    def add(what: str, key: str, ratio: float) -> None:
        found.append({"goal": f"{what}: {key}", "at_least": GOALS[key], "ratio": ratio, "holds": ratio >= GOALS[key]})

    for loss, result in record.get("race", {}).items():
        if result["ratios"]:
            add(loss, "fastest float32 PyTorch", result["ratios"][result["fastest_float32_pytorch"]])
            add(loss, "eager", result["ratios"][EAGER.name])
    if "threads" in record:
        n, rows = list(record["threads"]["images"].items())[-1]
        add(f"{n} images", "two threads over one", rows[TSRFAST.name]["ratio"])
    return found


# --- the command --------------------------------------------------------------------------------------------------------


def prepare(spec: str, folder: Path, sizes: Sizes) -> tuple[Pair, Callable[[int], tuple[Tensor, Tensor]], Dataset]:
    """The pair (from `folder`), a function n -> the first n test images and labels (around the end), and the data."""
    data = load(spec, train=sizes.recipe.images, test=sizes.test_images)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(n) % len(data.test)
        return data.test.pixels(index), data.test.labels[index]

    return trained_pair(sizes.recipe, data, folder), batch, data


def choose(only: Sequence[str], smoke: bool) -> list[Contestant]:
    """Those with a part of their name in `only` (default: all; with `smoke`: but the slow compilations), and the eager loop.

    Raises:
        InputError: a part that no name has.
    """
    for part in only:
        if not any(part in c.name for c in CONTESTANTS):
            names = "; ".join(c.name for c in CONTESTANTS)
            raise InputError(f"--only: must be part of a contestant's name ({names}), got {part!r}")
    if only:
        return [c for c in CONTESTANTS if c is EAGER or any(part in c.name for part in only)]
    return [c for c in CONTESTANTS if not (smoke and "compile" in c.name)]


def main() -> int:
    """0: done; 1: tsrfast failed (the record says how); 2: wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in tsrfast reproduce: cifar10:PATH, folder:PATH, synthetic")
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--pair", type=Path, help="folder of the trained pair, default OUT/pair; trained where it is missing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of contestants' names; eager always runs")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)  # how `memory` calls this again
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else FULL
    given = {name: getattr(arguments, name) for name in ("rounds", "batch", "steps") if getattr(arguments, name) is not None}
    for name, value in {**given, "threads": arguments.threads}.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    sizes = Sizes(**{**vars(sizes), **given})
    torch.set_num_threads(arguments.threads)
    try:
        entrants = choose(arguments.only, arguments.smoke)
        pair, batch, data = prepare(arguments.data, arguments.pair or arguments.out / "pair", sizes)
    except (InputError, EnvironmentFault) as e:
        parser.error(str(e))
    if arguments.probe:
        name, n = arguments.probe
        print(json.dumps(probe(pair, name, *batch(int(n)), sizes.memory_steps)))
        return 0
    record: dict[str, Any] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine() | {"load_before": digits(os.getloadavg()[0], 2)},
        "software": software() | {"libraries": versions_of(c.package for c in entrants if c.package)},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "settings": {
            "norm": "linf", "eps": EPS, "step_size": STEP_SIZE, "steps": sizes.steps, "batch": sizes.batch, "rounds": sizes.rounds,
            "threads": arguments.threads, "smoke": arguments.smoke,
        },
        "pair": vars(sizes.recipe) | {k: digits(v) for k, v in quality(pair, *batch(sizes.test_images)).items()},
    }  # fmt: skip
    print(f"pair: {record['pair']}")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "race": lambda: {loss: race(pair, loss, *batch(sizes.batch), sizes, entrants) for loss in LOSSES},
        "scaling": lambda: scaling(pair, batch, sizes),
        "threads": lambda: threads(pair, batch, sizes),
        "memory": lambda: memory(sizes),
    }
    for part in (part for part in PARTS if part in arguments.parts):
        record[part] = parts[part]()
        record["goals"] = goals(record)
        # After each part: what has been measured is not lost with the next one.
        atomic_write(arguments.out / "race.json", json.dumps(record, indent=1) + "\n")
    print(table(record))
    raced = [result for result in record.get("race", {}).values() if result["ratios"]]
    if raced and "scaling" in record:
        plot(record, arguments.out / "race.png")
    failed = any("absent" in result["rows"].get(TSRFAST.name, {}) for result in record.get("race", {}).values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
