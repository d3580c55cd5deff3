"""An evaluation in one row, in the manner of RobustBench's leaderboards (Croce et al. 2021), without a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsrfast._page.numerals import radius

if TYPE_CHECKING:
    from tsrfast.evaluation.evaluate import Evaluation

HEADER = (
    "| method | architecture | clean accuracy | robust accuracy | threat | images | attacks |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class SummaryRow:
    """Accuracies in [0, 1]; the robust one is the worst case over `attacks`. `norm` and `eps` are None where the attacks' threats differ;
    `eps` alone where any distance is allowed."""

    method: str
    architecture: str
    clean_accuracy: float
    robust_accuracy: float
    norm: str | None
    eps: float | None
    images: int
    attacks: tuple[str, ...]

    def markdown(self) -> str:
        """One line under `HEADER`."""
        threat = "mixed" if self.norm is None else f"{self.norm}, {'any distance' if self.eps is None else radius(self.eps)}"
        cells = [
            self.method,
            self.architecture,
            f"{100 * self.clean_accuracy:.2f} %",
            f"{100 * self.robust_accuracy:.2f} %",
            threat,
            str(self.images),
            ", ".join(self.attacks),
        ]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def summary_row(evaluation: Evaluation | dict[str, Any]) -> SummaryRow:
    """The row of an evaluation, or of what `load_evaluation` read."""
    record = evaluation if isinstance(evaluation, dict) else evaluation.record
    threat = record["threat"] or {"norm": None, "eps": None}
    return SummaryRow(
        record["model"]["name"] or record["model"]["architecture"],
        record["model"]["architecture"],
        record["clean"]["value"],
        record["robust"]["value"],
        threat["norm"],
        threat["eps"],
        record["data"]["images"],
        tuple(a["name"] for a in record["attacks"]),
    )
