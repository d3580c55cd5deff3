"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, table 2) under torchvision's names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from tsrfast.errors import InputError
from tsrfast.nets.classifier import CHANNELS, STEMS, Classifier, conv, linear, pooled
from tsrfast.nets.conv_relu import init_

# Expansion, channels, blocks, stride of the first block: table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
DIVISOR = 8


class MobileNetV2(Classifier):
    """Inverted residual blocks: 1x1 convolution to more channels, 3x3 convolution of each channel, 1x1 convolution back.

    Args:
        classes: number of logits.
        stem: ``imagenet`` (the paper's strides: the plane shrinks 32 times) or ``cifar`` (stride 1 in the first convolution and in the
            stage of 24 channels, as CIFAR's published nets have: 8 times). A file of weights does not say which.
        mean, std, seed: as in `ResNet`.
        width: factor on all channels, rounded to multiples of 8.

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        stem: str = "cifar",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(classes, mean, std, {"stem": stem, "width": width})
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not (math.isfinite(width) and width > 0):
            raise InputError(f"tsrfast.MobileNetV2: width must be a positive number, got {width!r}")
        small = self._one_of("stem", stem, STEMS) == "cifar"
        entering = _channels(32 * width)
        features: list[nn.Module] = [_gated(CHANNELS, entering, 3, 1 if small else 2)]
        for stage, (expansion, base, count, first) in enumerate(STAGES):
            leaving = _channels(base * width)
            for i in range(count):
                stride = first if i == 0 and not (small and stage == 1) else 1
                features.append(InvertedResidual(entering, leaving, stride, expansion))
                entering = leaving
        last = _channels(1280 * max(1.0, width))
        self.features = nn.Sequential(*features, _gated(entering, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), linear(last, classes))
        init_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, 3, H, W] in [0, 1]."""
        return self.classifier(pooled(self.features(self.normalise(x))))


class InvertedResidual(nn.Module):
    """x + conv(x) where sizes agree, else conv(x)."""

    def __init__(self, entering: int, leaving: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = entering * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_gated(entering, wide, 1)]
        layers += [_gated(wide, wide, 3, stride, groups=wide), conv(wide, leaving, 1), nn.BatchNorm2d(leaving)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and entering == leaving

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2(
    classes: int = 10,
    stem: str = "cifar",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    width: float = 1.0,
    seed: int = 0,
) -> MobileNetV2:
    """MobileNetV2; the arguments are those of the class."""
    return MobileNetV2(classes=classes, stem=stem, mean=mean, std=std, width=width, seed=seed)


def _gated(entering: int, leaving: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(entering, leaving, kernel, stride, groups=groups), nn.BatchNorm2d(leaving), nn.ReLU6())


def _channels(wanted: float) -> int:
    """The nearest multiple of 8, but at least 8 and not below 0.9 times `wanted`."""
    rounded = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * wanted else rounded
