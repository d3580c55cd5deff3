"""An attempt in native code: the whole loop of steps over compiled networks, and which calls can take that path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast.attacks.loop import Attempt, Batch, Best, Recipe, check_labels
from tsrfast.attacks.losses import (
    CrossEntropy,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
)
from tsrfast.chain import Chain, automatic, compile
from tsrfast.errors import InputError, UnsupportedModel
from tsrfast.ops.chain import FIELDS, KINDS, chain_pgd

# By exact type: a subclass may compute anything.
NATIVE_LOSSES = (CrossEntropy, Margin, OracleCrossEntropy, OracleKL, OracleL2, OracleMargin, OracleMaxDifference)
NETWORKS = ("model", "teacher")  # what messages call the networks of such a loss


@dataclass(frozen=True)
class Route:
    """The code that a call takes, and why.

    Attributes:
        path: ``chain`` (networks compiled by `tsrfast.compile`, the loop of steps in native code) or ``eager`` (PyTorch forward and
            backward, fused step).
        reason: one sentence.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Chains:
    """The compiled networks of an attack."""

    student: Chain
    teacher: Chain | None


def choose(recipe: Recipe, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Chains | None]:
    """The route of an attack on `model`, and the compiled networks if it is the chain's.

    Raises:
        InputError: the chain's path cannot be taken, but must be: the recipe asks for it, or a network is a `Chain`. A network is
            neither module nor chain. `x` is None, and the network does not say what images it takes.
    """
    networks = (model, *recipe.loss.models())
    for who, network in zip(NETWORKS, networks, strict=False):
        if not isinstance(network, (nn.Module, Chain)):
            raise InputError(f"tsrfast.attacks: {who} must be an nn.Module or a Chain, got {type(network).__name__}")
    chains, reason = _compiled(recipe, networks, x)
    if chains is not None:
        return Route("chain", reason), chains
    if recipe.engine == "chain":
        raise InputError(f"tsrfast.attacks: engine must be 'auto' or 'eager' for this call, got 'chain': {reason}")
    if any(isinstance(network, Chain) for network in networks):
        raise InputError(f"tsrfast.attacks: a Chain has no autograd, and the native loop cannot run this call: {reason}")
    return Route("eager", reason), None


def _compiled(recipe: Recipe, networks: tuple[nn.Module | Chain, ...], x: Tensor | None) -> tuple[Chains | None, str]:
    """The networks compiled, or None; and the reason."""
    if recipe.engine == "eager":
        return None, "engine='eager' asks for it"
    if recipe.on_step is not None:
        return None, "on_step is called from PyTorch's loop"
    if type(recipe.loss) not in NATIVE_LOSSES:
        return None, f"native code does not know the loss {type(recipe.loss).__name__}"
    if x is not None and (x.dtype != torch.float32 or x.device.type != "cpu"):
        return None, f"x is {str(x.dtype).removeprefix('torch.')} on {x.device.type}, native code takes float32 on the CPU"
    chains: list[Chain] = []
    for who, network in zip(NETWORKS, networks, strict=False):
        try:
            if isinstance(network, Chain):
                chains.append(network)
            elif x is not None:
                chains.append(automatic(network, tuple(x.shape[1:])))
            else:
                chains.append(compile(network, chains[0].image if chains else None))
        except UnsupportedModel as e:
            return None, f"{who} does not compile: {e}"
        except InputError as e:
            if x is not None:
                raise
            raise InputError(f"tsrfast.attacks: x must be given, {who} does not say what images it takes") from e
    return Chains(chains[0], chains[1] if len(chains) > 1 else None), "every network compiles"


def attempt(chains: Chains, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int) -> Attempt:
    """One run of the native loop from `start` (see `loop.Engine`)."""
    student, teacher = chains.student, chains.teacher
    if restart == 0:
        check_chains(student, teacher, batch)
    t = batch.threat
    shape = (len(start), *entering(student))
    got = chain_pgd(
        batch.x0.reshape(shape).contiguous(),
        start.reshape(shape).contiguous(),
        (student.plan, student.packed),
        None if teacher is None else (teacher.plan, teacher.packed),
        batch.y if recipe.loss.needs_labels else None,
        loss=recipe.loss.name,
        norm=t.norm,
        eps=t.eps,
        step_size=batch.step_size,
        steps=recipe.steps,
        lo=t.lo,
        hi=t.hi,
        targeted=recipe.targeted,
        keep=recipe.keep,
        early_stop=recipe.early_stop,
        judge=judge,
        iterates=False,
    )
    x = torch.empty_like(batch.x0).copy_(got.x.reshape(batch.x0.shape))
    return Attempt(Best(x, got.loss, got.adversarial), got.bad, got.queries)


def entering(chain: Chain) -> tuple[int, ...]:
    """Shape of an image as the chain's first record takes it: flat, if that is linear."""
    first = dict(zip(FIELDS, chain.plan[0].tolist(), strict=True))
    flat = first["kind"] == KINDS["linear"]
    return (first["channels"],) if flat else (first["channels"], first["height"], first["width"])


def check_chains(student: Chain, teacher: Chain | None, batch: Batch) -> None:
    """Images, labels and networks fit together, in the words of the eager path."""
    for who, chain in (("model", student), ("teacher", teacher)):
        if chain is not None and chain.image != tuple(batch.x0.shape[1:]):
            raise InputError(
                f"tsrfast.attacks: x must have the shape [N, {', '.join(map(str, chain.image))}] that {who} was compiled for, "
                f"got {tuple(batch.x0.shape)}"
            )
    n = len(batch.x0)
    check_labels(batch.y, student.classes)
    if teacher is not None and teacher.classes != student.classes:
        raise InputError(
            f"tsrfast.attacks: teacher must give the student's logits {(n, student.classes)}, got {(n, teacher.classes)}"
        )
