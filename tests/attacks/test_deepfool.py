"""DeepFool: equal to a plain loop and to foolbox, whatever stands beside an image."""

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
from tsrfast.attacks import DeepFool
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 12, 12)
ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])


def net(seed=0, dtype=torch.float32):
    return ConvReLU((12, 10), image=IMAGE, seed=seed).to(dtype).eval()


def batch(n=16, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def norms(a, b):
    return (a.double() - b.double()).flatten(1).norm(dim=1)


def textbook(model, x, y, steps, candidates, overshoot=0.02):
    """The authors' deepfool.py, one image after the other; (images, forward passes)."""
    out, passes = x.clone(), []
    for n in range(len(x)):
        classes = model(x[n : n + 1])[0].argsort(descending=True)[:candidates]
        adv, total = x[n : n + 1], torch.zeros_like(x[n : n + 1])
        for done in range(steps + 1):
            passed = done + 1
            leaf = adv.detach().requires_grad_()
            z = model(leaf)[0]
            if z.argmax() != y[n]:
                out[n] = adv[0]
                break
            nearest, move = math.inf, None
            for k in classes[classes != y[n]]:
                (w,) = torch.autograd.grad(z[k] - z[y[n]], leaf, retain_graph=True)
                distance = float((z[k] - z[y[n]]).detach().abs() / w.norm())
                if distance < nearest:
                    nearest, move = distance, (distance + 1e-4) * w / w.norm()
            total = total + move
            adv = (x[n : n + 1] + (1 + overshoot) * total).clamp(0, 1)
        passes.append(passed)
    return out, torch.tensor(passes)


@pytest.mark.parametrize("candidates", [2, 4, 10])
def test_equals_the_authors_loop(candidates):
    """float64; norms are floored by 1e-8 here."""
    model, x = net(dtype=torch.float64), batch(12, dtype=torch.float64)
    y = answers(model, x)
    got = DeepFool(candidates=candidates).run(model, x, y)
    want, passes = textbook(model, x, y, 50, candidates)
    assert got.success.all()
    torch.testing.assert_close(got.x_adv, want, rtol=0, atol=1e-6)
    assert torch.equal(got.queries, passes)


@ENGINES
def test_result_says_what_is(engine):
    model, x = net(), batch(24)
    y = answers(model, x)
    y[::5] = (y[::5] + 1) % 10
    attack = DeepFool(steps=1, engine=engine)  # enough for some
    got = attack.run(model, x, y)
    assert got.path == engine
    assert torch.equal(got.success, answers(model, got.x_adv) != y)
    assert torch.equal(got.x_adv[::5], x[::5])
    assert (got.queries[::5] == 1).all()
    assert (got.queries.reshape(-1)[torch.arange(24) % 5 != 0] == 2).all()
    assert not got.success.all()
    assert torch.equal(got.x_adv[~got.success], x[~got.success])  # not fallen: unchanged
    z = model(got.x_adv).detach()
    own = z.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(got.loss, z.scatter(1, y[:, None], -math.inf).amax(1) - own, rtol=1e-4, atol=1e-6)
    assert torch.equal(attack(model, x, y), got.x_adv)
    full = dataclasses.replace(attack, steps=50).run(model, x, y)
    assert full.success.all()
    assert len(full.queries.unique()) > 2
    assert torch.equal(full.x_adv[got.success], got.x_adv[got.success])


def test_engines_agree():
    """float32 in two ways: steps of 0.1 that differ by a relative 1e-5."""
    model, x = net(), batch(32)
    y = answers(model, x)
    a, b = (DeepFool(engine=e).run(model, x, y) for e in ("chain", "eager"))
    assert (a.queries == b.queries).double().mean() > 0.9
    same = a.queries == b.queries
    torch.testing.assert_close(a.x_adv[same], b.x_adv[same], rtol=0, atol=1e-5)


def test_linear_model_needs_one_step():
    """To the nearest hyperplane, 2 % and 1e-4 further."""
    r = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4, 12, generator=r, dtype=torch.float64))
    x = 0.45 + 0.1 * torch.rand(8, 3, 2, 2, generator=r, dtype=torch.float64)
    y = answers(model, x)
    z, w = model(x).detach(), model[1].weight.detach()
    every = (z.gather(1, y[:, None]) - z) / (w[y][:, None] - w).norm(dim=2)
    want = every.masked_fill(torch.arange(4) == y[:, None], math.inf).amin(1)
    got = DeepFool(lo=-math.inf, hi=math.inf).run(model, x, y)
    assert got.queries.tolist() == [2] * 8
    torch.testing.assert_close(norms(got.x_adv, x), 1.02 * (want + 1e-4), rtol=1e-6, atol=0)


