"""A compiled network, and the two ways to get one: `compile`, once, and `automatic`, always up to date with its module."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tsrfast._modes import evaluating
from tsrfast.chain.folding import build
from tsrfast.chain.handlers import HANDLERS
from tsrfast.chain.tracing import BATCHES, CPU, MODES, Step, run_trace
from tsrfast.errors import InputError, UnsupportedModel
from tsrfast.ops.chain import ACTIVATIONS, FIELDS, KINDS, chain_forward, chain_gradient, chain_pack

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# A module -> its chain of the last image shape. By identity: a module may define __eq__.
_automatic: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Chain:
    """A network in eval mode as plan and packed parameters: a snapshot, that `refresh` brings up to date.

    Made by `tsrfast.compile`. It computes on its device, on the CPU in float32, on CUDA in the precision ``split`` (about 22 bits; see
    `tsrfast.ops.chain.PRECISIONS`), and its results carry no gradient graph. Wherever an `x` is taken: float32 ``[N, *image]`` on that
    device, any strides, not changed; `InputError` otherwise.

    Attributes:
        device: of the network, its parameters and its images.
        plan: int64 ``[records, columns]`` on the CPU, see `tsrfast.ops.chain`.
        weights: float32 ``[*]``, the parameters (folded) that the plan's offsets point into.
        packed: the same in the engine's own order.
        image: shape of one input.
        entering: the same as the first record takes it: flat, if that is linear.
        classes: number of logits.
        names: of each record, e.g. ``convs.0+relu``.
    """

    def __init__(
        self, source: Callable[[], nn.Module | None], image: tuple[int, ...], winograd: bool, device: torch.device = CPU
    ) -> None:
        self.image, self.device = image, device
        self._source, self._winograd = source, winograd
        self._precision = "split" if device.type == "cuda" else "float32"
        self._set(self._trace())
        if not all(_same(self._steps, self._trace(batch)) for batch in BATCHES[1:]):
            raise UnsupportedModel(
                f"tsrfast.compile: model ({type(source()).__name__}): is not the same network twice "
                "(the size of the batch, or a state that its forward changes)"
            )
        self._try()

    def _trace(self, batch: int = BATCHES[0]) -> list[Step]:
        model = self._source()
        if model is None:
            raise InputError("tsrfast.Chain: the network that the chain was compiled from must still exist")
        return run_trace(model, self.image, HANDLERS, batch, self.device)

    def _try(self) -> None:
        """Once for a structure: what tracing could not see shows in the numbers of two random images."""
        model = self._source()
        assert model is not None
        x = torch.rand(2, *self.image, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
        x = x.to(self.device)
        allowed = 1e-3 if self.device.type == "cpu" else 1e-2  # PyTorch's convolutions on CUDA may be TF32, with 10 bits
        with MODES, evaluating(model), torch.no_grad():
            want = model(x.clone())
        error, size = (self(x) - want).abs().max(), want.abs().max()
        if want.isfinite().all() and not error <= allowed * size + 1e-30:
            raise UnsupportedModel(
                f"tsrfast.compile: model ({type(model).__name__}): its logits of random images are not those of what was traced "
                f"(by {float(error / size):.2g} of the largest)"
            )

    def _set(self, steps: list[Step]) -> None:
        with torch.no_grad():
            self._steps = [
                s._replace(tensors=tuple(None if t is None else t.detach().clone() for t in s.tensors)) for s in steps
            ]
            try:
                self.plan, self.weights, self.names = build(self._steps, self._winograd, self.device)
                self.packed = chain_pack(self.plan, self.weights)
            except InputError as e:
                raise UnsupportedModel(f"tsrfast.compile: model: the engine refuses it ({e})") from e
        rows = [dict(zip(FIELDS, row, strict=True)) for row in self.plan.tolist()]
        self._rows = rows
        self.entering = _shape(rows[0], "")
        self.classes = rows[-1]["out_channels"] * rows[-1]["out_height"] * rows[-1]["out_width"]

    def refresh(self) -> None:
        """Read the network anew, structure included; not while another thread uses this chain.

        Raises:
            InputError: the network no longer exists.
            UnsupportedModel: it is no longer one that can be compiled.
        """
        self._set(self._trace())

    def stale(self) -> bool:
        """Whether the network is no longer what it was at the last `refresh`, parameters compared bit by bit.

        Raises:
            InputError: the network no longer exists.
        """
        try:
            return not _same(self._steps, self._trace())
        except UnsupportedModel:
            return True

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.activations(x, [len(self.names) - 1])[0].flatten(1)

    def activations(self, x: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """What the records `layers` (all, if not given) return, after their activation: ``[N, C, H, W]``, or ``[N, O]`` for linear."""
        wanted = range(len(self.names)) if layers is None else [self._record(layer) for layer in layers]
        ascending = sorted(set(wanted))
        with torch.no_grad():
            outputs = chain_forward(self._input(x), self.plan, self.packed, ascending, precision=self._precision)
        found = dict(zip(ascending, outputs, strict=True))
        return [found[i] for i in wanted]

    def gates(self, x: Tensor) -> list[Tensor]:
        """bool, shaped as the activations, for each record that ends in an activation: open where not z <= 0 (so NaN is)."""
        gated = [i for i, row in enumerate(self._rows) if row["activation"] != ACTIVATIONS["none"]]
        return [~(a <= 0) for a in self.activations(x, gated)]

    def input_gradient(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """Gradient of sum(logits * cotangent) with respect to x, like x; `cotangent` is float32 ``[N, classes]`` where x is."""
        given = self._input(x)
        wanted = (len(x), self.classes)
        if not isinstance(cotangent, Tensor) or (cotangent.shape, cotangent.dtype, cotangent.device) != (
            wanted,
            x.dtype,
            x.device,
        ):
            raise InputError(
                f"tsrfast.Chain: cotangent must be float32 {list(wanted)} on {self._where}, got {_said(cotangent)}"
            )
        with torch.no_grad():
            rows = cotangent.detach().reshape(len(x), 1, self.classes).contiguous()
            return chain_gradient(given, self.plan, self.packed, rows, precision=self._precision).reshape(x.shape)

    def gradient_rows(self, x: Tensor, layer: int) -> Tensor:
        """V_l: d logits_k / d what record `layer` returns (-1: x itself), ``[N, classes, *shape of that]``."""
        layer = -1 if layer == -1 else self._record(layer)
        given = self._input(x)
        with torch.no_grad():
            rows = torch.eye(self.classes, dtype=x.dtype, device=x.device).expand(len(x), -1, -1).contiguous()
            out = chain_gradient(given, self.plan, self.packed, rows, layer, precision=self._precision)
        return out.reshape(len(x), self.classes, *self.image) if layer == -1 else out

    @property
    def _where(self) -> str:
        return "the CPU" if self.device.type == "cpu" else str(self.device)

    def _record(self, layer: int) -> int:
        if not isinstance(layer, int) or not 0 <= layer < len(self.names):
            raise InputError(f"tsrfast.Chain: layer must be a record, 0 to {len(self.names) - 1}, got {layer!r}")
        return layer

    def _input(self, x: Tensor) -> Tensor:
        if (
            not isinstance(x, Tensor)
            or x.dtype != torch.float32
            or x.device != self.device
            or x.ndim != len(self.image) + 1
            or tuple(x.shape[1:]) != self.image
        ):
            raise InputError(
                f"tsrfast.Chain: x must be float32 [N, {', '.join(map(str, self.image))}] on {self._where}, got {_said(x)}"
            )
        return x.detach().reshape(len(x), *self.entering).contiguous()

    def __str__(self) -> str:
        kinds = {number: kind for kind, number in KINDS.items()}
        lines = [("", "record", "name", "in", "out", "kernel", "algorithm", "MFLOP")]
        for i, (row, name) in enumerate(zip(self._rows, self.names, strict=True)):
            kind = kinds[row["kind"]]
            entering, leaving = ("x".join(map(str, _shape(row, side))) for side in ("", "out_"))
            windowed = kind in ("conv", "avg_pool", "max_pool")
            kernel = "{kernel_h}x{kernel_w} / {stride_h}x{stride_w} + {pad_h}x{pad_w}".format(**row) if windowed else ""
            algorithm = "winograd" if row["winograd"] else "direct" if kind == "conv" else ""
            lines.append((str(i), kind, name, entering, leaving, kernel, algorithm, f"{_flops(kind, row) / 1e6:.3f}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _shape(row: dict[str, int], side: str) -> tuple[int, ...]:
    shape = tuple(row[f"{side}{axis}"] for axis in ("channels", "height", "width"))
    return shape[:1] if row["kind"] == KINDS["linear"] else shape


def _flops(kind: str, row: dict[str, int]) -> int:
    """Additions and multiplications of the direct sum for an image."""
    outputs = row["out_channels"] * row["out_height"] * row["out_width"]
    window = row["kernel_h"] * row["kernel_w"]
    return outputs * {"conv": 2 * row["channels"] * window, "linear": 2 * row["channels"], "affine": 2}.get(kind, window)


def _said(x: object) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def _structure(steps: list[Step]) -> list[tuple[object, ...]]:
    """Everything but the tensors."""
    return [s[:-1] for s in steps]


def _same(kept: list[Step], now: list[Step]) -> bool:
    """The same operations with the same numbers, bit by bit (a NaN is equal to itself)."""
    if _structure(kept) != _structure(now):
        return False
    pairs = ((a, b) for k, n in zip(kept, now, strict=True) for a, b in zip(k.tensors, n.tensors, strict=True))
    with torch.no_grad():
        return all(_equal(a, b) for a, b in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = a.nbytes % 8 == 0 and all(t.storage_offset() * t.element_size() % 8 == 0 for t in (a, b))
    if whole and a.is_contiguous() and b.is_contiguous():
        return torch.equal(a.view(-1).view(torch.int64), b.view(-1).view(torch.int64))  # half of the time
    bits = _BITS[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def compile(model: nn.Module, image: Sequence[int] | Tensor | None = None, *, winograd: bool = True) -> Chain:
    """Compile a network for native code.

    Any module whose forward is one line of: Conv2d (kernels to 7, stride to 4, zero padding less than the kernel, no groups, no dilation),
    Linear, BatchNorm, ReLU, LeakyReLU, average and max pooling, Flatten, Dropout, and arithmetic with a constant a channel; as modules
    or functions. What counts is the network in eval mode, whatever mode it is in; it is left as it was.

    Args:
        model: float32 parameters on one device, cpu or cuda, which becomes the chain's; no hooks.
        image: shape of one input, (C, H, W) or (D,), or a batch of inputs; not needed if the model has an `image` or begins with a Linear.
        winograd: compute 3x3 convolutions by Winograd F(4x4,3x3) where that is quicker; else all of them by direct sums.

    Returns:
        A snapshot of the network, with a reference to it for `Chain.refresh`.

    Raises:
        UnsupportedModel: it is not such a network; the message names the module and why.
        InputError: no image shape, or not one.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"tsrfast.compile: model must be a torch.nn.Module, got {type(model).__name__}")
    return Chain(lambda: model, _image_shape(model, image), winograd, _device(model, image))


