"""Ten steps of PGD against a small conv net: the textbook loop in PyTorch, `tsrfast.attacks.PGD` in PyTorch with the fused
step, and as it comes (compiled where it can be)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.attacks import PGD, OracleL2

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def net(widths: tuple[int, ...], device: torch.device) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)).to(device).eval()


def textbook(student: nn.Module, teacher: nn.Module, loss: str, x0: Tensor, y: Tensor) -> Tensor:
    x = x0.clone()
    for _ in range(STEPS):
        leaf = x.detach().requires_grad_()
        logits = student(leaf)
        if loss == "oracle_l2":
            value = (logits - teacher(leaf)).square().sum(1).sum()
        else:
            value = F.cross_entropy(logits, y, reduction="sum")
        (g,) = torch.autograd.grad(value, leaf)
        x = torch.clamp(torch.min(torch.max(x + STEP * g.sign(), x0 - EPS), x0 + EPS), 0, 1)
    return x


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize("loss", ["cross_entropy", "oracle_l2"])
@pytest.mark.parametrize("impl", ["torch", "eager", "tsrfast"])
def test_pgd10(measure, impl, loss, n, device):
    torch.manual_seed(0)
    x0, y = torch.rand(n, 3, 32, 32, device=device), torch.randint(10, (n,), device=device)
    teacher, student = net((16, 32), device), net((18, 36), device)
    for model in (teacher, student):
        model(x0)  # the lazy layer takes its shape
        model.requires_grad_(False)
    attack = PGD(
        eps=EPS, step_size=STEP, steps=STEPS, random_start=False, loss=OracleL2(teacher) if loss == "oracle_l2" else loss
    )
    runs = {"torch": lambda: textbook(student, teacher, loss, x0, y), "tsrfast": lambda: attack(student, x0, y)}
    runs["eager"] = lambda: replace(attack, engine="eager")(student, x0, y)
    # Signs of gradients that are zero but for rounding may differ; nothing else may.
    different = (runs["torch"]() - runs[impl]()).abs() > 1e-6
    allowed = 0.1 if device.type == "cuda" else 0 if impl == "eager" else 1e-3  # on CUDA convolutions are rounded to TF32
    assert different.float().mean() <= allowed
    measure(f"pgd10 {device} linf {loss} {n}x3x32x32", runs[impl])
