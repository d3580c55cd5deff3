"""The HTML page: what the template is given. The template itself is `report.html.j2` beside this file."""

from __future__ import annotations

import base64
import json
from collections import Counter
from importlib import resources
from typing import Any

from tsrfast.suite.report import numerals
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
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["value"] = _value
    environment.filters["duration"] = numerals.duration
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    experiments = [_experiment(name, e, pictures.get(name), list(files[name])) for name, e in results["experiments"].items()]
    everything = [claim for e in experiments for claim in e["claims"]]
    return template.render(
        results=results,
        experiments=experiments,
        counts=_counts(everything),
        strong=[(e, claim) for e in experiments for claim in e["claims"] if claim.strong],
        small=results["preset"] in SMALL_PRESETS,
        run=None if run is None else _run(run),
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


def _run(run: dict[str, Any]) -> dict[str, Any]:
    known = {"started", "seconds", "stages", "machine", "command"}
    command = run.get("command")
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "started": run.get("started"),
        "seconds": run.get("seconds"),
        "machine": run.get("machine") or {},
        "stages": run.get("stages") or [],
        "rest": {key: value for key, value in run.items() if key not in known},
    }


def _counts(claims: list[Any]) -> dict[str, int]:
    counted = Counter(claim.state for claim in claims)
    return {"held": counted["held"], "failed": counted["failed"], "open": counted["open"], "all": len(claims)}


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _value(value: Any) -> str:
    """A setting as text: lists and numbers as JSON writes them, text as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value):
        return ", ".join(_value(v) for v in value)
    return json.dumps(value, ensure_ascii=False)
