"""CW-l2: equal to the originals where they are right, and right where they are not."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import CW
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 12, 12)
ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])
QUICK = {"c": 0.1, "steps": 50, "binary_search_steps": 3, "lr": 0.02}


def net(seed=0, dtype=torch.float32):
    return ConvReLU((12, 10), image=IMAGE, seed=seed).to(dtype).eval()


def batch(n=16, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def margins(model, x, y):
    """max of the others - own, per image."""
    with torch.no_grad():
        z = model(x)
    own = F.one_hot(y, z.shape[1]).bool()
    return z.masked_fill(own, -math.inf).amax(1) - z[own]


def norms(a, b):
    return (a.double() - b.double()).flatten(1).norm(dim=1)


class Shifted(nn.Module):
    """The same classifier, the same softmax, other logits."""

    def __init__(self, model, by):
        super().__init__()
        self.model, self.by = model, by

    def forward(self, x):
        return self.model(x) + self.by


def textbook(model, x, y, c, kappa, steps, lr, searches, targeted=False):
    """One image after the other, with torch.optim.Adam and autograd through everything (the paper, section VI.A; no early abort)."""
    out, found_any = x.clone(), torch.zeros(len(x), dtype=torch.bool)
    for n in range(len(x)):
        x0, const, lower, upper, nearest = x[n : n + 1], c, 0.0, math.inf, math.inf
        for _ in range(searches):
            w = torch.atanh((2 * x0 - 1) * (1 - 1e-6)).requires_grad_()
            adam, found = torch.optim.Adam([w], lr=lr), False
            for _ in range(steps):
                adv = (w.tanh() + 1) / 2
                z = model(adv)[0]
                others = torch.cat([z[: y[n]], z[y[n] + 1 :]]).max()
                gap = z[y[n]] - others if targeted else others - z[y[n]]
                size = (adv - x0).square().sum()
                if gap > kappa:
                    found = True
                    if size.sqrt() < nearest:
                        nearest, out[n] = float(size.detach().sqrt()), adv[0].detach()
                adam.zero_grad()
                (size + const * (kappa - gap).clamp_min(0)).backward(inputs=[w])
                adam.step()
            upper, lower = (min(upper, const), lower) if found else (upper, max(lower, const))
            const = const * 10 if math.isinf(upper) else (lower + upper) / 2
            found_any[n] |= found
    return out, found_any


@pytest.mark.parametrize(("kappa", "targeted"), [(0.0, False), (0.05, False), (0.0, True), (0.05, True)])
def test_equals_the_textbook(kappa, targeted):
    """In float64, image by image. Adam's small steps keep the paths together: 1e-7 after 120."""
    model, x = net(dtype=torch.float64), batch(3, dtype=torch.float64)
    y, c = (answers(model, x) + 3 * targeted) % 10, 10.0 if kappa else 0.1
    got = CW(c=c, kappa=kappa, steps=40, binary_search_steps=3, targeted=targeted, abort_early=False).run(model, x, y)
    want, found = textbook(model, x, y, c, kappa, 40, 0.01, 3, targeted)
    assert found.any()
    assert torch.equal(got.success, found)
    torch.testing.assert_close(got.x_adv, want, rtol=0, atol=1e-7)
    assert got.queries.tolist() == [1 + 120] * 3
    assert got.steps == 120


@ENGINES
@pytest.mark.parametrize("targeted", [False, True])
def test_result_says_what_is(engine, targeted):
    model, x = net(), batch(24)
    clean = answers(model, x)
    y = clean.clone()
    y[::5] = (y[::5] + 1) % 10
    attack = CW(**QUICK, targeted=targeted, engine=engine)
    got = attack.run(model, x, y)
    assert got.path == engine
    hit = answers(model, got.x_adv) == y
    assert torch.equal(got.success, hit if targeted else ~hit)
    done = (clean == y) if targeted else (clean != y)
    assert done.any()
    assert torch.equal(got.x_adv[done], x[done])  # adversarial as it is: nothing to do
    assert (got.queries[done] == 1).all()
    assert (got.queries[~done] > 1).all()
    assert got.success[~done].any()
    assert (norms(got.x_adv, x)[got.success & ~done] > 0).all()
    torch.testing.assert_close(got.loss, margins(model, got.x_adv, y), rtol=1e-4, atol=1e-5)
    assert torch.equal(attack(model, x, y), got.x_adv)