def _device(model: nn.Module, image: Sequence[int] | Tensor | None) -> torch.device:
    """Of the first parameter; of the batch of images, or the CPU, if there is none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    if first is not None and first.device.type in ("cpu", "cuda"):
        return first.device
    return image.device if isinstance(image, Tensor) else CPU


def _image_shape(model: nn.Module, image: Sequence[int] | Tensor | None) -> tuple[int, ...]:
    declared = getattr(model, "image", None)
    if image is None and isinstance(declared, tuple):
        image = declared
    if image is None:
        first = next(
            (m for m in model.modules() if not any(True for _ in m.children()) and any(True for _ in m.parameters())), None
        )
        if not isinstance(first, nn.Linear):
            raise InputError("tsrfast.compile: image must be given for this model: (C, H, W), (D,) or a batch, got None")
        image = (first.in_features,)
    shape = tuple(image.shape[1:]) if isinstance(image, Tensor) else tuple(image) if isinstance(image, Sequence) else ()
    if len(shape) not in (1, 3) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        got = list(image.shape) if isinstance(image, Tensor) else image
        raise InputError(
            f"tsrfast.compile: image must be (C, H, W) or (D,), positive integers, or a batch of such, got {got!r}"
        )
    return shape


def automatic(model: nn.Module, image: tuple[int, ...], device: torch.device = CPU) -> Chain:
    """The chain of `model` as it is now, for images of shape `image` on `device`: the one of the last call if nothing has changed.

    A chain that was returned is never changed. It does not keep the model alive. Any thread may call this. On CUDA the parameters are
    packed anew each time: that takes less than asking whether they have changed, which makes the host wait for the device.

    Raises:
        UnsupportedModel: the model, as it is now, cannot be compiled.
    """
    chain: Chain | None = _automatic.get(model)
    if chain is not None and (chain.image, chain.device) == (image, device):
        steps = chain._trace()
        if device.type == "cpu" and _same(chain._steps, steps):
            return chain
        if _structure(chain._steps) == _structure(steps):  # other numbers only, as in every step of training
            chain = copy.copy(chain)
            chain._set(steps)
            _automatic[model] = chain
            return chain
    chain = Chain(weakref.ref(model), image, winograd=True, device=device)
    _automatic[model] = chain
    return chain


def mostly_wide_linear(chain: Chain) -> bool:
    """More than a million weights in linear layers, and more multiplications there than in convolutions.

    A chain reads them once for every 16 images, a matrix product once for all: measured, 3072-1024-1024-10 on 128 images takes 1.5
    times as long, 784-200-10 no longer.
    """
    products = dict.fromkeys(KINDS, 0)
    for row in chain.plan.tolist():
        r = dict(zip(FIELDS, row, strict=True))
        kind = next(k for k, number in KINDS.items() if number == r["kind"])
        window = r["kernel_h"] * r["kernel_w"] * r["out_height"] * r["out_width"]
        products[kind] += r["channels"] * r["out_channels"] * window
    return products["linear"] > max(products["conv"], 1_000_000)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """What `model` says of x in eval mode, without gradient: through its chain where there is one, else through PyTorch.

    Args:
        model: any network; left in the modes it has.
        x: images as the model takes them, on its device.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        try:
            return automatic(model, tuple(x.shape[1:]))(x)
        except UnsupportedModel:
            pass
    with evaluating(model), torch.no_grad():
        out: Tensor = model(x)
        return out
