"""How robust a network is: accuracies with intervals over several attacks, resumable, with checks for hidden gradients and a report."""

from tsrfast.evaluation.evaluate import Evaluation, evaluate
from tsrfast.evaluation.masking import Finding, GradientMaskingWarning, check_gradient_masking
from tsrfast.evaluation.report import load_evaluation, render
from tsrfast.evaluation.share import Share
from tsrfast.evaluation.summary import SummaryRow, summary_row

__all__ = [
    "Evaluation",
    "Finding",
    "GradientMaskingWarning",
    "Share",
    "SummaryRow",
    "check_gradient_masking",
    "evaluate",
    "load_evaluation",
    "render",
    "summary_row",
]
