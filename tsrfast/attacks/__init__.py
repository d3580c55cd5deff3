"""Adversarial attacks on any `torch.nn.Module`: a choice of threat, loss and start for each attack, and one loop (`loop.py`) that runs
either in PyTorch (`eager.py`) or in native code on compiled networks (`native.py`)."""

from tsrfast.attacks.apgd import APGD, APGDTargeted
from tsrfast.attacks.attack import Attack, AttackResult
from tsrfast.attacks.autoattack import AutoAttack
from tsrfast.attacks.carlini_wagner import CW, CWLinf
from tsrfast.attacks.cascade import CascadeResult, Progress, Stage, run_cascade
from tsrfast.attacks.deepfool import DeepFool
from tsrfast.attacks.direction import Diversity, Draw, Smoothing
from tsrfast.attacks.ead import EAD
from tsrfast.attacks.fab import FAB, FABTargeted
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
from tsrfast.attacks.momentum import MIM
from tsrfast.attacks.native import Route
from tsrfast.attacks.pgd import PGD
from tsrfast.attacks.skip_gradient import skip_gradient
from tsrfast.attacks.square import Square
from tsrfast.attacks.threat import Threat
from tsrfast.attacks.transfer import Transfer, TransferMatrix, transfer_matrix

__all__ = [
    "APGD",
    "CW",
    "DLR",
    "EAD",
    "FAB",
    "FGSM",
    "MIM",
    "PGD",
    "APGDTargeted",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CWLinf",
    "CascadeResult",
    "CrossEntropy",
    "DeepFool",
    "Diversity",
    "Draw",
    "FABTargeted",
    "Loss",
    "Margin",
    "OracleCrossEntropy",
    "OracleKL",
    "OracleL2",
    "OracleMargin",
    "OracleMaxDifference",
    "Progress",
    "Route",
    "Smoothing",
    "Square",
    "Stage",
    "StepState",
    "TargetedDLR",
    "Threat",
    "Transfer",
    "TransferMatrix",
    "run_cascade",
    "skip_gradient",
    "transfer_matrix",
]
