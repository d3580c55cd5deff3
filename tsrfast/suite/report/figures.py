"""The figure of an experiment: its panels side by side, drawn from the curves in `results.json`."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

DPI = 150
INK, MUTED, RULE = "#22252a", "#666b73", "#d9dce1"
# light to dark within a family, so that a later epoch is a darker line of the same colour
MAPS = {"AT": "OrRd", "ST": "Blues", "ST-logit": "Blues", "ST-label": "Reds", "data": "Greys"}
SPARE_MAPS = ("Greens", "Purples", "YlOrBr", "PuRd", "GnBu")
DASHED = {"ST-label"}
# Scatters of several curves: a colour and a marker each, so that neither alone has to tell them apart. Colours: Okabe and Ito's (without
# their yellow) and three more, distinct to the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#22252A", "#E69F00", "#56B4E9", "#882255", "#7200E4", "#999933")
MARKERS = ("o", "s", "^", "D", "X", "v", "P", "*", "<", "h")
_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,  # a name may hold $
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: the PNG file's bytes, its size in CSS pixels, how many panels a row has, and words for it."""

    png: bytes
    width: int
    height: int
    across: int
    alt: str


def draw(experiment: dict[str, Any]) -> Picture:
    """Draw the curves of an experiment (at least one). The same curves give the same bytes on the same matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for curve in experiment["curves"]:
        panels.setdefault(curve["panel"], []).append(curve)
    across = min(len(panels), 4)
    down = math.ceil(len(panels) / across)
    legend = any(len(curves) > 1 for curves in panels.values())
    width = across * {1: 6.4, 2: 4.7}.get(across, 3.3)
    height = down * (3.6 if across < 3 else 3.0) + (0.5 if legend else 0.0)
    palette = _palette(experiment["curves"])
    headroom = max(len(_annotations(curves)) for curves in panels.values())
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change the file
        matplotlib.rcParams.update(_RC)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(wspace=0.05, hspace=0.08)  # type: ignore[union-attr, call-arg]
        y_labels = {curve.get("y_label") for curve in experiment["curves"]}
        grid = figure.subplots(down, across, squeeze=False, sharey=len(y_labels) == 1)
        named: dict[str, Any] = {}
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.set_axis_off()
                continue
            title = list(panels)[i]
            drawn = _panel(axes, title, panels[title], palette, headroom)
            named |= {k: v for k, v in drawn.items() if k not in named}
            axes.set_ylabel("" if len(y_labels) == 1 and i % across else axes.get_ylabel())
        if legend:
            columns = min(len(named), 6 if across > 1 else 3)
            figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(out.getvalue(), round(width * 88), round(height * 88), across, _alt(experiment["title"], panels))


def _panel(axes: Any, title: str, curves: list[dict[str, Any]], palette: dict[str, str], headroom: int) -> dict[str, Any]:
    """Draw one panel, its title above room for `headroom` annotations; returns the legend's handles by curve name."""
    bars = [c for c in curves if c.get("kind") == "bar"]
    clouds = [c for c in curves if c.get("kind") == "scatter"]
    named = {}
    for curve in curves:
        style = curve.get("style") or {}
        colour = _colour(palette[_family(curve)], style.get("shade", 0.75))
        x, y = curve["x"], [math.nan if v is None else v for v in curve["y"]]
        kind = curve.get("kind", "line")
        if kind == "bar":
            step = min((b - a for a, b in zip(sorted(set(x)), sorted(set(x))[1:], strict=False)), default=1.0)
            wide = 0.8 * step / len(bars)
            shift = (bars.index(curve) - (len(bars) - 1) / 2) * wide
            named[curve["name"]] = axes.bar([v + shift for v in x], y, width=wide, color=colour)
        elif kind == "scatter" and len(clouds) > 1:
            look = looks(clouds)[curve["name"]]
            named[curve["name"]] = axes.scatter(x, y, s=46, **look, alpha=0.9, edgecolors="white", linewidths=0.5)
        elif kind == "scatter":
            named[curve["name"]] = axes.scatter(x, y, s=9, color=colour, alpha=0.35, linewidths=0)
        else:
            dashed = style.get("dash", _family(curve) in DASHED)
            named[curve["name"]] = axes.plot(x, y, color=colour, lw=1.7, ls=(0, (4, 1.6)) if dashed else "-")[0]
        if len(x) == 1 and kind == "line":
            named[curve["name"]].set_marker("o")
    if any(c.get("log_y") for c in curves) and any(v is not None and v > 0 for c in curves for v in c["y"]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    if bars:
        axes.grid(False, axis="x")
    axes.set_xlabel(next((c["x_label"] for c in curves if c.get("x_label")), ""))
    axes.set_ylabel(next((c["y_label"] for c in curves if c.get("y_label")), ""))
    axes.set_title(title, fontsize=10.5, fontweight="bold", pad=6 + 12 * headroom)
    for i, line in enumerate(reversed(_annotations(curves))):  # above the plot, where it cannot cover a point
        axes.annotate(
            line, (0, 1), (0, 6 + 12 * i), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=MUTED
        )
    left, right = axes.get_xlim()
    for curve in curves:
        for mark in curve.get("marks") or []:
            axes.axvline(mark["x"], color=MUTED, lw=0.9, ls=(0, (2, 2)))
            near_right = mark["x"] > left + 0.62 * (right - left)
            axes.annotate(
                mark["text"],
                (mark["x"], 1),
                (-5 if near_right else 5, -10),
                fontsize=8.5,
                color=MUTED,
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if near_right else "left",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
            )
    return named


def looks(clouds: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Colour and marker of each scatter of a panel, by its name, in order of appearance."""
    names = dict.fromkeys(c["name"] for c in clouds)
    return {name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)}


def _annotations(curves: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(c["annotation"] for c in curves if c.get("annotation")))


def _family(curve: dict[str, Any]) -> str:
    return (curve.get("style") or {}).get("family", curve["name"])


def _palette(curves: list[dict[str, Any]]) -> dict[str, str]:
    """The colour map of every family: its own where it has one, else the next spare one, in order of appearance."""
    others = list(dict.fromkeys(f for f in map(_family, curves) if f not in MAPS))
    return MAPS | {family: SPARE_MAPS[i % len(SPARE_MAPS)] for i, family in enumerate(others)}


def _colour(name: str, shade: float) -> Any:
    import matplotlib

    return matplotlib.colormaps[name](0.32 + 0.63 * min(max(shade, 0.0), 1.0))


def _alt(title: str, panels: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    for panel, curves in panels.items():
        axes = f"{curves[0].get('y_label') or 'y'} against {curves[0].get('x_label') or 'x'}"
        parts.append(f"{panel} ({axes}): {', '.join(dict.fromkeys(c['name'] for c in curves))}")
    return f"{title}. {'; '.join(parts)}."
