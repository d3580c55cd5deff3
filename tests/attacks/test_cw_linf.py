"""The linf form of Carlini & Wagner: signed steps on their loss, as in tables of robust accuracy."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import PGD, CWLinf, Margin
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 10, 10)


def net(dtype=torch.float64):
    return ConvReLU((12, 10), image=IMAGE, seed=0).to(dtype).eval()


def batch(n=8, dtype=torch.float64):
    r = torch.Generator().manual_seed(0)
    return torch.rand(n, *IMAGE, generator=r).to(dtype), torch.randint(10, (n,), generator=r)


def textbook(model, x0, y, eps, step, steps, kappa, targeted):
    """As in Madry et al.'s code: -relu(correct - wrong + kappa), the own logit left out by a large number."""
    x = x0.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        z = model(x)
        own = F.one_hot(y, 10).bool()
        correct, other = z[own], (z - 1e4 * own).amax(1)
        loss = -F.relu(other - correct + kappa) if targeted else -F.relu(correct - other + kappa)
        (g,) = torch.autograd.grad(loss.sum(), x)
        x = (x + step * g.sign()).clamp(x0 - eps, x0 + eps).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 0.003, 50.0])
def test_equals_the_textbook(kappa, targeted):
    model, (x, y) = net(), batch()
    y = (model(x).argmax(1) + targeted) % 10
    attack = CWLinf(eps=0.05, step_size=0.005, steps=12, kappa=kappa, targeted=targeted, random_start=False)
    got = attack.run(model, x, y)
    torch.testing.assert_close(got.x_adv, textbook(model, x, y, 0.05, 0.005, 12, kappa, targeted), rtol=0, atol=1e-12)
    if kappa < 50:  # what is confident enough is left alone
        assert (got.loss == (-kappa if targeted else kappa)).any()
        free = dataclasses.replace(attack, kappa=math.inf).run(model, x, y)
        assert (free.loss - got.loss).abs().max() > 0
        assert (got.x_adv - x).abs().mean() < (free.x_adv - x).abs().mean()


def test_without_bound_it_is_pgd_on_the_margin():
    model, (x, y) = net(torch.float32), batch(dtype=torch.float32)
    attack = CWLinf(kappa=math.inf)
    assert str(attack.plan(model, x)) == "chain: every network compiles"
    assert torch.equal(attack(model, x, y), PGD(steps=20, loss="margin")(model, x, y))


def test_compiled_networks_with_a_bound():
    model, (x, y) = net(torch.float32), batch(16, dtype=torch.float32)
    attack = CWLinf(kappa=0.05)
    route = attack.plan(model, x)
    assert str(route) == "chain: every network compiles, under the loop in Python: native code has no bounds of the margin"
    a, b = (dataclasses.replace(attack, engine=e).run(model, x, y) for e in ("chain", "eager"))
    assert (a.path, b.path) == ("chain", "eager")
    assert ((a.x_adv - b.x_adv).abs() > 1e-4).double().mean() < 0.01
    assert torch.equal(attack(tsrfast.compile(model), x, y), a.x_adv)
    for part in (slice(0, 1), slice(1, 16)):
        assert torch.equal(attack(model, x[part], y[part], index=torch.arange(16)[part]), a.x_adv[part])


def test_bounds_of_the_margin():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3, requires_grad=True)
    y = torch.tensor([0, 1, 2])
    for loss, want in ((Margin(), [3, -2, 2]), (Margin(most=2.5), [2.5, -2, 2]), (Margin(least=-1, most=2.5), [2.5, -1, 2])):
        value, answer = loss(torch.empty(0), logits, y)
        assert value.tolist() == want
        assert answer is y
        (g,) = torch.autograd.grad(value.sum(), logits)
        held = torch.tensor([v in (2.5, -1) for v in want])
        assert (g[held] == 0).all()
        assert (g[~held] != 0).any(1).all()
    assert Margin(least=-math.inf, most=math.inf) == Margin()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3), kappa=st.sampled_from([0.0, 0.1, 50.0, math.inf]), steps=st.integers(0, 5), restarts=st.integers(1, 2),
    targeted=st.booleans(), keep=st.sampled_from(["last", "best"]), early=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_stays_in_ball_and_box(n, kappa, steps, restarts, targeted, keep, early, dtype):
    model, (x, y) = net(dtype).train(), batch(n, dtype)
    kept, rng, eps = x.clone(), torch.get_rng_state(), torch.linspace(0, 0.1, n)
    attack = CWLinf(eps, eps / 4, steps, kappa, restarts=restarts, targeted=targeted, keep=keep, early_stop=early)
    got = attack.run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert (got.x_adv.shape, got.x_adv.dtype) == (x.shape, dtype)
    if n:
        assert got.x_adv.min() >= 0
        assert got.x_adv.max() <= 1
        room = eps.double() + {torch.bfloat16: 4e-3, torch.float32: 1e-7, torch.float64: 1e-7}[dtype]
        assert ((got.x_adv.double() - x.double()).abs().flatten(1).amax(1) <= room).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CWLinf(kappa=-1.0), "kappa must be >= 0, got -1"),
        (lambda: CWLinf(kappa=math.nan), "kappa must be >= 0, got nan"),
        (lambda: CWLinf(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: Margin(least=1.0, most=0.0), "least must be <= most, got least=1.0, most=0.0"),
        (lambda: Margin(most=math.nan), "least must be <= most"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
