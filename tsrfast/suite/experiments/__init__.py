"""The paper's tables and figures, a file each: the runs it needs, the cells or curves it fills, and its claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsrfast.suite.experiments import fig2, fig3, fig4, table1, table3
from tsrfast.suite.lab import Lab

EXPERIMENTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "fig2": fig2.run,
    "fig3": fig3.run,
    "fig4": fig4.run,
    "table1": table1.run,
    "table3": table3.run,
}
