"""JSON files that tsrfast wrote, checked once, so that those who render them need no guards of their own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsrfast.errors import EnvironmentFault, InputError


def load_run(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read a `run.json` (times, machine, command); None where there is none, for the report does not need it.

    Raises:
        InputError: the file exists but is not a JSON object.
        EnvironmentFault: the file cannot be read.
    """
    if not Path(path).exists():
        return None
    run = read_json(Path(path), "load_run")
    is_a(run, dict, "an object", str(path))
    for i, stage in enumerate(is_a(run.get("stages", []), list, "a list", f"{path}: stages")):
        where = f"{path}: stages[{i}]"
        is_a(stage, dict, "an object", where)
        field(stage, "name", where, text)
        field(stage, "seconds", where, number)
        field(stage, "cached", where, flag, optional=True)
    return run


def read_json(path: Path, caller: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(path.read_bytes().decode(), parse_constant=refuse)
    except FileNotFoundError:
        raise InputError(f"tsrfast.{caller}: no such file: {path}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise InputError(f"tsrfast.{caller}: path must be a JSON file, got {path}") from None
    except OSError as e:
        raise EnvironmentFault(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"tsrfast.{caller}: {path} is not valid JSON: {e}") from None


def field(
    of: dict[str, Any],
    key: str,
    where: str,
    check: Callable[[Any, str], Any],
    *,
    null: bool = False,
    optional: bool = False,
) -> Any:
    if key not in of:
        if optional:
            return None
        raise InputError(f"tsrfast.report: {where} must have {key!r}, got only {sorted(map(str, of))}")
    if of[key] is None and null:
        return None
    return check(of[key], f"{where}.{key}")


def is_a(value: Any, kind: type | tuple[type, ...], what: str, where: str) -> Any:
    # bool is an int to Python, never to this file
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"tsrfast.report: {where} must be {what}, got {value!r:.60}")
    return value


def text(value: Any, where: str) -> Any:
    return is_a(value, str, "text", where)


def flag(value: Any, where: str) -> Any:
    return is_a(value, bool, "true or false", where)


def mapping(value: Any, where: str) -> Any:
    return is_a(value, dict, "an object", where)


def array(value: Any, where: str) -> Any:
    return is_a(value, list, "a list", where)


def integer(value: Any, where: str) -> Any:
    return is_a(value, int, "a whole number", where)


def integers(value: Any, where: str) -> Any:
    for i, one in enumerate(value if isinstance(value, list) else []):
        integer(one, f"{where}[{i}]")
    return value if isinstance(value, list) and value else integer(value, where)


def number(value: Any, where: str) -> Any:
    is_a(value, (int, float), "a number", where)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite:
        raise InputError(f"tsrfast.report: {where} must be finite, got {value!r:.60}")
    return value


def numbers(value: Any, where: str) -> Any:
    for i, one in enumerate(value if isinstance(value, list) else []):
        number(one, f"{where}[{i}]")
    return value if isinstance(value, list) else number(value, where)
