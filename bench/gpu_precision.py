"""Does low precision on tensor cores weaken the oracle attack? Five criteria, judged by float64 PyTorch of the final images.

    python bench/gpu_precision.py --out FILE.json [--data cifar10:PATH] [--pair DIR]

Pairs: the trained one of `gpu_race.py`, where ``float16`` has to hold, and near students (the teacher with noise on its parameters),
where ``auto`` has to, and float16 is shown beside it. The float32 attack is PyTorch's without TF32; ``chaos`` is the same from 1e-6 away:
what equally good attacks differ by.

1. ascent: sum g sign(g~) / sum |g| along the float32 attack, g in float64, mean of images and steps: at least 0.97.
2. log_ratio: of the final losses, image by image: the 95% interval of the mean ends above -1%.
3. robust_accuracy: share of images that both networks still answer alike: at most 0.1 points more (and who differs, for McNemar's test).
4. gradients: no NaN, and no more than 0.1% of the entries 0 where float64's are not.
5. training: students trained on such adversarial images end within the spread of float32's seeds, in clean and in robust agreement
   with the teacher (float32 attack), or better.

Exit status: 0; 1: a criterion is missed; 2: wrong arguments. `--device cpu --images 8 --steps 2` is to see that everything runs: there
``float32`` is the only precision.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contestants import EPS, STEP_SIZE, Pair, Recipe, quality, trained_pair
from gpu_contestants import PIECE, judged, tf32
from gpu_race import FULL, TINY_RECIPE
from precision import ASCENT, LOG_RATIO, POINTS, climb, compare, gradient, near_pair
from timing import digits
from torch import Tensor

from tsrfast._files import atomic_write
from tsrfast.attacks import PGD, OracleL2
from tsrfast.data import Dataset, Split, load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU
from tsrfast.training import OracleAdversarial, train

ZEROS = 0.001
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Sizes:
    """Images of the trained pair's attacks, of the near ones', and of ascent; steps; then the training."""

    recipe: Recipe = FULL.recipe
    images: int = 10000
    controls: int = 1000
    path: int = 64
    steps: int = 40
    near: tuple[float, ...] = (0.04, 0.01)
    training_images: int = 4000
    training_epochs: int = 4
    training_steps: int = 10


class Nets:
    """A pair in float32 and float64 on the device; the fields that `precision.py` looks at."""

    def __init__(self, pair: Pair, device: torch.device) -> None:
        def on(*to: Any) -> Pair:
            return Pair(*(copy.deepcopy(net).to(*to) for net in (pair.student, pair.teacher)))

        self.float32, self.float64 = on(device), on(device, torch.float64)


def pgd(pair: Pair, precision: str, steps: int, **more: Any) -> PGD:
    options: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE} | more
    loss = OracleL2(pair.teacher)
    return PGD(norm="linf", steps=steps, loss=loss, random_start=False, engine="chain", precision=precision, **options)


def float32_attack(nets: Nets, x: Tensor, y: Tensor, steps: int, chaos: bool = False) -> Tensor:
    """PyTorch's, without TF32."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign().to(x)
    start = x + (1e-6 * noise if chaos else 0)
    pieces = zip(x.split(PIECE), y.split(PIECE), start.split(PIECE), strict=True)
    with tf32(False):
        return torch.cat([climb(nets, "oracle", a, b, c, steps)[-1] for a, b, c in pieces])  # type: ignore[arg-type]


def ascent(nets: Nets, methods: Sequence[str], x: Tensor, y: Tensor, steps: int) -> dict[str, dict[str, float]]:
    """Efficiency, mean and lowest, and the share of entries that are 0 where float64's are not."""
    kept: dict[str, list[Tensor]] = {method: [] for method in methods}  # a step: [2, images]
    with tf32(False):
        path = climb(nets, "oracle", x, y, x, steps)[:-1]  # type: ignore[arg-type]
    for at in path:
        g = gradient(nets.float64, "oracle", at.double(), y).flatten(1)
        for method in methods:
            # One step where neither ball nor box holds it back.
            attack = pgd(nets.float32, method, 1, eps=1.0, step_size=1.0, lo=-2.0, hi=3.0)
            sign = (attack(nets.float32.student, at, y) - at).sign().flatten(1).double()
            lost = ((sign == 0) & (g != 0)).double().mean(1)
            kept[method].append(torch.stack([(g * sign).sum(1) / g.abs().sum(1), lost]))
    found = {}
    for method, values in kept.items():
        both = torch.stack(values)
        found[method] = {
            "efficiency": digits(both[:, 0].mean().item(), 6),
            "lowest": digits(both[:, 0].min().item()),
            "zeros": digits(both[:, 1].mean().item(), 3),
        }
    return found


