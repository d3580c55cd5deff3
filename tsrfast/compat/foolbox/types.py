"""Names for annotations."""

from __future__ import annotations

from typing import Any, NamedTuple


class Bounds(NamedTuple):
    """Of the pixels."""

    lower: float
    upper: float


BoundsInput = Bounds | tuple[float, float]
Preprocessing = dict[str, Any] | None
