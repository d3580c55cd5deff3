"""Attack libraries against their drop-ins: the same lines of code with the import changed, in one process.

    OMP_NUM_THREADS=1 python bench/drop_in.py --data cifar10:PATH --out DIR

writes DIR/drop_in.json and prints a table. Two workloads: ``student``, the paper's student (conv 50-35-35-22, trained as in `race.py`),
which compiles to a chain, and ``resnet18`` on 3x32x32, which does not: there only what surrounds the network differs.

How it measures: each library attacks once with the original and once with the drop-in, which warms both up and gives what is compared:
the mean cross-entropy, the share of images fooled and the mean l2 change. Then all run once a round, in an order that rotates.
Figures are medians of this process's CPU seconds (``cpu_s``), since other processes of the machine disturb those least; wall times are
kept beside them. A library that is not installed becomes a row that says so:
``pip install --no-deps -r tests/compat/originals.txt`` installs all but adv-lib.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import race
import torch
from record import machine, software, versions_of
from timing import digits, interleave, one_line
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast import attacks
from tsrfast._files import atomic_write
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import resnet18

EPS, ALPHA = 10 / 255, 0.01
L2_EPS, L2_ALPHA = 1.0, 0.1
OURS = "tsrfast"
SIDES = ("original", "drop_in")

Get = Callable[[str], Any]
"""A module of the library (``""``: itself): the original's, or the drop-in's of the same name."""


@dataclass(frozen=True)
class Script:
    """What a user of `library` writes.

    Attributes:
        attack: what is compared across libraries: scripts of one attack do the same work.
        library: name of the original's import; its drop-in is ``tsrfast.compat.<library>``, but for `drop_in`.
        run: (get, net, x, y, steps) -> adversarial images.
        package: whose version is recorded.
        images: at most so many, where the original is slow.
    """

    attack: str
    library: str
    run: Callable[[Get, nn.Module, Tensor, Tensor, int], Tensor]
    package: str | None = None
    drop_in: str | None = None
    images: int | None = None

    def get(self, original: bool) -> Get:
        root = self.library if original else f"tsrfast.compat.{self.drop_in or self.library}"
        return lambda name: importlib.import_module(f"{root}.{name}" if name else root)


# --- what users write ---------------------------------------------------------------------------------------------------


def torchattacks(name: str, **arguments: Any) -> Callable[[Get, nn.Module, Tensor, Tensor, int], Tensor]:
    """``torchattacks.<name>(model, ...)(images, labels)``; an argument "steps" is the number of steps."""

    def run(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        given = {k: steps if v == "steps" else v for k, v in arguments.items()}
        return getattr(get(""), name)(net, **given)(x, y)

    return run


def foolbox(name: str, eps: float | None, **arguments: Any) -> Callable[[Get, nn.Module, Tensor, Tensor, int], Tensor]:
    def run(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        library = get("")
        given = {k: steps if v == "steps" else v for k, v in arguments.items()}
        model = library.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return getattr(library.attacks, name)(**given)(model, x, y, epsilons=eps)[1]

    return run


def art(name: str, **arguments: Any) -> Callable[[Get, nn.Module, Tensor, Tensor, int], Tensor]:
    def run(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        classifier = get("estimators.classification").PyTorchClassifier(
            net,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=10,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        given = {k: steps if v == "steps" else v for k, v in arguments.items()}
        made = getattr(get("attacks.evasion"), name)(classifier, batch_size=len(x), **given)
        return torch.from_numpy(np.asarray(made.generate(x.numpy(), y.numpy())))

    return run


def cleverhans_pgd(norm: float, eps: float, alpha: float) -> Callable[[Get, nn.Module, Tensor, Tensor, int], Tensor]:
    def run(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        attack = get("torch.attacks.projected_gradient_descent").projected_gradient_descent
        return attack(net, x, eps, alpha, steps, norm, clip_min=0, clip_max=1, y=y, rand_init=False).detach()

    return run


def cleverhans_fgm(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    attack = get("torch.attacks.fast_gradient_method").fast_gradient_method
    return attack(net, x, EPS, np.inf, clip_min=0, clip_max=1, y=y).detach()


def cleverhans_cw(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    attack = get("torch.attacks.carlini_wagner_l2").carlini_wagner_l2
    return attack(net, x, 10, y=y, lr=0.01, initial_const=1.0, binary_search_steps=1, max_iterations=steps).detach()


def apgd(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Of AutoAttack's code, which PyPI has as pyautoattack."""
    kind = get("autopgd_base").APGDAttack
    return kind(net, n_iter=steps, norm="Linf", eps=EPS, loss="ce", device="cpu").perturb(x, y)


