"""What a network is trained to do: a loss of a batch, one file each."""

from tsrfast.training.objectives.at_label import AdversarialLabels
from tsrfast.training.objectives.at_oracle import OracleAdversarial
from tsrfast.training.objectives.at_plane import TwoStarts
from tsrfast.training.objectives.ccat import CCAT, Backtracking
from tsrfast.training.objectives.cross_entropy import TrueLabels
from tsrfast.training.objectives.protocol import Objective
from tsrfast.training.objectives.st_label import TeacherLabels
from tsrfast.training.objectives.st_logit import TeacherLogits

__all__ = [
    "CCAT",
    "AdversarialLabels",
    "Backtracking",
    "Objective",
    "OracleAdversarial",
    "TeacherLabels",
    "TeacherLogits",
    "TrueLabels",
    "TwoStarts",
]
