"""Each loss against its formula, and its gradient against finite differences of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tsrfast.attacks import (
    DLR,
    PGD,
    CrossEntropy,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
    TargetedDLR,
)
from tsrfast.attacks.losses import wrong
from tsrfast.errors import InputError


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


def dlr(z, y, t=None):
    """Eqs. 6 and 7 of the paper, for one image."""
    first, _, third, fourth = sorted(z, reverse=True)[:4]
    if t is not None:
        return -(z[y] - z[t]) / (first - (third + fourth) / 2)
    return -(z[y] - max(v for k, v in enumerate(z) if k != y)) / (first - third)


def test_dlr_is_its_formula():
    z, r = torch.randn(40, 6, dtype=torch.float64), torch.Generator().manual_seed(0)
    y, t = (torch.randint(6, (40,), generator=r) for _ in range(2))
    value, answer = DLR()(X, z, y)
    assert answer is y
    torch.testing.assert_close(value.tolist(), [dlr(a.tolist(), k) for a, k in zip(z, y, strict=True)])
    torch.testing.assert_close(DLR()(X, 7 * z - 100, y)[0], value)  # invariant to scale and shift
    value, answer = TargetedDLR(t)(X, z, y)
    assert answer is y
    torch.testing.assert_close(value.tolist(), [dlr(a.tolist(), k, m) for a, k, m in zip(z, y, t, strict=True)])
    assert ((value > 0) == (z.gather(1, t[:, None]) > z.gather(1, y[:, None])).squeeze(1)).all()


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_gradient(targeted):
    r = torch.Generator().manual_seed(0)
    y, t = (torch.randint(10, (5,), generator=r) for _ in range(2))
    loss, model = TargetedDLR(t) if targeted else DLR(), net(0)
    leaf, direction = X.clone().requires_grad_(), torch.randn(X.shape, dtype=X.dtype, generator=r)
    (g,) = torch.autograd.grad(loss(leaf, model(leaf), y)[0].sum(), leaf)
    with torch.no_grad():
        up, down = (loss(v, model(v), y)[0].sum() for v in (X + 1e-6 * direction, X - 1e-6 * direction))
    torch.testing.assert_close((g * direction).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


def test_dlr_drives_where_the_gradient_of_cross_entropy_is_gone():
    model = net(0)
    y = model(X).argmax(1)
    model[-1].weight.data *= 1e5  # softmax is 1 to the last bit
    model[-1].bias.data *= 1e5
    moved = {}
    for loss in (CrossEntropy(), DLR()):
        attack = PGD(norm="l2", eps=0.1, step_size=0.1, steps=1, loss=loss, random_start=False)
        moved[loss.name] = (attack(model, X, y) - X).abs().sum().item()
    assert moved["cross_entropy"] == 0
    assert moved["dlr"] > 0


@pytest.mark.parametrize("early_stop", [False, True])
def test_targets_stay_with_their_images(early_stop):
    """Images that stop, and restarts of the others, keep their own targets: in float64 each image alone gives the same."""
    x = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = net(0)
    y = model(x).argmax(1)
    y[1] = y[1] + 1  # adversarial from the start
    t = (y + torch.arange(8) % 8 + 1) % 10
    kw = {"eps": 0.05, "step_size": 0.01, "steps": 8, "restarts": 2, "early_stop": early_stop, "keep": "best"}
    whole = PGD(loss=TargetedDLR(t), **kw).run(model, x, y)
    assert len(whole.queries.unique()) > 1 or not early_stop
    for i in range(8):
        row = torch.tensor([i])
        alone = PGD(loss=TargetedDLR(t[row]), **kw)(model, x[row], y[row], index=row)
        torch.testing.assert_close(whole.x_adv[row], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DLR()(X, torch.zeros(1, 2), torch.tensor([0])), "loss 'dlr' needs a model of at least 3 classes, got 2"),
        (
            lambda: TargetedDLR(torch.tensor([1]))(X, torch.zeros(1, 3), torch.tensor([0])),
            "loss 'targeted_dlr' needs a model of at least 4 classes, got 3",
        ),
        (lambda: TargetedDLR([1]), r"targets must be int64 of shape \[N\], got list"),
        (lambda: TargetedDLR(torch.ones(2)), r"targets must be int64 of shape \[N\], got torch.float32 of shape \(2,\)"),
        (
            lambda: PGD(loss=TargetedDLR(torch.ones(4).long()))(net(0), X, torch.zeros(5).long()),
            r"targets must be a number or of shape \(5,\)",
        ),
        (lambda: PGD(loss=TargetedDLR(torch.full((5,), 10)))(net(0), X, torch.zeros(5).long()), "targets must be in 0..9"),
    ],
)
def test_dlr_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
