"""What `race.py` measured, as a table for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, EAGER, TSRFAST


def table(record: Mapping[str, Any]) -> str:
    """The record for a terminal."""
    lines: list[str] = []
    for loss, result in record.get("race", {}).items():
        s = record["settings"]
        lines += ["", f"{loss}: PGD-{s['steps']}, {s['batch']} images, {s['threads']} threads, medians of {s['rounds']} rounds"]
        lines.append(
            f"  {'':30}{'wall s':>9}{'spread':>8}{'CPU s':>9}{'ms/image':>10}{'GFLOP/s':>9}{'x eager':>9}{'x best':>8}"
            f"{'differ':>9}{'mean loss':>11}{'success':>9}"
        )
        rows, best = result["rows"], result["rows"][result["fastest_float32_pytorch"]]["wall_s"]
        for name, row in sorted(rows.items(), key=lambda item: item[1].get("wall_s", float("inf"))):
            if "wall_s" not in row:
                lines.append(f"  {name:30} {row['absent']}")
                continue
            wall = row["wall_s"]
            lines.append(
                f"  {name:30}{wall:9.4g}{row['spread']:8.1%}{row['cpu_s']:9.4g}{1e3 * wall / s['batch']:10.3g}{row['useful_gflops']:9.4g}"
                f"{rows[EAGER.name]['wall_s'] / wall:9.2f}{best / wall:8.2f}"
                f"{row['pixels_differ']:9.2%}{row['mean_loss']:11.5g}{row['success']:9.1%}"
            )
        lines.append(f"  x: median of eager, or of {result['fastest_float32_pytorch']} ('best'), over this one's.")
        lines.append(f"  FMA peak, as PyTorch's float32 matmul 1024^3 reaches it: {result['matmul_gflops']:.4g} GFLOP/s")
    if "scaling" in record:
        for axis in ("images", "steps"):
            points = record["scaling"][axis]
            lines += ["", f"seconds against {axis}: " + "".join(f"{a:>10}" for a in points["at"])]
            for name in (TSRFAST.name, EAGER.name):
                values = "".join(f"{t:10.4g}" for t in points[name]["wall_s"])
                lines.append(f"  {name:16}{'':{len(axis) + 4}}{values}   cost ~ {axis}^{points[name]['exponent']:.3g}")
    for n, rows in record.get("threads", {"images": {}})["images"].items():
        text = "; ".join(f"{name} {r['one_s']:.4g} s / {r['two_s']:.4g} s = {r['ratio']:.2f}" for name, r in rows.items())
        lines += ["", f"one thread / two, {n} images: {text}"]
    for name, rows in record.get("memory", {"MiB": {}})["MiB"].items():
        lines.append("")
        for n, row in rows.items():
            text = row.get("absent") or f"{row['growth']:.4g} MiB = images {row['images']:.4g} + {row['beyond']:.4g}"
            lines.append(f"peak memory above the input, {name}, {n} images: {text}")
        if name in record["memory"]["law"]:
            law = record["memory"]["law"][name]
            lines.append(f"  = {law['fixed']:.3g} MiB + {law['copies']:.3g} times the images' size")
    lines.append("")
    for goal in record["goals"]:
        lines.append(f"{'reached' if goal['holds'] else 'MISSED '}  {goal['goal']}: {goal['ratio']:.3g} of {goal['at_least']}")
    return "\n".join(lines).strip("\n")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Cost against images and against steps, and how many times longer the others take."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for axis, name in zip(axes, ("images", "steps"), strict=False):
        for contestant in (TSRFAST.name, EAGER.name):
            points = record["scaling"][name]
            (line,) = axis.loglog(points["at"], points[contestant]["wall_s"], "o-", label=contestant)
            last, seconds = points["at"][-1], points[contestant]["wall_s"][-1]
            ideal = [seconds * a / last for a in points["at"]]
            axis.loglog(points["at"], ideal, ":", color=line.get_color(), label=f"{contestant}, if linear")
        axis.set_xlabel(name)
        axis.set_ylabel("seconds")
        axis.set_title(f"oracle PGD: cost against {name}")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend()
    names = [c.name for c in CONTESTANTS if any(c.name in record["race"][loss]["ratios"] for loss in record["race"])]
    height = 0.8 / len(record["race"])
    for k, (loss, result) in enumerate(record["race"].items()):
        at = [(i + k * height, result["ratios"][name]) for i, name in enumerate(names) if name in result["ratios"]]
        bars = axes[2].barh([a for a, _ in at], [r for _, r in at], height, label=loss)
        axes[2].bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes[2].axvline(1, color="black", linewidth=0.8)
    axes[2].set_yticks([i + height * (len(record["race"]) - 1) / 2 for i in range(len(names))], names)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("median time over tsrfast's")
    s = record["settings"]
    axes[2].set_title(f"PGD-{s['steps']}, {s['batch']} images, {s['threads']} threads")
    axes[2].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
