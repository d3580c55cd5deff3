"""How numbers are written in the report."""

from __future__ import annotations

from collections.abc import Iterable

MINUS = "\N{MINUS SIGN}"


def fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals; scientific where that would show a number that is not zero as zero."""
    text = f"{value:,.{decimals}f}"
    if value and not text.strip("-0.,"):
        text = f"{value:.1e}"
    return text.replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """A difference: `fixed` with its sign, and a bare zero where it rounds to zero."""
    text = f"{value:,.{decimals}f}"
    if not text.strip("-0.,"):
        return f"{0:.{decimals}f}"
    return ("+" if value > 0 else "") + text.replace("-", MINUS)


def decimals(values: Iterable[float], unit: str) -> int:
    """One number of decimals for a whole table: 2 for per cent (as the paper prints), 0 for counts, else 4 digits."""
    shown = list(values)
    if unit == "%":
        return 2
    if all(float(v).is_integer() for v in shown):
        return 0
    largest = max(abs(v) for v in shown)
    return max(1, 4 - len(str(int(largest)))) if largest < 1e6 else 0


def apart(values: Iterable[float]) -> list[str]:
    """The values with 4 significant digits, or as many as it takes for different values to look different."""
    numbers = list(values)
    texts: list[str] = []
    for digits in range(4, 18):
        texts = [_significant(v, digits) for v in numbers]
        if len(set(texts)) == len(set(numbers)):
            break
    return texts


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.4 s`, `3 min 05 s`, `2 h 10 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def radius(eps: float) -> str:
    """As people write it: 8/255 where that is what it is."""
    steps = eps * 255
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-6 and 0 < round(steps) < 255 else f"{eps:g}"


def _significant(value: float, digits: int) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.{digits - 4}f}".replace("-", MINUS)
    return f"{value:.{digits}g}".replace("-", MINUS)
