"""Each loss against its formula, and its gradient against finite differences of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tsrfast.attacks import Margin, OracleCrossEntropy, OracleKL, OracleL2, OracleMargin, OracleMaxDifference
from tsrfast.attacks.losses import wrong


def net(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 10)).double()


X = torch.rand(5, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (OracleCrossEntropy, lambda s, t: F.cross_entropy(s, t.argmax(1), reduction="none")),
        (
            OracleMargin,
            lambda s, t: torch.stack(
                [max(r[k] for k in range(10) if k != c) - r[c] for r, c in zip(s, t.argmax(1), strict=True)]
            ),
        ),
        (OracleKL, lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none").sum(1)),
        (OracleL2, lambda s, t: ((s - t) ** 2).sum(1)),
        (
            OracleMaxDifference,
            lambda s, t: torch.stack([max(abs(a - b) for a, b in zip(p, q, strict=True)) for p, q in zip(s, t, strict=True)]),
        ),
    ],
)
def test_oracle_losses(loss, formula):
    student, teacher, x = net(0), net(1), X
    value, answer = loss(teacher)(x, student(x), None)
    torch.testing.assert_close(value, formula(student(x), teacher(x)))
    # The gradient, through both networks where both count.
    leaf, direction = (
        x.clone().requires_grad_(),
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)),
    )
    (g,) = torch.autograd.grad(loss(teacher)(leaf, student(leaf), None)[0].sum(), leaf)
    with torch.no_grad():
        up, down = (formula(student(v), teacher(v)).sum() for v in (x + 1e-6 * direction, x - 1e-6 * direction))
    torch.testing.assert_close((g * direction).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
    assert torch.equal(wrong(student(x), answer), student(x).argmax(1) != teacher(x).argmax(1))


def test_margin_works_when_all_logits_are_negative():
    logits = torch.tensor([[-5.0, -3.0, -9.0]])
    value, answer = Margin()(torch.empty(0), logits, torch.tensor([1]))
    assert value.item() == -2
    assert not wrong(logits, answer)


def test_of_equal_differences_the_first_has_the_gradient():
    s, t = torch.tensor([[1.0, -3.0, 0.0, 3.0]], requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    value = OracleMaxDifference(nn.Identity()).value(s, t)
    assert value.item() == 3
    ds, dt = torch.autograd.grad(value.sum(), (s, t))
    assert ds.tolist() == [[0, -1, 0, 0]]
    assert dt.tolist() == [[0, 1, 0, 0]]
    equal = OracleMaxDifference(nn.Identity()).value(s, s.detach())
    assert torch.autograd.grad(equal.sum(), s)[0].abs().sum() == 0
