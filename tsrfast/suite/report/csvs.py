"""The numbers of `results.json` as CSV: full precision, an empty field where there is no value."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from typing import Any

CELL_COLUMNS = ("group", "row", "column", "published", "published_std", "measured", "std", "n", "unit", "note")


def files(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Experiment -> file name -> text: `<experiment>_cells.csv`, and for every panel of curves
    `<experiment>_<panel>.csv` (curve, x, y). No name occurs twice.
    """
    made: dict[str, dict[str, str]] = {name: {} for name in results["experiments"]}
    taken: set[str] = set()
    for name, experiment in results["experiments"].items():
        if experiment["cells"]:
            rows = ([cell.get(key) for key in CELL_COLUMNS] for cell in experiment["cells"])
            made[name][_free(f"{name}_cells", taken)] = _table(CELL_COLUMNS, rows)
    for name, experiment in results["experiments"].items():
        panels: dict[str, list[dict[str, Any]]] = {}
        for curve in experiment["curves"]:
            panels.setdefault(curve["panel"], []).append(curve)
        for panel, curves in panels.items():
            points = ([c["name"], x, y] for c in curves for x, y in zip(c["x"], c["y"], strict=True))
            made[name][_free(f"{name}_{_slug(panel)}", taken)] = _table(("curve", "x", "y"), points)
    return made


def _table(header: Iterable[str], rows: Iterable[list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)  # str(float) is the shortest text that reads back as the same float
    return out.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60] or "curves"


def _free(stem: str, taken: set[str]) -> str:
    name, i = f"{stem}.csv", 2
    while name.lower() in taken:  # some file systems do not tell Fig3 from fig3
        name, i = f"{stem}_{i}.csv", i + 1
    taken.add(name.lower())
    return name
