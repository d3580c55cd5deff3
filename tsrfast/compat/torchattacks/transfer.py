"""Attacks of torchattacks 3.5.1 whose examples transfer: the loop of `tsrfast.attacks.MIM`, with the original's random draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.attacks import MIM, Smoothing
from tsrfast.compat.torchattacks._running import ascend
from tsrfast.compat.torchattacks.attack import Attack
from tsrfast.compat.torchattacks.gradient import uniform_start


class MIFGSM(Attack):
    """`BIM` with momentum (Dong et al. 2018)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__("MIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(
            self, images, labels, MIM, eps=self.eps, step_size=self.alpha, steps=self.steps, momentum=self.decay
        )  # fmt: skip


class NIFGSM(Attack):
    """`MIFGSM` with the gradient of where the momentum leads (Lin et al. 2020)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, decay: float = 1.0
    ) -> None:
        super().__init__("NIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(
            self, images, labels, MIM, eps=self.eps, step_size=self.alpha, steps=self.steps, momentum=self.decay, nesterov=True
        )  # fmt: skip


class DIFGSM(Attack):
    """`MIFGSM` on images that are resized and padded at random, all of a batch alike (Xie et al. 2019)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__("DIFGSM", model)
        self.eps = eps
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.resize_rate = resize_rate
        self.diversity_prob = diversity_prob
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self._forward(images, labels, None)

    def _forward(self, images: Tensor, labels: Tensor, smoothing: Smoothing | None) -> Tensor:
        grown: dict[str, Any] = {"engine": "eager"} if self.resize_rate > 1 else {}  # a compiled network takes one size
        return ascend(
            self, images, labels, MIM, eps=self.eps, step_size=self.alpha, steps=self.steps, momentum=self.decay,
            diversity=lambda x, draw: self.input_diversity(x), smoothing=smoothing,
            start=uniform_start(self.eps) if self.random_start else None, **grown,
        )  # fmt: skip

    def input_diversity(self, x: Tensor) -> Tensor:
        """What the model is shown at a step; draws as the original does."""
        low, high = sorted((int(x.shape[-1] * self.resize_rate), x.shape[-1]))
        size = int(torch.randint(low, high, (1,), dtype=torch.int32))
        left_over = high - size
        top = int(torch.randint(0, left_over, (1,), dtype=torch.int32))
        left = int(torch.randint(0, left_over, (1,), dtype=torch.int32))
        if torch.rand(1) >= self.diversity_prob:
            return x
        small = F.interpolate(x, size=[size, size], mode="bilinear", align_corners=False)
        return F.pad(small, [left, left_over - left, top, left_over - top])


class TIFGSM(DIFGSM):
    """`DIFGSM` with the gradient smoothed over neighbouring pixels (Dong et al. 2019)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 0.0,
        kernel_name: str = "gaussian",
        len_kernel: int = 15,
        nsig: float = 3,
        resize_rate: float = 0.9,
        diversity_prob: float = 0.5,
        random_start: bool = False,
    ) -> None:
        super().__init__(model, eps, alpha, steps, decay, resize_rate, diversity_prob, random_start)
        self.attack = "TIFGSM"
        self.kernel_name = kernel_name
        self.len_kernel = len_kernel
        self.nsig = nsig

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self._forward(images, labels, Smoothing(self.kernel_name, self.len_kernel, self.nsig))
