from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tsrfast.attacks import FGSM, PGD, OracleL2
from tsrfast.errors import InputError

ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])
NORMS = {"linf": (0.05, 0.02), "l2": (0.7, 0.2), "l1": (4.0, 1.0)}


def net(seed=0, width=6, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
        ).to(dtype)


def batch(n=5, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=r, dtype=dtype), torch.randint(10, (n,), generator=r)


def textbook_linf(model, x0, y, eps, step, steps, start, objective):
    """Madry et al. as everyone writes it: autograd, sign, clamp."""
    x = start.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(objective(model(x), x, y), x)
        with torch.no_grad():
            x = x + step * g.sign()
            x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
    return x.detach()


def ce(logits, x, y):
    return F.cross_entropy(logits, y, reduction="sum")


def test_equals_the_textbook_bit_for_bit():
    model, (x, y) = net().eval(), batch()
    got = PGD(eps=8 / 255, step_size=2 / 255, steps=7, random_start=False, engine="eager")(model, x, y)
    assert torch.equal(got, textbook_linf(model, x, y, 8 / 255, 2 / 255, 7, x, ce))


@ENGINES
def test_oracle_l2_equals_the_textbook_with_gradient_through_both_nets(engine):
    student, teacher, (x, _) = net(), net(1), batch()
    attack = PGD(eps=10 / 255, step_size=0.01, steps=6, loss=OracleL2(teacher), random_start=False, engine=engine)
    want = textbook_linf(student, x, None, 10 / 255, 0.01, 6, x, lambda s, x, y: (s - teacher(x)).square().sum())
    # A loss grouped otherwise rounds otherwise: compare what can flip only where the gradient is nearly 0.
    assert ((attack(student, x) - want).abs() > 1e-6).double().mean() < 0.01
    frozen = textbook_linf(student, x, None, 10 / 255, 0.01, 6, x, lambda s, x, y: (s - teacher(x).detach()).square().sum())
    assert ((attack(student, x) - frozen).abs() > 1e-6).double().mean() > 0.05  # the teacher's share of the gradient matters


@ENGINES
def test_linear_model_has_a_closed_form(engine):
    """For logits W x the strongest linf perturbation of the 2-class margin is eps * sign(w1 - w0)."""
    w = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    model[1].weight.data = w
    x, y = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])
    got = PGD(eps=0.1, step_size=0.03, steps=10, loss="margin", engine=engine)(model, x, y)
    torch.testing.assert_close(got, (x + 0.1 * (w[1] - w[0]).sign().reshape(x.shape)).clamp(0, 1))
    got = PGD(norm="l2", eps=0.3, step_size=0.1, steps=30, loss="margin", engine=engine)(model, x, y)
    torch.testing.assert_close(got, x + 0.3 * F.normalize(w[1] - w[0], dim=0).reshape(x.shape), rtol=0, atol=1e-4)
    # l1: the optimum is to spend everything on the largest coordinate (it has room for 0.3)
    got = PGD(norm="l1", eps=0.3, step_size=0.1, steps=30, loss="margin", engine=engine)(model, x, y)
    best = (w[1] - w[0]).abs().argmax()
    assert abs((got - x).flatten()[best].abs().item() - 0.3) < 1e-3


def test_fgsm_is_one_step():
    model, (x, y) = net(), batch()
    want = textbook_linf(model, x, y, 0.03, 0.03, 1, x, ce)
    assert torch.equal(FGSM(eps=0.03, engine="eager")(model, x, y), want)
    assert ((FGSM(eps=0.03, step_size=0.01)(model, x, y) - x).abs().max() - 0.01).abs() < 1e-6


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(list(NORMS)), n=st.integers(1, 4), scale=st.floats(0, 2), steps=st.integers(0, 4),
    keep=st.sampled_from(["last", "best"]), restarts=st.integers(1, 2), start=st.booleans(), seed=st.integers(0, 2**31),
    loss=st.sampled_from(["cross_entropy", "margin"]), targeted=st.booleans(), early_stop=st.booleans(),
    engine=st.sampled_from(["chain", "eager"]),
)  # fmt: skip
def test_stays_in_ball_and_box(norm, n, scale, steps, keep, restarts, start, seed, loss, targeted, early_stop, engine):
    eps, size = (scale * v for v in NORMS[norm])
    x, y = batch(n, seed % 1000)
    attack = PGD(norm=norm, eps=eps, step_size=size, steps=steps, keep=keep, restarts=restarts, random_start=start, seed=seed,
                 loss=loss, targeted=targeted, early_stop=early_stop, engine=engine)  # fmt: skip
    result = attack.run(net(), x, y)
    p = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    distance = (result.x_adv.double() - x.double()).flatten(1).norm(p=p, dim=1)
    assert (distance <= eps + {"linf": 1, "l2": 4, "l1": 192}[norm] * 6e-8).all()  # one rounding a pixel
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    assert result.x_adv.dtype == x.dtype
    assert result.steps == steps * restarts
    hit = net()(result.x_adv).argmax(1) == y
    assert torch.equal(result.success, hit if targeted else ~hit)


