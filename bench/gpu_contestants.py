"""Who takes part in `gpu_race.py`: every way to run the oracle attack of the paper on a GPU, and what is timed of each.

The attack is that of `contestants.py`: linf PGD on |s(x') - t(x')|^2, gradient through both networks, from the clean image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from contestants import EPS, STEP_SIZE, Pair, Run, pytorch
from torch import Tensor

from tsrfast.attacks import PGD, OracleL2

# Keeps the small cotangents of a student near its teacher above float16's least; the sign of the gradient does not see it.
LOSS_SCALE = 256.0
PIECE = 500  # images at a time where nobody takes the time


@dataclass(frozen=True)
class Entrant:
    """A way to run the attack.

    Attributes:
        name: in tables.
        build: (pair, steps, images, images at a time) -> what runs it. `images` are like those to come.
        family: ``tsrfast`` or ``pytorch``.
        weaker: by which share its mean loss may stay below that of the float32 loop.
        pieces: whether the number of images at a time is for `gpu_race.best_piece` to find; else all at once.
    """

    name: str
    build: Callable[[Pair, int, Tensor, int], Run]
    family: str
    weaker: float
    pieces: bool = False


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch's float32 products and convolutions may round their operands to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`step`, which allocates nothing that outlives it, as a CUDA graph; on the CPU itself."""
    if device.type != "cuda":
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries choose their algorithms before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return graph.replay


def eager(channels_last: bool) -> Callable[[Pair, int, Tensor, int], Run]:
    """The loop that a careful PyTorch user writes, in float32 or TF32."""

    def build(pair: Pair, steps: int, like: Tensor, piece: int) -> Run:
        loop = pytorch(channels_last=channels_last, piece=piece)(pair, "oracle", steps)

        def run(x: Tensor, y: Tensor) -> Tensor:
            with tf32(True):
                return loop(x, y)

        return run

    return build


def reference(pair: Pair, steps: int, piece: int) -> Run:
    """The same loop without TF32, which nobody times."""
    loop = pytorch(piece=piece)(pair, "oracle", steps)

    def run(x: Tensor, y: Tensor) -> Tensor:
        with tf32(False):
            return loop(x, y)

    return run


@torch.no_grad()
def judged(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, do both networks answer alike) of each image, whoever made it, by a float64 forward pass; `pair` is float64."""
    s, t = (torch.cat([net(part) for part in x.double().split(PIECE)]) for net in (pair.student, pair.teacher))
    return (s - t).square().sum(1), s.argmax(1) == t.argmax(1)


def graphed(autocast: bool) -> Callable[[Pair, int, Tensor, int], Run]:
    """All steps as one CUDA graph, 16-bit channels_last convolutions, one clamp a step for ball and box.

    Args:
        autocast: float32 networks under autocast, which converts the weights every time; else networks converted to float16 once.
    """

    def build(pair: Pair, steps: int, like: Tensor, piece: int) -> Run:
        device = like.device
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16  # what autocast has on a CPU
        nets: list[Any] = [copy.deepcopy(net).to(memory_format=torch.channels_last) for net in (pair.student, pair.teacher)]  # type: ignore[call-overload]
        student, teacher = nets if autocast else (net.to(dtype) for net in nets)
        x, low, high = (like[:piece].clone(memory_format=torch.channels_last) for _ in range(3))

        def step() -> None:
            leaf = x.detach().requires_grad_()
            with torch.autocast(device.type, dtype, enabled=autocast, cache_enabled=False):
                given = leaf if autocast else leaf.to(dtype)
                apart = student(given).float() - teacher(given).float()
            (gradient,) = torch.autograd.grad(LOSS_SCALE * apart.square().sum(), leaf)
            x.add_(gradient.sign_(), alpha=STEP_SIZE)
            torch.clamp(x, low, high, out=x)

        def loop() -> None:
            for _ in range(steps):
                step()

        attack = captured(loop, device)

        def run(images: Tensor, y: Tensor) -> Tensor:
            made = []
            for part in images.split(piece):  # all of the same size
                x.copy_(part)
                torch.clamp(part - EPS, min=0, out=low)
                torch.clamp(part + EPS, max=1, out=high)
                attack()
                made.append(x.clone())
            return torch.cat(made)

        return run

    return build


def tsrfast(precision: str) -> Callable[[Pair, int, Tensor, int], Run]:
    """`tsrfast.attacks.PGD` on compiled networks."""

    def build(pair: Pair, steps: int, like: Tensor, piece: int) -> Run:
        attack = PGD(
            norm="linf", eps=EPS, step_size=STEP_SIZE, steps=steps, loss=OracleL2(pair.teacher), random_start=False,
            engine="chain", precision=precision,
        )  # fmt: skip
        return lambda x, y: attack(pair.student, x, y)

    return build


FLOAT16 = Entrant("tsrfast float16", tsrfast("float16"), "tsrfast", 0.01)
EAGER = Entrant("eager, TF32", eager(False), "pytorch", 0.02, pieces=True)
GRAPHS = Entrant("float16 autocast, channels_last, CUDA graph", graphed(True), "pytorch", 0.05, pieces=True)
RIVALS = (
    EAGER,
    Entrant("eager, TF32, channels_last", eager(True), "pytorch", 0.02, pieces=True),
    GRAPHS,
    Entrant("float16 weights, channels_last, CUDA graph", graphed(False), "pytorch", 0.05, pieces=True),
)
OURS = {
    "cuda": (
        FLOAT16,
        Entrant("tsrfast auto", tsrfast("auto"), "tsrfast", 0.01),
        Entrant("tsrfast split", tsrfast("split"), "tsrfast", 0.005),
        Entrant("tsrfast float32", tsrfast("float32"), "tsrfast", 0.005),
    ),
    "cpu": (Entrant("tsrfast float32", tsrfast("float32"), "tsrfast", 0.005),),
}
