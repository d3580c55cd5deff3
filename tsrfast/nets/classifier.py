"""What the image classifiers share: normalisation inside, an architecture that JSON can describe, seeded weights.

A class derives from `Classifier`, builds its layers under the names of the published files, and calls `init_` last.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tsrfast.errors import InputError, unknown

CHANNELS = 3
STEMS = ("cifar", "imagenet")
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
AT_THE_END = (0, 1, 0, 1)  # TensorFlow's "same" padding of a plane of even size before a 3x3 convolution with stride 2

NetT = TypeVar("NetT", bound="Classifier")


class Classifier(nn.Module):
    """A classifier from pixels [N, C, H, W] in [0, 1] to logits [N, classes].

    No layer works in place, so no value that a residual sum, a hook or an attack still needs is
    overwritten; in eval mode the logits depend on the image alone.

    Args:
        classes: number of logits.
        mean, std: C numbers each; (x - mean) / std is done inside. Both or neither.
        channels: C.
        settings: the other arguments of the constructor, as `config` gives them back.

    Raises:
        InputError: `classes` not a positive integer; mean or std alone, not C finite numbers, or a std that is not positive.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        classes: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        settings: Mapping[str, Any],
        channels: int = CHANNELS,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.classes = self._positive("classes", classes)
        self._settings = dict(settings)
        if (mean is None) != (std is None):
            raise InputError(f"tsrfast.{self._name}: mean and std must be given together, got only one of them")
        self.register_buffer("mean", None)
        self.register_buffer("std", None)
        if mean is not None and std is not None:
            self.set_normalisation(mean, std)

    def set_normalisation(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        """Make (x - mean) / std the first thing that the net does, in place of what it did before.

        Args:
            mean, std: C numbers each, in units of pixels in [0, 1].

        Raises:
            InputError: not C finite numbers, or a std that is not positive. The net is then as before.
        """
        buffers = {}
        reference = next(self.parameters(), torch.empty(0))
        for name, values in (("mean", mean), ("std", std)):
            try:
                numbers = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
            except (TypeError, ValueError, RuntimeError):
                numbers = []
            bad = len(numbers) != self.channels or not all(math.isfinite(v) for v in numbers)
            if bad or (name == "std" and min(numbers) <= 0):
                wanted = f"{self.channels} finite {'positive ' if name == 'std' else ''}numbers"
                raise InputError(f"tsrfast.{self._name}: {name} must be {wanted}, got {values!r}")
            buffers[name] = torch.tensor(numbers, dtype=torch.float64).to(reference).view(-1, 1, 1)
        self.mean, self.std = buffers["mean"], buffers["std"]

    @property
    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build a net of this architecture: plain numbers, strings and lists, fit for JSON."""
        return {
            **self._settings,
            "classes": self.classes,
            "mean": None if self.mean is None else self.mean.flatten().tolist(),
            "std": None if self.std is None else self.std.flatten().tolist(),
        }

    @classmethod
    def from_config(cls: type[NetT], config: Mapping[str, Any], *, seed: int = 0) -> NetT:
        """A net of the architecture that `config` describes, with fresh weights from `seed`.

        Raises:
            InputError: an unknown key, a missing one that has no default, or a value that the constructor refuses.
        """
        if not isinstance(config, Mapping):
            raise InputError(f"tsrfast.{cls.__name__}.from_config: config must be a mapping, got {type(config).__name__}")
        allowed = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name != "seed"}
        for key in config:
            if key not in allowed:
                raise unknown(f"{cls.__name__} config key", str(key), allowed)
        for key, default in allowed.items():
            if default is inspect.Parameter.empty and key not in config:
                raise InputError(f"tsrfast.{cls.__name__}.from_config: config must name {key}")
        build: Any = cls  # the arguments are the subclass's
        return build(**config, seed=seed)

    def normalise(self, x: Tensor) -> Tensor:
        """`x` as the first convolution wants it.

        Raises:
            InputError: `x` is not [N, C, H, W].
        """
        # A tracer's proxy is not a Tensor and has no shape to compare.
        if isinstance(x, Tensor) and (x.ndim != 4 or x.shape[1] != self.channels):
            raise InputError(f"tsrfast.{self._name}: x must have shape [N, {self.channels}, H, W], got {list(x.shape)}")
        if self.mean is None or self.std is None:
            return x
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config.items())

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _positive(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"tsrfast.{self._name}: {name} must be a positive integer, got {value!r}")
        return value

    def _one_of(self, name: str, value: object, allowed: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise InputError(f"tsrfast.{self._name}: {name} must be one of {', '.join(allowed)}, got {value!r}")
        return value


def conv(
    entering: int, leaving: int, kernel: int, stride: int = 1, *, padding: int | None = None, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, weights not yet drawn; by default padded so that stride 1 keeps the size."""
    padding = kernel // 2 if padding is None else padding
    made = skip_init(nn.Conv2d, entering, leaving, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    assert isinstance(made, nn.Conv2d)
    return made


def linear(entering: int, leaving: int) -> nn.Linear:
    """A linear layer with bias, weights not yet drawn."""
    made = skip_init(nn.Linear, entering, leaving)
    assert isinstance(made, nn.Linear)
    return made


def pooled(x: Tensor) -> Tensor:
    """The mean over the plane: [N, C, H, W] to [N, C]."""
    return nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
