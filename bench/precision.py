"""Does a chain's float32 with Winograd F(4x4,3x3) weaken an attack? Judged by a float64 PyTorch forward of the final images.

    OMP_NUM_THREADS=1 python bench/precision.py --data cifar10:PATH --pair DIR --out FILE.json

The oracle attack is the hard one: its gradient J_S^T d - J_T^T d, d = s - t, is a difference of nearly equal vectors, so rounding is
amplified by |t| / |s - t|. Pairs: the trained one of `race.py`, and near students, the teacher with relative noise on its parameters.
Methods: ``eager`` PyTorch in float32 (channels_last), ``winograd`` and ``direct`` chains, ``bf16`` autocast, which must fail on the
nearest pair or these measures see nothing, and ``chaos``, the eager attack from 1e-6 away: what equally good attacks differ by.

- errors: |a - b| / |b| of each image, b in float64, on clean images; their mean.
- ascent: sum g sign(g~) / sum |g| along the eager float32 attack, g in float64: the share of the first-order gain that the signs of
  g~ keep; at least 0.97. The chain's signs are those of a step of its native loop.
- log ratio: log(loss / loss of eager) at the end, image by image: mean and its 95% interval, whose lower end must be above -1%.
- robust accuracy: how often s answers as t (oracle), or with the label (cross-entropy); aim: within 0.1 points of eager's.

Exit status: 0; 1: winograd or direct misses ascent or log ratio, or bf16 reaches one on the nearest pair; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import race
import torch
from contestants import EPS, LOSSES, STEP_SIZE, Pair, Recipe, quality
from record import machine, software
from timing import digits
from torch import Tensor, nn
from torch.nn import functional as F

import tsrfast
from tsrfast._files import atomic_write
from tsrfast.attacks import PGD, OracleL2
from tsrfast.chain import Chain
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.ops.chain import FIELDS, chain_pgd

CHAINS = ("winograd", "direct")
ASCENT, LOG_RATIO, POINTS = 0.97, -0.01, 0.1  # what has to be reached
PIECE = 32  # images at a time in PyTorch


@dataclass(frozen=True)
class Sizes:
    """Numbers of images: of the trained pair's attacks, of each other attack, and of errors and ascent. Then steps, and distances."""

    images: int = 1000
    controls: int = 256
    path: int = 32
    steps: int = 40
    near: tuple[float, ...] = (0.04, 0.01, 0.003)


SMOKE = Sizes(images=48, controls=48, path=4, steps=2, near=(0.01,))  # two steps: narrow intervals, before chaos sets in
SMOKE_RACE = replace(race.SMOKE, recipe=Recipe([8, 8], [10, 10], images=64, teacher_epochs=1, student_epochs=1))


class Nets:
    """A pair, every way it is computed."""

    def __init__(self, pair: Pair) -> None:
        def converted(**to: Any) -> Pair:
            return Pair(*(copy.deepcopy(net).to(**to) for net in (pair.student, pair.teacher)))

        def compiled(winograd: bool) -> tuple[Chain, Chain]:
            return tsrfast.compile(pair.student, winograd=winograd), tsrfast.compile(pair.teacher, winograd=winograd)

        self.float32, self.float64 = converted(memory_format=torch.channels_last), converted(dtype=torch.float64)
        self.chains = {"winograd": compiled(True), "direct": compiled(False)}


def near_pair(teacher: nn.Module, x: Tensor, y: Tensor, distance: float) -> Pair:
    """A student |s - t| / |t| = `distance` (within 2%) from the teacher on x: relative Gaussian noise on every parameter."""
    scale = found = distance
    for _ in range(20):
        scale *= distance / found
        generator, student = torch.Generator().manual_seed(0), copy.deepcopy(teacher)
        for p in student.parameters():
            p.data.mul_(1 + scale * torch.randn(p.shape, generator=generator))
        pair = Pair(student, teacher)  # type: ignore[arg-type]
        found = quality(pair, x, y)["logit_distance"]
        if abs(found / distance - 1) < 0.02:
            return pair
    raise ArithmeticError(f"no student {distance} from its teacher, the last was {found}")


