"""Attacks from words: a name and ``key=value`` settings, as a command line gives them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import tsrfast.attacks
from tsrfast.attacks import Attack, Diversity, Loss, Smoothing, losses
from tsrfast.errors import InputError, unknown

_CLASSES: dict[str, type[Attack]] = {
    name.lower(): value
    for name, value in vars(tsrfast.attacks).items()
    if inspect.isclass(value) and issubclass(value, Attack) and dataclasses.is_dataclass(value)
}
# Other names: AutoAttack's versions and members, and forms of one class that have a name of their own.
_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{version: ("autoattack", {"version": version}) for version in ("standard", "plus", "rand")},
    "apgd-ce": ("apgd", {}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgdtargeted", {}),
    "fab-t": ("fabtargeted", {}),
    "nim": ("mim", {"nesterov": True}),
    "dim": ("mim", {"diversity": Diversity()}),
    "tim": ("mim", {"smoothing": Smoothing()}),
}
_ORACLES: dict[str, Any] = {
    value.name: value
    for value in vars(tsrfast.attacks).values()
    if inspect.isclass(value) and issubclass(value, Loss) and "teacher" in getattr(value, "__dataclass_fields__", {})
}


def names() -> list[str]:
    """Of all attacks that words can describe, sorted."""
    return sorted({*(name for name, kind in _CLASSES.items() if not _unspeakable(kind)), *_ALIASES})


def settings_of(name: str) -> list[str]:
    """The settings of the attack of that name.

    Raises:
        InputError: there is none.
    """
    return [f.name for f in dataclasses.fields(_find(name)[0])]  # type: ignore[arg-type]


def build(name: str, settings: Mapping[str, str], teacher: nn.Module | None = None) -> Attack:
    """The attack of that name (any case) with these settings, which are its fields.

    Numbers may be fractions (``8/255``), ``none`` is None, lists are separated by commas, a loss is given by its name.

    Args:
        name: see `names`.
        settings: values as text.
        teacher: for losses against an oracle.

    Raises:
        InputError: unknown attack or setting (with the nearest one), or a value that does not fit.
    """
    kind, fixed = _find(name)
    fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = dict(fixed)
    for key, text in settings.items():
        if key not in fields:
            raise unknown(f"setting of attack {name!r}", key, fields)
        values[key] = _parse(key, fields[key], text, teacher)
    eps = values.get("eps")
    if isinstance(eps, float) and eps > 1 and values.get("norm", "linf") == "linf":
        raise InputError(f"setting eps must be in pixels of [0, 1] for linf, got {eps:g}; did you mean {eps:g}/255?")
    return kind(**values)


def build_several(attacks: str, settings: Sequence[tuple[str, str]], teacher: nn.Module | None = None) -> dict[str, Attack]:
    """Attacks by name from ``apgd-ce,square``; AutoAttack under its own names stands for its members.

    Args:
        attacks: names, separated by commas.
        settings: (key, text) for every attack that has such a setting, (``pgd.key``, text) for one.
        teacher: as in `build`.

    Raises:
        InputError: as `build`; also a name twice, or a setting that none of them has.
    """
    wanted = [name.strip().lower() for name in attacks.split(",") if name.strip()]
    if not wanted:
        raise InputError("--attacks: must name at least one attack, got none")
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise InputError(f"--attacks: must name each attack once, got {twice!r} twice")
    mine: dict[str, dict[str, str]] = {name: {} for name in wanted}
    has = {name: settings_of(name) for name in wanted}
    for key, text in settings:
        name, dot, own = key.rpartition(".")
        if dot and name not in mine:
            raise unknown("attack in --set", name, wanted)
        those = [name] if dot else [n for n in wanted if key in has[n]]
        if not those:
            raise unknown(f"setting of attacks {', '.join(wanted)}:", key, {s for n in wanted for s in has[n]})
        for one in those:
            mine[one][own] = text
    return {name: build(name, mine[name], teacher) for name in wanted}


def number(option: str, text: str) -> float:
    """``0.03`` or ``8/255``.

    Raises:
        InputError: neither.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{option} must be a number such as 0.03 or 8/255, got {text!r}") from None


def split_settings(items: Sequence[str]) -> list[tuple[str, str]]:
    """``["steps=40"]`` as pairs.

    Raises:
        InputError: an item without ``=``.
    """
    pairs = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set: must be key=value, got {item!r}")
        pairs.append((key.strip(), text.strip()))
    return pairs


def _find(name: str) -> tuple[type[Attack], dict[str, Any]]:
    base, fixed = _ALIASES.get(name.lower(), (name.lower(), {}))
    if base not in _CLASSES:
        raise unknown("attack", name, names())
    kind = _CLASSES[base]
    if needs := _unspeakable(kind):
        hint = "; give --surrogate CHECKPOINT beside another attack" if kind is tsrfast.attacks.Transfer else ""
        raise InputError(f"attack {name} needs {' and '.join(needs)}, which words cannot give{hint}")
    return kind, fixed


def _unspeakable(kind: type[Attack]) -> list[str]:
    """Fields that must be given, and are objects."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def _parse(key: str, kind: str, text: str, teacher: nn.Module | None) -> Any:
    kinds = [part.strip() for part in kind.split("|")]
    option = f"setting {key}"
    if "Loss" in kinds:
        return _loss(text, teacher)
    if "None" in kinds and text.lower() == "none":
        return None
    if "bool" in kinds:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{option} must be true or false, got {text!r}")
        return text.lower() == "true"
    if "float" in kinds:
        return number(option, text)
    if "int" in kinds:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{option} must be an integer, got {text!r}") from None
    if "str" in kinds:
        return text
    if kind.startswith("tuple[str"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    raise InputError(f"{option} must be an object of Python ({kind}), which words cannot give; got {text!r}")


def _loss(text: str, teacher: nn.Module | None) -> str | Loss:
    if text in _ORACLES:
        if teacher is None:
            raise InputError(f"setting loss: {text} needs --teacher CHECKPOINT")
        return _ORACLES[text](teacher)
    if text not in losses.BY_NAME:
        raise unknown("loss", text, (*losses.BY_NAME, *_ORACLES))
    return text
