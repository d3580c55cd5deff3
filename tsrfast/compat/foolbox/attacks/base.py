"""What all attacks share: the call around `run`, which clips to each epsilon and says which images are adversarial."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tsrfast.compat.foolbox._tensors import like, raw, shown
from tsrfast.compat.foolbox.criteria import Criterion, Misclassification
from tsrfast.compat.foolbox.distances import Distance
from tsrfast.compat.foolbox.models import Model
from tsrfast.errors import InputError


class Attack:
    """Base of all attacks: a call with a model, images, labels or a criterion, and ``epsilons=``."""

    def __call__(self, model: Model, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def repeat(self, times: int) -> Attack:
        raise NotImplementedError

    def __repr__(self) -> str:
        args = ", ".join(f"{k.strip('_')}={v}" for k, v in vars(self).items())
        return f"{type(self).__name__}({args})"


class AttackWithDistance(Attack):
    """An attack that knows how images are measured: attribute `distance`."""

    distance: Distance

    def repeat(self, times: int) -> Attack:
        """Several runs, of which each image keeps the first that fooled the model (epsilon None: the nearest)."""
        return Repeated(self, times)

    def _results(
        self, model: Model, inputs: Any, criterion: Criterion, epsilons: list[Any], several: bool, found: list[Tensor]
    ) -> Any:
        """(raw, clipped, is_adv), or lists of them and is_adv ``[epsilons, N]``, from what `run` returned for each epsilon."""
        x = raw(inputs).detach()
        clipped, success = [], []
        for epsilon, xp in zip(epsilons, found, strict=True):
            near = xp if epsilon is None else self.distance.clip_perturbation(x, xp, epsilon).clamp(*model.bounds)
            clipped.append(near)
            with torch.no_grad():
                success.append(raw(criterion(shown(near), model(shown(near)))))
        outs, nears = ([like(t, inputs) for t in ts] for ts in (found, clipped))
        if several:
            return outs, nears, like(torch.stack(success), inputs)
        return outs[0], nears[0], like(success[0], inputs)


class FixedEpsilonAttack(AttackWithDistance):
    """An attack within a given distance: subclasses define ``run(model, inputs, criterion, *, epsilon)``."""

    def run(self, model: Model, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """Images as `inputs`, at most `epsilon` away if all goes well (the call clips them)."""
        raise NotImplementedError

    def __call__(self, model: Model, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        """Attack once for each epsilon.

        Args:
            model: the model, with its bounds.
            inputs: images ``[N, ...]`` within them.
            criterion: labels ``[N]``, or a criterion.
            epsilons: a number, or several: then lists are returned, and is_adv is ``[epsilons, N]``.

        Returns:
            (raw, clipped, is_adv): what `run` found, the same clipped to epsilon, and where that is adversarial.

        Raises:
            AssertionError: images beyond the bounds.
            NotImplementedError: an epsilon is None.
        """
        verify_input_bounds(inputs, model)
        goal, (eps, several) = get_criterion(criterion), _listed(epsilons)
        if any(e is None for e in eps):
            raise NotImplementedError("FixedEpsilonAttack subclasses do not yet support None in epsilons")
        x = shown(raw(inputs))
        found = [raw(self.run(model, x, goal, epsilon=e, **kwargs)) for e in eps]
        return self._results(model, inputs, goal, eps, several, found)


class MinimizationAttack(AttackWithDistance):
    """An attack for the smallest change: subclasses define ``run(model, inputs, criterion, *, early_stop)``."""

    def run(self, model: Model, inputs: Any, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> Any:
        """Images as `inputs`, as near as adversarial ones were found; `early_stop`: nearer than this is near enough."""
        raise NotImplementedError

    def __call__(self, model: Model, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        """Attack once; as `FixedEpsilonAttack`, and an epsilon of None leaves what was found as it is."""
        verify_input_bounds(inputs, model)
        goal, (eps, several) = get_criterion(criterion), _listed(epsilons)
        enough = None if any(e is None for e in eps) else min(eps)
        xp = raw(self.run(model, shown(raw(inputs)), goal, early_stop=enough, **kwargs))
        return self._results(model, inputs, goal, eps, several, [xp] * len(eps))


class Repeated(AttackWithDistance):
    """An attack, several times."""

    def __init__(self, attack: AttackWithDistance, times: int) -> None:
        if times < 1:
            raise ValueError(f"expected times >= 1, got {times}")
        self.attack = attack
        self.times = times

    @property
    def distance(self) -> Distance:  # type: ignore[override]  # read-only, as in foolbox
        return self.attack.distance

    def repeat(self, times: int) -> Attack:
        return Repeated(self.attack, self.times * times)

    def __call__(self, model: Model, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
        goal, (eps, several) = get_criterion(criterion), _listed(epsilons)
        x = raw(inputs).detach()
        best: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        for _ in range(self.times):
            xps, xpcs, success = self.attack(model, x, goal, epsilons=eps, **kwargs)
            if best is None:
                best = xps, xpcs, success
                continue
            outs, nears, held = best
            for k, epsilon in enumerate(eps):
                better = ~held[k]
                if epsilon is None:
                    better = better | (self.distance(x, xps[k]) < self.distance(x, outs[k]))
                better = (better & success[k]).reshape(-1, *[1] * (x.ndim - 1))
                outs[k], nears[k] = torch.where(better, xps[k], outs[k]), torch.where(better, xpcs[k], nears[k])
            best = outs, nears, held | success
        assert best is not None  # times >= 1
        outs, nears = ([like(t, inputs) for t in ts] for ts in best[:2])
        return (outs, nears, like(best[2], inputs)) if several else (outs[0], nears[0], like(best[2][0], inputs))


def _listed(epsilons: Any) -> tuple[list[Any], bool]:
    """The epsilons, and whether there may be several."""
    if not isinstance(epsilons, Iterable) or (isinstance(epsilons, Tensor) and not epsilons.ndim):
        return [epsilons if epsilons is None else float(epsilons)], False
    eps = [e if e is None else float(e) for e in epsilons]
    if not eps:
        raise InputError("tsrfast.compat.foolbox: epsilons must be a number or at least one, got none")
    return eps, True


def get_criterion(criterion: Any) -> Criterion:
    """A criterion as it is; labels are to be missed."""
    return criterion if isinstance(criterion, Criterion) else Misclassification(criterion)


def goal_of(criterion: Criterion) -> tuple[Tensor, bool]:
    """Labels ``[N]``, and whether they are targets.

    Raises:
        ValueError: another criterion.
    """
    if isinstance(criterion, Misclassification):
        return raw(criterion.labels), False
    if hasattr(criterion, "target_classes"):
        return raw(criterion.target_classes), True
    raise ValueError(f"unsupported criterion {type(criterion).__name__}")


def raise_if_kwargs(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"attack got an unexpected keyword argument '{next(iter(kwargs))}'")


def verify_input_bounds(inputs: Any, model: Model) -> None:
    """Images are within the model's bounds (NaN is not), or an AssertionError says so."""
    x = raw(inputs)
    if not x.numel():
        return
    least, most = (v.item() for v in torch.aminmax(x.detach()))
    lower, upper = model.bounds
    if not (least >= lower and most <= upper):
        raise AssertionError(
            f"tsrfast.compat.foolbox: inputs must be within the model's bounds ({lower:g}, {upper:g}), got [{least:g}, {most:g}]"
        )
