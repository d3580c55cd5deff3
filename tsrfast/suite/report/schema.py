"""What `results.json` (schema 1) looks like, checked once, so that the renderers need no guards of their own."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsrfast.errors import EnvironmentFault, InputError, unknown

SCHEMA = 1
RELATIONS = (">", "<", ">=", "<=", "increasing", "decreasing", "in")
KINDS = ("line", "scatter", "bar")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # an experiment's name becomes part of file names


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a `results.json`.

    Raises:
        InputError: there is no such file, it is not JSON (NaN and Infinity are not), or it does not follow schema 1.
        EnvironmentFault: the file cannot be read.
    """
    results = _read(Path(path), "load_results")
    validate(results, where=str(path))
    return results


def load_run(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read a `run.json` (times, machine, command); None where there is none, for the report does not need it.

    Raises:
        InputError: the file exists but is not a JSON object.
        EnvironmentFault: the file cannot be read.
    """
    if not Path(path).exists():
        return None
    run = _read(Path(path), "load_run")
    _is(run, dict, "an object", str(path))
    for i, stage in enumerate(_is(run.get("stages", []), list, "a list", f"{path}: stages")):
        where = f"{path}: stages[{i}]"
        _is(stage, dict, "an object", where)
        _field(stage, "name", where, _text)
        _field(stage, "seconds", where, _number)
        _field(stage, "cached", where, _flag, optional=True)
    return run


def validate(results: Any, where: str = "results") -> None:
    """Check `results` against schema 1.

    Raises:
        InputError: the first thing that does not fit, by its place in the file.
    """
    _is(results, dict, "an object", where)
    if results.get("schema") != SCHEMA:
        found = f"{results['schema']!r}" if "schema" in results else "none"
        raise InputError(f"tsrfast.report: {where}: schema must be {SCHEMA}, got {found:.40}")
    for key in ("tsrfast", "preset", "device"):
        _field(results, key, where, _text)
    _field(results, "seed", where, _integer)
    data = _field(results, "data", where, _object)
    for key in ("name", "fingerprint"):
        _field(data, key, f"{where}: data", _text)
    sizes = _field(data, "sizes", f"{where}: data", _object)
    for split in sizes:
        _field(sizes, split, f"{where}: data.sizes", _integer)
    for name, experiment in _field(results, "experiments", where, _object).items():
        if not _NAME.fullmatch(name):
            raise InputError(
                f"tsrfast.report: {where}: an experiment's name must be letters, digits, _ and -, got {name!r:.60}"
            )
        _experiment(_is(experiment, dict, "an object", f"{where}: {name}"), f"{where}: {name}")


def _experiment(e: dict[str, Any], where: str) -> None:
    for key in ("title", "summary"):
        _field(e, key, where, _text)
    _field(e, "settings", where, _object)
    for i, note in enumerate(_field(e, "notes", where, _array)):
        _text(note, f"{where}.notes[{i}]")
    places: set[tuple[str, str, str]] = set()
    for i, cell in enumerate(_field(e, "cells", where, _array)):
        place = _cell(cell, f"{where}.cells[{i}]")
        if place in places:
            raise InputError(
                f"tsrfast.report: {where}.cells[{i}] must have a place of its own, "
                f"got (group, row, column) = {place} a second time"
            )
        places.add(place)
    for i, curve in enumerate(_field(e, "curves", where, _array)):
        _curve(curve, f"{where}.curves[{i}]")
    for i, claim in enumerate(_field(e, "claims", where, _array)):
        _claim(claim, f"{where}.claims[{i}]")


def _cell(cell: Any, where: str) -> tuple[str, str, str]:
    _is(cell, dict, "an object", where)
    for key in ("published", "measured", "std"):
        _field(cell, key, where, _number, null=True)
    _field(cell, "n", where, _integer, null=True)
    _field(cell, "published_std", where, _number, null=True, optional=True)
    _field(cell, "note", where, _text, null=True, optional=True)
    _field(cell, "unit", where, _text, optional=True)
    place = (cell.get("group", "main"), _field(cell, "row", where, _text), _field(cell, "column", where, _text))
    _text(place[0], f"{where}.group")
    return place


def _curve(curve: Any, where: str) -> None:
    _is(curve, dict, "an object", where)
    for key in ("panel", "name"):
        _field(curve, key, where, _text)
    for key in ("x_label", "y_label", "annotation"):
        _field(curve, key, where, _text, null=True, optional=True)
    x, y = _field(curve, "x", where, _array), _field(curve, "y", where, _array)
    if len(x) != len(y):
        raise InputError(f"tsrfast.report: {where}: x and y must be equally long, got {len(x)} and {len(y)}")
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        _number(a, f"{where}.x[{i}]")
        if b is not None:  # a gap in the curve
            _number(b, f"{where}.y[{i}]")
    kind = curve.get("kind", "line")
    if kind not in KINDS:
        raise unknown(f"kind in {where}", str(kind), KINDS)
    _field(curve, "log_y", where, _flag, optional=True)
    style = _field(curve, "style", where, _object, optional=True) or {}
    _field(style, "family", f"{where}.style", _text, optional=True)
    _field(style, "shade", f"{where}.style", _number, optional=True)
    _field(style, "dash", f"{where}.style", _flag, optional=True)
    for i, mark in enumerate(_field(curve, "marks", where, _array, optional=True) or []):
        _is(mark, dict, "an object", f"{where}.marks[{i}]")
        _field(mark, "x", f"{where}.marks[{i}]", _number)
        _field(mark, "text", f"{where}.marks[{i}]", _text)


def _claim(claim: Any, where: str) -> None:
    _is(claim, dict, "an object", where)
    _field(claim, "text", where, _text)
    if claim.get("relation") not in RELATIONS:
        raise unknown(f"relation in {where}", str(claim.get("relation")), RELATIONS)
    _field(claim, "left", where, _numbers, null=True)
    _field(claim, "right", where, _numbers, null=True)
    _field(claim, "holds", where, _flag, null=True)  # null: what it compares was not run
    _field(claim, "strong", where, _flag, optional=True)
    for key in ("source", "analysis"):
        _field(claim, key, where, _text, null=True, optional=True)


def _read(path: Path, caller: str) -> Any:
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


def _field(
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


def _is(value: Any, kind: type | tuple[type, ...], what: str, where: str) -> Any:
    # bool is an int to Python, never to this file
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"tsrfast.report: {where} must be {what}, got {value!r:.60}")
    return value


def _text(value: Any, where: str) -> Any:
    return _is(value, str, "text", where)


def _flag(value: Any, where: str) -> Any:
    return _is(value, bool, "true or false", where)


def _object(value: Any, where: str) -> Any:
    return _is(value, dict, "an object", where)


def _array(value: Any, where: str) -> Any:
    return _is(value, list, "a list", where)


def _integer(value: Any, where: str) -> Any:
    return _is(value, int, "a whole number", where)


def _number(value: Any, where: str) -> Any:
    _is(value, (int, float), "a number", where)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        finite = False
    if not finite:
        raise InputError(f"tsrfast.report: {where} must be finite, got {value!r:.60}")
    return value


def _numbers(value: Any, where: str) -> Any:
    for i, one in enumerate(value if isinstance(value, list) else []):
        _number(one, f"{where}[{i}]")
    return value if isinstance(value, list) else _number(value, where)
