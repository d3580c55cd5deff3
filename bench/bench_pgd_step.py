"""One projected step on CIFAR images: plain PyTorch (`tsrfast.reference`, which counts NaN entries too), and ours."""

from __future__ import annotations

import pytest
import torch

from tsrfast import ops, reference

BALLS = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.1), "l1": (12.0, 1.0)}  # eps, step
SIZES = {"1-float32": (1, torch.float32), "128-float32": (128, torch.float32), "128-bfloat16": (128, torch.bfloat16)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("impl", [reference.pgd_step, ops.pgd_step], ids=["torch", "tsrfast"])
def test_pgd_step(measure, impl, norm, size, device):
    n, dtype = SIZES[size]
    eps, step = BALLS[norm]
    r = torch.Generator().manual_seed(0)
    x0, noise, g = torch.rand(n, 3, 32, 32, generator=r), *(torch.randn(n, 3, 32, 32, generator=r) for _ in range(2))
    x, x0, g = ((t.to(device, dtype)) for t in ((x0 + 0.01 * noise).clamp(0, 1), x0, g))

    exact = reference.pgd_step(x.double(), x0.double(), g.double(), norm=norm, eps=eps, step_size=step)[0]
    got = ops.pgd_step(x, x0, g, norm=norm, eps=eps, step_size=step)[0]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps)

    measure(
        f"pgd_step {device} {norm} {n}x3x32x32 {size.split('-')[1]}",
        lambda: impl(x, x0, g, norm=norm, eps=eps, step_size=step),
        moved=4 * x.numel() * x.element_size(),
    )
