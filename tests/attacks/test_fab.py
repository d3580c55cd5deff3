"""FAB against the authors' code (installed: the same iterates up to rounding; else numbers recorded from it), and what holds always."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast
from tsrfast.attacks import APGD, FAB, DeepFool, FABTargeted
from tsrfast.errors import InputError

RADII = {"linf": 8 / 255, "l2": 0.3, "l1": 1.2}
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # the authors'
ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])


def net(seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (
            nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
            )
            .to(dtype)
            .eval()
        )


MODEL = net()


def batch(n=24, seed=0, dtype=torch.float32):
    """Images and labels, of which every fifth is wrong."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = net(dtype=dtype)(x).argmax(1)
    y[::5] = (y[::5] + 1) % 10
    return x, y


def lengths(a, b, norm):
    return (a.double() - b.double()).flatten(1).norm(p=ORDER[norm], dim=1)


def authors(norm, **options):
    return pytest.importorskip("pyautoattack.fab_pt").FABAttack_PT(MODEL, norm=NAMES[norm], **options)


@ENGINES
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_run_equals_the_authors(norm, steps, engine):
    """Their sums of 192 terms are float32: pixels differ by 1e-5, lengths by 1e-5 (l1) and 1e-6."""
    x, y = batch()
    want = authors(norm, n_iter=steps).attack_single_run(x, y).detach()
    got = FAB(norm=norm, eps=math.inf, steps=steps, keep="best", engine=engine).run(MODEL, x, y)
    torch.testing.assert_close(got.x_adv, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(lengths(got.x_adv, x, norm), lengths(want, x, norm), rtol=0, atol=1e-5 if norm == "l1" else 1e-6)
    assert 5 <= (want != x).flatten(1).any(1).sum() <= 19
    assert got.path == engine


@pytest.mark.parametrize("norm", RADII)
def test_a_targeted_run_equals_the_authors(norm):
    x, y = batch(12)
    theirs = authors(norm, n_iter=20)
    for k in (1, 9):
        theirs.target_class = k + 1
        want = theirs.attack_single_run(x, y, is_targeted=True).detach()
        only = _Only(norm=norm, eps=math.inf, steps=20, keep="best", target_classes=k)
        # the sums of l1, as above, through 20 steps: 2.4e-5 on a CPU without AVX-512
        torch.testing.assert_close(only(MODEL, x, y), want, rtol=0, atol=5e-5 if norm == "l1" else 2e-5)


class _Only(FABTargeted):
    """The last of the target classes alone."""

    def _rounds(self, clean, y):
        yield list(super()._rounds(clean, y))[-1]


@pytest.mark.parametrize("norm", RADII)
def test_whole_attacks_equal_the_authors(norm):
    x, y = batch(12)
    for ours, more in ((FAB, {}), (FABTargeted, {"target_classes": 2})):
        theirs = authors(norm, n_iter=10, eps=RADII[norm], targeted=bool(more), n_target_classes=more.get("target_classes", 9))
        want = theirs.perturb(x, y)
        fallen = MODEL(want).argmax(1) != y
        got = {k: ours(norm=norm, eps=RADII[norm], steps=10, keep=k, **more).run(MODEL, x, y) for k in ("first", "best")}
        assert torch.equal(got["first"].success, fallen)
        assert torch.equal(got["best"].success, fallen)
        assert 3 < fallen.sum() < len(x)
        assert (lengths(got["best"].x_adv, x, norm) <= lengths(want, x, norm) + 1e-5).all()
        if not more:  # there the authors stop at the first class that an image falls for
            torch.testing.assert_close(got["best"].x_adv, want, rtol=0, atol=1e-5)


# norm: (fallen, mean length of FAB at any distance; fallen of FABTargeted with 2 classes), 20 steps
RECORDED = {"linf": (13, 0.0331638, 13), "l2": (14, 0.2813642, 14), "l1": (14, 1.1116315, 14)}


@ENGINES
@pytest.mark.parametrize("norm", RADII)
def test_numbers_recorded_from_the_authors(norm, engine):
    """pyautoattack 0.2.0."""
    x, y = batch()
    fallen, mean, fallen_targeted = RECORDED[norm]
    kw = {"norm": norm, "steps": 20, "engine": engine}
    assert FAB(eps=RADII[norm], **kw).run(MODEL, x, y).success.sum() == fallen
    assert FABTargeted(eps=RADII[norm], target_classes=2, **kw).run(MODEL, x, y).success.sum() == fallen_targeted
    far = FAB(eps=math.inf, keep="best", **kw)(MODEL, x, y)
    assert lengths(far, x, norm).mean().item() == pytest.approx(mean, rel=2e-5)


@ENGINES
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("form", [FAB, FABTargeted])
def test_what_keep_says(form, norm, engine):
    x, y = batch(12)
    more = {"target_classes": 2} if form is FABTargeted else {}
    attack = form(norm=norm, eps=RADII[norm], steps=8, engine=engine, **more)
    first, best = (dataclasses.replace(attack, keep=k).run(MODEL, x, y) for k in ("first", "best"))
    clean = MODEL(x).argmax(1) != y
    most = 1 + 2 * attack._terms().steps
    for got in (first, best):
        assert got.path == engine
        assert torch.equal(got.success, MODEL(got.x_adv).argmax(1) != y)
        assert torch.equal(got.x_adv[clean | ~got.success], x[clean | ~got.success])
        assert (got.queries[clean] == 1).all()
        assert (got.queries[~got.success] == most).all()
        z = MODEL(got.x_adv).detach()
        margin = z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None]).squeeze(1)
        torch.testing.assert_close(got.loss, margin, rtol=1e-3, atol=1e-5)
    assert torch.equal(first.success, best.success)
    assert (best.queries[~clean] == most).all()
    assert (first.queries[first.success & ~clean] < most).all()
    assert (lengths(best.x_adv, x, norm) <= lengths(first.x_adv, x, norm) + 1e-6).all()
    assert lengths(best.x_adv, x, norm).sum() < 0.99 * lengths(first.x_adv, x, norm).sum()


