"""Attacks one after the other."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tsrfast.compat.torchattacks.attack import Attack


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
