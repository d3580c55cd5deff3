"""Claims of the paper as checks that can come out false."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any


def _claim(
    text: str, left: Any, relation: str, right: Any, holds: bool, source: str, strong: bool, if_failed: str | None
) -> dict[str, Any]:
    left, right = (None if _undefined(value) else value for value in (left, right))
    return {
        "text": text, "left": left, "relation": relation, "right": right, "holds": holds, "source": source, "strong": strong,
        "analysis": None if holds else if_failed,
    }  # fmt: skip


def _undefined(value: Any) -> bool:
    """A NaN, or a list with one: what JSON cannot hold and no claim can rest on."""
    return any(isinstance(v, float) and math.isnan(v) for v in (value if isinstance(value, list) else [value]))


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
    holds = {">": left > right, "<": left < right, ">=": left >= right, "<=": left <= right}[relation]
    return _claim(text, left, relation, right, bool(holds), source, strong, if_failed)


def monotone(
    text: str, values: Sequence[float], relation: str, *, source: str, strong: bool = False, if_failed: str | None = None
) -> dict[str, Any]:
    """`values` are strictly ``increasing`` or ``decreasing``; arguments as in `compare`."""
    pairs = list(itertools.pairwise(values))
    holds = all(a < b for a, b in pairs) if relation == "increasing" else all(a > b for a, b in pairs)
    return _claim(text, list(values), relation, None, holds and not any(map(math.isnan, values)), source, strong, if_failed)
