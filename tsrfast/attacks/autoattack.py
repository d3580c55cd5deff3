"""AutoAttack (Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"):
four attacks that need no tuning, one after the other, with the numbers of the authors' code (package autoattack)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks import native
from tsrfast.attacks.apgd import APGD, APGDTargeted
from tsrfast.attacks.attack import Attack, Method, Terms
from tsrfast.attacks.cascade import CascadeResult, Progress, device_of, run_cascade
from tsrfast.attacks.eager import evaluate
from tsrfast.attacks.fab import FAB, FABTargeted
from tsrfast.attacks.loop import Attempt, Best, own_copy, undisturbed
from tsrfast.attacks.losses import CrossEntropy, Margin
from tsrfast.attacks.native import Route
from tsrfast.attacks.square import Square
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.chain import Chain
from tsrfast.errors import InputError, unknown

NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
VERSIONS: Mapping[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": (),
}
BY_GRADIENT = frozenset(NAMES) - {"square"}


@dataclass(frozen=True, eq=False)
class AutoAttack(Attack):
    """The ensemble: each attack on the images that still stand after the ones before.

    =========  ===================================================================================================================
    standard   apgd-ce, apgd-t, fab-t, square. l1: apgd-ce with 5 restarts, apgd-t towards 5 classes, both through larger radii.
    plus       apgd-ce and apgd-dlr with 5 restarts, fab with 5, square, apgd-t, fab-t.
    rand       apgd-ce, apgd-dlr, 20 gradients averaged at each iterate: for networks that draw random numbers.
    custom     what `attacks` says; apgd-ce, apgd-dlr and fab with 5 restarts.
    =========  ===================================================================================================================

    All have 100 iterations (square: 5000 queries) and those towards a class the 9 most likely wrong ones, unless said otherwise.
    A network with fewer than 4 classes has no targeted DLR loss, one with fewer than 3 no DLR loss: those attacks are left out, with a
    warning. Warnings are also given where the result is probably too good: the network draws random numbers, returns probabilities, has
    gradients that are 0, or Square finds what the attacks by gradient did not.

    Called, or by `run`, it attacks a batch; `evaluate` takes a data set, and says how each attack went.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in that norm, in pixel units; a number or ``[N]``; finite.
        version: ``standard``, ``plus``, ``rand`` or ``custom``.
        attacks: for ``custom`` only, and then needed: names among ``apgd-ce``, ``apgd-dlr``, ``apgd-t``, ``fab``, ``fab-t``, ``square``, in
            order.
        steps, queries: of the iterative attacks and of square, of the authors' own choice by default.
        seed: key of all random numbers.
        lo, hi: the pixel box.
        engine: as in `PGD`.

    Raises:
        InputError: a value that is not allowed.
    """

    norm: str = "linf"
    eps: float | Tensor = 8 / 255
    version: str = "standard"
    attacks: tuple[str, ...] = ()
    steps: int = 100
    queries: int = 5000
    seed: int = 0
    lo: float = 0.0
    hi: float = 1.0
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise unknown("version", self.version, VERSIONS)
        if isinstance(self.attacks, str) or (self.version == "custom") != bool(self.attacks):
            raise InputError(
                f"tsrfast.attacks: attacks must be names for version='custom', and empty for the others, got {self.attacks!r} "
                f"for {self.version!r}"
            )
        for name in self.attacks:
            if name not in NAMES:
                raise unknown("attack", name, NAMES)
        if len(set(self.attacks)) < len(self.attacks):
            raise InputError(f"tsrfast.attacks: attacks must differ, got {self.attacks!r}")
        check_count("steps", self.steps, 0)
        check_count("queries", self.queries, 0)
        self.members()

    def members(self) -> dict[str, Attack]:
        """The attacks by name, in order."""
        l1 = self.norm == "l1" and self.version == "standard"
        rand, standard = self.version == "rand", self.version == "standard"
        shared = {k: getattr(self, k) for k in ("norm", "eps", "seed", "lo", "hi", "engine")}
        iterative = {**shared, "steps": self.steps}
        restarts = 5 if l1 or not (standard or rand) else 1
        apgd = APGD(**iterative, restarts=restarts, eot_iter=20 if rand else 1, larger_eps=l1)
        makers: dict[str, Callable[[], Attack]] = {
            "apgd-ce": lambda: apgd,
            "apgd-dlr": lambda: dataclasses.replace(apgd, loss="dlr"),
            "apgd-t": lambda: APGDTargeted(**iterative, larger_eps=l1, target_classes=5 if l1 else 9),
            "fab": lambda: FAB(**iterative, restarts=5),
            "fab-t": lambda: FABTargeted(**iterative, target_classes=9),
            "square": lambda: Square(**shared, queries=self.queries, rescale_schedule=False),
        }
        return {name: makers[name]() for name in VERSIONS[self.version] or self.attacks}

    def evaluate(
        self,
        model: nn.Module | Chain,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor | None = None,
        batch_size: int = 500,
        checkpoint: Path | None = None,
        progress: Callable[[Progress], None] | None = None,
        individually: bool = False,
    ) -> CascadeResult:
        """Robust accuracy, attack by attack (`run_cascade` says what the arguments are).

        Warns (`warnings.warn`): as the class says.
        """
        check_count("batch_size", batch_size, 1)
        self._terms().threat.check_images(x)
        members = suited(model, x[:batch_size], y, self.members(), random=self.version == "rand", engine=self.engine)
        result = run_cascade(
            model,
            x,
            y,
            members,
            index=index,
            batch_size=batch_size,
            checkpoint=checkpoint,
            progress=progress,
            individually=individually,
        )
        warn_of_square(result, individually)
        return result

    def _terms(self) -> Terms:
        steps = sum(a._terms().steps for a in self.members().values())
        return Terms(Threat(self.norm, self.eps, self.lo, self.hi), None, False, steps, self.engine)

    def _method(self, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Method]:
        network, route = native.callable_network(model, x, self.engine)

        def method(x: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
            assert y is not None  # checked
            members = suited(model, x, y, self.members(), random=self.version == "rand", engine=self.engine)
            got = run_cascade(model, x, y, members, index=index, batch_size=len(x))
            warn_of_square(got, individually=False)
            best = Best.unjudged(got.x_adv)
            if judge:
                with evaluating(network):
                    best.loss = evaluate(network, Margin(), False, got.x_adv, y, gradient=False, first=False).loss
            best.adversarial = ~got.robust
            return Attempt(best, got.bad_gradients, got.queries)

        return route, method


def suited(
    model: nn.Module | Chain, x: Tensor, y: Tensor, members: Mapping[str, Attack], *, random: bool, engine: str = "auto"
) -> dict[str, Attack]:
    """The attacks that `model` has enough classes for; with the warnings that some images, of which there may be none, tell.

    Args:
        model, x, y: network, images on any device, labels of them and perhaps of more.
        members: attacks by their names (`NAMES`).
        random: they are made for networks that draw random numbers.
        engine: theirs.
    """
    chosen = dict(members)
    if not len(x) or not isinstance(y, Tensor):  # what is wrong with it is said by `run_cascade`
        return chosen
    device = device_of(model, x)
    classes = inspect_model(model, x.to(device), y[: len(x)].to(device), members, random=random, engine=engine)
    least = {"apgd-dlr": 3, "apgd-t": 4}
    for name in members:
        if classes < least.get(name, 0):
            _warn(f"{name} is left out: its loss needs {least[name]} classes, the model has {classes}")
            del chosen[name]
    return chosen


def inspect_model(
    model: nn.Module | Chain, x: Tensor, y: Tensor, attacks: Mapping[str, Attack], *, random: bool, engine: str = "auto"
) -> int:
    """Warn of what makes an evaluation unreliable, as far as a batch shows it; the number of classes.

    Args:
        model, x, y: network, images on its device, labels.
        attacks: by their names (`NAMES`), that are to be run.
        random: the attacks are made for networks that draw random numbers.
        engine: that of the attacks.
    """
    network = native.callable_network(model, x, engine)[0]
    plain = model if isinstance(model, nn.Module) else network
    by_gradient = sorted(BY_GRADIENT & set(attacks))
    with undisturbed(x.device), evaluating(plain, network):
        x, y = own_copy(x), y.clone()  # free of inference mode
        with torch.no_grad():
            outputs = [evaluate(plain, CrossEntropy(), False, x, y, gradient=False, first=True).logits for _ in range(5)]
        if not random and _vary(outputs):
            _warn("the model answers differently each time it is asked: it draws random numbers, and needs version='rand'")
        z = outputs[0]
        if bool(((z > -1e-5) & (z < 1 + 1e-5)).all()) and bool(((z.sum(1) - 1).abs() < 1e-5).all()):
            _warn("the model returns probabilities: it must return logits, else gradients vanish and attacks fail")
        classes = z.shape[1]
        if by_gradient:
            at = evaluate(network, CrossEntropy(), False, x, y, gradient=True, first=False)
            flat = int((at.gradient().flatten(1) == 0).all(1).sum())
            if flat:
                _warn(
                    f"{flat} of {len(x)} images have a cross-entropy gradient of zero: {', '.join(by_gradient)} may fail where an attack "
                    "adapted to the model would not"
                )
    for name, attack in attacks.items():
        wanted = getattr(attack, "target_classes", 0)
        if classes - 1 < wanted and classes >= 4:
            _warn(f"{name} asks for {wanted} target classes, the model has {classes - 1} wrong ones: all of them are tried")
    return classes


def warn_of_square(result: CascadeResult, individually: bool) -> None:
    """Warn if Square finds, in more than 0.2 % of the images, what the attacks before it did not."""
    position = next((i for i, stage in enumerate(result.stages) if stage.name == "square"), 0)
    if not position or individually:
        return
    gain = result.stages[position - 1].robust_accuracy - result.stages[position].robust_accuracy
    if gain > 0.002:
        _warn(
            f"square lowers the robust accuracy by {gain:.2%}: the gradients of the model mislead, and the evaluation is probably too good; "
            "try Square with more queries and restarts, or an attack adapted to the model"
        )


def _vary(outputs: list[Tensor]) -> bool:
    """Whether the directions of the logits differ by more than rounding."""
    first, *others = (z / (torch.linalg.vector_norm(z, dim=1, keepdim=True) + 1e-10) for z in outputs)
    return any(bool((torch.linalg.vector_norm(first - z, dim=1) > 1e-4).any()) for z in others)


def _warn(reason: str) -> None:
    warnings.warn(f"AutoAttack: {reason}", stacklevel=4)
