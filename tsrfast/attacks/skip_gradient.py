"""The skip gradient method (Wu et al., ICLR 2020, "Skip connections matter"): residual branches count less on the way back.

Where a block computes z + f(z), the factor (1 + f') of the backward pass becomes (1 + gamma f') (eq. 5 there); what the network says stays the
same. Examples made on such a network transfer better. A modifier of networks, not an attack: any attack that uses gradients takes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tsrfast._modes import evaluating
from tsrfast.attacks.loop import undisturbed
from tsrfast.errors import InputError

Node = Any  # of the autograd graph: `Tensor.grad_fn`

_WEIGHTED = ("Convolution", "Addmm", "Mm", "Bmm")  # what the names of their nodes begin with


class _Looking(threading.local):
    """Whether a network is being run to find its branches, which is not to begin another search."""

    now = False


_looking = _Looking()


@contextmanager
def skip_gradient(model: nn.Module, gamma: float, modules: Iterable[str | nn.Module] | None = None) -> Iterator[list[str]]:
    """Scale the gradient of the residual branches of `model` by `gamma` inside the block::

        with skip_gradient(model, 0.5) as found:
            x_adv = MIM()(model, x, y)
        print(found)  # ['layer1.0.bn2', 'layer1.1.bn2', ...]

    Branches are found when the network is called first, from what it computes, whatever its classes are: of a sum (or a concatenation, as
    in DenseNets) whose one part is computed from another, that part; of a sum with a shortcut of at most one convolution or linear layer,
    the other side. Attacks run in PyTorch meanwhile: a compiled network has no hooks. Training inside the block would scale the
    gradients of parameters, too.

    Args:
        model: the network, or the part of it whose branches are meant.
        gamma: in [0, 1]; 1 leaves everything as it is. The authors take 0.2 for ResNets and 0.5 for DenseNets.
        modules: those whose results are to be scaled, by name or themselves, instead of looking for them; each returns a tensor.

    Yields:
        The names of the modules at the ends of the branches: empty until the network has been called, unless `modules` is given.

    Raises:
        InputError: gamma outside [0, 1]; a module that `model` does not have. When the network is called first: it has no residual
            branches, or one that ends in no module of its own, called once.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"tsrfast.attacks: model must be an nn.Module for skip_gradient, got {type(model).__name__}")
    if not 0 <= gamma <= 1:
        raise InputError(f"tsrfast.attacks: gamma must be in [0, 1], got {gamma}")
    found: list[str] = []
    handles: list[RemovableHandle] = []
    lock = threading.Lock()

    def scale(module: nn.Module, args: object, out: object) -> None:
        if not isinstance(out, Tensor):
            raise InputError(f"tsrfast.attacks: modules of skip_gradient must return a tensor, got {type(out).__name__}")
        if out.requires_grad:
            out.register_hook(lambda g: g * gamma)

    def install(names: Iterable[str]) -> None:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(scale))
            found.append(name)

    def search(module: nn.Module, args: tuple[object, ...]) -> None:
        if _looking.now:
            return
        with lock:  # of several threads one searches, the others wait for its hooks
            if not found:
                _looking.now = True
                try:
                    install(_branches(model, args))
                finally:
                    _looking.now = False

    try:
        if modules is None:
            handles.append(model.register_forward_pre_hook(search))
        else:
            install(_names(model, modules))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _names(model: nn.Module, modules: Iterable[str | nn.Module]) -> list[str]:
    """The modules' names, each once."""
    if isinstance(modules, (str, nn.Module)):
        raise InputError(f"tsrfast.attacks: modules must be a list of names or modules, got one {type(modules).__name__}")
    known = dict(model.named_modules())
    names = {m: name for name, m in known.items()}
    out = []
    for given in modules:
        if isinstance(given, str) and given not in known:
            raise InputError(f"tsrfast.attacks: modules must be of the model, which has no {given!r}")
        if not isinstance(given, str) and given not in names:
            raise InputError(f"tsrfast.attacks: modules must be of the model, got a {type(given).__name__} that is not")
        out.append(given if isinstance(given, str) else names[given])
    if not out:
        raise InputError("tsrfast.attacks: modules must name at least one, got none")
    return list(dict.fromkeys(out))


