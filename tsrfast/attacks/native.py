"""An attempt in native code: the whole loop of steps over compiled networks, and which calls can take that path."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tsrfast import _native
from tsrfast._threads import threads
from tsrfast.attacks.loop import Attempt, Batch, Best, Recipe, check_labels, of_image, own_copy, run_loop
from tsrfast.attacks.losses import (
    CrossEntropy,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
)
from tsrfast.chain import Chain, Differentiable, automatic, compile, mostly_wide_linear
from tsrfast.errors import InputError, UnsupportedModel, unknown
from tsrfast.ops.chain import PRECISIONS, ChainPGD, chain_pgd, has_fused_kernel

# By exact type: a subclass may compute anything.
NATIVE_LOSSES = (CrossEntropy, Margin, OracleCrossEntropy, OracleKL, OracleL2, OracleMargin, OracleMaxDifference)
ENGINES = ("auto", "chain", "eager")
NETWORKS = ("model", "teacher")  # what messages call the networks of such a loss


@dataclass(frozen=True)
class Route:
    """The code that a call takes, and why.

    Attributes:
        path: ``chain`` (networks compiled by `tsrfast.compile`, the loop of steps in native code), ``graph`` (a step of PyTorch and the
            fused update, recorded as a CUDA graph and replayed) or ``eager`` (PyTorch forward and backward, fused update).
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


def check_engine(engine: str) -> None:
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)


def check_precision(precision: str) -> None:
    if precision not in ("auto", *PRECISIONS):
        raise unknown("precision", precision, ("auto", *PRECISIONS))


def beyond(recipe: Recipe) -> str | None:
    """What the native loop cannot do, but the one in Python can, on compiled networks too; None: nothing."""
    if recipe.direction is not None:
        return "native code has no momentum"
    if type(recipe.loss) is Margin and recipe.loss.bounded:
        return "native code has no bounds of the margin"
    return None


def choose(recipe: Recipe, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Chains | None]:
    """The route of an attack on `model`, and the compiled networks if it is the chain's.

    Raises:
        InputError: the chain's path cannot be taken, but must be: the recipe asks for it, or a network is a `Chain`. A network is
            neither module nor chain. `x` is None, and the network does not say what images it takes.
    """
    networks = (model, *recipe.loss.models())
    reason = None
    if recipe.engine != "eager":
        reason = beyond(recipe)
        if recipe.on_step is not None:
            reason = "on_step is called from PyTorch's loop"
        elif type(recipe.loss) not in NATIVE_LOSSES:
            reason = f"native code does not know the loss {type(recipe.loss).__name__}"
    route, chains = _route(networks, x, recipe.engine, reason)
    own = any(isinstance(network, Chain) for network in networks)
    if chains is not None and x is not None and x.is_cuda and recipe.engine == "auto" and not own:
        plans = [chain.plan for chain in chains]
        teacher = plans[1] if len(plans) > 1 else None
        if not has_fused_kernel(plans[0], teacher, recipe.loss.name, recipe.threat.norm, x.device):
            route, chains = (
                Route(
                    "eager",
                    "there is no fused kernel for these networks (tsrfast.chain.fuse may make one; engine='chain' runs them layer by layer)",
                ),
                None,
            )
    if recipe.precision != "auto" and chains is None:
        raise InputError(
            f"tsrfast.attacks: precision must be 'auto' where native code does not run, got {recipe.precision!r}: {route.reason}"
        )
    if recipe.precision not in ("auto", "float32") and x is not None and not on_cuda(x):
        raise InputError(f"tsrfast.attacks: precision must be 'auto' or 'float32' on {x.device}, got {recipe.precision!r}")
    return route, None if chains is None else Chains(chains[0], chains[1] if len(chains) > 1 else None)


def callable_network(model: nn.Module | Chain, x: Tensor | None, engine: str, who: str = "model") -> tuple[nn.Module, Route]:
    """The network for an attack with its loop in Python: `model`, or its chain made differentiable; and the route that says which.

    Args:
        model: network or chain. A module is to be in eval mode when the result is called.
        x: images; None: those that the network itself says it takes.
        engine: as in `PGD`.
        who: what messages call the network.

    Raises:
        InputError: as `choose`.
    """
    slower = x is not None and x.is_cuda and engine == "auto" and not isinstance(model, Chain)
    route, chains = _route(
        (model,),
        x,
        engine,
        "layer by layer, native code is not known to be faster than PyTorch on CUDA" if slower else None,
        (who,),
    )
    if chains is None:
        assert isinstance(model, nn.Module)
        return model, route
    if x is not None:
        check_shape(who, chains[0], x)
    return Differentiable(chains[0]), route


