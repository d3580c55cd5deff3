"""Adversarial attacks on any `torch.nn.Module`: one loop (`loop.py`), and a choice of threat, loss and start for each attack."""

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
)
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
    "StepState",
    "Threat",
]
