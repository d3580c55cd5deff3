"""Residual networks under torchvision's names (He et al. 2016, arXiv:1512.03385; the bottleneck has its stride at the 3x3 convolution,
"v1.5", as torchvision's and kuangliu's have), and PreActResNet under RobustBench's (He et al. 2016, arXiv:1603.05027)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tsrfast.errors import InputError
from tsrfast.nets.classifier import ACTIVATIONS, AT_THE_END, CHANNELS, STEMS, Classifier, conv, linear, pooled
from tsrfast.nets.conv_relu import init_

STAGES = 4
SHORTCUTS = ("activated", "input", "deepmind")


class ResNet(Classifier):
    """Stem, four stages of residual blocks, mean over the plane, linear layer ``fc``.

    Args:
        blocks: residual blocks of each of the four stages.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions (ResNet-50) instead of two 3x3 (ResNet-18, 34).
        classes: number of logits.
        stem: ``imagenet`` (7x7 convolution with stride 2, max pooling) or ``cifar`` (3x3 convolution, stride 1, no pooling). A file of
            weights tells one from the other by the kernel only: nets that keep the pooling after a 3x3 convolution (some are published
            for CIFAR-10) have the same tensors and other logits.
        mean, std: normalisation done inside.
        width: channels of the first stage.
        seed: of the initial weights (see `init_`).

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        bottleneck: bool = False,
        classes: int = 10,
        stem: str = "cifar",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        settings = {"blocks": _listed(blocks), "bottleneck": bool(bottleneck), "stem": stem, "width": width}
        super().__init__(classes, mean, std, settings)
        counts, width = _four(self, blocks), self._positive("width", width)
        small = self._one_of("stem", stem, STEMS) == "cifar"
        self.conv1 = conv(CHANNELS, width, 3) if small else conv(CHANNELS, width, 7, 2)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU()
        block = Bottleneck if bottleneck else BasicBlock
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(block, block.expansion, width, counts)
        self.fc = linear(8 * width * block.expansion, classes)
        init_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, 3, H, W] in [0, 1]."""
        h = self.maxpool(self.relu(self.bn1(self.conv1(self.normalise(x)))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(pooled(h))


class BasicBlock(nn.Module):
    """relu(downsample(x) + bn(conv3(relu(bn(conv3(x))))))"""

    expansion = 1

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(entering, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _downsample(entering, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """relu(downsample(x) + bn(conv1(relu(bn(conv3(relu(bn(conv1(x)))))))))"""

    expansion = 4

    def __init__(self, entering: int, width: int, stride: int) -> None:
        super().__init__()
        leaving = width * self.expansion
        self.conv1, self.bn1 = conv(entering, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, leaving, 1), nn.BatchNorm2d(leaving)
        self.relu = nn.ReLU()
        self.downsample = _downsample(entering, leaving, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(h)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class PreActResNet(Classifier):
    """3x3 convolution, four stages of blocks that normalise and gate before they convolve, mean over the plane, layer ``linear``.

    Args:
        blocks: residual blocks of each of the four stages.
        final_norm: batch normalisation ``bn`` and ReLU before the mean over the plane, as Rice et al. 2020, Kireev et al. 2021 and
            DeepMind have, Wong et al. 2020 and Andriushchenko et al. 2020 have not.
        shortcut: what a block's 1x1 convolution reads: ``activated``, relu(bn1(x)), as in most (RobustBench's PreActBlockV2; Rice,
            Kireev, kuangliu), or the block's ``input`` x (RobustBench's PreActBlock; Wong, Andriushchenko). A file does not say which.
            ``deepmind`` (Gowal, Rebuffi, Rade et al.): a 3x3 convolution of x; with stride 2 the plane is padded at the end only.
        activation: ``relu``, or ``silu`` (x sigmoid(x), also called swish) as DeepMind's have.
        classes, mean, std, width, seed: as in `ResNet`.

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        classes: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        final_norm: bool = True,
        shortcut: str = "activated",
        activation: str = "relu",
        width: int = 64,
        seed: int = 0,
    ) -> None:
        settings = {"blocks": _listed(blocks), "final_norm": bool(final_norm), "shortcut": shortcut}
        super().__init__(classes, mean, std, settings | {"activation": activation, "width": width})
        counts, width = _four(self, blocks), self._positive("width", width)
        shortcut = self._one_of("shortcut", shortcut, SHORTCUTS)
        act = ACTIVATIONS[self._one_of("activation", activation, tuple(ACTIVATIONS))]
        self.conv1 = conv(CHANNELS, width, 3)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(
            lambda entering, leaving, stride: PreActBlock(entering, leaving, stride, shortcut, act), 1, width, counts
        )
        self.bn = nn.BatchNorm2d(8 * width) if final_norm else None
        self.relu = act()
        self.linear = linear(8 * width, classes)
        init_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, 3, H, W] in [0, 1]."""
        h = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalise(x))))))
        return self.linear(pooled(h if self.bn is None else self.relu(self.bn(h))))


class PreActBlock(nn.Module):
    """shortcut + conv3(act(bn(conv3(a)))), where a = act(bn(x)); the shortcut is x, or a convolution of a or x where sizes differ."""

    def __init__(self, entering: int, width: int, stride: int, shortcut: str, act: type[nn.Module]) -> None:
        super().__init__()
        late = shortcut == "deepmind" and stride == 2
        padding = 0 if late else None
        self.bn1, self.relu = nn.BatchNorm2d(entering), act()
        self.pad = nn.ZeroPad2d(AT_THE_END) if late else nn.Identity()
        self.conv1 = conv(entering, width, 3, stride, padding=padding)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.activated = shortcut == "activated"
        self.shortcut = None
        if stride != 1 or entering != width:
            kernel = 3 if shortcut == "deepmind" else 1
            self.shortcut = nn.Sequential(conv(entering, width, kernel, stride, padding=padding))

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu(self.bn1(x))
        h = self.conv2(self.relu(self.bn2(self.conv1(self.pad(a)))))
        return h + (x if self.shortcut is None else self.shortcut(self.pad(a if self.activated else x)))


def resnet18(
    classes: int = 10,
    stem: str = "cifar",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> ResNet:
    """ResNet-18; the arguments are those of `ResNet`."""
    return ResNet((2, 2, 2, 2), classes=classes, stem=stem, mean=mean, std=std, seed=seed)


def resnet34(
    classes: int = 10,
    stem: str = "cifar",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> ResNet:
    """ResNet-34; the arguments are those of `ResNet`."""
    return ResNet((3, 4, 6, 3), classes=classes, stem=stem, mean=mean, std=std, seed=seed)


def resnet50(
    classes: int = 10,
    stem: str = "cifar",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> ResNet:
    """ResNet-50; the arguments are those of `ResNet`."""
    return ResNet((3, 4, 6, 3), bottleneck=True, classes=classes, stem=stem, mean=mean, std=std, seed=seed)


def preact_resnet18(
    classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    final_norm: bool = True,
    shortcut: str = "activated",
    activation: str = "relu",
    seed: int = 0,
) -> PreActResNet:
    """PreActResNet-18; the arguments are those of `PreActResNet`."""
    return PreActResNet(
        (2, 2, 2, 2),
        classes=classes,
        mean=mean,
        std=std,
        final_norm=final_norm,
        shortcut=shortcut,
        activation=activation,
        seed=seed,
    )


def _listed(blocks: object) -> object:
    return list(blocks) if isinstance(blocks, Sequence) else blocks


def _four(net: Classifier, blocks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != STAGES:
        raise InputError(f"tsrfast.{type(net).__name__}: blocks must be {STAGES} positive integers, got {blocks!r}")
    return tuple(net._positive("blocks", count) for count in blocks)


def _stages(
    block: Callable[[int, int, int], nn.Module], expansion: int, width: int, counts: Sequence[int]
) -> list[nn.Sequential]:
    """Each stage but the first halves the plane and doubles the channels."""
    entering, stages = width, []
    for stage, count in enumerate(counts):
        made = []
        for i in range(count):
            made.append(block(entering, width << stage, 2 if stage and not i else 1))
            entering = (width << stage) * expansion
        stages.append(nn.Sequential(*made))
    return stages


def _downsample(entering: int, leaving: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and entering == leaving:
        return None
    return nn.Sequential(conv(entering, leaving, 1, stride), nn.BatchNorm2d(leaving))
