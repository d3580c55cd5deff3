"""Moments of the paper's four layers: plain PyTorch in float32, in float64 (accurate, as ours is), and ours.

Ours on a GPU reads every value once, which is its bound: GB/s stands beside that of a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch

from tsrfast.ops.channel_correlation import channel_correlation
from tsrfast.reference.channel_correlation import CorrelationState
from tsrfast.reference.channel_correlation import channel_correlation as reference

LAYERS = {"conv1": (50, 45, 30), "conv2": (35, 32, 28), "conv3": (35, 32, 26), "conv4": (22, 20, 24)}


def torch64(student: torch.Tensor, teacher: torch.Tensor) -> CorrelationState:
    return reference(student.double(), teacher.double())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("impl", [reference, torch64, channel_correlation], ids=["torch32", "torch64", "tsrfast"])
def test_channel_correlation(measure, benchmark, impl, layer, device):
    cs, ct, side = LAYERS[layer]
    n = 64 if device.type == "cpu" else 2048
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, c, side, side, generator=g).relu().to(device) for c in (cs, ct))
    exact, got = torch64(student, teacher), impl(student, teacher)
    torch.testing.assert_close(got.m2_student, exact.m2_student, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.cross, exact.cross, rtol=0, atol=1e-5 * float(exact.m2_student.max()))

    measure(f"channel_correlation {device} {layer} {n}x{cs}|{ct}x{side}x{side}", lambda: impl(student, teacher))
    if benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = round(2e-9 * cs * ct * float(exact.n) / benchmark.stats["min"], 1)
        benchmark.extra_info["GB/s"] = round(4e-9 * (cs + ct) * float(exact.n) / benchmark.stats["min"], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "copy"])
def test_bytes_of_the_first_layer(measure, benchmark, layout, dtype, device):
    """Each type and layout; "copy" reads half of the same bytes and writes them to the other half: the machine's own rate."""
    cs, ct, side = LAYERS["conv1"]
    n = 64 if device.type == "cpu" else 2048
    memory = torch.contiguous_format if layout == "nchw" else torch.channels_last
    student, teacher = (torch.rand(n, c, side, side, device=device).to(dtype=dtype, memory_format=memory) for c in (cs, ct))
    size = (cs + ct) * n * side * side * dtype.itemsize
    if layout == "copy":
        half = torch.empty(2, size // 2, dtype=torch.uint8, device=device)
        measure(f"copy {device} {size} bytes", lambda: half[0].copy_(half[1]))
    else:
        got = channel_correlation(student, teacher)
        exact = torch64(student[:8], teacher[:8])
        first = channel_correlation(student[:8], teacher[:8])
        torch.testing.assert_close(first.cross, exact.cross, rtol=0, atol=1e-5 * float(exact.m2_student.max()))
        assert got.n == n * side * side
        measure(f"channel_correlation {device} {layout} {dtype} {n}x{cs}|{ct}", lambda: channel_correlation(student, teacher))
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = round(1e-9 * size / benchmark.stats["min"], 1)