def test_is_nearer_than_deepfool_and_stronger_than_one_step():
    x, y = batch(32)
    deep, fab = DeepFool()(MODEL, x, y), FAB(norm="l2", eps=math.inf, keep="best", steps=20).run(MODEL, x, y)
    reached = (MODEL(deep).argmax(1) != y) & fab.success
    assert reached.sum() > 20
    assert lengths(fab.x_adv, x, "l2")[reached].mean() < 0.95 * lengths(deep, x, "l2")[reached].mean()
    means = [FAB(steps=k, eps=0.03).run(MODEL, x, y).success.sum() for k in (0, 1, 5, 20)]
    assert means == sorted(means)
    assert means[0] < means[-1]


@pytest.mark.parametrize("norm", RADII)
def test_finds_what_apgd_finds(norm):
    """Another algorithm for the same question: at most one image of 12 apart."""
    x, y = batch(12)
    fab = FABTargeted(norm=norm, eps=RADII[norm], steps=20, target_classes=3).run(MODEL, x, y).success
    apgd = APGD(norm=norm, eps=RADII[norm], loss="dlr", steps=30).run(MODEL, x, y).success
    assert (apgd & ~fab).sum() <= 1


@pytest.mark.parametrize("norm", RADII)
def test_restarts_begin_elsewhere(norm):
    """The first run for each class at the image, the others at points of the ball of eps / 2, no two the same."""
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(x.detach().clone())
            return MODEL(x)

    x, y = batch(8)
    right = MODEL(x).argmax(1) == y
    for form, more, runs in ((FAB, {}, 3), (FABTargeted, {"target_classes": 2}, 6)):
        seen.clear()
        attack = form(norm=norm, eps=2 * RADII[norm], steps=1, restarts=3, keep="best", **more)
        result = attack.run(Watched(), x, y)
        assert result.steps == runs
        assert len(seen) == 1 + 2 * runs
        starts = seen[1::2]  # each run looks at its start, and at the step from there
        for k, start in enumerate(starts):
            far = lengths(start, x[right], norm)
            if k % 3 == 0:
                assert (far == 0).all()
            else:
                assert ((far > 0.3 * RADII[norm]) & (far <= RADII[norm] * (1 + 1e-6))).all()
                assert not any(torch.equal(start, other) for other in starts[:k])
        one = dataclasses.replace(attack, restarts=1).run(MODEL, x, y)
        assert (result.success >= one.success).all()
        rounding = 1e-5 if norm == "l1" else 1e-6  # of the float32 sums by which the nearest is kept
        nearer = lengths(result.x_adv, x, norm) <= lengths(one.x_adv, x, norm) + rounding
        assert nearer[one.success].all()


