"""What all attacks have in common: checking what they are given, choosing a path, running the loop, and what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks import eager, graph, native, steps
from tsrfast.attacks.loop import Attempt, Best, Engine, Recipe, own_copy, run_loop, undisturbed
from tsrfast.attacks.losses import Loss
from tsrfast.attacks.native import Route
from tsrfast.attacks.threat import Threat
from tsrfast.chain import Chain
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Adversarial images and what is known about each of N.

    Attributes:
        x_adv: images as the input, inside ball and box (up to one rounding).
        success: bool ``[N]``, whether the loss's notion of adversarial (targeted: of the target) holds at `x_adv`.
        loss: ``[N]``, the loss there.
        steps: gradient steps asked for, restarts included: the most that an image takes.
        queries: int64 ``[N]``, forward passes each image took.
        bad_gradients: int64 ``[N]``, gradient entries without a direction (NaN) over all steps: not 0 means a broken model.
        path: which code ran: ``chain``, ``graph`` or ``eager`` (see `Route`).
        reason: why that code.
    """

    x_adv: Tensor
    success: Tensor
    loss: Tensor
    steps: int
    queries: Tensor
    bad_gradients: Tensor
    path: str
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Terms:
    """What an attack demands of a call, whatever its method.

    Attributes:
        threat: the box that images must be in, and the radius, of which there may be one an image.
        loss: says whether labels are needed, and which networks there are besides the model; None: an objective of the attack's own,
            on labels.
        targeted: `y` are targets.
        steps: what `AttackResult.steps` reports.
        engine: ``auto``, ``chain`` or ``eager``.
        sizes: other values by name, of which there may be one an image.
    """

    threat: Threat
    loss: Loss | None
    targeted: bool
    steps: int
    engine: str
    sizes: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        native.check_engine(self.engine)


# From clean images (any strides, in or out of a graph), labels, the images' numbers, and whether loss and success are wanted.
Method = Callable[[Tensor, Tensor | None, Tensor, bool], Attempt]


