"""The HTML page: what the template is given. The template itself is `report.html.j2` beside this file."""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any

from tsrfast._page import document
from tsrfast.suite.report.figures import Picture
from tsrfast.suite.report.tables import sentences, tables

SMALL_PRESETS = ("smoke", "quick")  # far below the paper's sizes, so levels are not comparable, orderings may be


def html(
    results: dict[str, Any],
    pictures: dict[str, Picture],
    files: dict[str, dict[str, str]],
    run: dict[str, Any] | None = None,
) -> str:
    """The page for validated `results`. `files` are the CSV files of each experiment, named beside what they hold."""
    experiments = [_experiment(name, e, pictures.get(name), list(files[name])) for name, e in results["experiments"].items()]
    everything = [claim for e in experiments for claim in e["claims"]]
    return document(
        __package__,
        "report.html.j2",
        results=results,
        experiments=experiments,
        counts=_counts(everything),
        strong=[(e, claim) for e in experiments for claim in e["claims"] if claim.strong],
        small=results["preset"] in SMALL_PRESETS,
        run=run,
    )


def _experiment(name: str, e: dict[str, Any], picture: Picture | None, csvs: list[str]) -> dict[str, Any]:
    claims = sentences(e["claims"])
    return {
        "name": name,
        "title": e["title"],
        "paragraphs": _paragraphs(e["summary"]),
        "tables": tables(e["cells"]),
        "csvs": csvs,
        "picture": picture,
        "image": "data:image/png;base64," + base64.b64encode(picture.png).decode() if picture else "",
        "claims": claims,
        "counts": _counts(claims),
        "notes": e["notes"],
        "settings": e["settings"],
    }


def _counts(claims: list[Any]) -> dict[str, int]:
    counted = Counter(claim.state for claim in claims)
    return {"held": counted["held"], "failed": counted["failed"], "open": counted["open"], "all": len(claims)}


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]