def close_attacks(a, b, share):
    """Adversarial images that agree but for a `share` of pixels: a sign flips where a gradient is zero up to rounding."""
    return ((a - b).abs() > 1e-5).double().mean().item() <= share


@pytest.mark.parametrize("norm", NORMS)
def test_batch_size_and_threads_do_not_matter(norm):
    """One image at a time, or all at once, on 1 or 2 threads. In float64 the images agree to 1e-9: PyTorch's convolutions sum in
    another order at another batch size (1e-16 relative), and no gradient is that close to a change of sign.
    In float32 (1e-7 relative) single pixels may flip; at most 2 % do after 6 steps."""
    eps, size = NORMS[norm]
    before = torch.get_num_threads()
    for dtype, share, tolerance in ((torch.float64, 0.0, 1e-9), (torch.float32, 0.02, None)):
        student, teacher, (x, _) = net(dtype=dtype), net(1, dtype=dtype), batch(8, dtype=dtype)
        attack = PGD(norm=norm, eps=eps, step_size=size, steps=6, loss=OracleL2(teacher), seed=5)
        try:
            torch.set_num_threads(1)
            whole = attack(student, x)
            torch.set_num_threads(2)
            single = torch.cat([attack(student, x[i : i + 1], index=torch.tensor([i])) for i in range(len(x))])
        finally:
            torch.set_num_threads(before)
        if tolerance is not None:
            torch.testing.assert_close(whole, single, rtol=0, atol=tolerance)
        assert close_attacks(whole, single, share)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_depends_on_seed_image_and_restart_alone(norm):
    eps, size = NORMS[norm]
    model, (x, y) = net(), batch(6)
    attack = PGD(norm=norm, eps=eps, step_size=size, steps=0)
    start = attack(model, x, y)
    part = attack(model, x[3:], y[3:], index=torch.tensor([3, 4, 5]))
    torch.testing.assert_close(start[3:], part, rtol=0, atol=0 if norm == "linf" else 1e-6)
    assert not torch.equal(start, attack(model, x, y, index=torch.arange(6) + 1))
    assert not torch.equal(start, dataclasses.replace(attack, seed=1)(model, x, y))
    seen = []
    dataclasses.replace(attack, steps=1, restarts=3, on_step=lambda s: seen.append(s.x))(model, x, y)
    assert torch.equal(seen[0], start)
    assert not torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[2], seen[1])


def test_random_starts_fill_their_balls():
    """Radii of uniform points: |d| / eps of linf is near 1 in high dimension; in l2, (r / eps)^D is uniform; l1 sums stay inside."""
    x = torch.full((256, 1, 5, 5), 0.5)
    model = nn.Flatten()
    for norm, p in (("l2", 2), ("l1", 1)):
        r = (PGD(norm=norm, eps=0.2, step_size=0, steps=0, loss=OracleL2(model))(model, x) - x).flatten(1).norm(
            p=p, dim=1
        ) / 0.2
        u = r**25
        assert r.max() <= 1 + 1e-6
        assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 16
    d = (PGD(eps=0.2, step_size=0, steps=0, loss=OracleL2(model))(model, x) - x).flatten() / 0.2
    assert abs(d.mean()) < 5 * 3**-0.5 / 80
    assert abs(d.square().mean() - 1 / 3) < 0.02