def _route(
    networks: tuple[nn.Module | Chain, ...],
    x: Tensor | None,
    engine: str,
    against: str | None,
    names: tuple[str, ...] = NETWORKS,
) -> tuple[Route, list[Chain] | None]:
    """`against`: what speaks against the chain's path besides the networks and images."""
    for who, network in zip(names, networks, strict=False):
        if not isinstance(network, (nn.Module, Chain)):
            raise InputError(f"tsrfast.attacks: {who} must be an nn.Module or a Chain, got {type(network).__name__}")
        check_device(who, network, x)
    chains, reason = (None, against) if against is not None else _compiled(networks, x, engine, names)
    if chains is not None:
        return Route("chain", reason), chains
    if engine == "chain":
        raise InputError(f"tsrfast.attacks: engine must be 'auto' or 'eager' for this call, got 'chain': {reason}")
    if any(isinstance(network, Chain) for network in networks):
        raise InputError(f"tsrfast.attacks: a Chain has no autograd, and the native loop cannot run this call: {reason}")
    return Route("eager", reason), None


def _compiled(
    networks: tuple[nn.Module | Chain, ...], x: Tensor | None, engine: str, names: tuple[str, ...]
) -> tuple[list[Chain] | None, str]:
    """The networks compiled, or None; and the reason."""
    if engine == "eager":
        return None, "engine='eager' asks for it"
    if x is not None and (x.dtype != torch.float32 or x.device.type not in ("cpu", "cuda")):
        return None, f"x is {str(x.dtype).removeprefix('torch.')} on {x.device.type}, native code takes float32 on cpu or cuda"
    chains: list[Chain] = []
    for who, network in zip(names, networks, strict=False):
        try:
            if isinstance(network, Chain):
                chains.append(network)
            elif x is not None:
                chains.append(automatic(network, tuple(x.shape[1:]), x.device))
            else:
                chains.append(compile(network, chains[0].image if chains else None))
        except UnsupportedModel as e:
            return None, f"{who} does not compile: {e}"
        except InputError as e:
            if x is not None:
                raise
            raise InputError(f"tsrfast.attacks: x must be given, {who} does not say what images it takes") from e
    if engine == "auto" and not any(isinstance(n, Chain) for n in networks) and any(map(mostly_wide_linear, chains)):
        return None, "most of the work is in wide linear layers, where PyTorch's matrix products are faster"
    return chains, "every network compiles"


# Images at a time, on the CPU for each thread (8 vectors of 16): what Python holds besides the result does not grow with their number, and
# Ctrl-C, which native code does not hear, waits some seconds at most.
PIECE = 128
PIECE_ON_CUDA = 16384

# Students as near to their teacher as that, |s - t| / |t| at the start, are attacked in the precision `split`: rounding to float16 is
# amplified by |t| / |s - t|, and costs 3 % of the ascent at 0.04, 8 % at 0.01.
NEAR = 0.03


