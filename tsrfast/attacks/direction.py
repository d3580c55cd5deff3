"""What makes examples transfer: the direction of a step is more than the gradient at the iterate.

Momentum (Dong et al. 2018), the gradient of a point further on (Lin et al. 2020) or of a resized image (Xie et al. 2019), and a gradient
smoothed over the neighbouring pixels (Dong et al. 2019). All of them combine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tsrfast.attacks.threat import check_count
from tsrfast.errors import InputError, unknown
from tsrfast.ops import philox_uniform

# Draws of the random numbers: far from those of the random starts, which count from 0 (`starts.py`).
_FIRST_DRAW = 2**30


@dataclass(frozen=True, eq=False)
class Draw:
    """Where random numbers come from, so that they do not depend on how batches are cut.

    Attributes:
        seed: of the attack.
        index: int64 ``[n]``, the images' numbers in their data set.
        number: of the step, from 0; goes on over restarts.
    """

    seed: int
    index: Tensor
    number: int

    def uniform(self, count: int) -> Tensor:
        """float32 ``[n, count]`` in [0, 1)."""
        return philox_uniform(self.seed, self.index, count, draw=_FIRST_DRAW + self.number)


@dataclass(frozen=True)
class Diversity:
    """Random resizing and padding (Xie et al., CVPR 2019, section 3.2): the image made smaller, anywhere in a black image of its size.

    Each image has a size and a place of its own (torchattacks: one for the whole batch). Sizes are integers from ``int(resize_rate * H)``
    to below H, height and width alike; sampling is bilinear.

    Args:
        prob: chance that an image is changed at a step.
        resize_rate: smallest size, as a share; in (0, 1).

    Raises:
        InputError: a value that is not allowed.
    """

    prob: float = 0.5
    resize_rate: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise InputError(f"tsrfast.attacks: prob must be in [0, 1], got {self.prob}")
        if not 0 < self.resize_rate < 1:
            raise InputError(f"tsrfast.attacks: resize_rate must be in (0, 1), got {self.resize_rate}")

    def __call__(self, x: Tensor, draw: Draw) -> Tensor:
        """The images ``[n, C, H, W]`` as the model is to see them; differentiable."""
        if x.ndim != 4:
            raise InputError(f"tsrfast.attacks: x must be images [N, C, H, W] for Diversity, got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        chance, size, top, left = draw.uniform(4).double().unbind(1)
        plain = chance >= self.prob
        rows = self._sampling(height, size, top, plain).to(x.dtype)
        columns = self._sampling(width, size, left, plain).to(x.dtype)
        return rows[:, None] @ x @ columns[:, None].mT

    def _sampling(self, length: int, size: Tensor, place: Tensor, plain: Tensor) -> Tensor:
        """Matrices ``[n, length, length]`` that resize and place the pixels of one axis; the identity where `plain`."""
        least = max(int(length * self.resize_rate), 1)
        small = least + (size * (length - least)).long()
        small = torch.where(plain, length, small)
        first = (place * (length - small)).long()
        at = torch.arange(length, device=size.device) - first[:, None]  # number of the output pixel within the small image
        inside = (at >= 0) & (at < small[:, None])
        # Centres of pixels lie at halves; beyond the outermost centres the edge is repeated.
        source = ((at + 0.5) * (length / small.double())[:, None] - 0.5).clamp(0, length - 1)[..., None]
        weights = (1 - (source - torch.arange(length, device=size.device)).abs()).clamp_min(0)
        return weights * inside[..., None]


@dataclass(frozen=True)
class Smoothing:
    """Convolution of the gradient with a kernel (Dong et al., CVPR 2019, "translation-invariant", eq. 8), channel by channel.

    Args:
        kernel: ``gaussian``, ``uniform`` or ``linear`` (section 3.3 there).
        length: of the kernel's side, odd, in pixels.
        sigma: how many standard deviations of the Gaussian the kernel reaches to either side.

    Raises:
        InputError: a value that is not allowed.
    """

    kernel: str = "gaussian"
    length: int = 15
    sigma: float = 3.0

    def __post_init__(self) -> None:
        if self.kernel not in ("gaussian", "uniform", "linear"):
            raise unknown("kernel", self.kernel, ("gaussian", "uniform", "linear"))
        check_count("length", self.length, 1)
        if self.length % 2 == 0:  # no middle: the gradient would move by half a pixel
            raise InputError(f"tsrfast.attacks: length must be odd, got {self.length}")
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise InputError(f"tsrfast.attacks: sigma must be > 0 and finite, got {self.sigma}")

    def weights(self) -> Tensor:
        """float64 ``[length, length]``, of sum 1."""
        reach = (
            torch.linspace(-1, 1, self.length, dtype=torch.float64, device="cpu")
            if self.length > 1
            else torch.zeros(1, device="cpu")
        )
        if self.kernel == "gaussian":
            line = (-(self.sigma * reach).square() / 2).exp()
        elif self.kernel == "linear":
            line = 1 - reach.abs() * (self.length - 1) / (self.length + 1)
        else:
            line = torch.ones_like(reach)
        square = torch.outer(line, line).double()
        return square / square.sum()

    def __call__(self, g: Tensor) -> Tensor:
        """The gradient ``[n, C, H, W]``, smoothed; beyond the edge it is 0."""
        if g.ndim != 4:
            raise InputError(f"tsrfast.attacks: x must be images [N, C, H, W] for Smoothing, got shape {tuple(g.shape)}")
        channels = g.shape[1]
        kernel = _smoothing_kernel(self, g.device, g.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(g, kernel, padding="same", groups=channels)


@lru_cache(maxsize=32)
def _smoothing_kernel(smoothing: Smoothing, device: torch.device, dtype: torch.dtype) -> Tensor:
    return smoothing.weights().to(device, dtype)


@dataclass(frozen=True, eq=False)
class Direction:
    """Where the gradient of a step is taken and what becomes of it. The state of each image is one tensor like it, the velocity.

    v <- decay v + g / mean |g| (Dong et al., CVPR 2018, eq. 6, with the mean in place of the sum as in their code: no step cares, but the
    look-ahead does), and the step goes along v.

    Args:
        decay: share of the velocity that stays, >= 0.
        nesterov: the gradient is that of x + decay * step_size * v (Lin et al., ICLR 2020, eq. 8).
        diversity: what the model is shown instead of x, from images and a `Draw`; None: x.
        smoothing: of the gradient; None: as it is.
        seed: key of the draws.
    """

    decay: float
    nesterov: bool = False
    diversity: Callable[[Tensor, Draw], Tensor] | None = None
    smoothing: Smoothing | None = None
    seed: int = 0

    @property
    def elsewhere(self) -> bool:
        """Whether the gradient is not that of the iterate itself."""
        return self.nesterov or self.diversity is not None

    def start(self, x: Tensor) -> Tensor:
        """The velocity of images that have not moved; float32 for 16-bit images, whose sums would overflow."""
        return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))

    def view(self, x: Tensor, velocity: Tensor, step_size: float | Tensor, targeted: bool, draw: Draw) -> Tensor:
        """What the model is shown, differentiable with respect to x."""
        if self.nesterov:
            scale = (-1 if targeted else 1) * self.decay * step_size
            if isinstance(scale, Tensor):  # a plain number stays one: nothing then goes from host to device at each step
                scale = scale.to(x.device, velocity.dtype).reshape(-1, *[1] * (x.ndim - 1))
            x = x + (scale * velocity).to(x.dtype)
        return x if self.diversity is None else self.diversity(x, draw)

    def next(self, velocity: Tensor, gradient: Tensor) -> Tensor:
        """The velocity after a finite gradient."""
        g = gradient.to(velocity.dtype)
        if self.smoothing is not None:
            g = self.smoothing(g)
        # Where it is 0 everywhere the velocity alone decides.
        size = g.abs().mean(dim=tuple(range(1, g.ndim)), keepdim=True)
        return g / size.clamp_min(torch.finfo(g.dtype).tiny) + velocity * self.decay
