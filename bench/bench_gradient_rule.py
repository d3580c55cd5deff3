"""A and B of the paper's student and teacher, all four layers: a way back through PyTorch for each class, and ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsrfast.nets import ConvReLU
from tsrfast.specialization import GradientRule


def torch32(student: ConvReLU, teacher: ConvReLU, x: Tensor) -> list[tuple[Tensor, ...]]:
    """(A, B, B*, and the mean square of each unit of both) a layer; float32, rows of all layers from one pass a class."""
    rows = []
    for net in (student, teacher):
        logits, hidden = net.features(x.requires_grad_())
        ways = [torch.autograd.grad(logits[:, c].sum(), hidden, retain_graph=True) for c in range(logits.shape[1])]
        rows.append([torch.stack(each, 1) for each in zip(*ways, strict=True)])
    layers = []
    for s, t in zip(*rows, strict=True):
        flat = [v.flatten(0, 1).flatten(2) for v in (s, t)]
        grams = [(flat[i] @ flat[j].mT).sum(0) / len(x) for i, j in ((0, 1), (0, 0), (1, 1))]
        layers.append((*grams, *((v * v).sum(1).mean(0) for v in (s, t))))
    return layers


def ours(student: ConvReLU, teacher: ConvReLU, x: Tensor) -> list[tuple[Tensor, ...]]:
    rule = GradientRule(student, teacher)
    rule.update(x)
    return [(m.a, m.b_student, m.b_teacher, m.units_student, m.units_teacher) for m in rule.compute()]


@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize("impl", [torch32, ours], ids=["torch32", "tsrfast"])
def test_gradient_rule(measure, impl, n, device):
    student, teacher = (
        ConvReLU(widths, seed=seed).eval().requires_grad_(False).to(device)
        for seed, widths in enumerate([(50, 35, 35, 22), (45, 32, 32, 20)])
    )
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    for got, want in zip(impl(student, teacher, x.clone()), torch32(student, teacher, x.clone()), strict=True):
        for g, w in zip(got[:3], want[:3], strict=True):  # a unit near 0 may be open in one and closed in the other
            assert (g.cpu() - w.cpu()).norm() <= 1e-3 * w.cpu().norm()
    measure(f"gradient_rule {device} {n}", lambda: impl(student, teacher, x.clone()))
