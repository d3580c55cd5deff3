"""The cells of an experiment as tables, and its claims as sentences: everything is text when it leaves this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tsrfast._page import numerals

ARROW, DASH = " \N{RIGHTWARDS ARROW} ", "\N{EN DASH}"
SIGNS = {">": ">", "<": "<", ">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}


@dataclass(frozen=True)
class Entry:
    """One cell; a text is empty where there is nothing to say. `measured` is empty where nothing was run."""

    measured: str
    std: str
    published: str
    difference: str
    n: str
    unit: str
    mark: str


@dataclass(frozen=True)
class Table:
    """One group of cells: `grid[row][column]` is None where the experiment has no such cell."""

    heading: str
    rows: list[str]
    columns: list[str]
    grid: list[list[Entry | None]]
    unit: str  # of all cells; empty where they differ, then each says its own
    n: str  # the same
    has_published: bool
    has_std: bool
    has_published_std: bool  # makes a cell too wide for one line of published things
    notes: list[tuple[str, str]]  # (mark, text)


def tables(cells: list[dict[str, Any]]) -> list[Table]:
    """One table for each group; groups, rows and columns in the order of their first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell.get("group", "main"), []).append(cell)
    return [_table(name, members) for name, members in groups.items()]


def _table(heading: str, cells: list[dict[str, Any]]) -> Table:
    rows = list(dict.fromkeys(c["row"] for c in cells))
    columns = list(dict.fromkeys(c["column"] for c in cells))
    marks = {text: _mark(i) for i, text in enumerate(dict.fromkeys(c["note"] for c in cells if c.get("note")))}
    units = list(dict.fromkeys(c.get("unit", "") for c in cells))
    sizes = list(dict.fromkeys(c["n"] for c in cells if c["measured"] is not None and c["n"] is not None))
    decimals = {}
    for unit in units:
        values = [c[key] for c in cells if c.get("unit", "") == unit for key in ("measured", "published")]
        decimals[unit] = numerals.decimals((v for v in values if v is not None), unit)
    entries = {
        (c["row"], c["column"]): _entry(c, decimals[c.get("unit", "")], marks, len(units) == 1, len(sizes) <= 1) for c in cells
    }
    return Table(
        heading="Main table" if heading == "main" else heading[:1].upper() + heading[1:],
        rows=rows,
        columns=columns,
        grid=[[entries.get((row, column)) for column in columns] for row in rows],
        unit=units[0] if len(units) == 1 else "",
        n=f"{sizes[0]:,}" if len(sizes) == 1 else "",
        has_published=any(c["published"] is not None for c in cells),
        has_std=any(c["std"] is not None for c in cells),
        has_published_std=any(c.get("published_std") is not None for c in cells),
        notes=[(mark, text) for text, mark in marks.items()],
    )


def _entry(cell: dict[str, Any], decimals: int, marks: dict[str, str], one_unit: bool, one_n: bool) -> Entry:
    measured, published = cell["measured"], cell["published"]
    spread = cell.get("published_std")
    return Entry(
        measured="" if measured is None else numerals.fixed(measured, decimals),
        std="" if cell["std"] is None or measured is None else numerals.fixed(cell["std"], decimals),
        published=""
        if published is None
        else numerals.fixed(published, decimals)
        + ("" if spread is None else f" \N{PLUS-MINUS SIGN} {numerals.fixed(spread, decimals)}"),
        difference="" if measured is None or published is None else numerals.signed(measured - published, decimals),
        n="" if one_n or measured is None or cell["n"] is None else f"{cell['n']:,}",
        unit="" if one_unit else cell.get("unit", ""),
        mark=marks.get(cell.get("note") or "", ""),
    )


def _mark(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else str(i - 25)


_STATES = {True: "held", False: "failed", None: "open"}


@dataclass(frozen=True)
class Sentence:
    """One claim: what it says, the numbers compared, and how it came out (`held`, `failed` or `open`: not run)."""

    text: str
    numbers: str
    state: str
    strong: bool
    source: str
    analysis: str
    seeds: list[tuple[int, str, str]]  # (seed, state, numbers) of each, where it was judged over several


def sentences(claims: list[dict[str, Any]]) -> list[Sentence]:
    """The claims of an experiment, in their order."""
    return [
        Sentence(
            text=c["text"],
            numbers=_comparison(c["left"], c["relation"], c["right"]),
            state=_STATES[c["holds"]],
            strong=bool(c.get("strong")),
            source=c.get("source") or "",
            analysis=c.get("analysis") or "",
            seeds=[
                (s["seed"], _STATES[s["holds"]], _comparison(s["left"], c["relation"], s["right"]))
                for s in c.get("seeds") or []
            ],
        )
        for c in claims
    ]


def _comparison(left: Any, relation: str, right: Any) -> str:
    first, second = _list(left), _list(right)
    texts = numerals.apart([*first, *second])
    a, b = texts[: len(first)], texts[len(first) :]
    if relation == "in" and len(b) == 2:
        return f"{', '.join(a) or DASH} in [{b[0]}, {b[1]}]"
    if relation in SIGNS:
        return f"{', '.join(a) or DASH} {SIGNS[relation]} {', '.join(b) or DASH}"
    return f"{ARROW.join(a) or DASH} ({relation})" if not b else f"{ARROW.join(a)} {relation} {ARROW.join(b)}"


def _list(value: Any) -> list[float]:
    return value if isinstance(value, list) else [] if value is None else [value]