def test_fewer_classes_than_targets():
    x, y = batch(12)
    got = FABTargeted(steps=2, target_classes=99, eps=1e-4).run(MODEL, x, y)  # there are 9 others
    assert (got.queries[~got.success] == 1 + 9 * 2 * 2).all()
    few = FABTargeted(steps=2, target_classes=2, eps=1e-4).run(MODEL, x, y)
    assert (few.queries[~few.success] == 1 + 2 * 2 * 2).all()
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with pytest.raises(InputError, match="at least 2 classes for FAB, got 1"):
        FAB()(one, x, torch.zeros_like(y))


@settings(max_examples=20, deadline=None)
@given(
    norm=st.sampled_from(list(RADII)), n=st.integers(0, 4), scale=st.floats(0, 2), steps=st.integers(0, 7), each=st.booleans(),
    keep=st.sampled_from(["first", "best"]), restarts=st.integers(1, 2), seed=st.integers(0, 2**31), form=st.sampled_from([0, 1]),
    engine=st.sampled_from(["chain", "eager"]), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    last=st.booleans(),
)  # fmt: skip
def test_stays_in_ball_and_box(norm, n, scale, steps, each, keep, restarts, seed, form, engine, dtype, last):
    engine = "eager" if dtype != torch.float32 else engine
    x, y = batch(n, seed % 1000, dtype)
    x, model = x.where(x > 0.1, 0).where(x < 0.9, 1), net(dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    eps = torch.linspace(0.3, 1, n) * scale * RADII[norm] if each else scale * RADII[norm]
    kw = {"norm": norm, "eps": eps, "steps": steps, "restarts": restarts, "keep": keep, "seed": seed, "engine": engine}
    kept, random = x.clone(), torch.get_rng_state()
    result = (FAB(**kw) if form else FABTargeted(target_classes=2, **kw)).run(model, x, y)
    rounding = 1e-6 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
    assert (lengths(result.x_adv, x, norm) <= torch.as_tensor(eps, dtype=torch.float64) * (1 + rounding) + rounding).all()
    assert result.x_adv.dtype == dtype
    assert result.x_adv.shape == x.shape
    assert result.x_adv.stride() == x.stride() or n <= 1
    assert not result.x_adv.requires_grad
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random)
    if n:
        assert result.x_adv.min() >= 0
        assert result.x_adv.max() <= 1
        if dtype != torch.bfloat16:  # there a batch of another size rounds otherwise
            assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize(
    "attack", [FAB(steps=8, restarts=2), FABTargeted(steps=6, target_classes=3), FAB(steps=8, keep="best")]
)
def test_does_not_depend_on_how_images_are_batched(norm, attack):
    """In float64, where no step hangs on the rounding of another batch's sums; on the chain path bit by bit."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 0)):
        x, y = batch(7, dtype=dtype)
        model = net(dtype=dtype)
        engine = "chain" if dtype == torch.float32 else "eager"
        attack = dataclasses.replace(attack, norm=norm, eps=RADII[norm], seed=3, engine=engine)
        whole = attack.run(model, x, y)
        parts = [attack.run(model, x[i], y[i], index=i) for i in torch.arange(7).split([1, 4, 2])]
        torch.testing.assert_close(torch.cat([p.x_adv for p in parts]), whole.x_adv, rtol=0, atol=tolerance)
        assert torch.equal(torch.cat([p.queries for p in parts]), whole.queries)


def test_radius_of_each_image():
    x, y = batch(16)
    far = FAB(eps=math.inf, keep="best", steps=20).run(MODEL, x, y)
    needed = lengths(far.x_adv, x, "linf")
    eps = torch.where(torch.arange(16) % 2 == 0, 0.9, 1.1) * needed.float()
    got = FAB(eps=eps, steps=20, keep="best").run(MODEL, x, y)
    assert torch.equal(got.success, (torch.arange(16) % 2 == 1) & far.success | (needed == 0) & far.success)


@pytest.mark.parametrize("norm", RADII)
def test_other_boxes(norm):
    """The same images in [-1, 1], for a model that maps them back."""

    class Signed(nn.Module):
        def forward(self, x):
            return model((x + 1) / 2)

    model, (x, y) = net(dtype=torch.float64), batch(8, dtype=torch.float64)
    kw = {"norm": norm, "eps": math.inf, "steps": 10, "keep": "best"}
    got = FAB(lo=-1, **kw)(Signed(), 2 * x - 1, y)
    torch.testing.assert_close((got + 1) / 2, FAB(**kw)(model, x, y), rtol=0, atol=1e-8)


def test_nan_and_absent_gradients():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)) + 1, (x - x).sqrt().sum((1, 2, 3))], 1)  # its gradient is NaN

    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :2] + torch.tensor([1.0, 0.0])

    class Partly(nn.Module):
        """One pixel without a gradient."""

        def forward(self, x):
            pixel = x[:, 0, 0, 0]
            return torch.stack([x.new_ones(len(x)), x.mean((1, 2, 3)) + (pixel - pixel).sqrt() + 0.4], 1)

    x, y = batch(2)[0], torch.zeros(2, dtype=torch.int64)
    for norm in RADII:
        for model in (Broken(), Constant()):
            got = FAB(norm=norm, eps=math.inf, steps=3, keep="best").run(model, x, y)
            assert not got.success.any()
            assert torch.equal(got.x_adv, x)
            assert (got.bad_gradients > 0).all() == isinstance(model, Broken)
        got = FAB(norm=norm, eps=math.inf, steps=5).run(Partly(), x, y)
        assert got.success.all()
        assert ((got.x_adv - x)[:, 0, 0, 0].abs() <= 1e-7).all()  # an average of the pixel with itself
        assert (got.bad_gradients > 0).all()


def test_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))
    model.train()
    model[3].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = batch(4)
    for engine in ("eager", "auto"):
        FAB(steps=3, engine=engine)(model, x, y)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_takes_chains():
    x, y = batch(6)
    chain = tsrfast.compile(MODEL, (3, 8, 8))
    attack = FABTargeted(steps=5)
    assert torch.equal(attack(chain, x, y), dataclasses.replace(attack, engine="chain")(MODEL, x, y))
    assert attack.plan(MODEL, x).path == "chain"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"restarts": 0}, "restarts must be an integer >= 1, got 0"),
        ({"restarts": 2, "eps": math.inf}, "eps must be finite for random starts"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
        ({"norm": "l3"}, "unknown norm 'l3'"),
        ({"keep": "last"}, "unknown keep 'last'"),
        ({"alpha_max": 1.5}, r"alpha_max must be in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"eta": 0.9}, "eta must be >= 1 and finite, got 0.9"),
        ({"eta": math.nan}, "eta must be >= 1 and finite, got nan"),
        ({"lo": -math.inf}, "lo and hi must be finite for FAB, got lo=-inf"),
        ({"engine": "gpu"}, "unknown engine 'gpu'"),
    ],
)
def test_says_what_is_wrong(fields, message):
    for form in (FAB, FABTargeted):
        with pytest.raises(InputError, match=message):
            form(**fields)


def test_says_what_is_wrong_with_a_call():
    x, y = batch(2)
    with pytest.raises(InputError, match="target_classes must be an integer >= 1, got 0"):
        FABTargeted(target_classes=0)
    with pytest.raises(InputError, match="y is needed by FAB"):
        FAB()(MODEL, x)
    with pytest.raises(InputError, match=r"y must be in 0..9, the model's classes, got 10"):
        FAB()(MODEL, x, y + 10 - y)
    detached = nn.Sequential(MODEL, _Detached())
    with pytest.raises(InputError, match="model must be differentiable"):
        FAB()(detached, x, MODEL(x).argmax(1))


class _Detached(nn.Module):
    def forward(self, x):
        return x.detach()
