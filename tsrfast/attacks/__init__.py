"""Adversarial attacks on any `torch.nn.Module`: a choice of threat, loss and start for each attack, and one loop (`loop.py`) that runs
either in PyTorch (`eager.py`) or in native code on compiled networks (`native.py`)."""

from tsrfast.attacks.apgd import APGD, APGDTargeted
from tsrfast.attacks.attack import Attack, AttackResult
from tsrfast.attacks.carlini_wagner import CW
from tsrfast.attacks.deepfool import DeepFool
from tsrfast.attacks.fgsm import FGSM
from tsrfast.attacks.loop import StepState
from tsrfast.attacks.losses import (
    DLR,
    CrossEntropy,
    Loss,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
    TargetedDLR,
)
from tsrfast.attacks.native import Route
from tsrfast.attacks.pgd import PGD
from tsrfast.attacks.square import Square
from tsrfast.attacks.threat import Threat

__all__ = [
    "APGD",
    "CW",
    "DLR",
    "FGSM",
    "PGD",
    "APGDTargeted",
    "Attack",
    "AttackResult",
    "CrossEntropy",
    "DeepFool",
    "Loss",
    "Margin",
    "OracleCrossEntropy",
    "OracleKL",
    "OracleL2",
    "OracleMargin",
    "OracleMaxDifference",
    "Route",
    "Square",
    "StepState",
    "TargetedDLR",
    "Threat",
]
