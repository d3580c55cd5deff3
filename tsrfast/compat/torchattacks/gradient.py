"""Attacks of torchattacks 3.5.1 that are the loop of `tsrfast.attacks.PGD`, with the original's arguments and random draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsrfast.compat._running import Start
from tsrfast.compat.torchattacks._running import ascend
from tsrfast.compat.torchattacks.attack import Attack


def uniform_start(eps: float) -> Start:
    """From images to points drawn uniformly from the linf ball, clamped to the box."""
    return lambda x0: torch.clamp(x0 + torch.empty_like(x0).uniform_(-eps, eps), min=0, max=1)


class VANILA(Attack):
    """Returns the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("VANILA", model)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return images.clone().detach().to(self.device)


class GN(Attack):
    """Adds Gaussian noise of standard deviation `std`."""

    def __init__(self, model: nn.Module, std: float = 0.1) -> None:
        super().__init__("GN", model)
        self.std = std

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        images = images.clone().detach().to(self.device)
        return torch.clamp(images + self.std * torch.randn_like(images), min=0, max=1)


class FGSM(Attack):
    """One signed gradient step of length `eps` (Goodfellow et al. 2015)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255) -> None:
        super().__init__("FGSM", model)
        self.eps = eps
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(self, images, labels, eps=self.eps, step_size=self.eps, steps=1)


class BIM(Attack):
    """Signed gradient steps of length `alpha` in the linf ball (Kurakin et al. 2017); ``steps=0`` takes the paper's number."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("BIM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps if steps != 0 else int(min(eps * 255 + 4, 1.25 * eps * 255))
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(self, images, labels, eps=self.eps, step_size=self.alpha, steps=self.steps)


class PGD(Attack):
    """Projected gradient ascent in the linf ball (Madry et al. 2018)."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, random_start: bool = True
    ) -> None:
        super().__init__("PGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        start = uniform_start(self.eps) if self.random_start else None
        return ascend(self, images, labels, eps=self.eps, step_size=self.alpha, steps=self.steps, start=start)


class PGDL2(Attack):
    """Projected gradient ascent in the l2 ball. `eps_for_division` has no effect: a gradient is divided by its norm."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
    ) -> None:
        super().__init__("PGDL2", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.eps_for_division = eps_for_division
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        start = self._start if self.random_start else None
        return ascend(self, images, labels, norm="l2", eps=self.eps, step_size=self.alpha, steps=self.steps, start=start)

    def _start(self, x0: Tensor) -> Tensor:
        delta = torch.empty_like(x0).normal_()
        n = delta.flatten(1).norm(p=2, dim=1).view(-1, *[1] * (x0.ndim - 1))
        delta *= torch.zeros_like(n).uniform_(0, 1) / n * self.eps
        return torch.clamp(x0 + delta, min=0, max=1)


class FFGSM(Attack):
    """`PGD` of one step (Wong et al. 2020, "Fast is better than free")."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255) -> None:
        super().__init__("FFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(self, images, labels, eps=self.eps, step_size=self.alpha, steps=1, start=self._start)

    def _start(self, x0: Tensor) -> Tensor:
        # The original draws normal numbers first, and throws them away.
        return torch.clamp(x0 + torch.randn_like(x0).uniform_(-self.eps, self.eps), min=0, max=1)


class RFGSM(Attack):
    """`BIM` after a step of random signs, of length `alpha` (Tramèr et al. 2018)."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("RFGSM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(self, images, labels, eps=self.eps, step_size=self.alpha, steps=self.steps, start=self._start)

    def _start(self, x0: Tensor) -> Tensor:
        return torch.clamp(x0 + self.alpha * torch.randn_like(x0).sign(), min=0, max=1)


class TPGD(Attack):
    """`PGD` on the KL divergence from the model's own prediction for the clean image, as in TRADES (Zhang et al. 2019).

    Of KL(p || q) only the cross-entropy -sum p log q depends on the image that is attacked.
    """

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("TPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            predicted = self.get_logits(images.clone().detach().to(self.device)).softmax(1)
        return ascend(self, images, predicted, eps=self.eps, step_size=self.alpha, steps=self.steps, start=self._start)

    def _start(self, x0: Tensor) -> Tensor:
        return torch.clamp(x0 + 0.001 * torch.randn_like(x0), min=0, max=1)


class EOTPGD(Attack):
    """`PGD` with the sum of `eot_iter` gradients at each step, for models that draw random numbers (Zimmermann 2019)."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        eot_iter: int = 2,
        random_start: bool = True,
    ) -> None:
        super().__init__("EOTPGD", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.eot_iter = eot_iter
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return ascend(
            self, images, labels, eps=self.eps, step_size=self.alpha, steps=self.steps, eot_iter=self.eot_iter,
            start=uniform_start(self.eps) if self.random_start else None,
        )  # fmt: skip
