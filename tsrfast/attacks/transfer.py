"""Transfer attacks: images made on networks at hand, tried on one that is not (Liu et al. 2017; Dong et al. 2018, section 3.3), and
the matrix of who falls for whose images (Papernot et al. 2016, "Transferability in machine learning")."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.attacks.attack import Attack, Method, Terms, _check_integers
from tsrfast.attacks.eager import evaluate
from tsrfast.attacks.loop import Attempt, Best, check_logits, undisturbed
from tsrfast.attacks.losses import Loss, Margin, wrong
from tsrfast.attacks.native import Route, callable_network, check_device
from tsrfast.attacks.threat import check_count
from tsrfast.chain import Chain
from tsrfast.errors import InputError, unknown

COMBINE = ("logits", "probabilities", "loss")
AMONG = ("both", "target", "all")


@dataclass(frozen=True, eq=False)
class Transfer(Attack):
    """Another attack on surrogates, judged on the target: ``Transfer(PGD(), [a, b]).run(target, x, y).success``.

    The target is the model of the call. It answers once for each image, after the attack and only in `run`; no gradient of it is
    taken. `AttackResult.success` and `loss` are at the target, `queries` count its answers (1), `path` and `bad_gradients` tell of the
    surrogates. Attacks that end at the first success (`early_stop`, APGD's ``keep="first"``) end at that on the surrogates, with images
    which transfer less than those of a full run.

    Args:
        attack: any attack but `Transfer`; its loss, radius and targets are those of the result.
        surrogates: one network or several, modules or chains, of the target's classes; run in eval mode, left as they were.
        weights: a positive number for each of them, scaled to sum 1; None: equal.
        combine: what of several surrogates is averaged: ``logits``; ``probabilities`` (the attack sees the logarithm of the mean as
            logits); ``loss`` (of attacks that have a field `loss`; where they ask whether an image is adversarial, the mean logits say).

    Raises:
        InputError: a value that is not allowed; when called, also surrogates that differ in their classes.
    """

    attack: Attack
    surrogates: nn.Module | Chain | Sequence[nn.Module | Chain]
    weights: Sequence[float] | None = None
    combine: str = "logits"

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack) or isinstance(self.attack, Transfer):
            raise InputError(f"tsrfast.attacks: attack must be an attack other than Transfer, got {_kind(self.attack)}")
        if self.combine not in COMBINE:
            raise unknown("combine", self.combine, COMBINE)
        if self.combine == "loss" and "loss" not in _fields(self.attack):
            raise InputError(f"tsrfast.attacks: combine='loss' needs an attack with a field loss, got {_kind(self.attack)}")
        self._shares()

    def _networks(self) -> tuple[nn.Module | Chain, ...]:
        return _networks("surrogates", self.surrogates)

    def _shares(self) -> list[float]:
        """The weights, of sum 1."""
        count = len(self._networks())
        given = [1.0] * count if self.weights is None else [float(w) for w in self.weights]
        if len(given) != count or not all(0 < w < math.inf for w in given):
            raise InputError(f"tsrfast.attacks: weights must be {count} positive numbers, one a surrogate, got {given}")
        return [w / sum(given) for w in given]

    def _terms(self) -> Terms:
        return self.attack._terms()

    def _method(self, model: nn.Module | Chain, x: Tensor | None) -> tuple[Route, Method]:
        if not isinstance(model, (nn.Module, Chain)):
            raise InputError(f"tsrfast.attacks: model must be an nn.Module or a Chain, got {_kind(model)}")
        check_device("model", model, x)
        networks = self._networks()
        route, make = self.attack._method(networks[0], x) if len(networks) == 1 else self._on_several(networks, x)

        def method(x: Tensor, y: Tensor | None, index: Tensor, judge: bool) -> Attempt:
            made = make(x, y, index, False)
            if not judge:
                return Attempt(Best.unjudged(made.best.x), made.bad, torch.zeros_like(index), made.ungraphed)
            return Attempt(self._judge(model, made.best.x, y), made.bad, torch.ones_like(index), made.ungraphed)

        return route, method

    def _on_several(self, surrogates: tuple[nn.Module | Chain, ...], x: Tensor | None) -> tuple[Route, Method]:
        if getattr(self.attack, "engine", None) == "graph":
            raise InputError("tsrfast.attacks: engine must not be 'graph' for several surrogates, got 'graph'")
        terms = self._terms()
        pairs = [callable_network(s, x, terms.engine, who=f"surrogates[{i}]") for i, s in enumerate(surrogates)]
        networks, routes = zip(*pairs, strict=True)
        ensemble = _Ensemble(networks, self._shares(), self.combine)
        # The loop of steps is Python's; the surrogates are compiled by now, as far as they can be.
        changes: dict[str, object] = {"engine": "eager"} if "engine" in _fields(self.attack) else {}
        if self.combine == "loss":
            assert terms.loss is not None  # there is a field
            changes["loss"] = _MeanLoss(terms.loss, tuple(self._shares()))
        attack: Attack = dataclasses.replace(self.attack, **changes) if changes else self.attack  # type: ignore[type-var]
        return next((r for r in routes if r.path == "eager"), routes[0]), attack._method(ensemble, x)[1]

    def _judge(self, model: nn.Module | Chain, x: Tensor, y: Tensor | None) -> Best:
        terms = self._terms()
        loss = Margin() if terms.loss is None else terms.loss
        with evaluating(*(m for m in (model, *loss.models()) if isinstance(m, nn.Module))):
            return evaluate(model, loss, terms.targeted, x, y, gradient=False, first=True).candidate


class _Ensemble(nn.Module):
    """Several networks as one, from images to logits."""

    def __init__(self, networks: Sequence[nn.Module], shares: Sequence[float], combine: str) -> None:
        super().__init__()
        self.networks, self.shares, self.combine = nn.ModuleList(networks), shares, combine

    def forward(self, x: Tensor) -> Tensor:
        each = [network(x) for network in self.networks]
        for z in each:
            check_logits(z, x)
            if z.shape != each[0].shape:
                got = f"{each[0].shape[1]} and {z.shape[1]}"
                raise InputError(f"tsrfast.attacks: surrogates must have the same classes, got {got} logits")
        if self.combine == "probabilities":
            weighted = [z.log_softmax(1) + math.log(share) for z, share in zip(each, self.shares, strict=True)]
            return torch.stack(weighted).logsumexp(0)
        mean = torch.stack([share * z for z, share in zip(each, self.shares, strict=True)]).sum(0)
        if self.combine == "loss":
            mean.each = each  # type: ignore[attr-defined]  # for _MeanLoss: goes where the logits go, and no further
        return mean


@dataclass(frozen=True, eq=False)
class _MeanLoss(Loss):
    """The mean of a loss over the networks of an ensemble, which leaves their logits with its own."""

    loss: Loss
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("name", "needs_labels"):
            object.__setattr__(self, name, getattr(self.loss, name))

    def models(self) -> tuple[nn.Module | Chain, ...]:
        return self.loss.models()

    def with_models(self, *models: nn.Module | Chain) -> Loss:
        return dataclasses.replace(self, loss=self.loss.with_models(*models))

    def per_image(self) -> Mapping[str, Tensor]:
        return self.loss.per_image()

    def only(self, rows: Tensor) -> Loss:
        return dataclasses.replace(self, loss=self.loss.only(rows))

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        each: list[Tensor] | None = getattr(logits, "each", None)
        if each is None:
            raise InputError("tsrfast.attacks: combine='loss' needs an attack that gives the loss the network's own logits")
        found = [self.loss(x, z, y) for z in each]
        return torch.stack([share * value for share, (value, _) in zip(self.shares, found, strict=True)]).sum(0), found[0][1]


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Who falls for whose images: S sources, T targets, N images.

    Attributes:
        source_right: bool ``[S, N]``, the source classifies the clean image correctly.
        target_right: bool ``[T, N]``, the target does.
        wrong: bool ``[S, T, N]``, the target misclassifies the image made on the source.
        linf, l2: float64 ``[S]``, the mean length of the changes made on a source, in pixel units.
    """

    source_right: Tensor
    target_right: Tensor
    wrong: Tensor
    linf: Tensor
    l2: Tensor

    def counts(self, among: str = "both") -> Tensor:
        """int64 ``[S, T]``: the images that a rate is a share of.

        Args:
            among: images that ``both``, source and target, classify correctly when clean; that the ``target`` does; ``all``.

        Raises:
            InputError: another word.
        """
        return self._counted(among).sum(2)

    def rates(self, among: str = "both") -> Tensor:
        """float64 ``[S, T]``: the share of these images that the target misclassifies once attacked; NaN where there are none.

        ``all`` is Papernot et al.'s definition, in which what was wrong before counts too.
        """
        counted = self._counted(among)
        return (self.wrong & counted).sum(2).double() / counted.sum(2)

    def _counted(self, among: str) -> Tensor:
        if among not in AMONG:
            raise unknown("among", among, AMONG)
        if among == "all":
            return torch.ones_like(self.wrong)
        target = self.target_right.expand_as(self.wrong)
        return target if among == "target" else target & self.source_right[:, None]


def transfer_matrix(
    sources: nn.Module | Chain | Sequence[nn.Module | Chain],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    targets: nn.Module | Chain | Sequence[nn.Module | Chain] | None = None,
    index: Tensor | None = None,
    batch_size: int = 500,
) -> TransferMatrix:
    """Attack every source, and ask every target about the images.

    Args:
        sources: networks, as an attack takes them.
        x, y, index: images, true labels and numbers, as an attack takes them; at least one image.
        attack: any untargeted attack; run on one source at a time.
        targets: networks that answer; None: the sources.
        batch_size: images at a time; has no effect on the result. An attack that holds one value an image (`eps`) takes them all at once.

    Raises:
        InputError: as the attack; also a targeted one.
    """
    sources = _networks("sources", sources)
    targets = sources if targets is None else _networks("targets", targets)
    check_count("batch_size", batch_size, 1)
    if not isinstance(attack, Attack) or attack._terms().targeted:
        raise InputError(f"tsrfast.attacks: attack must be an untargeted attack, got {_kind(attack)}")
    attack._terms().threat.check_images(x)
    _check_labels(x, y)
    numbers = _check_integers("index", index, x)
    index = torch.arange(len(x), device=x.device) if numbers is None else numbers
    pieces = torch.arange(len(x), device=x.device).split(batch_size)

    def misses(model: nn.Module | Chain, images: Tensor) -> Tensor:
        return torch.cat([_misses(model, images[rows], y[rows]) for rows in pieces])

    target_right = torch.stack([~misses(t, x) for t in targets])
    source_right = target_right if targets is sources else torch.stack([~misses(s, x) for s in sources])
    fooled, linf, l2 = [], [], []
    for source in sources:
        made = torch.cat([attack(source, x[rows], y[rows], index[rows]) for rows in pieces])
        fooled.append(torch.stack([misses(t, made) for t in targets]))
        change = (made.double() - x.double()).flatten(1)
        linf.append(change.norm(p=math.inf, dim=1).mean())
        l2.append(change.norm(dim=1).mean())
    return TransferMatrix(source_right, target_right, torch.stack(fooled), torch.stack(linf), torch.stack(l2))


def _misses(model: nn.Module | Chain, x: Tensor, y: Tensor) -> Tensor:
    """bool ``[N]``, by one forward pass."""
    with undisturbed(x.device), evaluating(*([model] if isinstance(model, nn.Module) else [])):
        at = evaluate(model, Margin(), False, x.detach().clone(), y, gradient=False, first=True)
        return wrong(at.logits, at.answer)


def _check_labels(x: Tensor, y: Tensor) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1] or not len(y):
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else _kind(y)
        raise InputError(f"tsrfast.attacks: y must be int64 [N], one label an image of which there is one at least, got {what}")


def _networks(name: str, given: nn.Module | Chain | Sequence[nn.Module | Chain]) -> tuple[nn.Module | Chain, ...]:
    """One network (an `nn.Sequential` is one) or several, as a tuple of at least one."""
    networks = (given,) if isinstance(given, (nn.Module, Chain)) or not isinstance(given, Sequence) else tuple(given)
    if not networks:
        raise InputError(f"tsrfast.attacks: {name} must be one network at least, got none")
    for network in networks:
        if not isinstance(network, (nn.Module, Chain)):
            raise InputError(f"tsrfast.attacks: {name} must be an nn.Module or a Chain, or several, got {_kind(network)}")
    return networks


def _fields(attack: Attack) -> set[str]:
    return set(getattr(attack, "__dataclass_fields__", ()))


def _kind(value: object) -> str:
    return type(value).__name__
