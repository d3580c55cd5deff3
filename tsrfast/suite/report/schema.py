"""What `results.json` (schema 1) looks like, checked once, so that the renderers need no guards of their own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tsrfast._page.checks import array, field, flag, integer, integers, is_a, mapping, number, numbers, read_json, text
from tsrfast.errors import InputError, unknown

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
    results = read_json(Path(path), "load_results")
    validate(results, where=str(path))
    return results


def validate(results: Any, where: str = "results") -> None:
    """Check `results` against schema 1.

    Raises:
        InputError: the first thing that does not fit, by its place in the file.
    """
    is_a(results, dict, "an object", where)
    if results.get("schema") != SCHEMA:
        found = f"{results['schema']!r}" if "schema" in results else "none"
        raise InputError(f"tsrfast.report: {where}: schema must be {SCHEMA}, got {found:.40}")
    for key in ("tsrfast", "preset", "device"):
        field(results, key, where, text)
    field(results, "seed", where, integers)
    data = field(results, "data", where, mapping)
    for key in ("name", "fingerprint"):
        field(data, key, f"{where}: data", text)
    sizes = field(data, "sizes", f"{where}: data", mapping)
    for split in sizes:
        field(sizes, split, f"{where}: data.sizes", integer)
    for name, experiment in field(results, "experiments", where, mapping).items():
        if not _NAME.fullmatch(name):
            raise InputError(
                f"tsrfast.report: {where}: an experiment's name must be letters, digits, _ and -, got {name!r:.60}"
            )
        _experiment(is_a(experiment, dict, "an object", f"{where}: {name}"), f"{where}: {name}")


def _experiment(e: dict[str, Any], where: str) -> None:
    for key in ("title", "summary"):
        field(e, key, where, text)
    field(e, "settings", where, mapping)
    for i, note in enumerate(field(e, "notes", where, array)):
        text(note, f"{where}.notes[{i}]")
    places: set[tuple[str, str, str]] = set()
    for i, cell in enumerate(field(e, "cells", where, array)):
        place = _cell(cell, f"{where}.cells[{i}]")
        if place in places:
            raise InputError(
                f"tsrfast.report: {where}.cells[{i}] must have a place of its own, "
                f"got (group, row, column) = {place} a second time"
            )
        places.add(place)
    for i, curve in enumerate(field(e, "curves", where, array)):
        _curve(curve, f"{where}.curves[{i}]")
    for i, claim in enumerate(field(e, "claims", where, array)):
        _claim(claim, f"{where}.claims[{i}]")


def _cell(cell: Any, where: str) -> tuple[str, str, str]:
    is_a(cell, dict, "an object", where)
    for key in ("published", "measured", "std"):
        field(cell, key, where, number, null=True)
    field(cell, "n", where, integer, null=True)
    field(cell, "published_std", where, number, null=True, optional=True)
    field(cell, "note", where, text, null=True, optional=True)
    field(cell, "unit", where, text, optional=True)
    place = (cell.get("group", "main"), field(cell, "row", where, text), field(cell, "column", where, text))
    text(place[0], f"{where}.group")
    return place


def _curve(curve: Any, where: str) -> None:
    is_a(curve, dict, "an object", where)
    for key in ("panel", "name"):
        field(curve, key, where, text)
    for key in ("x_label", "y_label", "annotation"):
        field(curve, key, where, text, null=True, optional=True)
    x, y = field(curve, "x", where, array), field(curve, "y", where, array)
    if len(x) != len(y):
        raise InputError(f"tsrfast.report: {where}: x and y must be equally long, got {len(x)} and {len(y)}")
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        number(a, f"{where}.x[{i}]")
        if b is not None:  # a gap in the curve
            number(b, f"{where}.y[{i}]")
    kind = curve.get("kind", "line")
    if kind not in KINDS:
        raise unknown(f"kind in {where}", str(kind), KINDS)
    field(curve, "log_y", where, flag, optional=True)
    style = field(curve, "style", where, mapping, optional=True) or {}
    field(style, "family", f"{where}.style", text, optional=True)
    field(style, "shade", f"{where}.style", number, optional=True)
    field(style, "dash", f"{where}.style", flag, optional=True)
    for i, mark in enumerate(field(curve, "marks", where, array, optional=True) or []):
        is_a(mark, dict, "an object", f"{where}.marks[{i}]")
        field(mark, "x", f"{where}.marks[{i}]", number)
        field(mark, "text", f"{where}.marks[{i}]", text)


def _claim(claim: Any, where: str) -> None:
    is_a(claim, dict, "an object", where)
    field(claim, "text", where, text)
    if claim.get("relation") not in RELATIONS:
        raise unknown(f"relation in {where}", str(claim.get("relation")), RELATIONS)
    field(claim, "left", where, numbers, null=True)
    field(claim, "right", where, numbers, null=True)
    field(claim, "holds", where, flag, null=True)  # null: what it compares was not run
    field(claim, "strong", where, flag, optional=True)
    for i, one in enumerate(field(claim, "seeds", where, array, optional=True) or []):
        is_a(one, dict, "an object", f"{where}.seeds[{i}]")
        field(one, "seed", f"{where}.seeds[{i}]", integer)
        field(one, "holds", f"{where}.seeds[{i}]", flag, null=True)
        for side in ("left", "right"):
            field(one, side, f"{where}.seeds[{i}]", numbers, null=True)
    for key in ("source", "analysis"):
        field(claim, key, where, text, null=True, optional=True)
