"""EAD: equal to foolbox where that is right, and right where it is not."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast
from tsrfast.attacks import CW, EAD
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 10, 10)
ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])
QUICK = {"c": 1.0, "steps": 30, "binary_search_steps": 3}


def net(seed=0, dtype=torch.float32):
    return ConvReLU((12, 10), image=IMAGE, seed=seed).to(dtype).eval()


def batch(n=12, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def l1(a, b):
    return (a.double() - b.double()).flatten(1).abs().sum(1)


def textbook(model, x, y, c, kappa, beta, steps, searches, rule, targeted):
    """Algorithm 1 of the paper with the authors' steps, one image after the other (no early abort)."""
    out, fell = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for n in range(len(x)):
        x0, const, lower, upper, nearest = x[n : n + 1], c, 0.0, math.inf, math.inf
        for _ in range(searches):
            found, xk, yk = False, x0, x0
            for k in range(steps):
                leaf = yk.clone().requires_grad_()

                def gap(at, n=n):
                    z = model(at)[0]
                    rest = torch.cat([z[: y[n]], z[y[n] + 1 :]]).max()
                    return z[y[n]] - rest if targeted else rest - z[y[n]]

                cost = (leaf - x0).square().sum() + const * (kappa - gap(leaf)).clamp_min(0)
                (g,) = torch.autograd.grad(cost, leaf)
                z = yk - 0.01 * math.sqrt(1 - k / steps) * g
                new = x0.clone()
                new[z - x0 > beta] = (z - beta).clamp(max=1)[z - x0 > beta]
                new[z - x0 < -beta] = (z + beta).clamp(min=0)[z - x0 < -beta]
                yk, xk = new + k / (k + 3) * (new - xk), new
                with torch.no_grad():
                    if gap(xk) > kappa:
                        found = True
                        d = (xk - x0).abs().sum()
                        d = d if rule == "l1" else beta * d + (xk - x0).square().sum()
                        if d < nearest:
                            nearest, out[n] = float(d), xk[0]
            upper, lower = (min(upper, const), lower) if found else (upper, max(lower, const))
            const = const * 10 if math.isinf(upper) else (lower + upper) / 2
            fell[n] |= found
    return out, fell


@pytest.mark.parametrize("rule", ["l1", "en"])
@pytest.mark.parametrize(("kappa", "targeted"), [(0.0, False), (0.02, False), (0.0, True)])
def test_equals_the_textbook(rule, kappa, targeted):
    model, x = net(dtype=torch.float64), batch(3, dtype=torch.float64)
    y = (answers(model, x) + 3 * targeted) % 10
    attack = EAD(3.0, kappa, 20, 0.01, 3, False, targeted, decision_rule=rule, beta=2e-3)
    got = attack.run(model, x, y)
    want, fell = textbook(model, x, y, 3.0, kappa, 2e-3, 20, 3, rule, targeted)
    assert fell.any()
    assert torch.equal(got.success, fell)
    torch.testing.assert_close(got.x_adv, want, rtol=0, atol=1e-9)
    assert got.queries.tolist() == [1 + 2 * 60] * 3


def compare(rule, kappa, targeted):
    model, x = net(dtype=torch.float64), batch(12, dtype=torch.float64)
    y = (answers(model, x) + targeted) % 10
    return (
        model,
        x,
        y,
        EAD(
            c=1.0,
            kappa=kappa,
            steps=20,
            binary_search_steps=3,
            beta=1e-3,
            decision_rule=rule,
            targeted=targeted,
            abort_early=False,
        ),
    )


# foolbox 3.3.4 (EADAttack) on `compare`: how many of 12 fall, and their mean l1 norm.
CASES = [("en", 0.0, False), ("l1", 0.0, False), ("en", 0.02, False), ("l1", 0.0, True)]
RECORDED = {
    ("en", 0.0, False): (12, 2.22598491),
    ("l1", 0.0, False): (12, 1.74038703),
    ("en", 0.02, False): (12, 4.70209703),
    ("l1", 0.0, True): (12, 4.29752322),
}


@pytest.mark.parametrize("case", CASES)
def test_norms_recorded_from_foolbox(case):
    model, x, y, attack = compare(*case)
    got = attack.run(model, x, y)
    count, mean = RECORDED[case]
    assert got.success.sum() == count
    assert l1(got.x_adv, x)[got.success].mean().item() == pytest.approx(mean, rel=1e-6)


