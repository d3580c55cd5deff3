"""`report.html` from `evaluation.json` alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tsrfast._files import atomic_write
from tsrfast._page import document, numerals
from tsrfast._page.checks import array, field, flag, integer, is_a, mapping, number, read_json, text
from tsrfast.errors import InputError
from tsrfast.evaluation.record import SCHEMA
from tsrfast.evaluation.summary import HEADER, summary_row


def load_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an `evaluation.json`.

    Raises:
        InputError: there is no such file, it is not JSON, or it does not follow schema 1; the message names the place.
        EnvironmentFault: the file cannot be read.
    """
    record = read_json(Path(path), "load_evaluation")
    validate(record, str(path))
    return record  # type: ignore[no-any-return]


def render(record: dict[str, Any], folder: str | os.PathLike[str], *, run: dict[str, Any] | None = None) -> Path:
    """Write `report.html` into `folder` and return its path; the same record gives the same bytes.

    Args:
        record: what `load_evaluation` returns.
        folder: made where it does not exist.
        run: what `run.json` holds: times and machine, shown in a section of its own at the end.

    Raises:
        InputError: `record` does not follow the schema; nothing has been written.
        EnvironmentFault: `folder` cannot be written.
    """
    validate(record)
    page = document(
        __package__,
        "report.html.j2",
        run=run,
        e=record,
        share=_share,
        threat=_threat,
        distance=lambda d: "–" if d is None else numerals.apart([d])[0],
        markdown=f"{HEADER}\n{summary_row(record).markdown()}",
    )
    target = Path(folder) / "report.html"
    atomic_write(target, page)
    return target


def validate(record: Any, where: str = "evaluation") -> None:
    """Check against schema 1.

    Raises:
        InputError: the first thing that does not fit, by its place in the file.
    """
    is_a(record, dict, "an object", where)
    if record.get("schema") != SCHEMA:
        raise InputError(f"tsrfast.report: {where}: schema must be {SCHEMA}, got {record.get('schema')!r:.40}")
    for key in ("tsrfast", "device"):
        field(record, key, where, text)
    field(record, "individually", where, flag)
    model = field(record, "model", where, mapping)
    field(model, "name", f"{where}: model", text, null=True)
    for key, check in (("architecture", text), ("parameters", integer), ("sha256", text)):
        field(model, key, f"{where}: model", check)
    data = field(record, "data", where, mapping)
    for key, check in (("name", text), ("images", integer), ("shape", array), ("sha256", mapping)):
        field(data, key, f"{where}: data", check)
    field(record, "threat", where, _check_threat, null=True)
    for key in ("clean", "robust"):
        field(record, key, where, _check_share)
    for i, attack in enumerate(field(record, "attacks", where, array)):
        _check_attack(attack, f"{where}: attacks[{i}]")
    for i, finding in enumerate(field(record, "masking", where, array, null=True) or []):
        is_a(finding, dict, "an object", f"{where}: masking[{i}]")
        for key in ("check", "text", "reason", "source"):
            field(finding, key, f"{where}: masking[{i}]", text)
        field(finding, "numbers", f"{where}: masking[{i}]", mapping)
    for i, note in enumerate(field(record, "notes", where, array)):
        text(note, f"{where}: notes[{i}]")


def _check_attack(attack: Any, where: str) -> None:
    is_a(attack, dict, "an object", where)
    for key in ("name", "attack", "path"):
        field(attack, key, where, text)
    for key in ("attacked", "fallen", "queries", "refuted", "bad_gradients"):
        field(attack, key, where, integer)
    field(attack, "threat", where, _check_threat)
    field(attack, "robust", where, _check_share)
    field(attack, "median_distance", where, number, null=True)
    field(attack, "settings", where, mapping)


def _check_threat(threat: Any, where: str) -> None:
    is_a(threat, dict, "an object", where)
    field(threat, "norm", where, text)
    eps = threat.get("eps")
    for value in eps if isinstance(eps, list) and len(eps) == 2 else [] if eps is None else [eps]:
        number(value, f"{where}.eps")


def _check_share(share: Any, where: str) -> None:
    is_a(share, dict, "an object", where)
    for key in ("count", "of"):
        field(share, key, where, integer)
    for key in ("value", "low", "high"):
        field(share, key, where, number)


def _share(share: dict[str, Any]) -> str:
    """58.20 % (53.83 to 62.44): the interval behind the value."""
    return f"{100 * share['value']:.2f} % ({100 * share['low']:.2f} to {100 * share['high']:.2f})"


def _threat(threat: dict[str, Any]) -> str:
    eps = threat["eps"]
    if eps is None:
        return f"{threat['norm']}, any distance"
    if isinstance(eps, list):
        return f"{threat['norm']}, {numerals.radius(eps[0])} to {numerals.radius(eps[1])}"
    return f"{threat['norm']}, {numerals.radius(eps)}"
