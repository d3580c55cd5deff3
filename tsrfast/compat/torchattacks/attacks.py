"""The attacks of torchattacks 3.5.1 that tsrfast has: their arguments and random draws, the loop of `tsrfast.attacks` underneath."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tsrfast import attacks
from tsrfast.attacks import eager, native
from tsrfast.attacks.loop import Batch, own_copy, undisturbed
from tsrfast.compat.torchattacks.attack import Attack
from tsrfast.errors import InputError


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
        return _ascend(self, images, labels, norm="linf", eps=self.eps, step_size=self.eps, steps=1)


class BIM(Attack):
    """Signed gradient steps of length `alpha` in the linf ball (Kurakin et al. 2017); ``steps=0`` takes the paper's number."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10) -> None:
        super().__init__("BIM", model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps if steps != 0 else int(min(eps * 255 + 4, 1.25 * eps * 255))
        self.supported_mode = ["default", "targeted"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return _ascend(self, images, labels, norm="linf", eps=self.eps, step_size=self.alpha, steps=self.steps)


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
        start = self._start if self.random_start else None
        return _ascend(self, images, labels, norm="linf", eps=self.eps, step_size=self.alpha, steps=self.steps, start=start)

    def _start(self, x0: Tensor) -> Tensor:
        return torch.clamp(x0 + torch.empty_like(x0).uniform_(-self.eps, self.eps), min=0, max=1)


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
        return _ascend(self, images, labels, norm="l2", eps=self.eps, step_size=self.alpha, steps=self.steps, start=start)

    def _start(self, x0: Tensor) -> Tensor:
        delta = torch.empty_like(x0).normal_()
        n = delta.flatten(1).norm(p=2, dim=1).view(-1, *[1] * (x0.ndim - 1))
        delta *= torch.zeros_like(n).uniform_(0, 1) / n * self.eps
        return torch.clamp(x0 + delta, min=0, max=1)


class MultiAttack(Attack):
    """Attacks one after the other, each on the images that still stand.

    Args:
        attacks: at least two, all on the same model object.
        verbose: print the success rate after each attack.

    Raises:
        ValueError: one attack only, or several models.
    """

    def __init__(self, attacks: list[Attack], verbose: bool = False) -> None:
        super().__init__("MultiAttack", attacks[0].model)
        self.attacks = attacks
        self.verbose = verbose
        self.check_validity()
        self._standing: list[int] | None = None  # while `save` runs: images before the first attack, and after each

    def check_validity(self) -> None:
        if len(self.attacks) < 2:
            raise ValueError("More than two attacks should be given.")
        if len({id(attack.model) for attack in self.attacks}) != 1:
            raise ValueError("At least one of attacks is referencing a different model.")

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        final = images.clone().detach().to(self.device)
        images, labels = images.to(self.device), labels.clone().detach().to(self.device)
        rows = torch.arange(len(images), device=images.device)
        standing = [len(rows)]
        for attack in self.attacks:
            adversarial = attack(images[rows], labels[rows])
            with torch.no_grad():
                right = self.get_logits(adversarial).argmax(1) == labels[rows]
            final[rows[~right]] = adversarial[~right]
            rows = rows[right]
            standing.append(len(rows))
            if not len(rows):
                break
        if self.verbose:
            print(_success(standing))
        if self._standing is not None:
            for i, n in enumerate(standing):
                self._standing[i] += n
        return final

    def save(  # type: ignore[override]
        self,
        data_loader: DataLoader,
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_images: bool = False,
    ) -> tuple[float, list[float], float, float] | None:
        """As `Attack.save`; returns also the success rates after each attack, in percent, as the second of four."""
        talks, self.verbose = self.verbose, False
        self._standing = [0] * (len(self.attacks) + 1)
        try:
            got = super().save(data_loader, save_path, verbose, return_verbose, save_predictions, save_clean_images)
            return None if got is None else (got[0], _rates(self._standing), *got[1:])
        finally:
            self.verbose, self._standing = talks, None

    def _save_print(self, progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:  # type: ignore[override]
        assert self._standing is not None  # `save` alone calls it
        print(
            f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / {_success(self._standing)} "
            f"/ L2: {l2:1.5f} ({elapsed_time:2.3f} it/s) \t",
            end=end,
        )


def _rates(standing: list[int]) -> list[float]:
    return [(1 - n / standing[0]) * 100 for n in standing[1:]]


def _success(standing: list[int]) -> str:
    return "Attack success rate: " + " | ".join(f"{rate:2.2f} %" for rate in _rates(standing))


class _SoftCrossEntropy(attacks.CrossEntropy):
    """Labels are probabilities ``[N, classes]``. A type of its own: native code takes classes only."""


class _Normalised(nn.Module):
    """The model as pixels see it."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits


class _Asking(nn.Module):
    """The model as an attack with its own `get_logits` sees it."""

    def __init__(self, attack: Attack) -> None:
        super().__init__()
        self.attack = attack

    def forward(self, x: Tensor) -> Tensor:
        return self.attack.get_logits(x)


def _ascend(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    eps: float,
    step_size: float,
    steps: int,
    start: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`tsrfast.attacks.PGD` from a start of the caller's.

    The engines are called directly, not through the attack: it would begin where its own generator says, put the model into eval mode
    whatever `set_model_training_mode` says, and restore the random state that a model with dropout is to advance.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x0 = _pixels(attack, images.to(attack.device))
        labels = _checked(labels, x0)
        y = _checked(attack.get_target_label(x0.clone(), labels), x0) if attack.targeted else labels
        network, compiles = _network(attack, x0)
        recipe = attacks.PGD(
            norm=norm,
            eps=eps,
            step_size=step_size,
            steps=operator.index(steps),
            loss=_SoftCrossEntropy() if y.ndim == 2 else "cross_entropy",
            random_start=False,
            targeted=attack.targeted,
            engine="auto" if compiles else "eager",
        )._recipe()
        recipe.threat.check_images(x0)
        begin = x0.clone() if start is None else start(x0)
        if not x0.numel():
            return begin
        rows = torch.arange(len(x0), device=x0.device)
        batch = Batch(rows, x0, y, rows, recipe.threat, recipe.step_size)
        with undisturbed(x0.device):
            chains = native.choose(recipe, network, x0)[1]
        if chains is None:
            return eager.attempt(network, recipe, batch, begin, False, 0).best.x
        return native.attempt(chains, recipe, batch, begin, False, 0).best.x


def _pixels(attack: Attack, images: Tensor) -> Tensor:
    """An own copy of images in [0, 1]; what normalising and its inverse have rounded beyond is put back."""
    x0 = own_copy(images)
    if not x0.is_floating_point() or not x0.numel():
        return x0
    inside = x0.clamp(0, 1)
    beyond = (x0 - inside).abs().max().item()
    if beyond > 16 * torch.finfo(x0.dtype).eps:
        hint = "" if attack.normalization_used else "; are they normalised? set_normalization_used(mean, std) says how"
        raise InputError(
            f"tsrfast.compat.torchattacks: images must be in [0, 1], got [{x0.min().item():g}, {x0.max().item():g}]{hint}"
        )
    return inside


def _checked(labels: Tensor, x0: Tensor) -> Tensor:
    """Labels on the images' device: int64 ``[N]``, or probabilities ``[N, classes]``, as `torch.nn.CrossEntropyLoss` takes them."""
    if isinstance(labels, Tensor) and len(labels.shape) and len(labels) == len(x0):
        if labels.ndim == 1 and labels.dtype == torch.int64:
            return labels.clone().detach().to(x0.device)
        if labels.ndim == 2 and labels.is_floating_point():
            return labels.clone().detach().to(x0.device)
    what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise InputError(
        f"tsrfast.compat.torchattacks: labels must be int64 of shape ({len(x0)},), or probabilities ({len(x0)}, classes), got {what}"
    )


def _network(attack: Attack, x0: Tensor) -> tuple[nn.Module, bool]:
    """What `get_logits` computes, as a module; and whether it may be compiled."""
    for name in ("get_logits", "normalize"):
        if getattr(type(attack), name) is not getattr(Attack, name) or name in vars(attack):
            return _Asking(attack), False
    # A chain is the network in eval mode; `forward`, called directly, attacks it in the mode it has.
    may = not any(m.training for m in attack.model.modules())
    if attack._normalization_applied is not False:
        return attack.model, may
    mean, std = attack._normalization(x0)
    kept: _Normalised | None = vars(attack).get("_normalised")
    # Kept: compiling it is worth while once.
    if kept is None or kept.model is not attack.model or not (torch.equal(kept.mean, mean) and torch.equal(kept.std, std)):
        attack._normalised = kept = _Normalised(attack.model, mean, std)  # type: ignore[attr-defined]
    return kept, may
