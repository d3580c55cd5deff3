"""The paper's tables and figures, a file each: the runs it needs, the cells or curves it fills, and its claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsrfast.errors import unknown
from tsrfast.suite.experiments import (
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    fig9,
    fig10,
    fig11,
    fig12,
    fig14,
    fig15,
    fig16,
    global_,
    table1,
    table2,
    table3,
    table4,
    table5,
)
from tsrfast.suite.lab import Lab

EXPERIMENTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "fig2": fig2.run,
    "fig3": fig3.run,
    "fig4": fig4.run,
    "fig5": fig5.run,
    "fig6": fig6.run,
    "fig7": fig7.run,
    "fig8": fig8.run,
    "fig9": fig9.run,
    "fig10": fig10.run,
    "fig11": fig11.run,
    "fig12": fig12.run,
    "fig14": fig14.run,
    "fig15": fig15.run,
    "fig16": fig16.run,
    "table1": table1.run,
    "table2": table2.run,
    "table3": table3.run,
    "table4": table4.run,
    "table5": table5.run,
    "global": global_.run,  # last: over the students that the others used
}


def chosen(experiments: list[str]) -> list[str]:
    """The names of the experiments to run: `experiments`, or all.

    Raises:
        InputError: unknown experiment.
    """
    for name in experiments:
        if name not in EXPERIMENTS and name != "all":
            raise unknown("experiment", name, [*EXPERIMENTS, "all"])
    return list(EXPERIMENTS) if not experiments or "all" in experiments else experiments