def _branches(model: nn.Module, args: tuple[object, ...]) -> list[str]:
    """The modules that residual branches end in, in the order of the forward pass: `model` is run once, on one image."""
    x = args[0] if args else None
    if len(args) != 1 or not isinstance(x, Tensor) or not len(x):
        raise InputError(
            "tsrfast.attacks: model must be called with a batch of images alone for skip_gradient to find branches"
        )
    made: dict[nn.Module, list[Node]] = {m: [] for m in model.modules()}  # by each module, in each of its calls

    def note(module: nn.Module, args: object, out: object) -> None:
        made[module].append(out.grad_fn if isinstance(out, Tensor) else None)

    handles = [m.register_forward_hook(note) for m in made if m is not model]
    try:
        with undisturbed(x.device), evaluating(model):
            leaf = x[:1].detach().clone().requires_grad_()
            origin = leaf.view_as(leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            out = model(leaf)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(out, Tensor) or out.grad_fn is None:
        raise InputError("tsrfast.attacks: model must return a tensor with a gradient for skip_gradient to find branches")
    # The modules are listed from the outside in: the innermost of those that return a tensor remains.
    owner = {nodes[0]: name for name, m in model.named_modules() if len(nodes := made[m]) == 1 and nodes[0] is not None}
    graph = _Graph(out.grad_fn, origin)
    ends = dict(graph.branches())  # in order, each once
    if not ends:
        raise InputError(
            f"tsrfast.attacks: model ({type(model).__name__}) must have residual branches for skip_gradient, found none"
        )
    names = [next((owner[n] for n in graph.line(*end) if n in owner), None) for end in ends.items()]
    if None in names:
        raise InputError(
            f"tsrfast.attacks: model ({type(model).__name__}) has {names.count(None)} residual branches of {len(names)} that end in no "
            "module that is called once: give modules="
        )
    return [name for name in names if name is not None]


class _Graph:
    """What leads from one leaf to a result, as autograd has it."""

    def __init__(self, result: Node, origin: Node) -> None:
        # `origin`, the leaf's own, and what comes from it; inputs before what is computed from them.
        self.order: list[Node] = []
        self.number: dict[Node, int] = {}
        self.before: dict[Node, int] = {}  # bits by number: the node itself and all that it is computed from
        seen = set()
        stack = [(result, False)]
        while stack:
            node, finished = stack.pop()
            if finished:
                inputs = self.inputs(node)
                if inputs or node is origin:
                    self.number[node] = len(self.order)
                    self.before[node] = 1 << len(self.order)
                    for n in inputs:
                        self.before[node] |= self.before[n]
                    self.order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(n, False) for n, _ in node.next_functions if n is not None]

    def inputs(self, node: Node) -> list[Node]:
        """What the node is computed from, as far as it comes from the leaf."""
        return [n for n, _ in node.next_functions if n in self.number]

    def branches(self) -> Iterator[tuple[Node, int]]:
        """The nodes that residual branches end in, and the bits of those that lead to what they are added to."""
        for node in self.order:
            kind, parts = node.name(), self.inputs(node)
            if not kind.startswith(("AddBackward", "CatBackward")):
                continue
            for part in parts:
                others = [n for n in parts if n is not part and not self.before[n] >> self.number[part] & 1]
                kept = 0
                for n in others:
                    kept |= self.before[n]
                if any(self.before[part] >> self.number[n] & 1 for n in others) or (
                    kind.startswith("Add") and len(others) == 1 and self._is_shortcut(others[0], part)
                ):
                    yield part, kept

    def _is_shortcut(self, side: Node, other: Node) -> bool:
        """Of two parallel lines: at most one weighted layer, and fewer than the other has."""
        own = [
            sum(n.name().startswith(_WEIGHTED) for n in self.order if (self.before[a] & ~self.before[b]) >> self.number[n] & 1)
            for a, b in ((side, other), (other, side))
        ]
        return own[0] <= 1 and own[0] < own[1]

    def line(self, node: Node, kept: int) -> Iterator[Node]:
        """The node and what came before it, as long as one was computed from one and is not among the `kept`."""
        while not kept >> self.number[node] & 1:
            yield node
            inputs = self.inputs(node)
            if len(inputs) != 1:
                return
            node = inputs[0]
