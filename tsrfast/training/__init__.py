"""Training: one loop, learning-rate schedules, and objectives."""

from tsrfast.training.objectives import Objective, OracleAdversarial, TeacherLabels, TeacherLogits, TrueLabels
from tsrfast.training.schedule import Constant, Cosine, Piecewise, Schedule, parse_schedule
from tsrfast.training.substitute import SubstituteResult, train_substitute
from tsrfast.training.trainer import TrainResult, train

__all__ = [
    "Constant",
    "Cosine",
    "Objective",
    "OracleAdversarial",
    "Piecewise",
    "Schedule",
    "SubstituteResult",
    "TeacherLabels",
    "TeacherLogits",
    "TrainResult",
    "TrueLabels",
    "parse_schedule",
    "train",
    "train_substitute",
]