def original(foolbox, model, x, y, attack):
    """Images that fell, and which; foolbox takes black ones for adversarial, too."""
    theirs = foolbox.attacks.EADAttack(
        binary_search_steps=attack.binary_search_steps, steps=attack.steps, initial_stepsize=attack.lr, confidence=attack.kappa,
        initial_const=attack.c, regularization=attack.beta, decision_rule=attack.decision_rule.upper(), abort_early=attack.abort_early,
    )  # fmt: skip
    criterion = foolbox.criteria.TargetedMisclassification(y) if attack.targeted else y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, adv, _ = theirs(foolbox.PyTorchModel(model, (0, 1), device="cpu"), x, criterion, epsilons=None)
    return adv, (adv != 0).flatten(1).any(1)


@pytest.mark.parametrize("case", CASES)
def test_equals_foolbox(case):
    foolbox = pytest.importorskip("foolbox")
    model, x, y, attack = compare(*case)
    got = attack.run(model, x, y)
    adv, fell = original(foolbox, model, x, y, attack)
    assert torch.equal(got.success, fell)
    torch.testing.assert_close(got.x_adv[fell], adv[fell], rtol=0, atol=1e-9)


def test_early_abort_is_that_of_foolbox_image_by_image():
    """There the whole batch ends at once."""
    foolbox = pytest.importorskip("foolbox")
    model, x, y, attack = compare(*CASES[0])
    attack = dataclasses.replace(attack, abort_early=True)
    got = attack.run(model, x, y)
    assert len(got.queries.unique()) > 1
    for i in range(4):
        adv, fell = original(foolbox, model, x[i : i + 1], y[i : i + 1], attack)
        assert torch.equal(got.success[i : i + 1], fell)
        torch.testing.assert_close(got.x_adv[i : i + 1][fell], adv[fell], rtol=0, atol=1e-9)


@ENGINES
@pytest.mark.parametrize("targeted", [False, True])
def test_result_says_what_is(engine, targeted):
    model, x = net(), batch(24)
    clean = answers(model, x)
    y = clean.clone()
    y[::5] = (y[::5] + 1) % 10
    attack = EAD(**QUICK, targeted=targeted, engine=engine)
    got = attack.run(model, x, y)
    assert got.path == engine
    hit = answers(model, got.x_adv) == y
    assert torch.equal(got.success, hit if targeted else ~hit)
    done = (clean == y) if targeted else (clean != y)
    assert torch.equal(got.x_adv[done], x[done])  # adversarial as it is: nothing to do
    assert (got.queries[done] == 1).all()
    assert (got.queries[~done] > 1).all()
    assert got.success[~done].any()
    assert (l1(got.x_adv, x)[got.success & ~done] > 0).all()
    assert torch.equal(attack(model, x, y), got.x_adv)
    assert torch.equal(
        EAD(**QUICK, targeted=targeted)(tsrfast.compile(model), x, y), EAD(**QUICK, targeted=targeted)(model, x, y)
    )


def test_sparser_and_nearer_in_l1_than_cw():
    model, x = net(), batch(8)
    y = answers(model, x)
    ead = EAD(c=1.0, steps=100, binary_search_steps=4, beta=1e-2, decision_rule="l1").run(model, x, y)
    cw = CW(c=1.0, steps=100, binary_search_steps=4).run(model, x, y)
    assert ead.success.all()
    assert cw.success.all()
    assert (l1(ead.x_adv, x) < l1(cw.x_adv, x)).all()
    assert (ead.x_adv != x).double().mean() < 0.5 * (cw.x_adv != x).double().mean()


def test_no_nearer_than_the_boundary_of_a_linear_model():
    """Two classes, W x + b: in l1 the boundary is |margin| / max |w1 - w0| away."""
    r = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=r, dtype=torch.float64))
    x = 0.4 + 0.2 * torch.rand(6, 3, 2, 2, generator=r, dtype=torch.float64)
    y = answers(model, x)
    with torch.no_grad():
        z = model(x)
    want = (z[:, 0] - z[:, 1]).abs() / (model[1].weight[0] - model[1].weight[1]).abs().max()
    got = EAD(c=1.0, steps=100, binary_search_steps=5, beta=0.02, decision_rule="l1", abort_early=False).run(model, x, y)
    assert got.success.all()
    assert (l1(got.x_adv, x) >= want).all()
    assert (l1(got.x_adv, x) <= 1.7 * want).all()


