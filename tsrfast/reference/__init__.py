"""Each operator in plain PyTorch, as short as its formula. For tests, benchmarks, and readers."""

from tsrfast.reference.chain import chain_forward, chain_gradient, chain_pgd
from tsrfast.reference.chain_correlation import chain_correlation
from tsrfast.reference.channel_correlation import channel_correlation, merge
from tsrfast.reference.hyperplane_projection import hyperplane_projection
from tsrfast.reference.pgd_step import pgd_step
from tsrfast.reference.philox_uniform import philox_uniform
from tsrfast.reference.relu_gate import relu_gate, relu_gate_backward

__all__ = [
    "chain_correlation",
    "chain_forward",
    "chain_gradient",
    "chain_pgd",
    "channel_correlation",
    "hyperplane_projection",
    "merge",
    "pgd_step",
    "philox_uniform",
    "relu_gate",
    "relu_gate_backward",
]
