"""The oracle attack, compiled networks, correlations and the generic path on a GPU, against PyTorch, in one process.

    python bench/gpu_race.py --out FILE.json [--data cifar10:PATH] [--pair DIR] [--parts oracle chain correlation generic]

Times are by CUDA events: everything is warmed up, then all run once a round in an order that rotates; medians, with the spread. Before
an attack is timed, its images are judged by a float64 forward pass of the two networks on their own: inside ball and box, and a mean loss
that stays by no more than a stated share below the float32 loop's. Who fails that, or raises, becomes a row with the reason. PyTorch's
attacks take as many images at a time as is fastest for them. Useful TFLOP/s count multiply-adds of convolutions and linear layers,
forward and input gradient. The file is written again after each measurement: what has been measured is not lost.

The pair is the one of race.py, trained smaller, in DIR; `--device cpu --images 8 --steps 2` runs everything on a CPU, where times mean
nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import EPS, STEP_SIZE, Pair, Recipe, flop, quality, trained_pair
from gpu_contestants import OURS, PIECE, RIVALS, Entrant, captured, judged, reference, tf32
from timing import digits, one_line, rotated
from torch import Tensor
from torch.nn import functional as F

import tsrfast
from tsrfast import ops
from tsrfast._files import atomic_write
from tsrfast.attacks import PGD
from tsrfast.data import load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import resnet18
from tsrfast.ops.chain import has_fused_kernel

PARTS = ("oracle", "chain", "correlation", "generic")
LAYERS = {"conv1": (50, 45, 30), "conv2": (35, 32, 28), "conv3": (35, 32, 26), "conv4": (22, 20, 24)}  # of the paper's pair
ROUNDS, LEAST_ROUNDS = 9, 3


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    recipe: Recipe
    images: tuple[int, ...] = (128, 10000, 1024)
    steps: int = 40
    chain_images: tuple[int, ...] = (128, 10000)
    correlation_images: int = 2048
    generic_images: tuple[int, ...] = (128, 512)
    generic_steps: int = 10
    seconds: float = 15.0
    """After LEAST_ROUNDS, one comparison takes no longer than that."""


FULL = Sizes(Recipe([45, 32, 32, 20], [50, 35, 35, 22], images=4000, teacher_epochs=3, student_epochs=4))
TINY_RECIPE = Recipe([8, 8], [10, 10], images=64, teacher_epochs=1, student_epochs=1)  # for --images


# --- time -----------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, of the GPU too."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, and the distance between the quartiles."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median_s": digits(statistics.median(seconds)), "min_s": digits(min(seconds)), "max_s": digits(max(seconds)),
        "iqr_s": digits(high - low, 3), "rounds": len(seconds),
    }  # fmt: skip


def interleave(runs: Mapping[str, Callable[[], object]], device: torch.device, limit: float) -> dict[str, dict[str, Any]]:
    """Time all once a round, each round starting with another one: {name: `spread`}; fewer rounds after `limit` seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        timed(run, device)
    start = time.perf_counter()
    for r in range(ROUNDS if runs else 0):
        if r >= LEAST_ROUNDS and time.perf_counter() - start > limit:
            break
        for name in rotated(list(runs), r):
            seconds[name].append(timed(runs[name], device))
    return {name: spread(values) for name, values in seconds.items()}


# --- the parts ------------------------------------------------------------------------------------------------------------


def score(exact: Pair, x: Tensor) -> tuple[float, float]:
    """(mean loss, share of images that student and teacher answer differently); `exact` is float64."""
    loss, alike = judged(exact, x)
    return loss.mean().item(), 1 - alike.double().mean().item()


def compare(made: Tensor, x0: Tensor, mine: tuple[float, float], best: tuple[float, float], weaker: float) -> dict[str, Any]:
    """What somebody made of `x0`, beside what the float32 loop made: `mine` and `best` are the two's `score`.

    Raises:
        ArithmeticError: it leaves ball or box, or its loss stays behind.
    """
    out = max(((made - x0).abs().max() - EPS).item(), -made.min().item(), made.max().item() - 1)
    if not out <= 1e-6:  # NaN does not pass
        raise ArithmeticError(f"{out:.3g} outside of ball or box")
    ratio = mine[0] / best[0]
    if not ratio >= 1 - weaker:
        raise ArithmeticError(f"mean loss {mine[0]:.6g}, the float32 loop reaches {best[0]:.6g}")
    return {"mean_loss": digits(mine[0], 6), "loss_ratio": digits(ratio, 5), "success": digits(mine[1])}


