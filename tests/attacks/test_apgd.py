"""Auto-PGD against the authors' code (installed: the same bits; else numbers recorded from it), and what holds for every attack."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast
from tsrfast.attacks import APGD, DLR, PGD, APGDTargeted, CrossEntropy, OracleL2, TargetedDLR, Threat
from tsrfast.attacks.apgd import ascend
from tsrfast.attacks.loop import Batch
from tsrfast.attacks.losses import resolve
from tsrfast.errors import InputError

RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 1.5}
NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1", "cross_entropy": "ce", "dlr": "dlr"}  # the authors'
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


def begin(x, y, norm, eps):
    index = torch.arange(len(x))
    return Batch(index, x, y, index, Threat(norm, eps), 0.0)


def authors(monkeypatch, form="APGDAttack", **options):
    """Their attack with our start in the place of theirs; their seeding of the global generator undone."""
    base = pytest.importorskip("pyautoattack.autopgd_base")
    monkeypatch.setattr(torch.random, "manual_seed", lambda seed: None)

    class Started(getattr(base, form)):
        def attack_single_run(self, x, y, x_init=None):
            return super().attack_single_run(x, y, x_init=x if x_init is None else x_init)

    attack = Started(MODEL, **options)
    attack.init_hyperparam(batch()[0])
    return attack


@pytest.mark.parametrize("steps", [1, 7, 40, 100])
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_an_ascent_equals_the_authors_bit_for_bit(norm, loss, steps, scale, monkeypatch):
    (x, y), eps = batch(), scale * RADII[norm]
    start = (
        x + eps * (0.1 if norm == "l2" else 1) * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1)
    ).clamp(0, 1)
    theirs = authors(monkeypatch, n_iter=steps, norm=NAMES[norm], eps=eps, loss=NAMES[loss])
    highest, standing, value, last = theirs.attack_single_run(x, y, x_init=start)
    fallen = ~standing.bool()
    ours = {
        keep: ascend(
            MODEL, resolve(loss), begin(x, y, norm, eps), start, targeted=False, steps=steps, keep=keep, rho=0.75, eot_iter=1
        ).best
        for keep in ("first", "last", "best")
    }
    assert torch.equal(ours["best"].x, highest)
    assert torch.equal(ours["best"].loss, value)
    assert torch.equal(ours["last"].adversarial, fallen)
    assert torch.equal(ours["last"].x[fallen], last[fallen])
    assert torch.equal(ours["first"].adversarial, fallen)
    assert 0 < fallen.sum() < len(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_whole_attacks_equal_the_authors_bit_for_bit(norm, monkeypatch):
    (x, y), eps = batch(), RADII[norm]
    kw = {"norm": norm, "eps": eps, "steps": 20, "random_start": False, "engine": "eager"}
    for loss in ("cross_entropy", "dlr"):
        theirs = authors(monkeypatch, n_iter=20, norm=NAMES[norm], eps=eps, loss=NAMES[loss])
        assert torch.equal(APGD(loss=loss, keep="last", **kw)(MODEL, x, y), theirs.perturb(x.clone(), y))
        assert torch.equal(
            APGD(loss=loss, keep="best", **kw)(MODEL, x, y), theirs.perturb(x.clone(), y, best_loss=True).detach()
        )
    theirs = authors(monkeypatch, "APGDAttack_targeted", n_iter=20, norm=NAMES[norm], eps=eps, n_target_classes=9)
    assert torch.equal(APGDTargeted(keep="last", **kw)(MODEL, x, y), theirs.perturb(x.clone(), y))


@pytest.mark.parametrize("steps", [10, 50])
def test_l1_equals_the_authors_up_to_rounding(steps, monkeypatch):
    """The projection is another algorithm for the same point: an ascent may part where it meets a tie (1 image of 24 allowed)."""
    (x, y), eps = batch(), RADII["l1"]
    base = pytest.importorskip("pyautoattack.autopgd_base")
    start = (x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    theirs = base.APGDAttack(MODEL, n_iter=steps, norm="L1", eps=eps)
    theirs.init_hyperparam(x)
    with monkeypatch.context() as m:
        m.setattr(torch, "randn", lambda *a, **k: start - x)  # inside ball and box already
        _, standing, value, _ = theirs.attack_single_run(x, y)
    ours = ascend(
        MODEL, CrossEntropy(), begin(x, y, "l1", eps), start, targeted=False, steps=steps, keep="best", rho=0.75, eot_iter=1
    )
    assert ((ours.best.loss - value).abs() > 1e-5).sum() <= 1
    got = ascend(
        MODEL, CrossEntropy(), begin(x, y, "l1", eps), start, targeted=False, steps=steps, keep="last", rho=0.75, eot_iter=1
    )
    assert (got.best.adversarial != ~standing.bool()).sum() <= 1


def test_l1_by_way_of_larger_balls_equals_the_authors(monkeypatch):
    """But for pixels that only rounding moved: the authors count them when they choose the sparsity of a step, 1e-3 of the loss."""
    (x, y), eps, steps = batch(), RADII["l1"], 33
    base = pytest.importorskip("pyautoattack.autopgd_base")
    monkeypatch.setattr(base, "L0_norm", lambda d: (d.abs() > 1e-6).flatten(1).sum(1))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    theirs = base.APGDAttack(MODEL, n_iter=steps, norm="L1", eps=eps)
    theirs.init_hyperparam(x)
    with monkeypatch.context() as m:
        m.setattr(torch, "randn_like", lambda t: noise.clone())
        _, _, value, _ = theirs.decr_eps_pgd(x, y, [3 * eps, 2 * eps, eps], [10, 10, 13])
    start = tsrfast.ops.pgd_step(x + noise, x, noise, step_size=0.0, eps=3 * eps, norm="l1")[0]
    attack = APGD(norm="l1", eps=eps, steps=steps, larger_eps=True, keep="best")
    ours = attack._ascend(MODEL, CrossEntropy(), begin(x, y, "l1", eps), start, False)
    assert ((ours.best.loss - value).abs() > 1e-5).sum() <= 1
    assert ours.queries.tolist() == [steps + 3] * len(x)


# (norm, loss, fallen, highest losses)
RECORDED = [
    ("linf", "cross_entropy", 11, [2.60297, 2.01863, 2.03835, 2.03306]),
    ("linf", "dlr", 14, [3.33692, -0.14693, 0.1018, -0.12498]),
    ("l2", "cross_entropy", 15, [2.61995, 2.03466, 2.05178, 2.04826]),
    ("l2", "dlr", 19, [3.75141, 0.00764, 0.16837, 0.03122]),
    ("l1", "cross_entropy", 13, [2.60707, 2.0319, 2.0413, 2.04338]),
    ("l1", "dlr", 15, [3.49061, -0.04727, 0.11639, -0.02515]),
]


@ENGINES
@pytest.mark.parametrize("row", range(6))
def test_numbers_recorded_from_the_authors(row, engine):
    """pyautoattack 0.2.0: images fallen, and the highest losses of four, from the images themselves, 30 steps."""
    norm, loss, fallen, losses = RECORDED[row]
    x, y = batch()
    attack = APGD(norm=norm, eps=RADII[norm], loss=loss, steps=30, random_start=False, keep="best", engine=engine)
    torch.testing.assert_close(attack.run(MODEL, x, y).loss[:4], torch.tensor(losses), rtol=0, atol=2e-4)
    assert dataclasses.replace(attack, keep="first").run(MODEL, x, y).success.sum() == fallen


@ENGINES
@pytest.mark.parametrize("norm", RADII)
def test_what_keep_says(norm, engine):
    x, y = batch()
    attack = APGD(norm=norm, eps=RADII[norm], steps=20, loss="dlr", engine=engine)
    first, last, best = (dataclasses.replace(attack, keep=k).run(MODEL, x, y) for k in ("first", "last", "best"))
    assert torch.equal(first.success, last.success)
    clean = MODEL(x).argmax(1) != y
    assert (first.success & ~clean).any()
    assert not first.success.all()
    for got in (first, last):
        assert torch.equal(got.success, MODEL(got.x_adv).argmax(1) != y)
        assert torch.equal(got.x_adv[clean | ~got.success], x[clean | ~got.success])
        assert (got.queries[clean] == 1).all()
        assert (got.queries[~got.success] == 1 + 21).all()
    assert (last.queries[~clean] == 1 + 21).all()
    assert (first.queries[first.success & ~clean] < 22).all()
    assert (best.queries == 21).all()
    assert (best.loss >= last.loss).all()
    for got in (first, last, best):
        assert got.path == engine
        torch.testing.assert_close(got.loss, DLR()(x, MODEL(got.x_adv), y)[0], rtol=1e-3, atol=1e-4)


@ENGINES
def test_is_stronger_than_pgd_of_as_many_steps(engine):
    x, y = batch(64)
    kw = {"eps": 8 / 255, "steps": 20, "keep": "best", "engine": engine}
    ours = APGD(**kw).run(MODEL, x, y)
    plain = PGD(step_size=8 / 255, **kw).run(MODEL, x, y)
    assert ours.loss.mean() > plain.loss.mean()


def test_more_steps_and_restarts_are_stronger():
    x, y = batch(48)
    means = [APGD(steps=k, keep="best").run(MODEL, x, y).loss.mean() for k in (1, 5, 50)]
    assert means == sorted(means)
    one, three = (APGD(steps=3, restarts=r, keep="best").run(MODEL, x, y) for r in (1, 3))
    assert (three.loss >= one.loss).all()
    assert (three.loss > one.loss).any()
    one, three = (APGD(steps=3, restarts=r).run(MODEL, x, y) for r in (1, 3))
    assert (three.success >= one.success).all()
    assert three.steps == 9


@ENGINES
def test_targeted_classes_find_what_the_untargeted_attack_does_not(engine):
    x, y = batch(48)
    simple = APGD(steps=30, engine=engine).run(MODEL, x, y).success
    result = APGDTargeted(steps=30, engine=engine).run(MODEL, x, y)
    assert (result.success >= simple).all()
    assert result.success.sum() > simple.sum()
    assert torch.equal(result.success, MODEL(result.x_adv).argmax(1) != y)
    assert (result.queries[~result.success] == 1 + 9 * 31).all()
    assert result.steps == 270
    few = APGDTargeted(steps=30, target_classes=2, engine=engine).run(MODEL, x, y)
    assert (few.queries[~few.success] == 1 + 2 * 31).all()
    many = APGDTargeted(steps=2, target_classes=99, engine=engine).run(MODEL, x, y)  # 9 other classes
    assert (many.queries[~many.success] == 1 + 9 * 3).all()


@ENGINES
def test_targets_are_reached(engine):
    x, _ = batch(16)
    y = torch.arange(16) % 10
    attack = APGD(eps=0.1, steps=20, targeted=True, keep="best", engine=engine)
    result = attack.run(MODEL, x, y)
    before = nn.functional.cross_entropy(MODEL(x), y, reduction="none")
    assert (result.loss < before).all()
    got = dataclasses.replace(attack, keep="first").run(MODEL, x, y)
    assert torch.equal(got.success, MODEL(got.x_adv).argmax(1) == y)
    assert got.success.any()


@ENGINES
def test_oracle_losses_go_through_the_teacher(engine):
    x, teacher = batch(16)[0], net(1)
    attack = APGD(eps=0.05, steps=10, loss=OracleL2(teacher), keep="best", engine=engine)
    result = attack.run(MODEL, x)
    assert (result.loss > (MODEL(x) - teacher(x)).square().sum(1)).all()
    if engine == "chain":  # a compiled teacher has a gradient as well
        compiled = dataclasses.replace(attack, loss=OracleL2(tsrfast.compile(teacher, (3, 8, 8))))
        assert torch.equal(compiled(tsrfast.compile(MODEL, (3, 8, 8)), x), result.x_adv)


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(list(RADII)), n=st.integers(1, 4), scale=st.floats(0, 2), steps=st.integers(0, 9),
    keep=st.sampled_from(["first", "last", "best"]), restarts=st.integers(1, 2), start=st.booleans(), seed=st.integers(0, 2**31),
    loss=st.sampled_from(["cross_entropy", "dlr", "margin", None]), targeted=st.booleans(), wider=st.booleans(),
    engine=st.sampled_from(["chain", "eager"]), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    each=st.booleans(),
)  # fmt: skip
def test_stays_in_ball_and_box(norm, n, scale, steps, keep, restarts, start, seed, loss, targeted, wider, engine, dtype, each):
    if dtype != torch.float32:
        engine = "eager"
    x, y = batch(n, seed % 1000, dtype)
    x, model = x.where(x > 0.1, 0).where(x < 0.9, 1), net(dtype=dtype)
    eps = torch.linspace(0.3, 1, n) * scale * RADII[norm] if each else scale * RADII[norm]
    kw = {"norm": norm, "eps": eps, "steps": steps, "restarts": restarts, "random_start": start, "seed": seed, "engine": engine}
    kw["larger_eps"] = wider and norm == "l1"
    if loss is None:
        attack = APGDTargeted(keep="last" if keep == "best" else keep, target_classes=2, **kw)
    else:
        attack = APGD(loss=loss, targeted=targeted, keep=keep, **kw)
    kept = x.clone()
    result = attack.run(model, x, y)
    p = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    distance = (result.x_adv.double() - x.double()).flatten(1).norm(p=p, dim=1)
    rounding = {"linf": 2, "l2": 4, "l1": 192}[norm] * torch.finfo(dtype).eps / 2
    # The radius itself is rounded to x's dtype in l2.
    assert (distance <= torch.as_tensor(eps, dtype=torch.float64) * (1 + 4 * torch.finfo(dtype).eps) + rounding).all()
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    assert result.x_adv.dtype == dtype
    assert result.x_adv.shape == x.shape
    assert torch.equal(x, kept)
    assert not result.x_adv.requires_grad
    if dtype != torch.bfloat16:  # there a batch of another size rounds otherwise
        hit = model(result.x_adv).argmax(1) == y
        assert torch.equal(result.success, hit if targeted and loss is not None else ~hit)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", [APGD(steps=12, restarts=2), APGD(steps=12, keep="best", loss="dlr"), APGDTargeted(steps=6)])
def test_does_not_depend_on_how_images_are_batched(norm, attack):
    """In float64, where no step hangs on the rounding of another batch's sums; on the chain path bit by bit."""
    attack = dataclasses.replace(attack, norm=norm, eps=RADII[norm], seed=3)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 0)):
        x, y = batch(7, dtype=dtype)
        model = net(dtype=dtype)
        attack = dataclasses.replace(attack, engine="chain" if dtype == torch.float32 else "eager")
        whole = attack.run(model, x, y)
        parts = [attack.run(model, x[i], y[i], index=i) for i in torch.tensor([0, 1, 2, 3, 4, 5, 6]).split([1, 4, 2])]
        torch.testing.assert_close(torch.cat([p.x_adv for p in parts]), whole.x_adv, rtol=0, atol=tolerance)
        assert torch.equal(torch.cat([p.queries for p in parts]), whole.queries)