def run(chains: Chains, recipe: Recipe, x: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
    """`run_loop` piece by piece; arguments as there, `x` with any strides."""
    total: Attempt | None = None
    piece_size = PIECE_ON_CUDA if x.is_cuda else PIECE * threads()
    for rows in torch.arange(len(x), device="cpu").split(piece_size):
        piece = slice(int(rows[0]), int(rows[-1]) + 1)
        mine = dataclasses.replace(
            recipe,
            threat=dataclasses.replace(recipe.threat, eps=of_image(recipe.threat.eps, rows)),
            step_size=of_image(recipe.step_size, rows),
        )
        x0 = own_copy(x[piece])
        got = run_loop(partial(attempt, chains, mine), mine, x0, None if y is None else y[piece], index[piece], judge)
        if len(x) <= piece_size:
            return got
        if total is None:
            count = x.new_empty(len(x), dtype=torch.int64)
            whole = Best(torch.empty_like(x), x.new_empty(len(x)), x.new_empty(len(x), dtype=torch.bool))
            total = Attempt(whole, count, count.clone())
        total.best.x[piece], total.best.loss[piece], total.best.adversarial[piece] = (
            got.best.x,
            got.best.loss,
            got.best.adversarial,
        )
        total.bad[piece], total.queries[piece] = got.bad, got.queries
    assert total is not None  # there are images
    return total


def attempt(chains: Chains, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, restart: int) -> Attempt:
    """One run of the native loop from `start` (see `loop.Engine`)."""
    student, teacher = chains.student, chains.teacher
    if restart == 0:
        check_chains(student, teacher, batch)
    if not on_cuda(batch.x0):
        got = _pgd(chains, recipe, batch, start, judge, "float32")
    elif recipe.precision != "auto":
        got = _pgd(chains, recipe, batch, start, judge, recipe.precision)
    else:
        got = _as_precise_as_needed(chains, recipe, batch, start, judge)
    x = torch.empty_like(batch.x0).copy_(got.x.reshape(batch.x0.shape))
    return Attempt(Best(x, got.loss, got.adversarial), got.bad, got.queries)


def _as_precise_as_needed(chains: Chains, recipe: Recipe, batch: Batch, start: Tensor, judge: bool) -> ChainPGD:
    """In float16; then what is said of the results in `split`; then the attack again on the images that float16 is not enough for.

    In `split`: those whose student is `NEAR` its teacher, or with a success that is not confirmed. In float32: those with values beyond
    65504, float16's range, on the way. Each image decides for itself, so it does not matter what else is in the batch.
    """
    got = _pgd(chains, recipe, batch, start, judge, "float16")
    again, beyond_range = got.closeness < NEAR, got.bad > 0
    looked = judge or recipe.early_stop or recipe.keep == "best"
    if looked:
        once = dataclasses.replace(recipe, steps=0, early_stop=False)
        checked = _pgd(chains, once, batch, got.x.reshape(start.shape), True, "split")
        again |= got.adversarial & ~checked.adversarial
        beyond_range |= ~checked.loss.isfinite()
        got = got._replace(loss=checked.loss, adversarial=checked.adversarial, queries=got.queries + checked.queries)
    for precision in ("split", "float32"):
        rows = (beyond_range if precision == "float32" else again & ~beyond_range).nonzero().squeeze(1)
        if not len(rows):
            continue
        more = _pgd(chains, recipe, batch.only(rows), start[rows], judge, precision)
        for name in ("x", "loss", "adversarial", "bad"):
            getattr(got, name)[rows] = getattr(more, name)
        got.queries[rows] += more.queries
        beyond_range[rows] = (more.bad > 0) | (looked & ~more.loss.isfinite())
    return got


def _pgd(chains: Chains, recipe: Recipe, batch: Batch, start: Tensor, judge: bool, precision: str) -> ChainPGD:
    student, teacher, t = chains.student, chains.teacher, batch.threat
    shape = (len(start), *student.entering)
    return chain_pgd(
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
        precision=precision,
    )


def on_cuda(x: Tensor) -> bool:
    """Whether the CUDA engine, or its emulation, computes with x."""
    return x.is_cuda or _native.emulator is not None


def check_device(who: str, network: nn.Module | Chain, x: Tensor | None) -> None:
    """Some of a module's parameters and buffers, if it has any, are where the images are."""
    if x is None or not isinstance(network, nn.Module):
        return
    where = None
    for t in itertools.chain(network.parameters(), network.buffers()):
        if t.device == x.device:
            return
        where = t.device
    if where is not None:
        raise InputError(f"tsrfast.attacks: {who} must be on x's device {x.device}, got {where}")


def check_shape(who: str, chain: Chain, x: Tensor) -> None:
    if chain.image != tuple(x.shape[1:]):
        raise InputError(
            f"tsrfast.attacks: x must have the shape [N, {', '.join(map(str, chain.image))}] that {who} was compiled for, "
            f"got {tuple(x.shape)}"
        )


def check_chains(student: Chain, teacher: Chain | None, batch: Batch) -> None:
    """Images, labels and networks fit together, in the words of the eager path."""
    for who, chain in (("model", student), ("teacher", teacher)):
        if chain is not None:
            check_shape(who, chain, batch.x0)
    n = len(batch.x0)
    check_labels(batch.y, student.classes)
    if teacher is not None and teacher.classes != student.classes:
        raise InputError(
            f"tsrfast.attacks: teacher must give the student's logits {(n, student.classes)}, got {(n, teacher.classes)}"
        )
