"""Claims of the paper as checks that can come out false."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def _claim(text: str, left: Any, relation: str, right: Any, holds: bool, source: str, strong: bool, if_failed: str | None) -> dict[str, Any]:
    return {
        "text": text, "left": left, "relation": relation, "right": right, "holds": holds, "source": source, "strong": strong,
        "analysis": None if holds else if_failed,
    }  # fmt: skip


def compare(
    text: str, left: float, relation: str, right: float, *, source: str, strong: bool = False, if_failed: str | None = None
) -> dict[str, Any]:
    """``left relation right`` for relation ``>``, ``<``, ``>=`` or ``<=``; a NaN or missing number does not hold.

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
    pairs = list(zip(values[:-1], values[1:], strict=True))
    holds = all(a < b for a, b in pairs) if relation == "increasing" else all(a > b for a, b in pairs)
    return _claim(text, list(values), relation, None, holds and not any(map(math.isnan, values)), source, strong, if_failed)
