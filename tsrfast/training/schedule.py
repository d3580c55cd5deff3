"""Learning rates: frozen objects that map (step, steps per epoch, total steps) to a rate, and their short spellings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tsrfast.errors import InputError, unknown


@dataclass(frozen=True)
class Constant:
    """The same rate throughout."""

    lr: float

    def __post_init__(self) -> None:
        _check_rate("Constant", self.lr)

    def __call__(self, step: int, steps_per_epoch: int, total: int) -> float:
        return self.lr


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `lr` at step 0 towards 0 at step `total`, changed every step."""

    lr: float

    def __post_init__(self) -> None:
        _check_rate("Cosine", self.lr)

    def __call__(self, step: int, steps_per_epoch: int, total: int) -> float:
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass(frozen=True)
class Piecewise:
    """A rate from epoch to epoch: `points` maps the epoch at which a rate begins to it; one begins at epoch 0.

    The authors' CIFAR schedule without its final drop is {0: 0.001, 5: 0.002, 10: 0.005, 30: 0.01}.
    """

    points: tuple[tuple[int, float], ...]

    def __init__(self, points: Mapping[int, float]) -> None:
        object.__setattr__(self, "points", tuple(sorted(points.items())))
        for epoch, rate in self.points:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise InputError(f"tsrfast.Piecewise: points must begin at epochs 0, 1, 2, ..., got {epoch!r}")
            _check_rate("Piecewise", rate)
        if not self.points or self.points[0][0] != 0:
            raise InputError(f"tsrfast.Piecewise: points must have a rate for epoch 0, got {dict(points)}")

    def __call__(self, step: int, steps_per_epoch: int, total: int) -> float:
        epoch = step // steps_per_epoch
        return [rate for start, rate in self.points if start <= epoch][-1]


Schedule = Callable[[int, int, int], float]


def parse_schedule(text: str) -> Constant | Cosine | Piecewise:
    """A schedule from "constant:0.01", "cosine:0.1" or "piecewise:0=0.001,5=0.002,10=0.005,30=0.01" (epoch=rate).

    Raises:
        InputError: an unknown kind, or a number that is missing, malformed or not positive.
    """
    kind, _, rest = text.partition(":")
    kind = kind.strip()
    if kind not in ("constant", "cosine", "piecewise"):
        raise unknown("learning-rate schedule", kind, ("constant", "cosine", "piecewise"))
    if kind == "constant":
        return Constant(_number(text, rest))
    if kind == "cosine":
        return Cosine(_number(text, rest))
    points: dict[int, float] = {}
    for part in rest.split(","):
        start, equals, rate = part.partition("=")
        epoch = start.strip()
        if not equals or not epoch.isdecimal():
            wanted = "epoch=rate pairs such as 0=0.001,5=0.002"
            raise InputError(f"tsrfast.parse_schedule: piecewise must list {wanted}, got {part!r} in {text!r}")
        if int(epoch) in points:
            given = f"{int(epoch)} twice in {text!r}"
            raise InputError(f"tsrfast.parse_schedule: piecewise must name each epoch once, got {given}")
        points[int(epoch)] = _number(text, rate)
    return Piecewise(points)


def _number(text: str, given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise InputError(f"tsrfast.parse_schedule: rate must be a number, got {given.strip()!r} in {text!r}") from None


def _check_rate(name: str, lr: float) -> None:
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (math.isfinite(lr) and lr > 0):
        raise InputError(f"tsrfast.{name}: lr must be a positive number, got {lr!r}")