@ENGINES
def test_reaches_the_confidence(engine):
    model, x = net(), batch(12)
    y = answers(model, x)
    low, high = (CW(**{**QUICK, "c": 10.0}, kappa=k, engine=engine).run(model, x, y) for k in (0.0, 0.1))
    for got, kappa in ((low, 0.0), (high, 0.1)):
        assert got.success.all()
        assert (margins(model, got.x_adv, y) > kappa - 1e-5).all()
    assert (norms(high.x_adv, x) > norms(low.x_adv, x)).all()


def test_finds_the_nearest_point_of_a_linear_model():
    """Two classes, W x + b: the distance to the boundary is |margin| / |w1 - w0|."""
    r = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=r, dtype=torch.float64))
        model[1].bias.zero_()
    x = 0.4 + 0.2 * torch.rand(6, 3, 2, 2, generator=r, dtype=torch.float64)
    y = answers(model, x)
    with torch.no_grad():
        z = model(x)
    want = (z[:, 0] - z[:, 1]).abs() / (model[1].weight[0] - model[1].weight[1]).norm()
    got = CW(c=1.0, steps=200, binary_search_steps=6, abort_early=False).run(model, x, y)
    assert got.success.all()
    distance = norms(got.x_adv, x)
    assert (distance >= want - 1e-9).all()
    assert (distance <= 1.02 * want + 1e-4).all()


@pytest.mark.parametrize("shift", [-5.0, -1000.0, 1000.0])
def test_logits_of_any_sign(shift):
    """torchattacks' CW multiplies the own logit by 0 to leave it out, and never succeeds where all logits are negative."""
    model, x = net(dtype=torch.float64), batch(10, dtype=torch.float64)
    y = answers(model, x)
    plain, moved = (CW(**QUICK, abort_early=False).run(m, x, y) for m in (model, Shifted(model, shift)))
    assert plain.success.all()
    assert moved.success.all()
    torch.testing.assert_close(moved.x_adv, plain.x_adv, rtol=0, atol=1e-6)


@ENGINES
def test_failures_are_returned_unchanged(engine):
    """foolbox's CW returns black images for them, and calls most of those adversarial."""
    model, x = net(), batch(12)
    y = answers(model, x)
    assert (answers(model, torch.zeros_like(x)) != y).any()  # black would count as success
    got = CW(c=1e-6, steps=3, binary_search_steps=1, engine=engine).run(model, x, y)
    assert not got.success.any()
    assert torch.equal(got.x_adv, x)
    torch.testing.assert_close(got.loss, margins(model, x, y), rtol=1e-4, atol=1e-5)


def test_unreached_confidence_leaves_a_wrong_image_wrong():
    model, x = net(), batch(6)
    y = (answers(model, x) + 1) % 10
    got = CW(c=1e-6, kappa=50.0, steps=3, binary_search_steps=1, abort_early=False).run(model, x, y)
    assert torch.equal(got.x_adv, x)
    assert got.success.all()
    assert (got.queries == 4).all()