class Attack:
    """An attack is a value: its fields say everything, calling it changes nothing but the tensor it returns.

    A new attack defines `_terms` and `_attack`; one that is a choice of threat, loss and start for the loop of `loop.py` derives from
    `LoopAttack` and defines `_recipe`.
    """

    def _terms(self) -> Terms:
        raise TypeError(f"{type(self).__name__} must define _terms()")

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        """Attack at least one image. Everything is checked but what only the logits tell (`loop.check_logits`, `loop.check_labels`).

        Args:
            network: from images to logits, differentiable, in eval mode: the model, or its chain as a module.
            x0: clean images, dense, a copy.
            y, index: int64 ``[N]``; y may be None only where the loss needs none.
            judge: whether loss and success of the returned images are wanted (else NaN and False will do).
        """
        raise TypeError(f"{type(self).__name__} must define _attack(network, x0, y, index, judge)")

    def _method(self, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Method]:
        """The route of a call, and what it runs."""
        terms = self._terms()
        found = [native.callable_network(model, x, terms.engine)]
        for teacher in terms.loss.models() if terms.loss is not None else ():
            found.append(native.callable_network(teacher, x, terms.engine, who="teacher"))
        networks, routes = zip(*found, strict=True)
        route = next((r for r in routes if r.path == "eager"), routes[0])

        def method(x: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
            with evaluating(*networks):  # what is compiled has no mode: the modules behind it are left alone
                return self._attack(networks[0], own_copy(x), y, index, judge)

        return route, method

    def __call__(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Adversarial images for `x`.

        Args:
            model: network from ``[N, C, H, W]`` to logits ``[N, classes]``; run in eval mode, left as it was. Or what
                `tsrfast.compile` made of one, used as it is.
            x: clean images in [0, 1] (or the attack's own box).
            y: int64 ``[N]`` labels (targeted: the targets); not needed by oracle losses.
            index: int64 ``[N]``, the images' numbers in their data set, default 0..N-1; random starts depend on them, so that an image
                gets the same start in any batch.

        Returns:
            A new tensor as `x`.

        Raises:
            InputError: bad images, labels, shapes or devices; the chain's path cannot be taken, but must be (see `plan`).
        """
        return self._run(model, x, y, index, judge=False).x_adv

    def run(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None = None, index: Tensor | None = None) -> AttackResult:
        """As calling the attack, and also says how it went (one more forward pass)."""
        return self._run(model, x, y, index, judge=True)

    def plan(self, model: nn.Module | Chain, x: Tensor | None = None) -> Route:
        """Which code a call would take, and why.

        Native code (``chain``) takes float32 images on cpu or cuda, for tsrfast's own losses and for networks that `tsrfast.compile` can compile;
        everything else runs in PyTorch: on a GPU as a step that is recorded and replayed (``graph``; whether it can be recorded only
        trying tells: `AttackResult.reason` says what came of it), else step by step (``eager``).

        Args:
            model: as for a call.
            x: images of which only shape, dtype and device count; None: images that the network itself says it takes.

        Raises:
            InputError: the chain's path cannot be taken, but must be: ``engine="chain"``, or a network is a `Chain`. `x` is None, and
                nothing says what images the network takes.
        """
        with undisturbed(torch.device("cpu") if x is None else x.device):
            return self._method(model, x)[0]

    def _run(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None, index: Tensor | None, judge: bool) -> AttackResult:
        terms = self._terms()
        if isinstance(x, Tensor):
            graph.check_not_recording(x.device)
        terms.threat.check_images(x)
        sizes = dict(terms.sizes)
        if terms.loss is not None:
            sizes.update(terms.loss.per_image())
            if terms.targeted and not terms.loss.needs_labels:
                raise InputError(f"tsrfast.attacks: targeted needs a loss with labels, got {terms.loss.name!r}")
        if y is None and (terms.loss is None or terms.loss.needs_labels):
            who = type(self).__name__ if terms.loss is None else f"loss {terms.loss.name!r}"
            raise InputError(f"tsrfast.attacks: y is needed by {who}")
        y = _check_integers("y", y, x)
        index = _check_integers("index", index, x)
        for name, value in sizes.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != x.shape[:1]:
                raise InputError(f"tsrfast.attacks: {name} must be a number or of shape ({len(x)},), got {tuple(value.shape)}")
        with undisturbed(x.device):
            # Copies: free of inference mode.
            x = x.clone() if x.is_inference() else x
            y = None if y is None else y.clone()
            index = torch.arange(len(x), device=x.device) if index is None else index.clone()
            route, method = self._method(model, x)
            if x.numel():
                got = method(x, y, index, judge)
            else:
                none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
                got = Attempt(Best.unjudged(own_copy(x)), none, none.clone())
        if got.ungraphed is not None:
            route = Route("eager", got.ungraphed)
        best = got.best
        return AttackResult(best.x, best.adversarial, best.loss, terms.steps, got.queries, got.bad, route.path, route.reason)


class LoopAttack(Attack):
    """An attack that `run_loop` runs: in native code, in Python on compiled networks, or in PyTorch."""

    def _recipe(self) -> Recipe:
        raise TypeError(f"{type(self).__name__} must define _recipe()")

    def _terms(self) -> Terms:
        r = self._recipe()
        # To those who run its recipe in a way of their own, a graph is PyTorch.
        engine = "eager" if r.engine == "graph" else r.engine
        return Terms(r.threat, r.loss, r.targeted, r.steps * r.restarts, engine, {"step_size": r.step_size})

    def _method(self, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Method]:
        recipe = self._recipe()
        _check_options(recipe, x)
        insists = _insists(recipe)
        if insists is not None:
            route = _pytorch_only(recipe, model, x, insists)
        elif (beyond := native.beyond(recipe)) is not None:
            route, in_python = super()._method(model, x)
            if route.path == "chain":
                return Route("chain", f"{route.reason}, under the loop in Python: {beyond}"), in_python
            own = any(isinstance(m, Chain) for m in (model, *recipe.loss.models()))
            if own or x is None or (x.device.type == "cpu" and graph.against(recipe, x) is not None):
                return route, in_python  # on networks that are compiled as far as they can be
        else:
            route, chains = native.choose(recipe, model, x)
            if chains is not None:
                return route, partial(native.run, chains, recipe)
        assert isinstance(model, nn.Module)
        return self._in_pytorch(recipe, model, x, route)

    def _in_pytorch(self, recipe: Recipe, model: nn.Module, x: Tensor | None, route: Route) -> tuple[Route, Method]:
        """The route and method of a call that nothing speaks against running on modules; `route`: eager, and why."""
        engine: Engine = partial(eager.attempt, model, recipe)
        if x is not None and x.device.type != "cpu" and recipe.early_stop and recipe.on_step is None:
            engine = partial(steps.attempt, model, recipe)
        if recipe.engine != "eager":
            against = graph.against(recipe, x)
            if against is None:
                route, engine = Route("graph", _GRAPH), partial(graph.graphs_of(self).attempt, model, recipe)
            elif recipe.engine == "graph":
                raise InputError(f"tsrfast.attacks: engine must be 'auto' or 'eager' for this call, got 'graph': {against}")
            elif x is not None and x.device.type != "cpu":
                route = Route("eager", f"{route.reason}; no graph: {against}")

        def method(x: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
            with evaluating(*(m for m in (model, *recipe.loss.models()) if isinstance(m, nn.Module))), _memory(self):
                x0 = shown = own_copy(x)
                if recipe.memory_format is not None:
                    shown = x0.contiguous(memory_format=recipe.memory_format)
                got = run_loop(engine, recipe, shown, y, index, judge)
                got.best.x = eager.as_dense(got.best.x, x0)
                return got

        return route, method

    def _attack(self, network: nn.Module, x0: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
        recipe = self._recipe()
        which = self._terms().engine
        teachers = [native.callable_network(m, x0, which, who="teacher")[0] for m in recipe.loss.models()]
        recipe = dataclasses.replace(recipe, loss=recipe.loss.with_models(*teachers))
        with evaluating(*(m for m in recipe.loss.models() if isinstance(m, nn.Module))):
            return run_loop(partial(eager.attempt, network, recipe), recipe, x0, y, index, judge)


_GRAPH = "a step is recorded once and replayed"


def _insists(recipe: Recipe) -> str | None:
    """Why native code is out of the question, whatever the networks are; None: it is not."""
    if recipe.engine == "graph":
        return "engine='graph' asks for PyTorch"
    asked = [name for name in ("memory_format", "autocast") if getattr(recipe, name) is not None]
    if not asked:
        return None
    return f"{' and '.join(asked)} {'asks' if len(asked) == 1 else 'ask'} for PyTorch"


def _pytorch_only(recipe: Recipe, model: nn.Module | Chain, x: Tensor | None, why: str) -> Route:
    """The eager route of networks that are modules.

    Raises:
        InputError: they are not, or ``engine="chain"``.
    """
    if recipe.engine == "chain":
        raise InputError(f"tsrfast.attacks: engine must be 'auto', 'graph' or 'eager' for this call, got 'chain': {why}")
    for who, network in zip(native.NETWORKS, (model, *recipe.loss.models()), strict=False):
        if isinstance(network, Chain):
            raise InputError(f"tsrfast.attacks: {who} must be an nn.Module for this call, got a Chain: {why}")
    native.choose(dataclasses.replace(recipe, engine="eager"), model, x)  # networks and devices are checked there
    return Route("eager", "engine='eager' asks for it" if recipe.engine == "eager" else why)


def _check_options(recipe: Recipe, x: Tensor | None) -> None:
    if x is None:
        return
    if recipe.memory_format is torch.channels_last and x.ndim != 4:
        raise InputError(f"tsrfast.attacks: x must be images [N, C, H, W] for channels_last, got shape {tuple(x.shape)}")
    if recipe.autocast is not None and x.dtype != torch.float32:
        raise InputError(f"tsrfast.attacks: x must be float32 for autocast, got {x.dtype}")


@contextmanager
def _memory(attack: Attack) -> Iterator[None]:
    """If memory runs out inside the block, the attack's recordings are given up, and the error says what else helps."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        graph.graphs_of(attack).drop()
        raise torch.OutOfMemoryError(
            f"{e}\ntsrfast.attacks: memory ran out; cut the batch (results do not depend on it: pass index=), or take "
            "autocast=torch.float16 or engine='eager'"
        ) from e


def _check_integers(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None:
        return None
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
        one = f" (x of shape {tuple(x.shape)} is {len(x)} images; one image is x[None])" if x.ndim == 3 else ""
        raise InputError(f"tsrfast.attacks: {name} must be int64 of shape ({len(x)},), got {what}{one}")
    if t.device != x.device:
        raise InputError(f"tsrfast.attacks: {name} must be on x's device {x.device}, got {t.device}")
    return t.detach()