def gradient(pair: Pair, loss: str, x: Tensor, y: Tensor, bf16: bool = False) -> Tensor:
    """Of the loss's sum with respect to x, by autograd."""
    leaf = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        s = pair.student(leaf)
        value = (s - pair.teacher(leaf)).square().sum() if loss == "oracle" else F.cross_entropy(s, y, reduction="sum")
    return torch.autograd.grad(value, leaf)[0]


def climb(nets: Nets, loss: str, x0: Tensor, y: Tensor, start: Tensor, steps: int, bf16: bool = False) -> list[Tensor]:
    """Every iterate of the PyTorch attack, `steps` + 1."""
    low, high = (x0 - EPS).clamp(min=0), (x0 + EPS).clamp(max=1)
    x = [torch.clamp(start, low, high)]
    for _ in range(steps):
        x.append(torch.clamp(x[-1] + STEP_SIZE * gradient(nets.float32, loss, x[-1], y, bf16).sign(), low, high))
    return x


def attack(nets: Nets, method: str, loss: str, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Adversarial images."""
    if method in CHAINS:
        student, teacher = nets.chains[method]
        chosen: Any = OracleL2(teacher) if loss == "oracle" else loss
        options: dict[str, Any] = {"eps": EPS, "step_size": STEP_SIZE, "random_start": False, "engine": "chain"}
        return PGD(norm="linf", steps=steps, loss=chosen, **options)(student, x, y)
    moved = (1e-6 if method == "chaos" else 0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()
    pieces = zip(x.split(PIECE), y.split(PIECE), (x + moved).split(PIECE), strict=True)
    return torch.cat([climb(nets, loss, a, b, c, steps, bf16=method == "bf16")[-1] for a, b, c in pieces])


def direction(nets: Nets, method: str, loss: str, x: Tensor, y: Tensor) -> Tensor:
    """Where the method steps from x: -1, 0 or 1 a pixel."""
    if method not in CHAINS:
        return gradient(nets.float32, loss, x, y, bf16=method == "bf16").sign()
    student, teacher = ((net.plan, net.packed) for net in nets.chains[method])
    chosen: dict[str, Any] = {"teacher": teacher, "loss": "oracle_l2"} if loss == "oracle" else {"labels": y, "loss": loss}
    # One step of the native loop, where neither ball nor box holds it back.
    return (chain_pgd(x, x, student, eps=1.0, step_size=1.0, steps=1, lo=-2.0, hi=3.0, judge=False, **chosen).x - x).sign()


def quantities(nets: Nets, method: str, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the attacks are made of, as the method computes it."""
    if method in CHAINS:
        student, teacher = nets.chains[method]
        s, t = student(x), teacher(x)
        oracle = student.input_gradient(x, 2 * (s - t)) + teacher.input_gradient(x, 2 * (t - s))
        cross_entropy = student.input_gradient(x, s.softmax(1) - F.one_hot(y, s.shape[1]))
    else:
        pair = nets.float64 if method == "float64" else nets.float32
        x = x.to(next(pair.student.parameters()).dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=method == "bf16"):
            s, t = pair.student(x), pair.teacher(x)
        oracle, cross_entropy = (gradient(pair, loss, x, y, method == "bf16") for loss in LOSSES)
    return {"logits": s, "logit_difference": s - t, "cross_entropy_gradient": cross_entropy, "oracle_gradient": oracle}


def errors(nets: Nets, methods: Sequence[str], x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    def error(a: Tensor, b: Tensor) -> float:
        return digits(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean().item(), 3)

    exact = quantities(nets, "float64", x, y)
    return {m: {name: error(a, exact[name]) for name, a in quantities(nets, m, x, y).items()} for m in methods}


def ascent(nets: Nets, methods: Sequence[str], loss: str, x: Tensor, y: Tensor, steps: int) -> dict[str, dict[str, Any]]:
    """Efficiency, mean over steps and images and the lowest, and the share of pixels whose sign is float64's."""
    kept: dict[str, list[Tensor]] = {method: [] for method in methods}  # a step and piece: [2, n]
    for a, b in zip(x.split(8), y.split(8), strict=True):  # float64 is faster in few images
        for at in climb(nets, loss, a, b, a, steps)[:-1]:
            g = gradient(nets.float64, loss, at.double(), b).flatten(1)
            for method in methods:
                sign = direction(nets, method, loss, at, b).flatten(1)
                kept[method].append(torch.stack([(g * sign).sum(1) / g.abs().sum(1), (sign == g.sign()).double().mean(1)]))
    found: dict[str, dict[str, Any]] = {}
    for method, values in kept.items():
        (efficiency, equal), lowest = torch.cat(values, 1).mean(1).tolist(), torch.cat(values, 1)[0].min().item()
        found[method] = {"efficiency": digits(efficiency, 6), "lowest": digits(lowest)}
        found[method] |= {"equal_signs": digits(equal, 5), "holds": efficiency >= ASCENT}
    return found


@torch.no_grad()
def judged(pair: Pair, loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, robust: bool) of each image, by float64 PyTorch, whoever made it."""
    s, t = (torch.cat([net(a) for a in x.double().split(PIECE)]) for net in (pair.student, pair.teacher))
    if loss == "oracle":
        return (s - t).square().sum(1), s.argmax(1) == t.argmax(1)
    return F.cross_entropy(s, y, reduction="none"), s.argmax(1) == y


def compare(mine: Sequence[Tensor], eager: Sequence[Tensor]) -> dict[str, Any]:
    """A method's (images, losses, robust) beside those of the eager attack on the same images."""
    (x, value, robust), (x0, value0, robust0) = mine, eager
    ratio = (value / value0).log()
    mean, half = ratio.mean().item(), 1.96 * ratio.std().item() / len(ratio) ** 0.5
    points = 100 * (robust.double().mean() - robust0.double().mean()).item()
    return {
        "images": len(x), "log_ratio": digits(mean), "interval": [digits(mean - half), digits(mean + half)],
        "deviation": digits(ratio.std().item(), 3), "holds": mean - half > LOG_RATIO,
        "robust_accuracy": digits(robust.double().mean().item()), "points": round(points, 3),
        "within_points": abs(points) <= POINTS + 1e-9, "only_here_robust": int((robust & ~robust0).sum()),
        "only_eager_robust": int((robust0 & ~robust).sum()), "pixels_differ": digits(((x - x0).abs() > 1e-6).double().mean().item(), 3),
    }  # fmt: skip


def attacks(nets: Nets, loss: str, x: Tensor, y: Tensor, sizes: Sizes) -> dict[str, Any]:
    """Every method's attack against the eager one: the Winograd chain on all images, the others on the first `controls`."""

    def made(method: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
        images = attack(nets, method, loss, x[:n], y[:n], sizes.steps)
        return images, *judged(nets.float64, loss, images, y[:n])

    eager = made("eager", len(x))
    counts = {"winograd": len(x)} | dict.fromkeys(("direct", "bf16", "chaos"), min(sizes.controls, len(x)))
    return {
        "eager_robust_accuracy": digits(eager[2].double().mean().item()),
        "eager_mean_loss": digits(eager[1].mean().item(), 6),
        "methods": {m: compare(made(m, n), [t[:n] for t in eager]) for m, n in counts.items()},
    }


def measure(pair: Pair, x: Tensor, y: Tensor, losses: Sequence[str], sizes: Sizes) -> dict[str, Any]:
    nets, methods = Nets(pair), ("eager", *CHAINS, "bf16")
    a, b, few, column = x[: sizes.path], y[: sizes.path], sizes.controls, FIELDS.index("winograd")
    return {
        "logit_distance": digits(quality(nets.float64, x[:few].double(), y[:few])["logit_distance"]),
        "winograd_layers": {name: sum(int(net.plan[:, column].sum()) for net in both) for name, both in nets.chains.items()},
        "errors": errors(nets, methods, a, b),
        "ascent": ascent(nets, methods, "oracle", a, b, sizes.steps),
        "attacks": {loss: attacks(nets, loss, x, y, sizes) for loss in losses},
    }


def verdict(pairs: dict[str, Any]) -> dict[str, bool]:
    """Whether chains reach ascent and log ratio on every pair, and whether bf16 reaches one of them on the nearest, the last."""

    def reached(method: str, of: Sequence[dict[str, Any]]) -> list[bool]:
        losses = [found["methods"][method]["holds"] for pair in of for found in pair["attacks"].values()]
        return [*losses, *(pair["ascent"][method]["holds"] for pair in of)]

    every = list(pairs.values())
    return {m: all(reached(m, every)) for m in CHAINS} | {"bf16, nearest pair": any(reached("bf16", every[-1:]))}


def table(name: str, found: dict[str, Any]) -> str:
    lines = [f"\n{name}: |s - t| / |t| = {found['logit_distance']}, layers by Winograd: {found['winograd_layers']['winograd']}"]
    lines += ["  errors of        logits     s - t   CE grad  oracle g    ascent    lowest     signs"]
    keys, missed = ("logits", "logit_difference", "cross_entropy_gradient", "oracle_gradient"), {True: "", False: "  MISSED"}
    row = "".join(f"{{{key}:10.2e}}" for key in keys) + "{efficiency:10.5f}{lowest:10.4f}{equal_signs:10.2%}"
    for method, e in found["errors"].items():
        lines.append(f"  {method:12}" + row.format(**e, **found["ascent"][method]) + missed[found["ascent"][method]["holds"]])
    for loss, result in found["attacks"].items():
        about = f"mean loss {result['eager_mean_loss']}, robust accuracy {result['eager_robust_accuracy']:.1%}"
        head = "images   log ratio, 95% interval        deviation   robust  points  decisions +/-  pixels"
        lines += [f"  {loss}: eager's {about}", f"{'':16}{head}"]
        for method, r in result["methods"].items():
            interval = "{:+.3%} ({:+.3%}, {:+.3%})".format(r["log_ratio"], *r["interval"])
            row = "{deviation:11.2%}{robust_accuracy:9.1%}{points:+8.2f}{only_here_robust:10}/{only_eager_robust:<4}{pixels_differ:8.2%}"
            lines.append(f"  {method:12}{r['images']:8}{interval:>31}" + row.format(**r) + missed[r["holds"]])
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in tsrfast reproduce: cifar10:PATH, folder:PATH, synthetic")
    parser.add_argument("--pair", type=Path, help="folder of race.py's pair, default beside --out; trained if missing")
    parser.add_argument("--images", type=int, help=f"test images for the trained pair, default {Sizes.images}")
    parser.add_argument("--steps", type=int, help=f"of every attack, default {Sizes.steps}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/precision/precision.json"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("images", "steps") if getattr(arguments, name) is not None}
    for name, value in {**given, "threads": arguments.threads}.items():
        if value < (2 if name == "images" else 1):  # an interval needs two
            parser.error(f"--{name} must be at least {2 if name == 'images' else 1}, got {value}")
    sizes = replace(SMOKE if arguments.smoke else Sizes(), **given)
    torch.set_num_threads(arguments.threads)
    try:
        race_sizes = SMOKE_RACE if arguments.smoke else race.FULL
        trained, batch, data = race.prepare(arguments.data, arguments.pair or arguments.out.parent / "pair", race_sizes)
    except (InputError, EnvironmentFault) as e:
        parser.error(str(e))
    if sizes.images > len(data.test):
        parser.error(f"--images must be at most {len(data.test)}, the test images loaded, got {sizes.images}")
    x, y = batch(sizes.images)
    record: dict[str, Any] = {
        "schema": 1, "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(), "software": software(), "data": {"name": data.name, "fingerprint": data.fingerprint},
        "settings": {"norm": "linf", "eps": EPS, "step_size": STEP_SIZE, "smoke": arguments.smoke, **asdict(sizes)},
        "criteria": {"ascent": ASCENT, "log_ratio": LOG_RATIO, "points": POINTS}, "pairs": {},
    }  # fmt: skip
    for distance in (None, *sizes.near):
        n = len(x) if distance is None else sizes.controls
        pair = trained if distance is None else near_pair(trained.teacher, x[:n], y[:n], distance)
        name, losses = ("trained", LOSSES) if distance is None else (f"near {distance}", LOSSES[:1])
        record["pairs"][name] = measure(pair, x[:n], y[:n], losses, sizes)
        record["verdict"] = verdict(record["pairs"])
        atomic_write(arguments.out, json.dumps(record, indent=1) + "\n")  # each time: what has been measured is not lost
        print(table(name, record["pairs"][name]), flush=True)
    print(f"\nascent and log ratio: {record['verdict']}")
    return 0 if record["verdict"] == dict.fromkeys(CHAINS, True) | {"bf16, nearest pair": False} else 1


if __name__ == "__main__":
    sys.exit(main())
