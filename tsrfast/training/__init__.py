"""Training: one loop, learning-rate schedules, and objectives."""

from tsrfast.training.objectives import (
    CCAT,
    AdversarialLabels,
    Backtracking,
    Objective,
    OracleAdversarial,
    TeacherLabels,
    TeacherLogits,
    TrueLabels,
    TwoStarts,
)
from tsrfast.training.ranks import ALONE, Ranks
from tsrfast.training.robust_features import robust_features
from tsrfast.training.schedule import Constant, Cosine, Piecewise, Schedule, parse_schedule
from tsrfast.training.substitute import SubstituteResult, train_substitute
from tsrfast.training.trainer import TrainResult, train

__all__ = [
    "ALONE",
    "CCAT",
    "AdversarialLabels",
    "Backtracking",
    "Constant",
    "Cosine",
    "Objective",
    "OracleAdversarial",
    "Piecewise",
    "Ranks",
    "Schedule",
    "SubstituteResult",
    "TeacherLabels",
    "TeacherLogits",
    "TrainResult",
    "TrueLabels",
    "TwoStarts",
    "parse_schedule",
    "robust_features",
    "train",
    "train_substitute",
]
