"""Projected gradient descent (Madry et al. 2018), the attack of the paper (section 5.1: 40 steps of 0.01, eps = 10/255, linf)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsrfast.attacks.attack import LoopAttack
from tsrfast.attacks.direction import Direction
from tsrfast.attacks.graph import check_engine
from tsrfast.attacks.loop import Recipe, StepState
from tsrfast.attacks.losses import Loss, resolve
from tsrfast.attacks.native import check_precision
from tsrfast.attacks.threat import Threat, check_count, check_radius
from tsrfast.errors import InputError, unknown


@dataclass(frozen=True, eq=False)
class PGD(LoopAttack):
    """Multi-step projected gradient ascent on a loss.

    Args:
        norm: ``linf`` (signed steps), ``l2`` (normalised gradient), ``l1`` (sparse steps; see `tsrfast.ops.pgd_step`).
        eps: radius in that norm, in pixel units of [0, 1]; a number or ``[N]``.
        step_size: length of a step, likewise.
        steps: number of steps, >= 0.
        loss: ``cross_entropy``, ``margin``, or a `Loss` such as ``OracleL2(teacher)``.
        random_start: begin at a random point of the ball (a function of `seed`, image number and restart alone).
        restarts: independent attempts; each image keeps its best (adversarial first, then by loss).
        targeted: `y` are targets to be reached.
        keep: ``last`` iterate, or the ``best`` over all.
        seed: key of the random starts.
        lo, hi: the pixel box.
        on_step: called with a `StepState` at each step.
        early_stop: an image stops at its first adversarial iterate (the start included), which is returned; only the others go on.
            For evaluation: success is that of ``keep="best"``, for less work; the loss is not driven further.
        momentum: share mu of the velocity that stays at each step (`MIM` says what it does and has more of the kind); 0: none.
        precision: of native code on CUDA: ``float16``, ``split`` (two float16 an operand, about 22 bits), ``float32``, or ``auto``:
            float16, and split for those images that need it (see `tsrfast.attacks.native.NEAR`). Elsewhere ``auto`` and ``float32``
            are the same.
        engine: ``auto`` takes native code where it can (`plan` says whether and why), and on a GPU records a step of what runs in PyTorch
            as a CUDA graph and replays it; ``eager`` always PyTorch, launched step by step; ``chain`` native code, ``graph`` a graph, or
            an error that says why not. Graphs serve later batches too, smaller ones filled up, while the model's parameters stay where they
            are (their values may change). An attack keeps eight at most, in memory of their own, until it or the model is deleted.
        memory_format: ``torch.channels_last``: the networks are shown images in that format; their weights stay as they are. None: in
            the format of `x`.
        autocast: ``torch.float16`` or ``torch.bfloat16``: gradients are taken under `torch.autocast`, of a loss in float32 (float16:
            scaled image by image against underflow; what overflows is counted in `bad_gradients`). Verdicts and losses are still those
            of the model as it is: `keep="best"`, `early_stop` and `on_step` take one more forward pass a step. None: as the model is.
            Both are for modules, and not for native code.

    Raises:
        InputError: a value that is not allowed.
    """

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    step_size: float | Tensor = 2 / 255
    steps: int = 10
    loss: str | Loss = "cross_entropy"
    random_start: bool = True
    restarts: int = 1
    targeted: bool = False
    keep: str = "last"
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    on_step: Callable[[StepState], None] | None = None
    early_stop: bool = False
    engine: str = "auto"
    momentum: float = 0.0
    precision: str = "auto"
    memory_format: torch.memory_format | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self._recipe()

    def _recipe(self) -> Recipe:
        threat = Threat(self.norm, self.eps, self.lo, self.hi)
        check_radius("step_size", self.step_size, finite=True)
        check_count("steps", self.steps, 0)
        check_count("restarts", self.restarts, 1)
        if self.keep not in ("last", "best"):
            raise unknown("keep", self.keep, ("last", "best"))
        check_engine(self.engine)
        check_precision(self.precision)
        if not 0 <= self.momentum < math.inf:
            raise InputError(f"tsrfast.attacks: momentum must be >= 0 and finite, got {self.momentum}")
        for name, value, allowed in (
            ("memory_format", self.memory_format, (None, torch.channels_last, torch.contiguous_format)),
            ("autocast", self.autocast, (None, torch.float16, torch.bfloat16)),
        ):
            if value not in allowed:
                raise InputError(f"tsrfast.attacks: {name} must be {', '.join(map(str, allowed[1:]))} or None, got {value!r}")
        return Recipe(
            threat,
            resolve(self.loss),
            self.step_size,
            self.steps,
            self.restarts,
            self.random_start,
            self.targeted,
            self.keep,
            self.early_stop,
            self.seed,
            self.on_step,
            self.engine,
            Direction(self.momentum) if self.momentum else None,
            self.memory_format,
            self.autocast,
            self.precision,
        )