def advlib_pgd(get: Get, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    return get("attacks").pgd_linf(net, x, y, EPS, steps=steps, random_init=False, absolute_step_size=ALPHA)


SCRIPTS = (
    Script("FGSM", "torchattacks", torchattacks("FGSM", eps=EPS), "torchattacks"),
    Script("FGSM", "foolbox", foolbox("FGSM", EPS), "foolbox"),
    Script("FGSM", "cleverhans", cleverhans_fgm, "cleverhans"),
    Script("FGSM", "art", art("FastGradientMethod", eps=EPS), "adversarial-robustness-toolbox"),
    Script("PGD linf", "torchattacks", torchattacks("PGD", eps=EPS, alpha=ALPHA, steps="steps", random_start=False)),
    Script("PGD linf", "foolbox", foolbox("LinfPGD", EPS, abs_stepsize=ALPHA, steps="steps", random_start=False)),
    Script("PGD linf", "cleverhans", cleverhans_pgd(np.inf, EPS, ALPHA)),
    Script("PGD linf", "art", art("ProjectedGradientDescent", eps=EPS, eps_step=ALPHA, max_iter="steps", verbose=False)),
    Script("PGD linf", "adv_lib", advlib_pgd, "adv-lib", drop_in="advlib"),
    Script("PGD l2", "torchattacks", torchattacks("PGDL2", eps=L2_EPS, alpha=L2_ALPHA, steps="steps", random_start=False)),
    Script("PGD l2", "foolbox", foolbox("L2PGD", L2_EPS, abs_stepsize=L2_ALPHA, steps="steps", random_start=False)),
    Script("PGD l2", "cleverhans", cleverhans_pgd(2, L2_EPS, L2_ALPHA)),
    Script(
        "PGD l2", "art", art("ProjectedGradientDescent", norm=2, eps=L2_EPS, eps_step=L2_ALPHA, max_iter="steps", verbose=False)
    ),
    Script("MIM", "torchattacks", torchattacks("MIFGSM", eps=EPS, alpha=ALPHA, steps="steps", decay=1.0)),
    Script("APGD-CE", "torchattacks", torchattacks("APGD", eps=EPS, steps="steps")),
    Script("APGD-CE", "pyautoattack", apgd, "pyautoattack", drop_in="autoattack"),
    Script("CW l2", "torchattacks", torchattacks("CW", c=1, steps="steps")),
    Script("CW l2", "foolbox", foolbox("L2CarliniWagnerAttack", None, initial_const=1.0, binary_search_steps=1, steps="steps")),
    Script("CW l2", "cleverhans", cleverhans_cw, images=16),
    Script("DeepFool l2", "torchattacks", torchattacks("DeepFool", steps=50), images=8),
    Script("DeepFool l2", "foolbox", foolbox("L2DeepFoolAttack", None, steps=50), images=8),
    Script("DeepFool l2", "art", art("DeepFool", max_iter=50, verbose=False), images=4),
)
DIRECT: dict[str, Callable[[int], attacks.Attack]] = {
    "FGSM": lambda steps: attacks.FGSM(eps=EPS),
    "PGD linf": lambda steps: attacks.PGD(norm="linf", eps=EPS, step_size=ALPHA, steps=steps, random_start=False),
    "PGD l2": lambda steps: attacks.PGD(norm="l2", eps=L2_EPS, step_size=L2_ALPHA, steps=steps, random_start=False),
}
"""tsrfast's own, for the attacks that all libraries have."""


# --- the comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    name: str
    net: nn.Module
    images: int
    steps: int


def outcome(net: nn.Module, x: Tensor, y: Tensor, made: Tensor) -> dict[str, float]:
    """What an attack reached, by a float32 forward pass in PyTorch: whoever made the images."""
    with torch.no_grad():
        logits = net(made)
    return {
        "loss": digits(F.cross_entropy(logits, y).item(), 5),
        "fooled": digits((logits.argmax(1) != y).float().mean().item()),
        "mean_l2": digits((made - x).flatten(1).norm(dim=1).mean().item()),
    }


def compare(work: Workload, x: Tensor, y: Tensor, scripts: Sequence[Script], rounds: int) -> list[dict[str, Any]]:
    """A row a script: {"attack", "library", "images", "original": times and outcome, "drop_in": the same, "ratio"} or "absent"."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    for script in scripts:
        n = min(script.images or work.images, work.images)
        row: dict[str, Any] = {"attack": script.attack, "library": script.library, "images": n}
        rows.append(row)
        for side in SIDES:
            get = script.get(original=side == "original")

            def run(script: Script = script, get: Get = get, n: int = n) -> Tensor:
                torch.manual_seed(0)
                np.random.seed(0)
                return script.run(get, work.net, x[:n], y[:n], work.steps).detach()

            try:
                row[side] = outcome(work.net, x[:n], y[:n], run())
                runs[f"{len(rows) - 1} {side}"] = run
            except ImportError as e:
                row[side] = {"absent": f"not installed ({one_line(e)})"}
            except Exception as e:  # whatever a library raises: the others go on
                row[side] = {"absent": one_line(e)}
            print(f"  {work.name}: {script.attack}, {script.library}, {side}: {row[side]}", file=sys.stderr)
    for name, make in DIRECT.items():
        attack = make(work.steps)
        path = attack.plan(work.net, x).path
        rows.append({"attack": name, "library": OURS, "images": work.images, "path": path})
        runs[f"{len(rows) - 1} drop_in"] = lambda attack=attack: attack(work.net, x[: work.images], y[: work.images])  # type: ignore[misc]
        rows[-1]["drop_in"] = outcome(work.net, x[: work.images], y[: work.images], runs[f"{len(rows) - 1} drop_in"]())  # type: ignore[arg-type]
    for key, times in interleave(runs, rounds).items():
        number, side = key.split()
        rows[int(number)][side] |= times
    for row in rows:
        if all("cpu_s" in row.get(side, {}) for side in SIDES):
            row["ratio"] = digits(row["original"]["cpu_s"] / row["drop_in"]["cpu_s"], 3)
    return rows


def standings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each attack, on as many images each: CPU ms an image of the fastest original and of the slowest and fastest drop-in."""
    found: dict[str, Any] = {}
    for attack in dict.fromkeys(row["attack"] for row in rows):
        per_image: dict[str, dict[str, float]] = {"original": {}, "drop_in": {}}
        for row in (r for r in rows if r["attack"] == attack):
            for side, times in per_image.items():
                if "cpu_s" in row.get(side, {}):
                    times[row["library"]] = digits(1e3 * row[side]["cpu_s"] / row["images"])
        if all(per_image.values()):
            (theirs, best), (ours, mine) = (min(t.items(), key=lambda item: item[1]) for t in per_image.values())
            found[attack] = {
                "fastest_original": theirs,
                "ms": best,
                "fastest_of_ours": ours,
                "our_ms": mine,
                "ratio": digits(best / mine, 3),
            }
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record for a terminal."""
    lines = []
    for name, result in record["workloads"].items():
        s = result["settings"]
        lines += [
            "",
            f"{name}: {s['images']} images, {s['steps']} steps, {record['settings']['threads']} thread(s), CPU ms an image",
        ]
        lines.append(
            f"  {'':14}{'':14}{'images':>7}{'original':>10}{'drop-in':>10}{'ratio':>7}   loss, fooled, mean l2: original | drop-in"
        )
        for row in result["rows"]:
            times, reached = "", []
            for side in (row.get(side, {}) for side in SIDES):
                times += f"{1e3 * side['cpu_s'] / row['images']:10.3g}" if "cpu_s" in side else f"{'-':>10}"
                if side:
                    reached.append(side.get("absent") or f"{side['loss']:.4g} {side['fooled']:.2f} {side['mean_l2']:.3g}")
            ratio = f"{row['ratio']:7.2f}" if "ratio" in row else f"{'':7}"
            lines.append(f"  {row['attack']:14}{row['library']:14}{row['images']:7}{times}{ratio}   {' | '.join(reached)}")
        for attack, s in result["standings"].items():
            lines.append(
                f"  {attack}: fastest original ({s['fastest_original']}) over ours ({s['fastest_of_ours']}): {s['ratio']:.2f}"
            )
    return "\n".join(lines).strip("\n")


def main() -> int:
    """0: done; 1: a drop-in failed where its original did not (the record says how); 2: wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="synthetic", help="as in tsrfast reproduce: cifar10:PATH, folder:PATH, synthetic")
    parser.add_argument("--out", type=Path, default=Path("runs/drop_in"))
    parser.add_argument("--pair", type=Path, help="folder of race.py's pair, default OUT/pair; trained where it is missing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of 'ATTACK LIBRARY', as in the table")
    parser.add_argument("--workloads", nargs="+", default=["student", "resnet18"], choices=["student", "resnet18"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    torch.set_num_threads(arguments.threads)
    chosen = [s for s in SCRIPTS if not arguments.only or any(part in f"{s.attack} {s.library}" for part in arguments.only)]
    if not chosen:
        parser.error(
            f"--only must be part of one of {', '.join(f'{s.attack} {s.library}' for s in SCRIPTS)}, got {arguments.only}"
        )
    try:
        pair, batch, data = race.prepare(
            arguments.data, arguments.pair or arguments.out / "pair", race.SMOKE if arguments.smoke else race.FULL
        )
    except (InputError, EnvironmentFault) as e:
        parser.error(str(e))
    torch.manual_seed(0)
    small = arguments.smoke
    works = {
        "student": lambda: Workload("student", pair.student, 2 if small else 64, 2 if small else 20),
        "resnet18": lambda: Workload(
            "resnet18", resnet18(classes=10, stem="cifar").eval(), 1 if small else 8, 1 if small else 5
        ),
    }
    record: dict[str, Any] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine() | {"load_before": digits(os.getloadavg()[0], 2)},
        "software": software() | {"libraries": versions_of(s.package for s in chosen if s.package)},
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "settings": {
            "eps": EPS,
            "alpha": ALPHA,
            "l2_eps": L2_EPS,
            "l2_alpha": L2_ALPHA,
            "rounds": arguments.rounds,
            "threads": arguments.threads,
        },
        "workloads": {},
    }
    for name in arguments.workloads:
        work = works[name]()
        x, y = batch(work.images)
        if name == "resnet18":  # untrained: what it says of an image is its label
            with torch.no_grad():
                y = work.net(x).argmax(1)
        rows = compare(work, x, y, chosen, arguments.rounds)
        record["workloads"][name] = {
            "settings": {"images": work.images, "steps": work.steps},
            "rows": rows,
            "standings": standings(rows),
        }
        # After each: what has been measured is not lost with the next one.
        atomic_write(arguments.out / "drop_in.json", json.dumps(record, indent=1) + "\n")
    print(table(record))
    rows = [row for result in record["workloads"].values() for row in result["rows"]]
    return int(any("absent" in row["drop_in"] and "absent" not in row.get("original", {"absent": ""}) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
