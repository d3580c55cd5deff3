"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv:1605.07146) under the names of TRADES and RobustBench."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tsrfast.errors import InputError
from tsrfast.nets.classifier import ACTIVATIONS, AT_THE_END, CHANNELS, Classifier, conv, linear, pooled
from tsrfast.nets.conv_relu import init_

PADDINGS = ("symmetric", "same")


class WideResNet(Classifier):
    """3x3 convolution to 16 channels, three groups of (depth - 4) / 6 blocks, batch normalisation, mean over the plane, layer ``fc``.

    The same net carries two families of published weights: those in the manner of TRADES (WRN-28-10, WRN-34-10: ReLU, symmetric
    padding) and DeepMind's (WRN-28-10, WRN-70-16 of Gowal, Rebuffi, Wang et al.: SiLU, TensorFlow's padding).

    Args:
        depth: number of convolutions along the main path, 6 n + 4.
        widen: channels of the groups are 16, 32 and 64 times this.
        classes, mean, std, seed: as in `ResNet`.
        activation: ``relu`` or ``silu`` (x sigmoid(x), also called swish).
        padding: of the 3x3 convolutions with stride 2: ``symmetric``, or ``same``, one row and column at the end only.

    Raises:
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        *,
        classes: int = 10,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: str = "relu",
        padding: str = "symmetric",
        seed: int = 0,
    ) -> None:
        settings = {"depth": depth, "widen": widen, "activation": activation, "padding": padding}
        super().__init__(classes, mean, std, settings)
        count, remainder = divmod(self._positive("depth", depth) - 4, 6)
        if remainder or count < 1:
            raise InputError(f"tsrfast.WideResNet: depth must be 6 n + 4 with n >= 1, got {depth}")
        act = ACTIVATIONS[self._one_of("activation", activation, tuple(ACTIVATIONS))]
        same = self._one_of("padding", padding, PADDINGS) == "same"
        width = 16 * self._positive("widen", widen)
        self.conv1 = conv(CHANNELS, 16, 3)
        self.block1 = Group(count, 16, width, 1, act, same)
        self.block2 = Group(count, width, 2 * width, 2, act, same)
        self.block3 = Group(count, 2 * width, 4 * width, 2, act, same)
        self.bn1, self.relu = nn.BatchNorm2d(4 * width), act()
        self.fc = linear(4 * width, classes)
        init_(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, 3, H, W] in [0, 1]."""
        h = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        return self.fc(pooled(self.relu(self.bn1(h))))


class Group(nn.Module):
    """`count` blocks, of which the first changes width and size."""

    def __init__(self, count: int, entering: int, width: int, stride: int, act: type[nn.Module], same: bool) -> None:
        super().__init__()
        blocks = [Block(entering, width, stride, act, same)]
        blocks += [Block(width, width, 1, act, same) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Block(nn.Module):
    """shortcut + conv3(act(bn(conv3(a)))), where a = act(bn(x)); the shortcut is x, or its 1x1 convolution of a where widths differ."""

    def __init__(self, entering: int, width: int, stride: int, act: type[nn.Module], same: bool) -> None:
        super().__init__()
        late = same and stride == 2
        self.bn1, self.relu1 = nn.BatchNorm2d(entering), act()
        self.pad = nn.ZeroPad2d(AT_THE_END) if late else nn.Identity()
        self.conv1 = conv(entering, width, 3, stride, padding=0 if late else 1)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), act()
        self.conv2 = conv(width, width, 3)
        self.convShortcut = None if entering == width else conv(entering, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(x))
        h = self.conv2(self.relu2(self.bn2(self.conv1(self.pad(a)))))
        return h + (x if self.convShortcut is None else self.convShortcut(a))


def wide_resnet(
    depth: int = 28,
    widen: int = 10,
    classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    activation: str = "relu",
    padding: str = "symmetric",
    seed: int = 0,
) -> WideResNet:
    """WRN-depth-widen; the arguments are those of `WideResNet`."""
    return WideResNet(depth, widen, classes=classes, mean=mean, std=std, activation=activation, padding=padding, seed=seed)
