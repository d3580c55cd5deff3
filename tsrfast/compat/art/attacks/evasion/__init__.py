"""ART's evasion attacks, by their names there."""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import not_covered
from tsrfast.compat.art.attacks.evasion.auto_attack import AutoAttack
from tsrfast.compat.art.attacks.evasion.gradient import (
    BasicIterativeMethod,
    FastGradientMethod,
    MomentumIterativeMethod,
    ProjectedGradientDescent,
    ProjectedGradientDescentNumpy,
    ProjectedGradientDescentPyTorch,
)
from tsrfast.compat.art.attacks.evasion.search import (
    AutoProjectedGradientDescent,
    CarliniL2Method,
    DeepFool,
    ElasticNet,
    SquareAttack,
)

__all__ = [
    "AutoAttack",
    "AutoProjectedGradientDescent",
    "BasicIterativeMethod",
    "CarliniL2Method",
    "DeepFool",
    "ElasticNet",
    "FastGradientMethod",
    "MomentumIterativeMethod",
    "ProjectedGradientDescent",
    "ProjectedGradientDescentNumpy",
    "ProjectedGradientDescentPyTorch",
    "SquareAttack",
]

# What is nearest here -> what ART has besides.
_MISSING: dict[str, tuple[str, ...]] = {
    "ProjectedGradientDescent": (
        "AdversarialPatch", "AdversarialPatchNumpy", "AdversarialPatchPyTorch", "AdversarialPatchTensorFlowV2",
        "AdversarialTexturePyTorch", "CarliniWagnerASR", "CompositeAdversarialAttackPyTorch", "DPatch",
        "FeatureAdversariesNumpy", "FeatureAdversariesPyTorch", "FeatureAdversariesTensorFlowV2",
        "GRAPHITEWhiteboxPyTorch", "ImperceptibleASR", "ImperceptibleASRPyTorch", "MalwareGDTensorFlow",
        "OverTheAirFlickeringPyTorch", "OverloadPyTorch", "ProjectedGradientDescentTensorFlowV2", "RobustDPatch",
        "SNAL", "ShadowAttack", "SpatialTransformation", "TargetedUniversalPerturbation", "UniversalPerturbation",
        "VirtualAdversarialMethod", "Wasserstein",
    ),
    "AutoProjectedGradientDescent": (
        "AutoConjugateGradient", "RescalingAutoConjugateGradient",
    ),
    "CarliniL2Method": (
        "BrendelBethgeAttack", "CarliniL0Method", "CarliniLInfMethod", "FrameSaliencyAttack",
        "HighConfidenceLowUncertainty", "NewtonFool", "SaliencyMapMethod",
    ),
    "SquareAttack": (
        "BoundaryAttack", "DecisionTreeAttack", "GRAPHITEBlackbox", "GeoDA", "HopSkipJump", "LaserAttack", "LowProFool",
        "PixelAttack", "SignOPTAttack", "SimBA", "ThresholdAttack", "ZooAttack",
    ),
}  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    for nearest, originals in _MISSING.items():
        if name in originals:
            raise not_covered("art", name, __all__, nearest)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
