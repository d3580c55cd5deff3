"""Records of `gpu_check.sh` as tables: predictions beside measurements, goals held or failed; and the README's part on them.

    python bench/gpu_report.py RECORD.json      # a record, readable
    python bench/gpu_report.py --readme         # rewrites the README between its two marks, from the records in bench/records

`gpu_predictions.json` says what was predicted, before it was measured, and what has to be reached. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RECORDS, README = BENCH / "records", BENCH.parent / "README.md"
BEGIN, END = "<!-- made by: python bench/gpu_report.py --readme -->\n", "<!-- end of what is made -->\n"
UNMEASURED = "No GPU has been measured yet: `bench/records/` holds no record of a complete `bench/gpu_check.sh`, so no figure is stated here.\n"
KIND = "gpu_check"


def predictions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCH / "gpu_predictions.json").read_text())
    return found


def lookup(record: Any, path: str) -> float | None:
    """The number at a/b/c in dictionaries and lists; None where there is none."""
    for key in path.split("/"):
        if isinstance(record, list) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        elif isinstance(record, dict) and key in record:
            record = record[key]
        else:
            return None
    return float(record) if isinstance(record, (int, float)) else None


def figures(record: Mapping[str, Any], predicted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure: {"what", "unit", "measured"} and, on the GPU that they are for, "predicted", "range", "goal" and "holds".

    ``holds`` is None without a goal; a goal of which nothing was measured does not hold.
    """
    here = predicted["gpu"] in (record.get("machine", {}).get("gpu") or "")
    rows = []
    for f in predicted["figures"]:
        value, over = lookup(record, f["value"]), lookup(record, f["over"]) if "over" in f else 1.0
        measured = value / over if value is not None and over else None
        row: dict[str, Any] = {
            "what": f["what"],
            "unit": f["unit"],
            "measured": None if measured is None else float(f"{measured:.4g}"),
        }
        if here:
            row |= {key: f[key] for key in ("predicted", "range") if key in f}
            row |= goal(f, measured)
        rows.append(row)
    return rows


def goal(figure: Mapping[str, Any], measured: float | None) -> dict[str, Any]:
    for key, sign in (("at_most", 1), ("at_least", -1)):
        if key in figure:
            holds = measured is not None and sign * measured <= sign * figure[key]
            return {"goal": f"{key.replace('_', ' ')} {figure[key]:g}", "holds": holds}
    return {"goal": None, "holds": None}


# --- text -------------------------------------------------------------------------------------------------------------------


