"""foolbox's attacks, by their names there."""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import not_covered
from tsrfast.compat.foolbox.attacks.base import (
    Attack,
    FixedEpsilonAttack,
    MinimizationAttack,
)
from tsrfast.compat.foolbox.attacks.gradient import (
    L1AdamBasicIterativeAttack,
    L1AdamProjectedGradientDescentAttack,
    L1BasicIterativeAttack,
    L1FastGradientAttack,
    L1MomentumIterativeFastGradientMethod,
    L1ProjectedGradientDescentAttack,
    L2AdamBasicIterativeAttack,
    L2AdamProjectedGradientDescentAttack,
    L2BasicIterativeAttack,
    L2FastGradientAttack,
    L2MomentumIterativeFastGradientMethod,
    L2ProjectedGradientDescentAttack,
    LinfAdamBasicIterativeAttack,
    LinfAdamProjectedGradientDescentAttack,
    LinfBasicIterativeAttack,
    LinfFastGradientAttack,
    LinfMomentumIterativeFastGradientMethod,
    LinfProjectedGradientDescentAttack,
)
from tsrfast.compat.foolbox.attacks.minimization import EADAttack, L2CarliniWagnerAttack, L2DeepFoolAttack

FGM = L2FastGradientAttack
FGSM = LinfFastGradientAttack
L1PGD = L1ProjectedGradientDescentAttack
L2PGD = L2ProjectedGradientDescentAttack
LinfPGD = LinfProjectedGradientDescentAttack
PGD = LinfPGD
MIFGSM = LinfMomentumIterativeFastGradientMethod
L1AdamPGD = L1AdamProjectedGradientDescentAttack
L2AdamPGD = L2AdamProjectedGradientDescentAttack
LinfAdamPGD = LinfAdamProjectedGradientDescentAttack
AdamPGD = LinfAdamPGD

__all__ = [
    "FGM",
    "FGSM",
    "L1PGD",
    "L2PGD",
    "MIFGSM",
    "PGD",
    "AdamPGD",
    "Attack",
    "EADAttack",
    "FixedEpsilonAttack",
    "L1AdamBasicIterativeAttack",
    "L1AdamPGD",
    "L1AdamProjectedGradientDescentAttack",
    "L1BasicIterativeAttack",
    "L1FastGradientAttack",
    "L1MomentumIterativeFastGradientMethod",
    "L1ProjectedGradientDescentAttack",
    "L2AdamBasicIterativeAttack",
    "L2AdamPGD",
    "L2AdamProjectedGradientDescentAttack",
    "L2BasicIterativeAttack",
    "L2CarliniWagnerAttack",
    "L2DeepFoolAttack",
    "L2FastGradientAttack",
    "L2MomentumIterativeFastGradientMethod",
    "L2ProjectedGradientDescentAttack",
    "LinfAdamBasicIterativeAttack",
    "LinfAdamPGD",
    "LinfAdamProjectedGradientDescentAttack",
    "LinfBasicIterativeAttack",
    "LinfFastGradientAttack",
    "LinfMomentumIterativeFastGradientMethod",
    "LinfPGD",
    "LinfProjectedGradientDescentAttack",
    "MinimizationAttack",
]

# What is nearest here -> what foolbox has besides.
_MISSING = {
    "LinfPGD": (
        "GenAttack", "L2AdditiveGaussianNoiseAttack", "L2AdditiveUniformNoiseAttack", "L2ClippingAwareAdditiveGaussianNoiseAttack",
        "L2ClippingAwareAdditiveUniformNoiseAttack", "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack",
        "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack", "L2ContrastReductionAttack", "L2RepeatedAdditiveGaussianNoiseAttack",
        "L2RepeatedAdditiveUniformNoiseAttack", "LinfAdditiveUniformNoiseAttack", "LinfRepeatedAdditiveUniformNoiseAttack",
        "SpatialAttack", "VirtualAdversarialAttack",
    ),
    "EADAttack": ("L0BrendelBethgeAttack", "L0FMNAttack", "L1BrendelBethgeAttack", "L1FMNAttack", "PointwiseAttack",
        "SaltAndPepperNoiseAttack", "SparseL1DescentAttack"),
    "tsrfast.attacks.APGD": ("LInfFMNAttack", "LinfDeepFoolAttack", "LinfinityBrendelBethgeAttack"),
    "tsrfast.attacks.Square": ("BoundaryAttack", "DatasetAttack", "HopSkipJumpAttack"),
    "L2CarliniWagnerAttack": (
        "BinarizationRefinementAttack", "BinarySearchContrastReductionAttack", "DDNAttack", "GaussianBlurAttack",
        "InversionAttack", "L2BrendelBethgeAttack", "L2FMNAttack", "LinearSearchBlendedUniformNoiseAttack",
        "LinearSearchContrastReductionAttack", "NewtonFoolAttack",
    ),
}  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    for nearest, originals in _MISSING.items():
        if name in originals:
            raise not_covered(
                "foolbox",
                name,
                [n for n in __all__ if n not in ("Attack", "FixedEpsilonAttack", "MinimizationAttack")],
                nearest,
            )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