def measure(pair: Pair, x: Tensor, y: Tensor, methods: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    """Criteria 1 to 4 of one pair."""
    nets = Nets(pair, x.device)
    base = float32_attack(nets, x, y, sizes.steps)
    expected = [base.cpu(), *(t.cpu() for t in judged(nets.float64, base))]
    found: dict[str, Any] = {"logit_distance": digits(quality(nets.float64, x[:PIECE].double(), y[:PIECE])["logit_distance"])}
    found["ascent"] = ascent(nets, methods, x[: sizes.path], y[: sizes.path], sizes.steps)
    found["attacks"], found["nan_gradients"] = {}, {}
    for method in (*methods, "chaos"):
        if method == "chaos":
            made = float32_attack(nets, x, y, sizes.steps, chaos=True)
        else:
            result = pgd(nets.float32, method, sizes.steps).run(nets.float32.student, x, y)
            made, found["nan_gradients"][method] = result.x_adv, int(result.bad_gradients.sum())
        found["attacks"][method] = compare([made.cpu(), *(t.cpu() for t in judged(nets.float64, made))], expected)
    return found


def training(pair: Pair, method: str, data: Dataset, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Criterion 5: {precision: [[clean, robust agreement] of each seed]}, and whether `method` holds."""
    teacher = copy.deepcopy(pair.teacher).to(device)
    split = Split(data.train.images[: sizes.training_images], data.train.labels[: sizes.training_images])
    x = data.test.pixels(torch.arange(min(PIECE, len(data.test)))).to(device)

    def student(precision: str, seed: int) -> list[float]:
        net = ConvReLU(sizes.recipe.student, image=tuple(x.shape[1:]), classes=len(data.classes), seed=seed).to(device)
        attack = PGD(
            eps=EPS,
            step_size=STEP_SIZE,
            steps=sizes.training_steps,
            loss=OracleL2(teacher),
            engine="chain",
            precision=precision,
        )
        train(
            net, OracleAdversarial(teacher, attack), split, epochs=sizes.training_epochs, batch_size=128, lr="cosine:0.001",
            optimizer="adam", seed=seed,
        )  # fmt: skip
        nets = Nets(Pair(net.eval().requires_grad_(False), teacher), device)
        made = float32_attack(nets, x, torch.zeros(len(x), dtype=torch.int64, device=device), sizes.steps)
        return [digits(judged(nets.float64, images)[1].double().mean().item()) for images in (x, made)]

    runs = {"float32": [student("float32", seed) for seed in SEEDS]}
    runs[method] = runs["float32"] if method == "float32" else [student(method, seed) for seed in SEEDS]
    return {"agreement": runs, "holds": within_spread(runs["float32"], runs[method])}


def within_spread(base: Sequence[Sequence[float]], mine: Sequence[Sequence[float]]) -> bool:
    """Mean of each metric over seeds: not below base's mean by more than base's seeds are apart."""
    pairs = zip(zip(*base, strict=True), zip(*mine, strict=True), strict=True)
    return all(sum(m) / len(m) >= sum(b) / len(b) - (max(b) - min(b)) for b, m in pairs)  # NaN does not pass


def criteria(found: dict[str, Any], method: str) -> dict[str, bool]:
    """Which of the first four hold for `method` on a measured pair."""
    a, r = found["ascent"][method], found["attacks"][method]
    return {
        "ascent": a["efficiency"] >= ASCENT,
        "log_ratio": r["interval"][0] > LOG_RATIO,
        "robust_accuracy": r["points"] <= POINTS + 1e-9,
        "gradients": found["nan_gradients"][method] == 0 and a["zeros"] <= ZEROS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in tsrfast reproduce: cifar10:PATH, folder:PATH, synthetic")
    parser.add_argument(
        "--pair", type=Path, default=Path("runs/gpu/pair"), help="folder of gpu_race.py's pair; trained if missing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/precision.json"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--images", type=int, help="this many everywhere, and tiny networks: to see that everything runs")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    sizes = Sizes()
    for name, least in (("images", 2), ("steps", 1)):  # an interval needs two images
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if arguments.images:
        n = arguments.images
        sizes = Sizes(TINY_RECIPE, n, n, n, near=(0.04,), training_images=n, training_epochs=1, training_steps=1)
    if arguments.steps:
        sizes = Sizes(**{**vars(sizes), "steps": arguments.steps})
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    device = torch.device(arguments.device)
    try:
        data = load(arguments.data, train=sizes.recipe.images, test=sizes.images)
        trained = trained_pair(sizes.recipe, data, arguments.pair)
    except (InputError, EnvironmentFault) as e:
        parser.error(str(e))
    methods, asked = (("float16", "auto"), ("float16", "auto")) if device.type == "cuda" else (("float32",), ("float32",) * 2)
    index = torch.arange(min(sizes.images, len(data.test)))
    x, y = data.test.pixels(index), data.test.labels[index]
    record: dict[str, Any] = {
        "settings": {"norm": "linf", "eps": EPS, "step_size": STEP_SIZE, "steps": sizes.steps, "device": arguments.device},
        "limits": {"ascent": ASCENT, "log_ratio": LOG_RATIO, "points": POINTS, "zeros": ZEROS}, "pairs": {}, "criteria": {},
    }  # fmt: skip
    for distance in (None, *sizes.near):
        n, method = (len(x), asked[0]) if distance is None else (min(sizes.controls, len(x)), asked[1])
        pair = trained if distance is None else near_pair(trained.teacher, x[:n], y[:n], distance)
        name = "trained" if distance is None else f"near {distance}"
        found = record["pairs"][name] = measure(pair, x[:n].to(device), y[:n].to(device), methods, sizes)
        record["criteria"][f"{name}, {method}"] = criteria(found, method)
        atomic_write(arguments.out, json.dumps(record, indent=1) + "\n")  # each time: what has been measured is not lost
    record["training"] = training(trained, asked[0], data, sizes, device)
    record["criteria"][f"trained, {asked[0]}"]["training"] = record["training"]["holds"]
    atomic_write(arguments.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["criteria"], indent=1))
    return 0 if all(holds for one in record["criteria"].values() for holds in one.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