@ENGINES
def test_best_is_at_least_as_strong_as_last_and_restarts_help(engine):
    student, teacher, (x, _) = net(), net(1), batch(32)
    base = PGD(
        eps=0.1, step_size=0.09, steps=5, loss=OracleL2(teacher), engine=engine
    )  # so long that the loss goes up and down
    last, best = base.run(student, x), dataclasses.replace(base, keep="best").run(student, x)
    stronger = best.success & ~last.success
    assert ((best.loss >= last.loss) | stronger).all()
    assert (best.loss > last.loss).any()
    three = dataclasses.replace(base, restarts=3).run(student, x)
    assert ((three.loss >= last.loss) | (three.success & ~last.success)).all()
    recomputed = (student(three.x_adv) - teacher(three.x_adv)).square().sum(1)
    torch.testing.assert_close(three.loss, recomputed.detach(), rtol=1e-4, atol=1e-6)


@ENGINES
def test_targeted_lowers_the_loss_of_the_target(engine):
    model, (x, y) = net(), batch(16)
    attack = PGD(eps=0.1, step_size=0.02, steps=10, targeted=True, engine=engine)
    before, after = (F.cross_entropy(model(v), y, reduction="none") for v in (x, attack(model, x, y)))
    assert (after < before).all()


def test_more_steps_are_stronger_on_average():
    student, teacher, (x, _) = net(), net(1), batch(32)
    losses = [
        PGD(steps=k, loss=OracleL2(teacher), eps=0.05, step_size=0.005).run(student, x).loss.mean() for k in (0, 2, 8, 20)
    ]
    assert losses == sorted(losses)


def test_loss_rises_for_nearly_every_image():
    """After 40 steps the loss is at least that of the clean image for > 99 % of images."""
    student, teacher, (x, _) = net(), net(1), batch(200)
    result = PGD(eps=10 / 255, step_size=0.01, steps=40, loss=OracleL2(teacher)).run(student, x)
    clean = (student(x) - teacher(x)).square().sum(1)
    assert (result.loss >= clean).double().mean() > 0.99


@ENGINES
def test_student_equal_to_its_teacher_is_left_at_the_random_start(engine):
    """s = t has oracle gradient 0, sign(0) = 0, robust accuracy 100 %."""
    student, (x, _) = net(), batch(8)
    attack = PGD(steps=5, loss=OracleL2(net()), engine=engine)
    result = attack.run(student, x)
    assert torch.equal(result.x_adv, dataclasses.replace(attack, steps=0)(student, x))
    assert not result.success.any()


