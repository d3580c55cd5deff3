"""Signs that a network only hides its gradients: a low success of attacks that says nothing about robustness.

The checks are those of Athalye, Carlini & Wagner (ICML 2018, "Obfuscated gradients give a false sense of security", section 3.1) and of
Carlini et al. (2019, "On evaluating adversarial robustness", sections 3 and 4), each with what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast._modes import evaluating
from tsrfast.attacks import FGSM, PGD, Attack, Square, Threat
from tsrfast.attacks.loop import check_labels, check_logits, own_copy, undisturbed
from tsrfast.attacks.starts import random_start
from tsrfast.errors import InputError

STEPS = 20
DRAWS = 20  # of noise: as many looks at the model as PGD takes
RESTARTS = 10
QUERIES = 300
FAR_STEPS = 50

# What is allowed before something is said. Shares of the images.
_P_VALUE = 0.01  # that one attack beats another by chance
_NO_GRADIENT = 0.05
_STANDING = 0.05
_BY_RESTARTS = 0.15
_BY_NOISE = 0.05
_FEW = 2  # that many images, of however few, are no sign: some always lie at the border
_NOT_REPEATED = 1e-3  # of the logits' spread: far above what the order of sums changes

OBFUSCATED = "Athalye et al. 2018, section 3.1"
EVALUATING = "Carlini et al. 2019"


class GradientMaskingWarning(UserWarning):
    """A robust accuracy is likely too high, because gradients do not lead where the model fails."""


@dataclass(frozen=True)
class Finding:
    """Something that should not be.

    Attributes:
        check: short name, e.g. ``zero_gradient``.
        text: what was seen, with numbers.
        reason: why that is a sign of masking, and what to do.
        source: where it is from.
        numbers: what was measured, by name.
    """

    check: str
    text: str
    reason: str
    source: str
    numbers: dict[str, float | int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.text} {self.reason} ({self.source})"


def check_gradient_masking(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", eps: float = 8 / 255, seed: int = 0
) -> list[Finding]:
    """Look for gradient masking on the images that the model has right; an honest model gives an empty list.

    Some tens of images are enough; the work is about a thousand forward passes of each, less where attacks succeed.

    Args:
        model: network from ``[N, C, H, W]`` in [0, 1] to logits; run in eval mode, left as it was.
        x, y: clean images and int64 labels ``[N]``.
        norm, eps: the threat for which the model is called robust; one finite eps > 0 in pixel units.
        seed: of starts, noise and Square.

    Returns:
        What was found, the plainest faults first.

    Raises:
        InputError: bad images or labels; eps not finite and positive; no image is classified right.
    """
    if not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise InputError(f"tsrfast.evaluation: eps must be a finite number > 0, got {eps!r}")
    threat = Threat(norm, float(eps))
    threat.check_images(x)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"tsrfast.evaluation: y must be int64 of shape ({len(x)},), got {what}")
    with undisturbed(x.device), evaluating(model):
        x, y = own_copy(x), y.clone()
        with torch.no_grad():
            logits = model(x)
            check_logits(logits, x)
            check_labels(y, logits.shape[1])
            again = model(x)
        right = (logits.argmax(1) == y).nonzero().squeeze(1)
        if not len(right):
            raise InputError("tsrfast.evaluation: model must be right on some of the images, got none")
        probe = _Probe(model, x[right], y[right], right, threat, seed)
        loss, leaf = probe.loss()
        return [
            *_outputs(logits[right], again[right]),
            *_gradients(loss, leaf),
            *(_attacks(probe) if loss.requires_grad else ()),  # without a graph no attack by gradient runs
        ]


@dataclass(frozen=True, eq=False)
class _Probe:
    """The model and the images it has right."""

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Threat
    seed: int

    def falls(self, attack: Attack) -> Tensor:
        """bool ``[n]``: which images the attack fells."""
        return attack.run(self.model, self.x, self.y, self.index).success

    def pgd(self, eps: float, steps: int = STEPS, restarts: int = 1, random: bool = True) -> Tensor:
        return self.falls(
            PGD(
                self.threat.norm, eps, 2.5 * eps / steps, steps,
                restarts=restarts, random_start=random, early_stop=True, seed=self.seed,
            )
        )  # fmt: skip

    def loss(self) -> tuple[Tensor, Tensor]:
        """Cross-entropy, summed, and the images as its leaf."""
        leaf = self.x.clone().requires_grad_()
        return F.cross_entropy(self.model(leaf), self.y, reduction="sum"), leaf

    def noise(self) -> Tensor:
        """bool ``[n]``: which images fall to random points of the ball."""
        fallen = torch.zeros_like(self.y, dtype=torch.bool)
        for draw in range(DRAWS):
            # Draws beyond those of PGD's restarts.
            start = random_start(self.x, self.threat, seed=self.seed, index=self.index, restart=RESTARTS + draw)
            with torch.no_grad():
                fallen |= self.model(start).argmax(1) != self.y
        return fallen


def _outputs(logits: Tensor, again: Tensor) -> Iterator[Finding]:
    spread = float(logits.double().std()) if logits.numel() > 1 else 0.0
    change = float((logits.double() - again.double()).abs().max())
    if not change <= _NOT_REPEATED * spread and change != 0:
        changed = int((logits.argmax(1) != again.argmax(1)).sum())
        yield Finding(
            "random_outputs",
            f"The same images gave logits that differ by up to {change:.3g} (their spread is {spread:.3g}); "
            f"{changed} of {len(logits)} answers changed.",
            "A gradient of one draw is noise: average over draws (APGD(eot_iter=20), AutoAttack version 'rand').",
            f"{OBFUSCATED}, stochastic gradients",
            {"largest_change": change, "spread": spread, "answers_changed": changed, "images": len(logits)},
        )
    values = logits.double()
    away = float((values.sum(1) - 1).abs().max())
    if bool((values >= 0).all()) and bool((values <= 1).all()) and away < 1e-3:
        yield Finding(
            "probabilities",
            f"The model's outputs lie in [0, 1] and sum to 1 within {away:.1g} for all {len(logits)} images: softmax, not logits.",
            "Cross-entropy applies softmax once more, DLR divides by differences that round to 0: gradients vanish. "
            "Take the layer before the softmax.",
            f"{EVALUATING}, section 4.3: attack the logits",
            {"largest_distance_from_1": away, "images": len(logits)},
        )


def _gradients(loss: Tensor, leaf: Tensor) -> Iterator[Finding]:
    if not loss.requires_grad:
        g = torch.zeros_like(leaf)
    else:
        found = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
        g = torch.zeros_like(leaf) if found is None else found
    n = len(g)
    norms = g.double().flatten(1).norm(dim=1)
    broken, flat = int((~norms.isfinite()).sum()), int((norms == 0).sum())
    numbers: dict[str, float | int] = {"broken": broken, "zero": flat, "images": n}
    if broken:
        yield Finding(
            "broken_gradient",
            f"The gradient of cross-entropy is NaN or infinite for {broken} of {n} images.",
            "An attack has no direction there and stays where it is.",
            f"{OBFUSCATED}, shattered gradients",
            numbers,
        )
    if flat > _NO_GRADIENT * n:
        yield Finding(
            "zero_gradient",
            f"The gradient of cross-entropy is exactly 0 for {flat} of {n} images.",
            "The loss is flat where the attack begins: a step that is not differentiable (rounding, argmax), or a softmax saturated by "
            "large logits. Attack through the step as if it were the identity, or with a loss that logits' scale does not change ('dlr').",
            f"{OBFUSCATED}, shattered and vanishing gradients",
            numbers,
        )


def _attacks(probe: _Probe) -> Iterator[Finding]:
    n, norm, eps = len(probe.y), probe.threat.norm, float(probe.threat.eps)
    one, many, noise = probe.falls(FGSM(norm, eps)), probe.pgd(eps), probe.noise()
    counts = {"images": n, "pgd": int(many.sum())}
    if (p := _by_chance(one, many)) < _P_VALUE:
        fallen = int(one.sum())
        yield Finding(
            "one_step_beats_many",
            f"One step (FGSM) fells {fallen} of {n} images, {STEPS} steps (PGD) only {counts['pgd']} (p = {p:.1g}).",
            "More steps can only help a search that follows true gradients.",
            OBFUSCATED,
            {**counts, "fgsm": fallen, "p_value": p},
        )
    fallen = int(noise.sum())
    if fallen > max(_FEW, _BY_NOISE * n) and fallen >= counts["pgd"] and counts["pgd"] < n:
        yield Finding(
            "noise_as_good",
            f"The best of {DRAWS} random points of the ball fells {fallen} of {n} images, PGD's {STEPS} steps {counts['pgd']}.",
            "Following the gradient must be better than not looking at it.",
            f"{OBFUSCATED}: random sampling finds adversarial examples",
            {**counts, "noise": fallen},
        )
    square = probe.falls(Square(norm, eps, queries=QUERIES, seed=probe.seed))
    if (p := _by_chance(square, many | one)) < _P_VALUE:
        fallen, white = int(square.sum()), int((many | one).sum())
        yield Finding(
            "black_box_beats_white_box",
            f"Square, which sees only answers, fells {fallen} of {n} images in {QUERIES} queries, FGSM and PGD together {white} "
            f"(p = {p:.1g}).",
            "Whoever has the gradients can do all that Square can: they do not lead to the images that exist.",
            OBFUSCATED,
            {"images": n, "square": fallen, "white_box": white, "p_value": p},
        )
    again = probe.pgd(eps, restarts=RESTARTS)
    more = int((again & ~many).sum())
    if more > max(_FEW, _BY_RESTARTS * n):
        yield Finding(
            "restarts_matter",
            f"{RESTARTS} random starts fell {int(again.sum())} of {n} images, one start {counts['pgd']}.",
            "The loss is so rugged that it is luck where a search ends: use many restarts, or more steps of smaller size.",
            f"{EVALUATING}, section 4.2",
            {**counts, "restarts": int(again.sum())},
        )
    reach = 1.0 if norm == "linf" else _diameter(norm, probe.x[0].numel())
    wide = min(4 * eps, reach)
    wider = int(probe.pgd(wide).sum())
    enough = max(_FEW, _STANDING * n)
    if eps < reach and wider <= counts["pgd"] and enough < counts["pgd"] < n - enough:
        yield Finding(
            "larger_eps_not_stronger",
            f"PGD fells {counts['pgd']} of {n} images at eps = {eps:.4g} and {wider} at eps = {wide:.4g}.",
            "The larger ball holds every image of the smaller one.",
            f"{EVALUATING}, section 4.4: accuracy must fall as eps grows",
            {**counts, "eps": eps, "larger_eps": wide, "pgd_larger_eps": wider},
        )
    standing = int((~(probe.pgd(reach, FAR_STEPS) | probe.pgd(reach, FAR_STEPS, random=False))).sum())
    if standing > _STANDING * n:
        yield Finding(
            "unbounded_attack_fails",
            f"With eps = {reach:.4g}, any image at all, PGD leaves {standing} of {n} images standing.",
            "Every image can be turned into one of another class there, so an attack that does not find it follows no gradient.",
            OBFUSCATED,
            {"images": n, "eps": reach, "standing": standing},
        )


def _diameter(norm: str, pixels: int) -> float:
    """Of the box [0, 1]^pixels: from any image to any other."""
    return math.sqrt(pixels) if norm == "l2" else float(pixels)


def _by_chance(a: Tensor, b: Tensor) -> float:
    """How likely two equal attacks differ that much in favour of `a`: one-sided sign test on the images that only one of them fells."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    return sum(math.comb(n, k) for k in range(only_a, n + 1)) / 2**n