def test_early_abort_is_each_image_s_own():
    """Fewer passes for nearly the same distance; one image alone gets what it gets in company, bit for bit on the chain."""
    model, x = net(), batch(16)
    y = answers(model, x)
    attack = CW(c=0.1, steps=100, binary_search_steps=3)
    got, full = attack.run(model, x, y), dataclasses.replace(attack, abort_early=False).run(model, x, y)
    assert (full.queries == 301).all()
    assert (got.queries <= 301).all()
    assert len(got.queries.unique()) > 1
    assert got.queries.double().mean() < 250
    assert torch.equal(got.success, full.success)
    assert norms(got.x_adv, x).mean() < 1.1 * norms(full.x_adv, x).mean()
    for part in (slice(0, 1), slice(1, 7), slice(7, 16)):
        alone = attack.run(model, x[part], y[part])
        assert torch.equal(alone.x_adv, got.x_adv[part])
        assert torch.equal(alone.queries, got.queries[part])


def test_batch_and_per_image_constants_in_pytorch():
    """float64 keeps another batch size's rounding below 1e-9."""
    model, x = net(dtype=torch.float64), batch(9, dtype=torch.float64)
    y, c = answers(model, x), torch.logspace(-3, 1, 9, dtype=torch.float64)
    y[0] = (y[0] + 1) % 10  # does not take part
    attack = CW(c=c, steps=30, binary_search_steps=2, lr=0.02)
    whole = attack.run(model, x, y)
    for part in (slice(0, 4), slice(4, 9)):
        got = dataclasses.replace(attack, c=c[part]).run(model, x[part], y[part])
        torch.testing.assert_close(got.x_adv, whole.x_adv[part], rtol=0, atol=1e-7)
        assert torch.equal(got.success, whole.success[part])
    assert 1 < whole.success.sum() < 9  # small constants are not enough


def test_more_binary_search_is_nearer():
    model, x = net(), batch(16)
    y = answers(model, x)
    distances = []
    for k in (1, 3, 10):
        got = CW(c=10.0, steps=60, binary_search_steps=k).run(model, x, y)
        assert got.success.all()
        distances.append(norms(got.x_adv, x).mean())
    assert distances[0] > distances[1] > distances[2]


def test_the_tenth_search_is_the_best_one_again():
    """As in the originals: nothing new for images that fell, and a last try with c = 1e10 for the others."""
    model, x = net(), batch(6)
    y = answers(model, x)
    nine, ten = (CW(c=0.1, steps=30, binary_search_steps=k, abort_early=False).run(model, x, y) for k in (9, 10))
    assert nine.success.all()
    assert torch.equal(ten.x_adv, nine.x_adv)
    assert torch.equal(ten.queries, nine.queries + 30)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 3), c=st.floats(0, 100), kappa=st.floats(0, 1), steps=st.integers(0, 12), lr=st.floats(0, 1),
    searches=st.integers(1, 11), abort=st.booleans(), targeted=st.booleans(), box=st.sampled_from([(0, 1), (-1, 2), (0, 255)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), ends=st.booleans(), last=st.booleans(),
)  # fmt: skip
def test_stays_in_the_box(n, c, kappa, steps, lr, searches, abort, targeted, box, dtype, ends, last):
    model = net(dtype=dtype)
    lo, hi = box
    x = (lo + (hi - lo) * batch(n, dtype=torch.float64).round(decimals=0 if ends else 6)).to(
        dtype
    )  # ends: pixels at 0 and 1 only
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept, rng = x.clone(), torch.get_rng_state()
    y = torch.arange(n)
    attack = CW(c, kappa, steps, lr, searches, abort, targeted, lo, hi)
    got = attack.run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (got.x_adv.shape, got.x_adv.dtype) == (x.shape, x.dtype)
    assert got.x_adv.stride() == x.stride() or not n
    if n:
        assert got.x_adv.min() >= lo
        assert got.x_adv.max() <= hi
        assert got.x_adv.isfinite().all()
    moved = (got.x_adv != x).flatten(1).any(1)
    assert (got.success | ~moved).all()
    assert (got.queries >= 1).all() or not n
    assert (got.queries <= 1 + steps * searches).all()