@pytest.mark.parametrize("norm", RADII)
def test_other_boxes(norm):
    """Images in [-1, 1], and no box at all: the same attack, as long as the box is out of reach."""
    (x, y), eps = batch(6), 0.1 * RADII[norm]
    x = 0.4 + 0.2 * x
    kw = {"norm": norm, "eps": eps, "steps": 10, "keep": "best", "engine": "eager"}
    want = APGD(**kw).run(MODEL, x, y)
    free = APGD(lo=-math.inf, hi=math.inf, **kw).run(MODEL, x, y)
    torch.testing.assert_close(free.loss, want.loss, rtol=0, atol=1e-5)
    signed = APGD(lo=-1, **kw)(MODEL, x - 0.6, y)
    assert signed.min() >= -1
    assert signed.min() < 0


def test_radius_of_each_image():
    x, y = batch(3)
    eps = torch.tensor([0.0, 0.02, 0.2])
    moved = (APGD(eps=eps, steps=4, keep="best")(MODEL, x, y) - x).flatten(1).abs().amax(1)
    torch.testing.assert_close(moved, eps, rtol=0, atol=1e-6)


class Moody(nn.Module):
    """Batch norm, dropout and a random number in eval mode: everything an attack could disturb."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
        )

    def forward(self, x):
        return self.body(x + 1e-3 * torch.randn_like(x))


@pytest.mark.parametrize("attack", [APGD(steps=3, eot_iter=3, restarts=2), APGDTargeted(steps=2)])
def test_leaves_everything_as_it_was(attack):
    model = Moody().train()
    model.body[1].eval()  # a mixed mode must survive
    state = {k: v.clone() for k, v in model.state_dict().items()}
    (x, y), rng = batch(5), torch.get_rng_state()
    x.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            out = attack(model, x, y)
        assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True, True, True]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_averaged_over_draws():
    class Noisy(nn.Module):
        """z_0 - z_1 = <w + noise, x>: the mean gradient's signs are w's the more surely, the more draws."""

        calls = 0

        def forward(self, x):
            Noisy.calls += len(x)
            noise = 3 * torch.randn(x[0].numel())
            score = x.flatten(1) @ (torch.ones(x[0].numel()) + noise)
            return torch.stack([-score, score], 1)

    x = torch.full((2, 1, 6, 6), 0.5)
    result = {}
    for eot in (1, 64):
        Noisy.calls = 0
        got = APGD(eps=0.1, steps=1, eot_iter=eot, keep="best", loss="margin", random_start=False, engine="eager").run(
            Noisy(), x, torch.zeros(2).long()
        )
        assert got.queries.tolist() == [eot + 1] * 2
        assert Noisy.calls == 2 * (eot + 1)
        result[eot] = ((got.x_adv - x) > 0).double().mean()
    assert result[64] > 0.95 or result[64] == 0  # 0: the draw made the start look better
    assert result[1] < 0.8


def test_nan_gradients_are_counted_and_images_stay_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), (x - x).sqrt().sum((1, 2, 3))], 1)  # d sqrt(0) = inf, inf - inf = nan

    x, _ = batch(2)
    for norm, eps in RADII.items():
        result = APGD(norm=norm, eps=eps, steps=2, keep="best").run(Broken(), x, torch.tensor([0, 1]))
        assert result.x_adv.isfinite().all()
        assert result.bad_gradients.tolist() == [2 * 192, 2 * 192]


@pytest.mark.parametrize("attack", [APGD(), APGDTargeted(), APGD(keep="best", norm="l1", eps=2.0, larger_eps=True)])
def test_no_images_one_image_and_other_layouts(attack):
    x, y = batch(3)
    result = attack.run(MODEL, x[:0], y[:0])
    assert result.x_adv.shape == (0, 3, 8, 8)
    assert result.queries.shape == (0,)
    attack = dataclasses.replace(attack, steps=4, engine="eager")
    assert attack(MODEL, x[:1], y[:1]).shape == (1, 3, 8, 8)
    double, x64 = net(dtype=torch.float64), x.double()
    want = attack(double, x64, y)
    last = attack(double, x64.contiguous(memory_format=torch.channels_last), y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    view = x64.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for other in (last, attack(double, view, y)):
        torch.testing.assert_close(other, want, rtol=0, atol=1e-9)
    flat = nn.Sequential(nn.Unflatten(1, (3, 8, 8)), double)
    torch.testing.assert_close(attack(flat, x64.flatten(1), y), want.flatten(1), rtol=0, atol=1e-9)


def test_half_precision_keeps_its_direction_where_the_gradient_is_zero():
    class Flat(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :5]

    x = torch.rand(2, 3, 4, 4).half()
    for norm, eps in RADII.items():
        out = APGD(norm=norm, eps=eps, steps=5, keep="best", random_start=False)(Flat(), x, torch.tensor([0, 0]))
        assert torch.equal(out, x)


def test_plan():
    x, _ = batch(2)
    assert APGD().plan(MODEL, x).path == "chain"
    assert APGD(engine="eager").plan(MODEL, x).path == "eager"
    assert APGD().plan(tsrfast.compile(MODEL, (3, 8, 8))).path == "chain"
    assert "does not compile" in APGDTargeted().plan(Moody(), x).reason


X, Y = batch(2)
TWO = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
CHAIN = tsrfast.compile(MODEL, (3, 8, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: APGD(eps=math.inf), "eps must be finite, got inf"),
        (lambda: APGD(eps=torch.tensor([1.0, math.inf])), "eps must be finite"),
        (lambda: APGD(eps=-1), "eps must be >= 0, got -1"),
        (lambda: APGD(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: APGD(steps=True), "steps must be an integer >= 0, got True"),
        (lambda: APGD(restarts=0), "restarts must be an integer >= 1, got 0"),
        (lambda: APGD(eot_iter=0), "eot_iter must be an integer >= 1, got 0"),
        (lambda: APGD(rho=1.5), r"rho must be in \[0, 1\], got 1.5"),
        (lambda: APGD(norm="L2"), "unknown norm 'L2'"),
        (lambda: APGD(loss="dlrr"), "unknown loss 'dlrr'; did you mean 'dlr'"),
        (lambda: APGD(keep="lst"), "unknown keep 'lst'"),
        (lambda: APGDTargeted(keep="best"), "unknown keep 'best'"),
        (lambda: APGDTargeted(target_classes=0), "target_classes must be an integer >= 1"),
        (lambda: APGD(engine="gpu"), "unknown engine 'gpu'"),
        (lambda: APGD(larger_eps=True), "larger_eps needs norm='l1', got 'linf'"),
        (lambda: APGD()(MODEL, X), "y is needed by loss 'cross_entropy'"),
        (lambda: APGDTargeted()(MODEL, X), "y is needed by APGDTargeted"),
        (lambda: APGD(targeted=True, loss=OracleL2(MODEL))(MODEL, X), "targeted needs a loss with labels"),
        (lambda: APGD()(MODEL, X * 255, Y), "divide by 255"),
        (lambda: APGD()(MODEL, X, Y + 10), r"y must be in 0..9, the model's classes"),
        (lambda: APGD()(MODEL, X, Y.float()), "y must be int64 of shape"),
        (lambda: APGD(eps=torch.ones(3))(MODEL, X, Y), r"eps must be a number or of shape \(2,\)"),
        (lambda: APGD()(nn.Flatten(0), X, Y), "model must return logits"),
        (lambda: APGD(loss="dlr")(TWO, X, Y * 0), "loss 'dlr' needs a model of at least 3 classes, got 2"),
        (lambda: APGDTargeted()(TWO, X, Y * 0), "loss 'targeted_dlr' needs a model of at least 4 classes, got 2"),
        (lambda: APGD(loss=TargetedDLR(Y[:1]))(MODEL, X, Y), r"targets must be a number or of shape \(2,\), got \(1,\)"),
        (
            lambda: APGD(engine="chain")(net(dtype=torch.float64), X.double(), Y),
            "engine must be 'auto' or 'eager' for this call",
        ),
        (lambda: APGD()(CHAIN, torch.rand(2, 3, 9, 9), Y), r"x must have the shape \[N, 3, 8, 8\] that model was compiled for"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
