"""The native operators: check, allocate, call. Each is `tsrfast.reference`'s function of the same name, faster."""

from tsrfast.ops.chain import ChainPGD, chain_forward, chain_gradient, chain_pack, chain_pgd
from tsrfast.ops.chain_correlation import chain_correlation
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge
from tsrfast.ops.hyperplane_projection import hyperplane_projection
from tsrfast.ops.pgd_step import pgd_step, pgd_step_
from tsrfast.ops.philox_uniform import philox_uniform
from tsrfast.ops.relu_gate import gated_relu, relu_gate, relu_gate_backward

__all__ = [
    "ChainPGD",
    "CorrelationState",
    "chain_correlation",
    "chain_forward",
    "chain_gradient",
    "chain_pack",
    "chain_pgd",
    "channel_correlation",
    "gated_relu",
    "hyperplane_projection",
    "merge",
    "pgd_step",
    "pgd_step_",
    "philox_uniform",
    "relu_gate",
    "relu_gate_backward",
]
