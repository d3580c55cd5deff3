"""ReLU with gate bits, and gating a vector back, on a 64-channel CIFAR layer: plain PyTorch with bits (`tsrfast.reference`)
and with a byte a unit (which takes eight times the memory for gates), and ours."""

from __future__ import annotations

import pytest
import torch

from tsrfast import ops, reference

SIZES = {"1-float32": (1, torch.float32), "128-float32": (128, torch.float32), "128-bfloat16": (128, torch.bfloat16)}
SHAPE = (64, 30, 30)


class Bytes:
    """The same with masks of bytes: what one would write if memory did not matter."""

    @staticmethod
    def relu_gate(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return z.relu(), z > 0

    @staticmethod
    def relu_gate_backward(v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return v * gate


IMPLS = pytest.mark.parametrize("impl", [reference, Bytes, ops], ids=["torch", "torchbytes", "tsrfast"])


def activations(size: str, device: torch.device) -> torch.Tensor:
    n, dtype = SIZES[size]
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def moved(z: torch.Tensor) -> int:
    """A value in, a value out, a bit."""
    return 2 * z.numel() * z.element_size() + z.numel() // 8


@pytest.mark.parametrize("size", SIZES)
@IMPLS
def test_relu_gate(measure, impl, size, device):
    z = activations(size, device)
    for got, want in zip(ops.relu_gate(z), reference.relu_gate(z), strict=True):
        assert torch.equal(got, want)
    n, dtype = size.split("-")
    measure(f"relu_gate {device} forward {n}x64x30x30 {dtype}", lambda: impl.relu_gate(z), moved(z))


@pytest.mark.parametrize("size", SIZES)
@IMPLS
def test_relu_gate_backward(measure, impl, size, device):
    z = activations(size, device)
    gate = ops.relu_gate(z)[1]
    assert torch.equal(ops.relu_gate_backward(z, gate), reference.relu_gate_backward(z, gate))
    if impl is Bytes:
        gate = z > 0
    n, dtype = size.split("-")
    measure(f"relu_gate {device} backward {n}x64x30x30 {dtype}", lambda: impl.relu_gate_backward(z, gate), moved(z))
