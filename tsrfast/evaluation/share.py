"""An accuracy: so many of so many images, and how far that may be from the accuracy on all images there could be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tsrfast.errors import InputError

Z = 1.959963984540054  # 95 %: the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Share:
    """`count` of `of`, with the 95 % score interval (Wilson 1927; recommended by Newcombe, Statistics in Medicine 17, 1998).

    Args:
        count: 0..of.
        of: at least 1.

    Raises:
        InputError: a count that cannot be.
    """

    count: int
    of: int

    def __post_init__(self) -> None:
        if self.of < 1 or not 0 <= self.count <= self.of:
            raise InputError(
                f"tsrfast.evaluation: a share must be 0 <= count <= of with of >= 1, got {self.count} of {self.of}"
            )

    @property
    def value(self) -> float:
        return self.count / self.of

    @property
    def low(self) -> float:
        return self._interval()[0]

    @property
    def high(self) -> float:
        return self._interval()[1]

    def _interval(self) -> tuple[float, float]:
        n, p, square = self.of, self.value, Z * Z
        middle = (p + square / (2 * n)) / (1 + square / n)
        half = Z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
        # Exactly 0 and 1 at the ends, where rounding would leave a little.
        return (0.0 if self.count == 0 else middle - half), (1.0 if self.count == n else middle + half)

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f})"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"count": self.count, "of": self.of, "value": self.value, "low": self.low, "high": self.high}
