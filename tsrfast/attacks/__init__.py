"""Adversarial attacks on any `torch.nn.Module`: a choice of threat, loss and start for each attack, and one loop (`loop.py`) that runs
either in PyTorch (`eager.py`) or in native code on compiled networks (`native.py`)."""

from tsrfast.attacks.attack import Attack, AttackResult
from tsrfast.attacks.fgsm import FGSM
from tsrfast.attacks.loop import StepState
from tsrfast.attacks.losses import (
    CrossEntropy,
    Loss,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
)
from tsrfast.attacks.native import Route
from tsrfast.attacks.pgd import PGD
from tsrfast.attacks.threat import Threat

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "CrossEntropy",
    "Loss",
    "Margin",
    "OracleCrossEntropy",
    "OracleKL",
    "OracleL2",
    "OracleMargin",
    "OracleMaxDifference",
    "Route",
    "StepState",
    "Threat",
]