class Moody(nn.Module):
    """Batch norm, dropout, a frozen part, a hook: everything an attack could disturb."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
        )
        self.body[0].weight.requires_grad_(False)

    def forward(self, x):
        return self.body(x)


@ENGINES
def test_leaves_everything_as_it_was(engine):
    model, teacher, (x, _) = Moody(), Moody(), batch()
    model.train()
    model.body[1].eval()  # a mixed mode must survive
    teacher.train()
    model.body[5].weight.grad = torch.ones_like(model.body[5].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x.requires_grad_()
    kept, rng = x.detach().clone(), torch.get_rng_state()
    out = PGD(steps=3, loss=OracleL2(teacher), engine=engine)(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True, True, True]
    assert all(m.training for m in teacher.modules())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not model.body[0].weight.requires_grad
    assert model.body[5].weight.requires_grad
    assert torch.equal(model.body[5].weight.grad, torch.ones_like(model.body[5].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "body.5.weight")
    assert torch.equal(x, kept)
    assert x.grad is None
    assert not out.requires_grad


def test_modes_come_back_after_an_exception():
    model, (x, y) = Moody().train(), batch()

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PGD(on_step=stop)(model, x, y)
    assert all(m.training for m in model.modules())


@ENGINES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_around_it(context, engine):
    model, (x, y) = net(), batch()
    with context():
        inside = PGD(steps=3, engine=engine)(model, x.clone(), y)
    assert torch.equal(inside.clone(), PGD(steps=3, engine=engine)(model, x, y))


def test_callback_sees_every_step():
    model, (x, y) = net(), batch()
    seen = []
    PGD(steps=3, restarts=2, on_step=seen.append)(model, x, y)
    assert [(s.restart, s.step) for s in seen] == [(r, k) for r in range(2) for k in range(3)]
    torch.testing.assert_close(seen[1].logits, model(seen[1].x).detach())
    torch.testing.assert_close(seen[1].loss, F.cross_entropy(seen[1].logits, y, reduction="none"))


def test_memory_formats_and_views():
    """channels_last, expanded and transposed images give what their contiguous copies give, up to rounding of the convolutions."""
    model, (x, y) = net(dtype=torch.float64), batch(dtype=torch.float64)
    want = PGD(steps=4)(model, x, y)
    last = PGD(steps=4)(model, x.contiguous(memory_format=torch.channels_last), y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    view = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for other in (last, PGD(steps=4)(model, view, y)):
        torch.testing.assert_close(other, want, rtol=0, atol=1e-9)
    same = x[:1].expand(3, -1, -1, -1)
    assert PGD(steps=2)(model, same, y[:3]).shape == same.shape


@ENGINES
def test_per_image_radius(engine):
    model, (x, y) = net(), batch(3)
    eps = torch.tensor([0.0, 0.02, 0.2])
    moved = (PGD(eps=eps, step_size=eps / 2, steps=4, engine=engine)(model, x, y) - x).flatten(1).abs().amax(1)
    torch.testing.assert_close(moved, eps, rtol=0, atol=1e-6)


def test_nan_gradients_are_counted_and_images_stay_finite():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.stack([x.sum((1, 2, 3)), (x - x).sqrt().sum((1, 2, 3))], 1)  # d sqrt(0) = inf, inf - inf = nan

    x, _ = batch(2)
    result = PGD(steps=2).run(Broken(), x, torch.tensor([0, 1]))
    assert result.x_adv.isfinite().all()
    assert result.bad_gradients.tolist() == [2 * 192, 2 * 192]


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().flatten(1)


X, Y = batch(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PGD(eps=-1e-3), "eps must be >= 0, got -0.001"),
        (lambda: PGD(eps=float("nan")), "eps must be >= 0, got nan"),
        (lambda: PGD(eps=torch.tensor([0.1, -0.5])), "eps must be >= 0, got -0.5"),
        (lambda: PGD(step_size=-1), "step_size must be >= 0, got -1"),
        (lambda: PGD(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: PGD(steps=2.5), "steps must be an integer >= 0, got 2.5"),
        (lambda: PGD(restarts=0), "restarts must be an integer >= 1, got 0"),
        (lambda: PGD(norm="L2"), "unknown norm 'L2'; did you mean 'l2'"),
        (lambda: PGD(loss="cross_entrpy"), "unknown loss 'cross_entrpy'; did you mean 'cross_entropy'"),
        (lambda: PGD(loss=F.cross_entropy), "loss must be a name .* or a Loss"),
        (lambda: PGD(keep="first"), "unknown keep 'first'"),
        (lambda: PGD(lo=1.0), "lo must be < hi"),
        (lambda: PGD()(net(), X), "y is needed by loss 'cross_entropy'"),
        (lambda: PGD(targeted=True, loss=OracleL2(net()))(net(), X), "targeted needs a loss with labels"),
        (lambda: PGD()(net(), X * 255, Y), r"x must be pixels in \[0, 1\], got values in .*divide by 255"),
        (lambda: PGD()(net(), X - 0.5, Y), r"x must be pixels in \[0, 1\], got values in \[-0"),
        (lambda: PGD()(net(), X.where(X > 0.5, torch.nan), Y), "x must be finite, got NaN"),
        (lambda: PGD(lo=-math.inf, hi=math.inf)(net(), X / 0, Y), "x must be finite"),
        (lambda: PGD()(net(), (X * 255).byte(), Y), "x must be a floating-point tensor .* got torch.uint8"),
        (lambda: PGD()(net(), X, Y + 10), r"y must be in 0..9, the model's classes, got 1\d"),
        (lambda: PGD()(net(), X, -1 - Y), r"y must be in 0..9"),
        (lambda: PGD()(net(), X, Y.float()), "y must be int64 of shape"),
        (lambda: PGD()(net(), X, Y[:1]), r"y must be int64 of shape \(2,\), got torch.int64 of shape \(1,\)"),
        (lambda: PGD()(net(), X, Y, index=torch.arange(3)), "index must be int64 of shape"),
        (lambda: PGD(eps=torch.ones(3))(net(), X, Y), r"eps must be a number or of shape \(2,\)"),
        (lambda: PGD()(nn.Flatten(0), X, Y), "model must return logits"),
        (lambda: PGD()(Detached(), X, Y), "model must be differentiable"),
        (lambda: PGD(loss=OracleL2(nn.Flatten()))(net(), X), "teacher must give the student's logits"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
