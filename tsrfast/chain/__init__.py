"""Small ReLU networks compiled for native code: `compile` makes a `Chain` of a module, or says why it cannot."""

from tsrfast.chain.chain import Chain, automatic, compile, logits, mostly_wide_linear
from tsrfast.chain.fusing import FusedKernel, fuse, precompile
from tsrfast.chain.gradient import Differentiable

__all__ = [
    "Chain",
    "Differentiable",
    "FusedKernel",
    "automatic",
    "compile",
    "fuse",
    "logits",
    "mostly_wide_linear",
    "precompile",
]