def test_nan_gradients_are_counted_and_images_stay_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)) + 1, (x - x).sqrt().sum((1, 2, 3))], 1)  # inf - inf = nan

    x = batch(2)
    got = CW(steps=3, binary_search_steps=1, abort_early=False).run(Broken(), x, torch.tensor([0, 0]))
    assert got.x_adv.isfinite().all()
    assert got.bad_gradients.tolist() == [2 * 432] * 2


def test_leaves_model_and_images_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 10))
    model.train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = batch(4).requires_grad_()
    rng = torch.get_rng_state()
    for engine in ("chain", "eager"):
        with torch.no_grad():
            out = CW(**QUICK, engine=engine)(model, x, torch.arange(4))
        assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None


def test_takes_a_chain():
    model, x = net(), batch(3)
    y = answers(model, x)
    assert torch.equal(CW(**QUICK)(tsrfast.compile(model), x, y), CW(**QUICK)(model, x, y))


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


X, Y = batch(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CW(c=-1), "c must be >= 0, got -1"),
        (lambda: CW(c=float("nan")), "c must be >= 0, got nan"),
        (lambda: CW(kappa=-0.5), "kappa must be >= 0, got -0.5"),
        (lambda: CW(lr=-1), "lr must be >= 0, got -1"),
        (lambda: CW(lr=float("inf")), "lr must be finite, got inf"),
        (lambda: CW(c=torch.tensor([1.0, torch.inf])), "c must be finite, got inf"),
        (lambda: CW(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: CW(binary_search_steps=0), "binary_search_steps must be an integer >= 1, got 0"),
        (lambda: CW(hi=math.inf), "lo and hi must be finite for CW, got lo=0.0, hi=inf"),
        (lambda: CW(engine="fast"), "unknown engine 'fast'"),
        (lambda: CW(c=torch.ones(3))(net(), X, Y), r"c must be a number or of shape \(2,\), got \(3,\)"),
        (lambda: CW()(net(), X), "y is needed"),
        (lambda: CW()(net(), X, Y + 10), "y must be in 0..9"),
        (lambda: CW()(net(), X * 255, Y), "divide by 255"),
        (lambda: CW()(Detached(), X, Detached()(X).argmax(1)), "model must be differentiable"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()


# adv-lib 0.2.8 (carlini_wagner_l2) and foolbox 3.3.4 on `compare`: mean l2 norm over 12 images, all of them adversarial.
RECORDED = {"adv-lib": {0.0: 0.161840984, 0.1: 1.34085811}, "foolbox": {0.0: 0.161849213, 0.1: 1.34085876}}


def compare(kappa):
    model, x = net(dtype=torch.float64), batch(12, dtype=torch.float64)
    y = answers(model, x)
    return model, x, y, CW(c=0.1, kappa=kappa, steps=100, binary_search_steps=4, abort_early=False)


@pytest.mark.parametrize("kappa", [0.0, 0.1])
def test_norms_recorded_from_the_originals(kappa):
    """adv-lib keeps c in float32 (6e-8); foolbox measures the loss's distance from tanh(arctanh(x)), which is 1e-6 beside x."""
    model, x, y, attack = compare(kappa)
    got = attack.run(model, x, y)
    assert got.success.all()
    mean = norms(got.x_adv, x).mean().item()
    assert mean == pytest.approx(RECORDED["adv-lib"][kappa], rel=1e-6)
    assert mean == pytest.approx(RECORDED["foolbox"][kappa], rel=1e-3)


@pytest.mark.parametrize("kappa", [0.0, 0.1])
def test_equals_foolbox(kappa):
    foolbox = pytest.importorskip("foolbox")
    model, x, y, attack = compare(kappa)
    got = attack.run(model, x, y)
    original = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=4, steps=100, stepsize=0.01, confidence=kappa, initial_const=0.1, abort_early=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, adv, fell = original(foolbox.PyTorchModel(model, (0, 1), device="cpu"), x, y, epsilons=None)
    assert torch.equal(got.success, fell)
    assert norms(got.x_adv, x).mean().item() == pytest.approx(norms(adv, x).mean().item(), rel=1e-3)
