"""Claims of the paper as checks that can come out false."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {"increasing": operator.lt, "decreasing": operator.gt}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le,
    "in": lambda left, right: all(right[0] <= v <= right[1] for v in (left if isinstance(left, list) else [left])),
}  # fmt: skip


def _claim(text: str, left: Any, relation: str, right: Any, source: str, strong: bool, if_failed: str | None) -> dict[str, Any]:
    verdict = holds(left, relation, right)
    left, right = (None if _undefined(value) else value for value in (left, right))
    return {
        "text": text, "left": left, "relation": relation, "right": right, "holds": verdict, "source": source, "strong": strong,
        "analysis": None if verdict else if_failed,
    }  # fmt: skip


def _undefined(value: Any) -> bool:
    """A NaN, or a list with one: what JSON cannot hold and no claim can rest on."""
    return any(isinstance(v, float) and math.isnan(v) for v in (value if isinstance(value, list) else [value]))


def holds(left: Any, relation: str, right: Any) -> bool:
    """Whether ``left relation right``; never with a NaN, or where one of them is missing (None).

    Args:
        left: a number; a list of them for ``increasing`` and ``decreasing`` (strictly).
        relation: ``>``, ``<``, ``>=``, ``<=``, ``increasing``, ``decreasing``, or ``in``: all of left within [right[0], right[1]].
        right: a number, or two for ``in``; nothing for the orders.
    """
    if relation in _ORDERS:
        return left is not None and not _undefined(left) and all(_ORDERS[relation](a, b) for a, b in itertools.pairwise(left))
    return not any(value is None or _undefined(value) for value in (left, right)) and bool(_COMPARISONS[relation](left, right))


def compare(
    text: str, left: float, relation: str, right: float, *, source: str, strong: bool = False, if_failed: str | None = None
) -> dict[str, Any]:
    """``left relation right`` for relation ``>``, ``<``, ``>=`` or ``<=``; with a NaN it does not hold, and the number is null.

    Args:
        text: the claim in words.
        source: where the paper makes it.
        strong: one of those that a faithful reproduction must show.
        if_failed: what is known about a failure; shown only then.
    """
    return _claim(text, left, relation, right, source, strong, if_failed)


def monotone(
    text: str, values: Sequence[float], relation: str, *, source: str, strong: bool = False, if_failed: str | None = None
) -> dict[str, Any]:
    """`values` are strictly ``increasing`` or ``decreasing``; arguments as in `compare`."""
    return _claim(text, list(values), relation, None, source, strong, if_failed)
