"""The report: CSV tables, PNG figures and one self-contained HTML page, rendered from `results.json` alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tsrfast._files import atomic_write
from tsrfast._page.checks import load_run
from tsrfast.suite.report.schema import load_results, validate

__all__ = ["load_results", "load_run", "render", "validate"]


def render(results: dict[str, Any], folder: str | os.PathLike[str], *, run: dict[str, Any] | None = None) -> Path:
    """Write the report of `results` into `folder` and return the path of its `report.html`.

    Files, each made by atomic rename: `report.html` (needs nothing else: images and styles are inside),
    `csv/<experiment>_cells.csv`, `csv/<experiment>_<panel>.csv` for every panel of curves, `figures/<experiment>.png`.
    The same results give the same bytes. Files of earlier reports are left where they are.

    Args:
        results: what `load_results` returns (schema 1).
        folder: made where it does not exist.
        run: what `load_run` returns: times and machine, shown in a section of its own at the end.

    Raises:
        InputError: `results` does not follow the schema; nothing has been written.
        EnvironmentFault: `folder` cannot be written.
    """
    from tsrfast.suite.report import csvs, figures, page  # late: figures need matplotlib, the page needs jinja2

    validate(results)
    target = Path(folder)
    files = csvs.files(results)
    pictures = {name: figures.draw(e) for name, e in results["experiments"].items() if e["curves"]}
    html = page.html(results, pictures, files, run)
    for texts in files.values():
        for name, text in texts.items():
            atomic_write(target / "csv" / name, text)
    for name, picture in pictures.items():
        atomic_write(target / "figures" / f"{name}.png", picture.png)
    atomic_write(target / "report.html", html)
    return target / "report.html"
