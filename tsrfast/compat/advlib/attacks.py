"""As ``adv_lib.attacks``; what agrees and what differs: `tsrfast.compat.advlib`."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from tsrfast import attacks
from tsrfast._modes import evaluating
from tsrfast.attacks.fab import FAB, FABTargeted
from tsrfast.compat._covered import not_covered
from tsrfast.compat._running import DrawnAPGD, DrawnAPGDTargeted, as_module, ascend, checked_labels, may_leave, search
from tsrfast.errors import InputError, unknown

__all__ = ["apgd", "apgd_targeted", "carlini_wagner_l2", "df", "fab", "pgd_linf"]

_LOSSES = {"ce": "cross_entropy", "dl": "margin", "dlr": "dlr"}
# What is nearest here -> what adv-lib has besides.
_MISSING = {
    "carlini_wagner_l2": ("alma", "carlini_wagner_linf", "ddn", "fmn", "pdgd", "pdpgd", "perc_al", "tr"),
    "df": ("sdf",),
    "apgd(norm=1)": ("fga", "sigma_zero", "str_attack", "vfga"),
}  # fmt: skip


def pgd_linf(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    ε: float | Tensor,
    targeted: bool = False,
    steps: int = 40,
    random_init: bool = True,
    restarts: int = 1,
    loss_function: str = "ce",
    relative_step_size: float = 0.01 / 0.3,
    absolute_step_size: float | None = None,
    callback: Any = None,
) -> Tensor:
    """PGD in linf (Madry et al. 2018).

    Args:
        model: module or function from images to logits.
        inputs: ``[N, C, H, W]`` in [0, 1].
        labels: int64 ``[N]``, targets if `targeted`.
        ε: radius, a number or ``[N]``.
        loss_function: ``ce``, ``dl`` (difference of logits) or ``dlr`` (its ratio).
        relative_step_size: as a share of ε; `absolute_step_size` overrides it.

    Returns:
        New images: the latest adversarial iterate of those before each step, else the image itself.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    _no_callback(callback)
    network, y = as_module(model), _labels(labels, inputs)
    loss = _loss(loss_function, tuple(_LOSSES))
    found = torch.zeros_like(y, dtype=torch.bool)
    adversarial = inputs.detach().clone()
    for _ in range(restarts):
        standing = (~found).nonzero().squeeze(1)
        if not len(standing):
            break
        radius = ε[standing] if isinstance(ε, Tensor) and ε.ndim else ε

        def note(s: attacks.StepState, standing: Tensor = standing) -> None:
            rows = standing[s.rows[s.adversarial]]
            adversarial[rows], found[rows] = s.x[s.adversarial], True

        def start(x0: Tensor, radius: float | Tensor = radius) -> Tensor:
            size = torch.as_tensor(radius, dtype=x0.dtype, device=x0.device).reshape(-1, *[1] * (x0.ndim - 1))
            return (x0 + torch.zeros_like(x0).uniform_(-1, 1) * size).clamp(0, 1)

        attack = attacks.PGD(
            eps=radius, step_size=radius * relative_step_size if absolute_step_size is None else absolute_step_size, steps=steps,
            loss=loss, random_start=False, targeted=targeted, on_step=note,
        )  # fmt: skip
        with evaluating(network):
            ascend(attack, network, inputs[standing], y[standing], start if random_init else None)
    return adversarial


def carlini_wagner_l2(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    targeted: bool = False,
    confidence: float = 0,
    learning_rate: float = 0.01,
    initial_const: float = 0.001,
    binary_search_steps: int = 9,
    max_iterations: int = 10000,
    abort_early: bool = True,
    β_1: float = 0.9,
    β_2: float = 0.999,
    callback: Any = None,
) -> Tensor:
    """Carlini & Wagner's l2 attack (2017): see `tsrfast.attacks.CW`.

    Args:
        model, inputs, labels: as in `pgd_linf`.
        confidence, learning_rate, initial_const, max_iterations: `kappa`, `lr`, `c` and `steps` there.
        β_1, β_2: only Adam's own, as by default.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    _no_callback(callback)
    if (β_1, β_2) != (0.9, 0.999):
        raise InputError(f"tsrfast.compat.advlib: β_1 and β_2 must be 0.9 and 0.999, got {β_1} and {β_2}")
    attack = attacks.CW(
        c=initial_const, kappa=confidence, steps=max_iterations, lr=learning_rate, binary_search_steps=binary_search_steps,
        abort_early=may_leave(abort_early, max_iterations), targeted=targeted,
    )  # fmt: skip
    return attack(as_module(model), inputs, _labels(labels, inputs))


def apgd(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    norm: float,
    targeted: bool = False,
    n_iter: int = 100,
    n_restarts: int = 1,
    loss_function: str = "dlr",
    eot_iter: int = 1,
    rho: float = 0.75,
    use_large_reps: bool = False,
    use_rs: bool = True,
    best_loss: bool = False,
) -> Tensor:
    """Auto-PGD (Croce & Hein 2020): see `tsrfast.attacks.APGD`.

    Args:
        model, inputs, labels: as in `pgd_linf`.
        eps: radius, a number or ``[N]``.
        norm: 1, 2 or ``float("inf")``.
        loss_function: ``ce`` or ``dlr`` (targeted: also divided by z_1st - z_3rd).
        use_large_reps: norm 1 alone: `larger_eps` there.
        use_rs: without effect: starts are random (as in the original).
        best_loss: return the iterate of the best loss, not the latest adversarial one.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    kind = _norm(norm)
    attack = DrawnAPGD(
        norm=kind, eps=eps, steps=n_iter, restarts=n_restarts, keep="best" if best_loss else "last", rho=rho, eot_iter=eot_iter,
        larger_eps=use_large_reps and not best_loss, loss=_loss(loss_function, ("ce", "dlr")), targeted=targeted, draw=_drawn(kind),
    )  # fmt: skip
    return _searched(attack, model, inputs, labels)