def test_an_image_does_not_depend_on_its_batch():
    for engine, dtype, atol in (("chain", torch.float32, 0.0), ("eager", torch.float64, 1e-9)):
        model, x = net(dtype=dtype), batch(12, dtype=dtype)
        y = answers(model, x)
        attack = DeepFool(engine=engine)
        whole = attack.run(model, x, y)
        for part in (slice(0, 1), slice(1, 5), slice(5, 12)):
            got = attack.run(model, x[part], y[part])
            torch.testing.assert_close(got.x_adv, whole.x_adv[part], rtol=0, atol=atol)
            assert torch.equal(got.queries, whole.queries[part])


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_logits_of_any_sign(shift):
    class Shifted(nn.Module):
        def forward(self, x):
            return model(x) + shift

    model, x = net(dtype=torch.float64), batch(8, dtype=torch.float64)
    y = answers(model, x)
    torch.testing.assert_close(DeepFool()(Shifted(), x, y), DeepFool()(model, x, y), rtol=0, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3), steps=st.integers(0, 5), candidates=st.none() | st.integers(2, 12), overshoot=st.floats(0, 10),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), ends=st.booleans(), last=st.booleans(),
)  # fmt: skip
def test_stays_in_the_box(n, steps, candidates, overshoot, dtype, ends, last):
    model = net(dtype=dtype)
    x = batch(n, dtype=torch.float64)
    x = (x.round() if ends else x).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept, rng = x.clone(), torch.get_rng_state()
    y = answers(model, x)
    got = DeepFool(steps, candidates, overshoot).run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (got.x_adv.shape, got.x_adv.dtype) == (x.shape, x.dtype)
    assert got.x_adv.stride() == x.stride() or not n
    if n:
        assert got.x_adv.min() >= 0
        assert got.x_adv.max() <= 1
    assert (got.success | (got.x_adv == x).flatten(1).all(1)).all()
    assert (got.queries <= steps + 1).all()


def test_nan_and_absent_gradients():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)) + 1, (x - x).sqrt().sum((1, 2, 3))], 1)  # inf - inf = nan

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.tensor([1.0, 0.0]))

        def forward(self, x):
            return self.z.expand(len(x), 2)

    class Partly(nn.Module):
        """One pixel without a gradient; class 1, as likely as class 0, cannot be reached: class 2 can."""

        def forward(self, x):
            pixel = x[:, 0, 0, 0]
            own = x.new_ones(len(x))
            return torch.stack([own, own, x.mean((1, 2, 3)) + (pixel - pixel).sqrt() + 0.4], 1)

    x, y = batch(2), torch.zeros(2, dtype=torch.int64)
    got = DeepFool().run(Partly(), x, y)
    assert got.success.all()
    assert (answers(Partly(), got.x_adv) == 2).all()
    assert torch.equal(got.x_adv[:, 0, 0, 0], x[:, 0, 0, 0])
    got = DeepFool(steps=3).run(Broken(), x, y)
    assert got.x_adv.isfinite().all()
    assert got.bad_gradients.tolist() == [3 * 432] * 2
    got = DeepFool(steps=3).run(Constant(), x, y)
    assert torch.equal(got.x_adv, x)
    assert not got.success.any()


def test_leaves_model_and_images_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 10))
    model.train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = batch(4).requires_grad_()
    rng = torch.get_rng_state()
    for engine in ("chain", "eager"):
        with torch.no_grad():
            out = DeepFool(engine=engine)(model, x, torch.arange(4))
        assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None


def test_takes_a_chain():
    model, x = net(), batch(3)
    y = answers(model, x)
    assert torch.equal(DeepFool()(tsrfast.compile(model), x, y), DeepFool()(model, x, y))


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


X, Y = batch(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeepFool(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: DeepFool(candidates=1), "candidates must be an integer >= 2, got 1"),
        (lambda: DeepFool(overshoot=-0.1), "overshoot must be >= 0, got -0.1"),
        (lambda: DeepFool(lo=1.0), "lo must be < hi"),
        (lambda: DeepFool(engine="fast"), "unknown engine 'fast'"),
        (lambda: DeepFool()(net(), X), "y is needed"),
        (lambda: DeepFool()(net(), X, Y + 10), "y must be in 0..9"),
        (lambda: DeepFool()(net(), X * 255, Y), "divide by 255"),
        (lambda: DeepFool()(Detached(), X, Detached()(X).argmax(1)), "model must be differentiable"),
        (
            lambda: DeepFool()(nn.Sequential(nn.Flatten(), nn.Linear(432, 1)), X, Y * 0),
            "at least 2 classes for DeepFool, got 1",
        ),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()


# Mean l2 norm over the 40 images of `compare`: foolbox 3.3.4 (L2DeepFoolAttack), and adv-lib 0.2.8 (df), which overshoots each step.
FOOLBOX, ADV_LIB = 0.1737744984, 0.1737745088


def compare():
    model, x = net(dtype=torch.float64), batch(40, dtype=torch.float64)
    return model, x, answers(model, x)


def test_norms_recorded_from_the_originals():
    model, x, y = compare()
    got = DeepFool().run(model, x, y)
    assert got.success.all()
    mean = norms(got.x_adv, x).mean().item()
    assert mean == pytest.approx(FOOLBOX, rel=1e-8)
    assert mean == pytest.approx(ADV_LIB, rel=1e-3)


@pytest.mark.parametrize("candidates", [3, 10])
def test_equals_foolbox(candidates):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = compare()
    got = DeepFool(candidates=candidates).run(model, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = foolbox.attacks.L2DeepFoolAttack(candidates=candidates)
        _, adv, fell = original(foolbox.PyTorchModel(model, (0, 1), device="cpu"), x, y, epsilons=None)
    assert torch.equal(got.success, fell)
    torch.testing.assert_close(got.x_adv, adv, rtol=0, atol=1e-12)