def shown(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    if unit == "criterion":
        return "yes" if value else "no"
    return f"{value:.1%}" if unit == "share" else f"{value:.4g}"


def verdict(row: Mapping[str, Any]) -> str:
    if row.get("holds") is not None:
        return "held" if row["holds"] else "not measured" if row["measured"] is None else "MISSED"
    low, high = row.get("range") or (None, None)
    if low is None or row["measured"] is None:
        return ""
    return "as predicted" if low <= row["measured"] <= high else "not as predicted"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def races(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, rows) of every comparison in a record."""
    for part in ("race", "kernels"):
        for name, sizes in record.get(part, {}).items():
            for size, found in sizes.items() if isinstance(sizes, dict) else ():
                if isinstance(found, dict) and "rows" in found:
                    yield f"{name}, {size}", found
                for sub, inner in found.items() if isinstance(found, dict) else ():
                    if isinstance(inner, dict) and "rows" in inner:
                        yield f"{name}, {size}, {sub}", inner


def race_table(found: Mapping[str, Any], ceilings: Mapping[str, Any]) -> list[str]:
    """Times with their spread, the ratio to ours, rates, and their share of the ceilings of the same run."""
    rows = [["", "median ms", "min", "max", "iqr", "ratio", "TFLOP/s", "GB/s", "of ceiling"]]
    for name, row in found["rows"].items():
        if "median_s" not in row:
            rows.append([f"{name}: {row.get('absent', 'not timed')}", *[""] * 8])
            continue
        flops, bandwidth = row.get("useful_tflop_per_s"), row.get("gb_per_s")
        rate, ceiling = (flops, "matmul_f16_tflop_per_s") if flops else (bandwidth, "copy_gb_per_s")
        share = rate / ceilings[ceiling] if rate and ceilings.get(ceiling) else None
        times = [f"{1e3 * row[key]:.4g}" for key in ("median_s", "min_s", "max_s", "iqr_s")]
        ratio = "1" if name == found.get("ours") else shown(found.get("ratios", {}).get(name))
        rows.append([f"{name} ({row['rounds']} rounds)", *times, ratio, shown(flops), shown(bandwidth), shown(share, "share")])
    return aligned(rows)


def table(record: Mapping[str, Any], predicted: Mapping[str, Any]) -> str:
    """All of a record for a reader at a terminal."""
    machine, software = record.get("machine", {}), record.get("software", {})
    about = (
        machine.get("gpu"),
        f"driver {machine.get('driver')}",
        f"torch {software.get('torch')}",
        f"commit {software.get('commit')}",
    )
    lines = [", ".join(str(a) for a in about), ""]
    parts = [["part", "outcome", "seconds", "limit", ""]]
    for name, part in record["parts"].items():
        parts.append([name, part["outcome"], f"{part['seconds']:.0f}", f"{part['limit_s']:.0f}", part.get("note", "")])
    lines += aligned(parts)
    for title, found in races(record):
        lines += ["", title, *race_table(found, record.get("ceilings", {}))]
    rows = [["figure", "measured", "predicted", "range", "goal", ""]]
    for row in figures(record, predicted):
        span = " to ".join(shown(v, row["unit"]) for v in row["range"]) if row.get("range") else ""
        what = f"{row['what']} [{row['unit']}]"
        cells = [
            shown(row["measured"], row["unit"]),
            shown(row.get("predicted"), row["unit"]),
            span,
            row.get("goal") or "",
            verdict(row),
        ]
        rows.append([what, *cells])
    return "\n".join([*lines, "", *aligned(rows)])


# --- the README -------------------------------------------------------------------------------------------------------------


def complete(path: Path) -> dict[str, Any] | None:
    """The record, if it is one of a whole check."""
    record = json.loads(path.read_text())
    whole = isinstance(record, dict) and record.get("kind") == KIND and record.get("complete")
    return record if whole else None


def newest(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The last complete record of each GPU."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = complete(path)
        if record is None:
            continue
        gpu = record["machine"]["gpu"]
        if gpu not in found or record["date"] >= found[gpu][1]["date"]:
            found[gpu] = (path, record)
    return [found[gpu] for gpu in sorted(found)]


def block(records: Sequence[tuple[Path, Mapping[str, Any]]], predicted: Mapping[str, Any]) -> str:
    """What stands between the marks."""
    if not records:
        return UNMEASURED
    parts = []
    for path, record in records:
        failed = [name for name, part in record["parts"].items() if part["outcome"] != "passed"]
        missing = f" Not passed: {', '.join(failed)}." if failed else ""
        head = f"{record['machine']['gpu']}, {record['date']} ([record](bench/records/{path.name})).{missing}"
        rows = ["| | measured | predicted | goal | |", "|---|---|---|---|---|"]
        for row in figures(record, predicted):
            if row["measured"] is None and row.get("holds") is None:
                continue
            unit = "" if row["unit"] in ("share", "criterion") else f" {row['unit']}"
            cells = [
                f"{shown(row['measured'], row['unit'])}{unit}",
                shown(row.get("predicted"), row["unit"]),
                row.get("goal") or "",
            ]
            rows.append(f"| {row['what']} | {' | '.join(cells)} | {verdict(row)} |")
        parts.append("\n".join([head, "", *rows]) + "\n")
    return "\n".join(parts)


def with_block(readme: str, made: str) -> str:
    """The README with another part between the marks.

    Raises:
        ValueError: it does not have each mark once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError("the README must have both marks once, the first one first")
    return readme[: readme.index(BEGIN) + len(BEGIN)] + made + readme[readme.index(END) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    if arguments.readme:
        README.write_text(with_block(README.read_text(), block(newest(RECORDS), predictions())))
    elif arguments.record:
        print(table(json.loads(arguments.record.read_text()), predictions()))
    else:
        parser.error("a record, or --readme")
    return 0


if __name__ == "__main__":
    sys.exit(main())