def apgd_targeted(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    norm: float,
    targeted: bool = False,
    n_iter: int = 100,
    n_restarts: int = 1,
    loss_function: str = "dlr",
    eot_iter: int = 1,
    rho: float = 0.75,
    use_large_reps: bool = False,
    use_rs: bool = True,
    num_targets: int | None = None,
) -> Tensor:
    """Auto-PGD towards one wrong class after the other: see `tsrfast.attacks.APGDTargeted`.

    Args:
        model, inputs, labels, eps, norm, use_large_reps, use_rs: as in `apgd`.
        targeted: must be False.
        loss_function: ``dlr`` alone.
        num_targets: classes to try; None: all.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    kind = _norm(norm)
    if targeted:
        raise InputError("tsrfast.compat.advlib: targeted must be False for apgd_targeted, which tries all targets, got True")
    _loss(loss_function, ("dlr",))
    attack = DrawnAPGDTargeted(
        norm=kind, eps=eps, steps=n_iter, restarts=n_restarts, keep="last", rho=rho, eot_iter=eot_iter, larger_eps=use_large_reps,
        target_classes=sys.maxsize if num_targets is None else num_targets, draw=_drawn(kind),
    )  # fmt: skip
    return _searched(attack, model, inputs, labels)


def df(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    targeted: bool = False,
    steps: int = 100,
    overshoot: float = 0.02,
    norm: float = 2,
    return_unsuccessful: bool = False,
    return_targets: bool = False,
) -> Tensor:
    """DeepFool (Moosavi-Dezfooli et al. 2016), all classes considered: see `tsrfast.attacks.DeepFool`.

    Args:
        model, inputs, labels: as in `pgd_linf`.
        targeted: True warns and returns the inputs, as the original.
        norm: 2 alone.
        return_unsuccessful, return_targets: must be False.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    if targeted:
        warnings.warn("DeepFool attack is untargeted only. Returning inputs.", stacklevel=2)
        return inputs
    if norm != 2:
        raise InputError(f"tsrfast.compat.advlib: norm must be 2 for df, got {norm}")
    if return_unsuccessful or return_targets:
        raise InputError("tsrfast.compat.advlib: return_unsuccessful and return_targets must be False, got True")
    attack = attacks.DeepFool(steps=steps, candidates=None, overshoot=overshoot)
    return attack(as_module(model), inputs, _labels(labels, inputs))


def fab(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    norm: float,
    n_iter: int = 100,
    ε: float | None = None,
    α_max: float = 0.1,
    β: float = 0.9,
    η: float = 1.05,
    restarts: int | None = None,
    targeted_restarts: bool = False,
    targeted: bool = False,
) -> Tensor:
    """FAB (Croce & Hein 2020), the nearest at any distance: see `tsrfast.attacks.FAB` and `FABTargeted`.

    Args:
        model, inputs, labels, norm: as in `apgd`.
        ε: of random starts: without effect.
        α_max, β, η: `alpha_max`, `beta` and `eta` there.
        restarts: with `targeted_restarts` the number of wrong classes to try (None: all), else None or 1: no random starts.
        targeted: True warns and returns the inputs, as the original.

    Raises:
        InputError: a value that is not allowed (a ``ValueError``).
    """
    if targeted:
        warnings.warn("FAB attack is untargeted only. Returning inputs.", stacklevel=2)
        return inputs
    fields: dict[str, Any] = {
        "norm": _norm(norm), "eps": math.inf, "steps": n_iter, "keep": "best", "alpha_max": α_max, "beta": β, "eta": η,
    }  # fmt: skip
    attack: attacks.Attack
    if targeted_restarts:
        attack = FABTargeted(target_classes=sys.maxsize if restarts is None else restarts, **fields)
    elif restarts not in (None, 1):
        raise InputError(f"tsrfast.compat.advlib: restarts must be None or 1 without targeted_restarts, got {restarts}")
    else:
        attack = FAB(**fields)
    return attack(as_module(model), inputs, _labels(labels, inputs))


def _labels(labels: object, inputs: Tensor) -> Tensor:
    return checked_labels("advlib", labels, inputs)


def _loss(name: str, allowed: tuple[str, ...]) -> str:
    if name.lower() not in allowed:
        raise unknown("loss_function", name, allowed)
    return _LOSSES[name.lower()]


def _norm(norm: float) -> str:
    kinds = {1: "l1", 2: "l2", math.inf: "linf"}
    if norm not in kinds:
        raise InputError(f"tsrfast.compat.advlib: norm must be 1, 2 or float('inf'), got {norm}")
    return kinds[norm]


def _no_callback(callback: object) -> None:
    if callback is not None:
        raise InputError(f"tsrfast.compat.advlib: callback must be None, got {type(callback).__name__}")


def _drawn(norm: str) -> Callable[[Tensor], Tensor]:
    return (lambda x0: 2 * torch.rand_like(x0) - 1) if norm == "linf" else torch.randn_like


def _searched(attack: attacks.Attack, model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    network = as_module(model)
    with evaluating(network):
        return search(attack, network, inputs, _labels(labels, inputs))


def __getattr__(name: str) -> NoReturn:
    for nearest, originals in _MISSING.items():
        if name in originals:
            raise not_covered("advlib", name, __all__, nearest)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