@ENGINES
def test_failures_are_the_images_themselves(engine):
    """foolbox returns black images and reports most of them as adversarial; torchattacks fails where all logits are negative."""
    model, x = net(), batch(8)
    y = answers(model, x)
    got = EAD(c=1e-6, steps=3, binary_search_steps=1, engine=engine).run(model, x, y)
    assert not got.success.any()
    assert torch.equal(got.x_adv, x)

    class Shifted(nn.Module):
        def forward(self, x):
            return model(x) - 1000.0

    # Logits near 1000 have steps of 6e-5, which moves margins, not the success.
    assert torch.equal(EAD(**QUICK).run(Shifted(), x, y).success, EAD(**QUICK).run(model, x, y).success)


def test_batches_and_per_image_constants():
    """Bit for bit on the chain; in PyTorch float64 keeps another batch size's rounding small."""
    for dtype, atol in ((torch.float32, 0), (torch.float64, 1e-7)):
        model, x = net(dtype=dtype), batch(9, dtype=dtype)
        y, c = answers(model, x), torch.logspace(-3, 1, 9, dtype=torch.float64)
        y[0] = (y[0] + 1) % 10  # does not take part
        attack = EAD(c=c, steps=30, binary_search_steps=2)
        whole = attack.run(model, x, y)
        for part in (slice(0, 1), slice(1, 4), slice(4, 9)):
            got = dataclasses.replace(attack, c=c[part]).run(model, x[part], y[part])
            torch.testing.assert_close(got.x_adv, whole.x_adv[part], rtol=0, atol=atol)
            assert torch.equal(got.success, whole.success[part])
            assert torch.equal(got.queries, whole.queries[part])
        assert 1 < whole.success.sum() < 9
        assert len(whole.queries.unique()) > 2  # early abort is each image's own


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3), c=st.floats(0, 100), kappa=st.floats(0, 1), steps=st.integers(0, 12), lr=st.floats(0, 1),
    searches=st.integers(1, 11), abort=st.booleans(), targeted=st.booleans(), box=st.sampled_from([(0, 1), (-1, 2), (0, 255)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), ends=st.booleans(), last=st.booleans(),
    beta=st.floats(0, 0.1), rule=st.sampled_from(["l1", "en"]),
)  # fmt: skip
def test_stays_in_the_box(n, c, kappa, steps, lr, searches, abort, targeted, box, dtype, ends, last, beta, rule):
    model = net(dtype=dtype).train()
    lo, hi = box
    x = (lo + (hi - lo) * batch(n, dtype=torch.float64).round(decimals=0 if ends else 6)).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept, rng = x.clone(), torch.get_rng_state()
    y = torch.arange(n)
    got = EAD(c, kappa, steps, lr, searches, abort, targeted, lo, hi, beta=beta, decision_rule=rule).run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert (got.x_adv.shape, got.x_adv.dtype) == (x.shape, x.dtype)
    assert got.x_adv.stride() == x.stride() or not n
    if n:
        assert got.x_adv.min() >= lo
        assert got.x_adv.max() <= hi
    assert got.x_adv.isfinite().all()
    moved = (got.x_adv != x).flatten(1).any(1)
    assert (got.success | ~moved).all()
    assert (got.queries <= 1 + 2 * steps * searches).all()


def test_nan_gradients_are_counted_and_images_stay_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)) + 1, (x - x).sqrt().sum((1, 2, 3))], 1)  # inf - inf = nan

    x = batch(2)
    got = EAD(steps=3, binary_search_steps=1, abort_early=False).run(Broken(), x, torch.tensor([0, 0]))
    assert got.x_adv.isfinite().all()
    assert got.bad_gradients.tolist() == [3 * 300] * 2


X, Y = batch(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EAD(beta=-1), "beta must be >= 0, got -1"),
        (lambda: EAD(beta=float("inf")), "beta must be finite, got inf"),
        (lambda: EAD(decision_rule="L2"), "unknown decision_rule 'L2'"),
        (lambda: EAD(c=-1), "c must be >= 0, got -1"),
        (lambda: EAD(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: EAD(hi=math.inf), "lo and hi must be finite for EAD, got lo=0.0, hi=inf"),
        (lambda: EAD()(net(), X), "y is needed"),
        (lambda: EAD()(net(), X, Y + 10), "y must be in 0..9"),
        (lambda: EAD()(net(), X * 255, Y), "divide by 255"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