def best_piece(entrant: Entrant, pair: Pair, x: Tensor, y: Tensor) -> int:
    """Images at a time with which two steps are fastest; it divides their number."""
    n = len(x)
    sizes = [n, *(n // k for k in (4, 10) if n % k == 0 and n // k >= 256)] if entrant.pieces else [n]
    if len(sizes) == 1:
        return n
    times = {}
    for piece in sizes:
        run = entrant.build(pair, 2, x, piece)
        run(x, y)
        times[piece] = min(timed(lambda run=run: run(x, y), x.device) for _ in range(2))  # type: ignore[misc]
    return min(times, key=lambda piece: times[piece])


def oracle(pair: Pair, exact: Pair, x: Tensor, y: Tensor, sizes: Sizes, work: int) -> dict[str, Any]:
    """All attacks on one batch; `work`: FLOP of an image and step. {"rows": {name: measurements or {"absent": reason}}, "ratios"}."""
    expected = score(exact, reference(pair, sizes.steps, min(len(x), PIECE))(x, y))
    rows: dict[str, Any] = {}
    runs: dict[str, Callable[[], object]] = {}
    for one in (*OURS[x.device.type], *RIVALS):
        try:
            piece = best_piece(one, pair, x, y)
            run = one.build(pair, sizes.steps, x, piece)
            made = run(x, y)
            runs[one.name] = partial(run, x, y)  # timed also if it is too weak: "absent" then says so beside the time
            rows[one.name] = {"images_at_a_time": piece} | compare(made, x, score(exact, made), expected, one.weaker)
        except Exception as e:  # whatever a capture or an allocation raises: the others still race
            rows[one.name] = {"absent": one_line(e)}
            runs.pop(one.name, None)
            gc.collect()
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"  oracle, {len(x)} images: {one.name}: {rows[one.name].get('absent', 'as strong')}", file=sys.stderr)
    for name, times in interleave(runs, x.device, sizes.seconds).items():
        rate = 1e-12 * work * sizes.steps * len(x) / times["median_s"]
        rows[name] |= times | {"useful_tflop_per_s": digits(rate)}
    return {"float32_loss": digits(expected[0], 6), "rows": rows, **ratios(rows, OURS[x.device.type][0].name)}


def ratios(rows: Mapping[str, Any], ours: str) -> dict[str, Any]:
    """{"ours": name, "ratios": {other: its median over ours}} of those that were timed; none without ours."""
    medians = {name: row["median_s"] for name, row in rows.items() if "median_s" in row and "absent" not in row}
    if ours not in medians:
        return {"ours": ours, "ratios": {}}
    return {"ours": ours, "ratios": {name: digits(t / medians[ours], 3) for name, t in medians.items() if name != ours}}


def chain(pair: Pair, x: Tensor, sizes: Sizes, work: int) -> dict[str, Any]:
    """The student alone, compiled, forward and input gradient; `work`: FLOP of both for an image."""
    student = pair.student
    compiled = tsrfast.compile(student)
    cotangent = torch.ones(len(x), student(x[:1]).shape[1], device=x.device)

    def gradient() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(student(leaf), leaf, cotangent)[0]

    with torch.no_grad(), tf32(False):
        error = ((compiled(x) - student(x)).norm() / student(x).norm()).item()
    if not error < 1e-3:
        raise ArithmeticError(f"logits are {error:.3g} apart")
    found: dict[str, Any] = {"logit_error": digits(error, 3)}
    runs: dict[str, tuple[float, dict[str, Callable[[], object]]]] = {
        "forward": (0.5, {"tsrfast": lambda: compiled(x), "PyTorch, TF32": torch.no_grad()(lambda: student(x))}),
        "gradient": (1.0, {"tsrfast": lambda: compiled.input_gradient(x, cotangent), "PyTorch, TF32": gradient}),
    }
    for name, (share, both) in runs.items():
        with tf32(True):
            times = interleave(both, x.device, sizes.seconds)
        for row in times.values():
            row["useful_tflop_per_s"] = digits(1e-12 * share * work * len(x) / row["median_s"])
        found[name] = {"rows": times, **ratios(times, "tsrfast")}
    return found


def correlation(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """GB/s at which the moments of the paper's layers are taken: bytes of both activations over time."""
    runs: dict[str, Callable[[], object]] = {}
    moved = {}
    for layer, (cs, ct, side) in LAYERS.items():
        g = torch.Generator(device).manual_seed(0)
        both = [torch.randn(sizes.correlation_images, c, side, side, generator=g, device=device).relu() for c in (cs, ct)]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for layout, given in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
                s, t = (a.to(dtype).contiguous(memory_format=given) for a in both)
                name = f"{layer} {str(dtype).removeprefix('torch.')} {layout}"
                runs[name] = partial(ops.channel_correlation, s, t)
                moved[name] = (s.numel() + t.numel()) * s.element_size()
    rows = interleave(runs, device, sizes.seconds)
    for name, row in rows.items():
        row["gb_per_s"] = digits(1e-9 * moved[name] / row["median_s"])
    return {"images": sizes.correlation_images, "rows": rows}


def networks_correlation(pair: Pair, x: Tensor, sizes: Sizes) -> dict[str, Any]:
    """Moments of both networks' convolutions from images: one kernel, whose activations never leave the chip (float16), layer by layer, and
    PyTorch's forward passes in pieces with `channel_correlation` behind them. "error": largest difference of a correlation from PyTorch's.
    """
    nets = [(c.plan, c.packed) for c in map(tsrfast.compile, (pair.student, pair.teacher))]
    layers = list(range(len(pair.student.widths)))

    def moments(precision: str) -> list[ops.CorrelationState]:
        return ops.chain_correlation(x, *nets, layers, layers, precision=precision)

    def in_pytorch() -> list[ops.CorrelationState]:
        total: list[ops.CorrelationState] = []
        with torch.no_grad():
            for piece in x.split(PIECE):
                both = (net.activations(piece) for net in (pair.student, pair.teacher))
                seen = [ops.channel_correlation(s, t) for s, t in zip(*both, strict=True)]
                total = [ops.merge(a, b) for a, b in zip(total, seen, strict=True)] if total else seen
        return total

    def rho(states: list[ops.CorrelationState]) -> Tensor:
        return torch.cat(
            [(s.cross / s.m2_student.sqrt()[:, None] / s.m2_teacher.sqrt()).nan_to_num(0, 0, 0).flatten() for s in states]
        )

    precisions = ("float16", "split") if x.is_cuda else ("float32",)
    runs: dict[str, Callable[[], object]] = {f"tsrfast {p}": partial(moments, p) for p in precisions}
    with tf32(False):
        exact = rho(in_pytorch())
        error = {name: digits((rho(run()) - exact).abs().max().item(), 3) for name, run in runs.items()}
    with tf32(True):
        rows = interleave({**runs, "PyTorch, TF32": in_pytorch}, x.device, sizes.seconds)
    return {"images": len(x), "error": error, "rows": rows, **ratios(rows, f"tsrfast {precisions[0]}")}


def generic(n: int, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """PGD on a ResNet-18, which does not compile, against its forward and backward passes alone.

    "overhead": what the attack takes beyond them, as a share: of the passes as they are for ``eager``, and captured in a CUDA graph where
    the attack is.
    """
    model = resnet18(seed=0).to(device).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 3, 32, 32, generator=g).to(device), (torch.arange(n) % 10).to(device)
    steps = sizes.generic_steps

    def passes() -> None:
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)

    def repeated(step: Callable[[], object]) -> None:
        for _ in range(steps):
            step()

    def attack(engine: str) -> PGD:
        return PGD(norm="linf", eps=8 / 255, step_size=2 / 255, steps=steps, random_start=False, engine=engine)

    stepwise, auto = attack("eager"), attack("auto")  # recordings live as long as their attack
    path = auto.run(model, x, y).path
    runs: dict[str, Callable[[], object]] = {
        "passes": lambda: repeated(passes),
        "passes, CUDA graph": partial(repeated, captured(passes, device)),
        "tsrfast eager": lambda: stepwise(model, x, y),
        "tsrfast auto": lambda: auto(model, x, y),
    }
    rows = interleave(runs, device, sizes.seconds)
    against = {"tsrfast eager": "passes", "tsrfast auto": "passes, CUDA graph" if path == "graph" else "passes"}
    overhead = {name: digits(rows[name]["median_s"] / rows[bare]["median_s"] - 1, 3) for name, bare in against.items()}
    return {"steps": steps, "path": path, "rows": rows, "against": against, "overhead": overhead}


# --- the command ------------------------------------------------------------------------------------------------------------


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why not."""
    try:
        return measure()
    except Exception as e:  # one part's failure does not lose the others
        return {"absent": one_line(e)}


def absences(found: object) -> list[str]:
    """Reasons of everything that is absent, at any depth."""
    if not isinstance(found, dict):
        return []
    own = [found["absent"]] if "absent" in found else []
    return own + [reason for value in found.values() for reason in absences(value)]


def main() -> int:
    """0: all measured; 1: something could not be (the record says what); 2: wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in tsrfast reproduce: cifar10:PATH, folder:PATH, synthetic")
    parser.add_argument(
        "--pair", type=Path, default=Path("runs/gpu/pair"), help="folder of the pair; trained where it is missing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/race.json"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--images", type=int, help="this many everywhere, and tiny networks: to see that everything runs")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    sizes = FULL
    for name in ("images", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if arguments.images:
        n = arguments.images
        sizes = Sizes(TINY_RECIPE, (n,), chain_images=(n,), correlation_images=n, generic_images=(n,), seconds=0)
    if arguments.steps:
        sizes = Sizes(**{**vars(sizes), "steps": arguments.steps, "generic_steps": min(arguments.steps, sizes.generic_steps)})
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    device = torch.device(arguments.device)
    torch.backends.cudnn.benchmark = True
    try:
        data = load(arguments.data, train=sizes.recipe.images, test=max(sizes.images))
        on_cpu = trained_pair(sizes.recipe, data, arguments.pair)
    except (InputError, EnvironmentFault) as e:
        parser.error(str(e))
    pair = Pair(*(copy.deepcopy(net).to(device) for net in (on_cpu.student, on_cpu.teacher)))
    exact = Pair(*(copy.deepcopy(net).to(device, torch.float64) for net in (on_cpu.student, on_cpu.teacher)))
    work = [flop(net, data.test.pixels(torch.tensor([0])).shape[1:]) for net in (on_cpu.student, on_cpu.teacher)]

    def batch(n: int) -> tuple[Tensor, Tensor]:
        index = torch.arange(n) % len(data.test)
        return data.test.pixels(index).to(device), data.test.labels[index].to(device)

    def clean(n: int) -> dict[str, float]:
        with tf32(False):
            return {key: digits(value) for key, value in quality(pair, *batch(n)).items()}

    plans = [tsrfast.compile(net).plan for net in (on_cpu.student, on_cpu.teacher)]
    record: dict[str, Any] = {
        "settings": {"norm": "linf", "eps": EPS, "step_size": STEP_SIZE, "steps": sizes.steps, "device": arguments.device},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "pair": vars(sizes.recipe) | clean(min(1000, len(data.test))) | {"flop_per_image_and_step": sum(work)},
        "one_kernel": has_fused_kernel(*plans, "oracle_l2", "linf"),
    }  # fmt: skip
    parts: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
        "oracle": {str(n): lambda n=n: oracle(pair, exact, *batch(n), sizes, sum(work)) for n in sizes.images},  # type: ignore[misc]
        "chain": {str(n): lambda n=n: chain(pair, batch(n)[0], sizes, work[0]) for n in sizes.chain_images},  # type: ignore[misc]
        "correlation": {
            "layers": lambda: correlation(device, sizes),
            "networks": lambda: networks_correlation(pair, batch(max(sizes.chain_images))[0], sizes),
        },
        "generic": {str(n): lambda n=n: generic(n, device, sizes) for n in sizes.generic_images},  # type: ignore[misc]
    }
    for part in (part for part in PARTS if part in arguments.parts):
        record[part] = {}
        for name, measure in parts[part].items():
            record[part][name] = attempt(measure)
            atomic_write(arguments.out, json.dumps(record, indent=1) + "\n")
    missing = absences(record)
    print("\n".join(missing), file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
