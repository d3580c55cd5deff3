"""The nearest point of a hyperplane in the box, for CIFAR images: by sorting (`tsrfast.reference`), and ours."""

from __future__ import annotations

import pytest
import torch

from tsrfast import ops, reference


@pytest.mark.parametrize("n", [1, 50, 250])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("impl", [reference.hyperplane_projection, ops.hyperplane_projection], ids=["torch", "tsrfast"])
def test_hyperplane_projection(measure, impl, norm, n, device):
    r = torch.Generator().manual_seed(0)
    t, w, beyond = torch.rand(n, 3, 32, 32, generator=r), torch.randn(n, 3, 32, 32, generator=r), torch.randn(n, generator=r)
    b = (w * t).flatten(1).sum(1) + 8 * beyond
    t, w, b = (a.to(device) for a in (t, w, b))

    exact = reference.hyperplane_projection(t.double(), w.double(), b.double(), norm=norm)
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-7)

    measure(
        f"hyperplane_projection {device} {norm} {n}x3x32x32 float32",
        lambda: impl(t, w, b, norm=norm),
        moved=3 * t.numel() * t.element_size(),
    )
