"""The conv ReLU family of teachers and students.

L convolutions (3x3, stride 1, no padding, bias), each followed by ReLU and, if asked for, by batch normalisation (after
the ReLU, the order of the authors' teacher); no pooling; flatten in (C, H, W) order; one linear layer to the logits
(Yang et al., AISTATS 2021, section 5.1). The paper's oracle has widths 45-32-32-20, its students 50-35-35-22.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tsrfast.chain import automatic
from tsrfast.errors import InputError, UnsupportedModel
from tsrfast.nets.classifier import Classifier, NetT

KERNEL = 3

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class ConvReLU(Classifier):
    """conv3x3 -> ReLU (-> BN) per width, then flatten and a linear layer.

    Args:
        widths: channels of each conv layer, first to last.
        batch_norm: affine BatchNorm2d after every ReLU.
        image: (C, H, W) of the input; each layer shrinks H and W by 2.
        classes: number of logits.
        mean, std: per-channel normalisation (x - mean) / std done inside the model; both or neither.
        seed: of the initial weights, drawn as PyTorch's `reset_parameters` does; the global random state is neither
            read nor changed.

    Raises:
        InputError: sizes that are not positive integers, an image too small for the depth, mean/std of the wrong length
            or not finite.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 64, 64),
        *,
        batch_norm: bool = False,
        image: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        widths, image = _sizes("widths", widths), _sizes("image", image, length=3)
        channels, height, width = image
        settings = {"widths": list(widths), "batch_norm": bool(batch_norm), "image": list(image)}
        super().__init__(classes, mean, std, settings, channels)
        self.widths, self.image, self.batch_norm = widths, image, bool(batch_norm)
        shrunk = (KERNEL - 1) * len(self.widths)
        if min(height, width) <= shrunk:
            raise InputError(
                f"tsrfast.ConvReLU: image must be larger than {shrunk}x{shrunk} for {len(self.widths)} layers, "
                f"got {height}x{width}"
            )
        fan_in = (channels, *self.widths[:-1])
        self.convs = nn.ModuleList(skip_init(nn.Conv2d, a, b, KERNEL) for a, b in zip(fan_in, self.widths, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) if self.batch_norm else nn.Identity() for c in self.widths)
        area = (height - shrunk) * (width - shrunk)
        self.head = skip_init(nn.Linear, self.widths[-1] * area, self.classes)
        init_(self, seed)

    @classmethod
    def from_config(cls: type[NetT], config: Mapping[str, Any], *, seed: int = 0) -> NetT:
        """As `Classifier.from_config`; the config must name the widths, though the constructor has a default."""
        net = super().from_config(config, seed=seed)
        if "widths" not in config:
            raise InputError("tsrfast.ConvReLU.from_config: config must name widths")
        return net

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, C, H, W] in [0, 1]."""
        h = self.normalise(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = norm(F.relu(conv(h)))
        return self.head(h.flatten(1))

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [N, classes] and the activations (as `activations`) of one pass.

        Through the net's compiled chain where there is one, in eval mode, and nothing asks for gradients.
        """
        h, kept = self.normalise(x), []
        own = type(self).forward is ConvReLU.forward and not any(m.training for m in self.modules())
        if own and not torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu":
            names = [*(f"convs.{layer}+relu" for layer in range(len(self.convs))), "head"]
            with suppress(UnsupportedModel):
                # Its records are the convolutions with their ReLUs, and the head: the rest is folded into the weights.
                chain = automatic(self, self.image)
                if len(chain.names) == len(names) and all(map(str.endswith, chain.names, names)):
                    *kept, logits = chain.activations(x)
                    return logits, kept
        for conv, norm in zip(self.convs, self.norms, strict=True):
            kept.append(F.relu(conv(h)))
            h = norm(kept[-1])
        return self.head(h.flatten(1)), kept

    def activations(self, x: Tensor) -> list[Tensor]:
        """Per conv layer the activations [N, C_l, H_l, W_l]: after the ReLU, before batch normalisation."""
        return self.features(x)[1]

    def normalise(self, x: Tensor) -> Tensor:
        """`x` as the first convolution wants it.

        Raises:
            InputError: `x` is not [N, C, H, W] of the net's image.
        """
        if isinstance(x, Tensor) and (x.ndim != 4 or tuple(x.shape[1:]) != self.image):
            c, h, w = self.image
            raise InputError(f"tsrfast.ConvReLU: x must have shape [N, {c}, {h}, {w}], got {list(x.shape)}")
        return super().normalise(x)


def init_(model: ModuleT, seed: int) -> ModuleT:
    """Redraw all weights of `model` in place as PyTorch's `reset_parameters` would; return it.

    Weights and biases of Conv2d and Linear: uniform in +-1/sqrt(fan_in), drawn in module order, weight before bias, in
    float32 on the CPU, so the values depend on `seed` alone. Batch normalisation: scale 1, shift 0, running mean 0,
    running variance 1. The global random state is not touched.

    Raises:
        InputError: `seed` is not an integer in [0, 2^63).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"tsrfast.init_: seed must be an integer in [0, 2^63), got {seed!r}")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        drawn = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                        parameter.copy_(drawn)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
    return model


def _sizes(name: str, values: Sequence[int], length: int | None = None) -> tuple[int, ...]:
    """`values` as a tuple of positive ints: `length` of them, or at least one."""
    sizes = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else ()
    integers = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in sizes)
    if not sizes or not integers or len(sizes) != (length or len(sizes)):
        raise InputError(f"tsrfast.ConvReLU: {name} must be {length or 'one or more'} positive integers, got {values!r}")
    return sizes
