"""Correlation of the paper's student and teacher straight from images: PyTorch's forward passes, then `channel_correlation`; and ours.

On a GPU ours is float16, which has a fused kernel for these networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tsrfast
from tsrfast import ops
from tsrfast.nets import ConvReLU
from tsrfast.ops.channel_correlation import CorrelationState

LAYERS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def nets() -> tuple[ConvReLU, ConvReLU]:
    student, teacher = ConvReLU((50, 35, 35, 22), seed=1), ConvReLU((45, 32, 32, 20), seed=2)
    return student.eval().requires_grad_(False), teacher.eval().requires_grad_(False)


def maps(net: ConvReLU, x: Tensor) -> list[Tensor]:
    """In PyTorch itself: `ConvReLU.activations` would take the compiled chain."""
    out, h = [], x
    for conv in net.convs:
        out.append(h := torch.relu(conv(h)))
    return out


def correlation(state: CorrelationState) -> Tensor:
    """0 for nodes that never fire."""
    return (state.cross / (state.m2_student[:, None] * state.m2_teacher).sqrt()).nan_to_num()


@pytest.mark.parametrize("n", [16, 256])
@pytest.mark.parametrize("impl", ["torch", "tsrfast"])
def test_chain_correlation(measure, benchmark, nets, impl, n, device):
    n = n if device.type == "cpu" else 64 * n
    student, teacher = (net.to(device) for net in nets)
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    chains = [(c.plan, c.packed) for c in map(tsrfast.compile, (student, teacher))]
    precision = "float32" if device.type == "cpu" else "float16"

    def run(impl: str) -> list[CorrelationState]:
        if impl == "torch":
            return [ops.channel_correlation(s, t) for s, t in zip(maps(student, x), maps(teacher, x), strict=True)]
        return ops.chain_correlation(x, *chains, LAYERS, LAYERS, precision=precision)

    # float16 rounds activations and weights to 11 bits.
    allowed = 1e-5 if device.type == "cpu" else 2e-3
    for got, want in zip(run("tsrfast"), run("torch"), strict=True):
        torch.testing.assert_close(correlation(got), correlation(want), rtol=0, atol=allowed)
    measure(f"chain_correlation {device} {precision} {n}x3x32x32", lambda: run(impl))
    if benchmark.stats:
        products = sum(
            m.weight.numel() * s * s for net in (student, teacher) for m, s in zip(net.convs, (30, 28, 26, 24), strict=True)
        )
        products += sum(
            a.out_channels * b.out_channels * s * s
            for a, b, s in zip(student.convs, teacher.convs, (30, 28, 26, 24), strict=True)
        )
        benchmark.extra_info["GFLOP/s"] = round(2e-9 * n * products / benchmark.stats["min"], 1)
