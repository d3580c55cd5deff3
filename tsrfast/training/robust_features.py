"""A data set of robust features: images that look to a robust network as those of the data set do (Ilyas et al., NeurIPS 2019), with
the oracle's answers kept (Yang et al., AISTATS 2021, appendix A.11, eq. 35). Training on them is ordinary training on logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks import PGD, Draw, Loss
from tsrfast.attacks.native import callable_network
from tsrfast.attacks.threat import check_count
from tsrfast.chain import Chain
from tsrfast.data import Split
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU, fold
from tsrfast.training.ranks import ALONE, Ranks

TINY = 1e-12  # under the roots: their slope at 0


def robust_features(
    robust: ConvReLU,
    teacher: nn.Module,
    split: Split,
    *,
    alpha: float = 0.5,
    steps: int = 1000,
    step_size: float = 0.1,
    seed: int = 0,
    batch_size: int = 500,
    on_progress: Callable[[int, int], object] | None = None,
    ranks: Ranks = ALONE,
) -> Split:
    """For each image x of `split` an x_r with little alpha |t(x_r) - t(x)|_2 + |f_M(x_r) - f_M(x)|_2 (norms, not squares).

    x_r starts at an image of `split` drawn for x alone, and takes gradient steps of fixed l2 length inside [0, 1]; the last iterate is
    rounded to 8 bits. What comes back does not depend on `batch_size` but for the networks' own rounding.

    Args:
        robust: f; f_M is the flattened output of its last convolution after ReLU.
        teacher: t.
        alpha: >= 0.
        steps: >= 0; 0 gives the starts.
        step_size: in pixel units, > 0.
        seed: of the starts.
        batch_size: images at a time.
        on_progress: called after each batch with (images done, all images).
        ranks: processes that all make this call with equal arguments and share the batches; each gets all images, the same as one
            process alone.

    Returns:
        As many images as `split` has, in its order; the labels are those of x.

    Raises:
        InputError: a value that is not allowed.
    """
    check_count("steps", steps, 0)
    check_count("batch_size", batch_size, 1)
    for name, value, ok in (
        ("alpha", alpha, 0 <= alpha < math.inf),
        ("step_size", step_size, 0 < step_size < math.inf),
    ):
        if not ok:
            wanted = ">= 0" if name == "alpha" else "> 0"
            raise InputError(f"tsrfast.training.robust_features: {name} must be {wanted} and finite, got {value}")
    features, parts = representation(robust), []
    weight = next(robust.parameters())
    with evaluating(features, teacher):
        for at in range(0, len(split), batch_size)[ranks.part]:
            index = torch.arange(at, min(at + batch_size, len(split)))
            x, start = (_pixels(split, i, weight) for i in (index, start_of(split, index, seed)))
            nets = [callable_network(m, x, "auto")[0] for m in (features, teacher)]
            with torch.no_grad():
                loss = Matching(nets[1], nets[1](x), nets[0](x), alpha)
            descent = PGD(norm="l2", eps=math.inf, step_size=step_size, steps=steps, loss=loss, random_start=False)
            parts.append((255 * descent(nets[0], start)).round().to(torch.uint8).cpu().contiguous())
            if on_progress is not None:
                on_progress(at + len(index), len(split))
    return Split(torch.cat(ranks.together(parts)), split.labels.cpu().clone())


def start_of(split: Split, index: Tensor, seed: int) -> Tensor:
    """The number of the image at which the robust features of each image `index`, int64 [N], start: uniform over `split`."""
    u = Draw(seed, index, 0).uniform(1).squeeze(1).double()
    return (u * len(split)).long()


def representation(net: ConvReLU) -> nn.Sequential:
    """f_M: from pixels [N, C, H, W] to the flattened output of the last convolution after ReLU, [N, D]; a copy."""
    folded = fold(net)  # the input's normalisation goes into the first convolution
    return nn.Sequential(*(layer for conv in folded.convs for layer in (conv, nn.ReLU())), nn.Flatten())


@dataclass(frozen=True, eq=False)
class Matching(Loss):
    """-(alpha |t(x_r) - t(x)|_2 + |f_M(x_r) - f_M(x)|_2): attacks increase it. The attacked model is f_M.

    Attributes:
        teacher: t.
        logits: t(x), [N, classes].
        features: f_M(x), [N, D].
        alpha: weight of the logits.
    """

    teacher: nn.Module | Chain
    logits: Tensor
    features: Tensor
    alpha: float
    name: ClassVar[str] = "robust_features"

    def models(self) -> tuple[nn.Module | Chain, ...]:
        return (self.teacher,)

    def with_models(self, *models: nn.Module | Chain) -> Loss:
        return dataclasses.replace(self, teacher=models[0])

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        distance = self.alpha * _length(self.teacher(x) - self.logits) + _length(logits - self.features)
        return -distance, self.features  # no image is adversarial: there is no wrong answer


def _length(v: Tensor) -> Tensor:
    return (v.square().sum(1) + TINY).sqrt()


def _pixels(split: Split, index: Tensor, like: Tensor) -> Tensor:
    return split.pixels(index.to(split.images.device)).to(like).contiguous(memory_format=torch.channels_last)
