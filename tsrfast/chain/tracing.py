"""A network becomes a list of steps: it is run once on a value that computes nothing and writes down what is done to it.

The value is a `torch.Tensor` by type, shape, dtype and device, so whatever a `forward` asks about its input has the true answer.
Every function that meets it arrives in `_Value.__torch_function__`, and what is not in `HANDLERS` is refused: nothing can be done to it
unseen, reading its numbers included. Not `torch.fx`: while that traces, the module calls of every thread of the process go through it;
and it takes milliseconds. This takes a quarter of one, so that whoever must know what a network is now traces it again.
"""

from __future__ import annotations

import random
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from tsrfast.errors import UnsupportedModel

Shape = tuple[int, int, int]
Handlers = Mapping[Callable[..., Any], Callable[..., Any]]

CPU = torch.device("cpu")
BATCHES = 61, 4094, 1  # images in a trace: a network must not depend on their number


# What is behind a value: should anything get at it all the same, it does not stay unnoticed.
@lru_cache
def _nan(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is kept: whoever comes first may be in that mode
        return torch.full((1,), torch.nan, dtype=torch.float32, device=device)


MODES = threading.RLock()  # held while modules are switched to eval mode and back


class Step(NamedTuple):
    """One operation of a network.

    Attributes:
        kind: conv, linear, avg_pool, max_pool, batch_norm, activation, add, sub, rsub, mul or div.
        name: of the module that does it, or of the function inside its module.
        entering, leaving: (C, H, W) of its input and output; features are (D, 1, 1).
        numbers: constants that are no tensors. conv, pools: kernel, stride, padding (height and width each); pools then
            count_include_pad. batch_norm: eps. activation: negative slope, 0 for ReLU. Arithmetic: the number, unless it is a tensor.
        tensors: as they are now, not copied. conv, linear: weight, bias. batch_norm: mean, variance, weight, bias. Arithmetic: one
            element or one a channel.
    """

    kind: str
    name: str
    entering: Shape
    leaving: Shape
    numbers: tuple[float, ...] = ()
    tensors: tuple[Tensor | None, ...] = ()


class _Running(threading.local):
    trace: Trace | None = None


_running = _Running()


class _Value(Tensor):
    """What the network is run on. Only `Trace.live` may be used, and only once: the computation is one line."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        t = _running.trace
        if t is None:
            raise UnsupportedModel(
                "tsrfast.compile: a value that a network kept when it was compiled has no numbers to compute with"
            )
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property
            name = getattr(getattr(func, "__self__", func), "__name__", name)
        if func not in t.handlers:
            t.refuse(f"{name} is not supported")
        values = [a for a in (*args, *kwargs.values()) if isinstance(a, _Value)]
        if len(values) != 1 or values[0] is not t.live:
            t.refuse(f"{name} uses a value that is used elsewhere too: the computation must be one line")
        if not torch.is_grad_enabled():
            t.refuse(f"{name} runs without gradient (no_grad, or inside an autograd.Function)")
        if torch.is_autocast_enabled(t.device.type):
            t.refuse(f"{name} runs under autocast: the chain computes in float32")
        return t.handlers[func](t, *args, **kwargs)


class Trace:
    """A trace under way: the steps so far, and the one value that may be used next (its shape is asked for here: that costs less)."""

    def __init__(self, model: nn.Module, image: tuple[int, ...], handlers: Handlers, batch: int, device: torch.device) -> None:
        self.model, self.handlers, self.batch, self.device = model, handlers, batch, device
        self.names: dict[int, str] = {}
        self.steps: list[Step] = []
        self.refused: str | None = None
        self.values: list[weakref.ref[Tensor]] = []
        self.versions: list[tuple[Tensor, int]] = []
        for name, m in model.named_modules():
            self.names[id(m)] = name
            if any(is_lazy(p) for p in m._parameters.values()):
                self.refuse("has parameters without a shape yet", m)
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
                self.refuse("has hooks", m)
            if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule":
                self.refuse("is compiled by torch.compile: give the network itself", m)
            if type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval:
                self.refuse("has a train() or eval() of its own, which may do more than switch the mode", m)
        if _has_any_global_hook():
            self.refuse("torch has hooks for all modules", model)
        self.live = self.value((batch, *image))

    def value(self, shape: Sequence[int]) -> Tensor:
        """A value of shape [N, ...], which is the live one from now on."""
        self.shape = tuple(shape)
        # A leaf that requires gradients: PyTorch itself then refuses to change it in place out of sight.
        self.live = Tensor._make_subclass(_Value, _nan(self.device).expand(self.shape), True)
        self.values.append(weakref.ref(self.live))
        return self.live

    def record(
        self, kind: str, leaving: Sequence[int], numbers: tuple[float, ...] = (), tensors: tuple[Tensor | None, ...] = ()
    ) -> Tensor:
        """Note a step from the live value to one of shape [N, *leaving], which is the live one from now on."""
        owner = self.owner()
        name = self.names[id(owner)]
        if not type(owner).__module__.startswith("torch.nn.") or not name:
            name = f"{name}.{kind}" if name else kind
        for t in tensors:
            if t is not None:
                self._check(t)
        self.steps.append(Step(kind, name, _chw(self.shape[1:]), _chw(leaving), numbers, tensors))
        return self.value((self.batch, *leaving))

    def _check(self, t: Tensor) -> None:
        if type(t) not in (Tensor, nn.Parameter):
            self.refuse(f"the chain computes with ordinary tensors; got {type(t).__name__}")
        if not t.is_inference():
            self.versions.append((t, t._version))
        if t.device != self.device or t.layout != torch.strided:
            self.refuse(f"the chain computes with dense tensors on {self.device}; got {t.layout} on {t.device}")
        if t.dtype != torch.float32 and not (t.ndim == 0 and t.is_floating_point()):  # such a number does not change a dtype
            self.refuse(f"the chain computes in float32; got {str(t.dtype).removeprefix('torch.')}")

    def owner(self) -> nn.Module:
        """The innermost module whose method is running."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if id(owner) in self.names and isinstance(owner, nn.Module):
                return owner
            frame = frame.f_back  # type: ignore[assignment]
        return self.model

    def refuse(self, why: str, owner: nn.Module | None = None) -> NoReturn:
        """Raise (and remember, since `forward` may catch it) that a module, by default the running one, cannot be compiled."""
        owner = self.owner() if owner is None else owner
        where = ".".join(("model", *filter(None, [self.names[id(owner)]])))
        self.refused = f"tsrfast.compile: {where} ({type(owner).__name__}): {why}"
        raise UnsupportedModel(self.refused)

    def run(self) -> list[Step]:
        """Call the network, in eval mode."""
        training = [m for m in self.model.modules() if m.training]
        outer, _running.trace = _running.trace, self
        random_before = _random_states()
        try:
            for m in training:
                m.training = False
            out = self.model(self.live)
        except Exception as e:
            said = str(e).strip().partition("\n")[0]
            failed = f"tsrfast.compile: model ({type(self.model).__name__}): {type(e).__name__}: {said}"
            raise UnsupportedModel(self.refused or failed) from e
        finally:
            _running.trace = outer
            for m in training:
                m.training = True
            drawn = _restore_random(random_before)
        if self.refused is not None:  # and forward caught it
            raise UnsupportedModel(self.refused)
        if drawn:
            self.refuse("its forward draws random numbers", self.model)
        if any(t._version != version for t, version in self.versions):
            self.refuse("its forward changes tensors that it computes with", self.model)
        if not isinstance(out, Tensor) or out.ndim != 2 or out is not self.live:
            what = f"of shape [N{''.join(f', {s}' for s in out.shape[1:])}]" if isinstance(out, _Value) else type(out).__name__
            self.refuse(f"must return the logits [N, classes] at the end of its computation, got {what}", self.model)
        if not self.steps:
            self.refuse("computes nothing", self.model)
        del out, self.live
        if any(v() is not None for v in self.values):
            self.refuse("keeps intermediate values of its forward", self.model)
        return self.steps


def _random_states() -> tuple[Tensor, object, Any]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _restore_random(before: tuple[Tensor, object, Any]) -> bool:
    """Whether any generator has been drawn from since; it is put back."""
    now = _random_states()
    drawn = not torch.equal(before[0], now[0])
    torch.set_rng_state(before[0])
    if before[1] != now[1]:
        drawn = True
        random.setstate(before[1])  # type: ignore[arg-type]
    if before[2] is not None and now[2] is not None and not _same_numpy(before[2], now[2]):
        drawn = True
        sys.modules["numpy"].random.set_state(before[2])
    return drawn


def _same_numpy(a: Any, b: Any) -> bool:
    return bool(a[0] == b[0] and (a[1] == b[1]).all() and a[2:] == b[2:])


def _chw(shape: Sequence[int]) -> Shape:
    c, h, w = shape if len(shape) == 3 else (shape[0], 1, 1)
    return c, h, w


def run_trace(
    model: nn.Module, image: tuple[int, ...], handlers: Handlers, batch: int = BATCHES[0], device: torch.device = CPU
) -> list[Step]:
    """The steps of `model`, as it would run in eval mode, on images of shape `image` on `device`; the model is left as it was.

    Raises:
        UnsupportedModel: naming the module and why.
    """
    with MODES, torch.enable_grad():
        return Trace(model, image, handlers, batch, device).run()


# May be asked about a value without using it. With properties it is their getter that arrives.
_QUESTIONS = {
    *(getattr(Tensor, p).__get__ for p in ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_cpu")),
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        torch.numel,
        Tensor.__len__,
        Tensor.get_device,
    ),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}
