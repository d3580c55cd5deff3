"""MI-, NI-, DI-, TI-FGSM and PGD's momentum: equal to torchattacks where that is right, and to the formulas of the papers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import MIM, PGD, Diversity, Draw, OracleL2, Smoothing
from tsrfast.attacks.direction import Direction
from tsrfast.errors import InputError

ALL = {"nesterov": True, "diversity": Diversity(prob=0.7, resize_rate=0.7), "smoothing": Smoothing(length=3)}


def net(dtype=torch.float64, gate=nn.SiLU, seed=0):
    """With SiLU it does not compile."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3), gate(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)
        return nn.Sequential(*layers).to(dtype).eval()


def batch(n=8, dtype=torch.float64, seed=0):
    r = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 9, 9), generator=r).to(dtype) / 255
    return x, torch.randint(10, (n,), generator=r)


def placed(x, rate, size, top, left):
    """Resized and padded by PyTorch's own operations, from uniform numbers."""
    length = x.shape[-1]
    least = int(length * rate)
    small = least + int(size * (length - least))
    top, left = (int(u * (length - small)) for u in (top, left))
    x = F.interpolate(x, size=[small, small], mode="bilinear", align_corners=False)
    return F.pad(x, [left, length - small - left, top, length - small - top])


def textbook(model, x0, y, *, eps=8 / 255, alpha=2 / 255, steps=10, mu=1.0, nesterov=False, norm="linf", targeted=False):
    """The papers' formulas, as everyone writes them; one image at a time."""
    out = []
    for clean, label in zip(x0.split(1), y.split(1), strict=True):
        x, v = clean.clone(), torch.zeros_like(clean)
        for _ in range(steps):
            x = x.detach().requires_grad_()
            at = x + mu * alpha * v if nesterov else x
            (g,) = torch.autograd.grad((-1 if targeted else 1) * F.cross_entropy(model(at), label), x)
            v = mu * v + g / g.abs().mean()
            with torch.no_grad():
                if norm == "linf":
                    delta = (x + alpha * v.sign() - clean).clamp(-eps, eps)
                else:
                    delta = x + alpha * v / v.norm() - clean
                    delta = delta * min(1.0, eps / delta.norm().item())
                x = (clean + delta).clamp(0, 1)
        out.append(x.detach())
    return torch.cat(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mu": 0.7},
        {"nesterov": True},
        {"nesterov": True, "mu": 0.5},
        {"nesterov": True, "targeted": True},
        {"norm": "l2", "eps": 0.5, "alpha": 0.2},
    ],
)
def test_equals_the_formulas(options):
    model, (x, y) = net(), batch()
    names = {"mu": "momentum", "alpha": "step_size"}
    got = MIM(**{names.get(k, k): v for k, v in options.items()})(model, x, y)
    torch.testing.assert_close(got, textbook(model, x, y, **options), rtol=0, atol=1e-12)
    if options.get("mu") != 0.7 and options.get("norm") != "l2":
        plain = PGD(random_start=False)(model, x, y)
        assert ((got - plain).abs() > 1e-6).any()  # it makes a difference here


ORIGINALS = {
    "MIFGSM": MIM(),
    "NIFGSM": MIM(nesterov=True),
    "DIFGSM": MIM(momentum=0.0),
    "TIFGSM": MIM(momentum=0.0, smoothing=Smoothing()),
}
# torchattacks 3.5.1 with its defaults (but diversity_prob=0) on `net(torch.float32)`, `batch(8, torch.float32)`: sums of |x_adv - x| and
# of the cross-entropy.
RECORDED = {
    "MIFGSM": (59.4431361, 18.7861273),
    "NIFGSM": (57.6235282, 18.7813635),
    "DIFGSM": (58.7294106, 18.7861395),
    "TIFGSM": (59.7490186, 18.6345553),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_numbers_recorded_from_torchattacks(name):
    model, (x, y) = net(torch.float32), batch(8, torch.float32)
    got = ORIGINALS[name].run(model, x, y)
    change, loss = RECORDED[name]
    assert (got.x_adv - x).abs().double().sum().item() == pytest.approx(change, rel=1e-5)
    assert got.loss.double().sum().item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("targeted", [False, True])
def test_equals_torchattacks(name, targeted):
    """All pixels to one rounding (there x + step - x + x, here the bound itself); input diversity with the draws of the original."""
    torchattacks = pytest.importorskip("torchattacks")
    model, (x, y) = net(torch.float32), batch(8, torch.float32)
    original = getattr(torchattacks, name)(model)
    attack = dataclasses.replace(ORIGINALS[name], targeted=targeted)
    if targeted:
        original.set_mode_targeted_by_label(quiet=True)
    if hasattr(original, "input_diversity"):
        attack = dataclasses.replace(attack, diversity=lambda x, draw: original.input_diversity(x))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        want = original(x, y)
        torch.manual_seed(5)
        got = attack(model, x, y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_momentum_of_pgd_is_that_of_mim():
    model, (x, y) = net(), batch()
    assert torch.equal(PGD(random_start=False, momentum=0.9)(model, x, y), MIM(momentum=0.9)(model, x, y))
    assert torch.equal(
        PGD(restarts=2, momentum=0.9)(model, x, y), MIM(momentum=0.9, restarts=2, random_start=True)(model, x, y)
    )
    assert torch.equal(MIM(momentum=0.0)(model, x, y), PGD(random_start=False)(model, x, y))


def test_diversity_is_resizing_and_padding():
    x, _ = batch(40)
    draw = Draw(3, torch.arange(40), 5)
    numbers = draw.uniform(4).double()
    got = Diversity(prob=1.0, resize_rate=0.6)(x, draw)
    for image, shown, (_, size, top, left) in zip(x.split(1), got.split(1), numbers, strict=True):
        torch.testing.assert_close(shown, placed(image, 0.6, size, top, left), rtol=0, atol=1e-12)
    assert (got[:, :, :, -1] == 0).all(2).all(1).any()  # never as large as the image
    for prob in (0.0, 0.4):
        some = Diversity(prob=prob, resize_rate=0.6)(x, draw)
        changed = numbers[:, 0] < prob
        assert torch.equal(some[~changed], x[~changed])
        assert torch.equal(some[changed], got[changed])
    # The gradient is that of PyTorch's operations, too.
    leaf = x[:1].clone().requires_grad_()
    weight = torch.linspace(0, 1, x[0].numel(), dtype=x.dtype).reshape(1, *x.shape[1:])
    grads = [
        torch.autograd.grad((weight * f(leaf)).sum(), leaf)[0]
        for f in (lambda t: Diversity(1.0, 0.6)(t, Draw(3, torch.tensor([0]), 5)), lambda t: placed(t, 0.6, *numbers[0, 1:]))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_diversity_of_images_that_are_not_square():
    x = torch.ones(30, 1, 20, 10)
    got = Diversity(prob=1.0, resize_rate=0.5)(x, Draw(0, torch.arange(30), 0))
    assert got.shape == x.shape
    tall, wide = (got.amax(d).count_nonzero(1) for d in ((1, 3), (1, 2)))
    assert (tall >= 10).all()
    assert (tall < 20).all()
    assert (wide >= 5).all()
    assert (wide < 10).all()
    assert len(tall.unique()) > 3


def test_every_step_draws_anew():
    draws = []

    def note(x, draw):
        draws.append((draw.number, draw.index.tolist(), draw.uniform(2)))
        return x

    model, (x, y) = net(), batch(2)
    MIM(steps=3, restarts=2, seed=4, diversity=note)(model, x, y, index=torch.tensor([7, 5]))
    assert [(number, index) for number, index, _ in draws] == [(k, [7, 5]) for k in range(6)]
    numbers = torch.cat([u for _, _, u in draws])
    assert len(numbers.unique()) == 24
    assert torch.equal(draws[3][2], Draw(4, torch.tensor([7, 5]), 3).uniform(2))


def test_kernels():
    for kernel in ("gaussian", "uniform", "linear"):
        w = Smoothing(kernel, 5, 2.0).weights()
        assert w.sum().item() == pytest.approx(1)
        assert torch.equal(w, w.flip(0))
        assert torch.equal(w, w.T)
    line = torch.tensor([math.exp(-(s**2) / 2) for s in (-2, -1, 0, 1, 2)], dtype=torch.float64)
    torch.testing.assert_close(Smoothing("gaussian", 5, 2.0).weights(), torch.outer(line, line) / line.sum() ** 2)
    line = torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64)
    torch.testing.assert_close(Smoothing("linear", 5).weights(), torch.outer(line, line) / 81)
    assert torch.equal(Smoothing(length=1).weights(), torch.ones(1, 1, dtype=torch.float64))
    g = torch.rand(2, 3, 8, 8)
    want = F.avg_pool2d(g, 3, 1, 1)
    torch.testing.assert_close(Smoothing("uniform", 3)(g), want)


def test_kernels_are_those_of_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    for kernel in ("gaussian", "uniform", "linear"):
        theirs = torchattacks.TIFGSM(net(), kernel_name=kernel).stacked_kernel
        torch.testing.assert_close(Smoothing(kernel).weights().float(), theirs[0, 0], rtol=1e-6, atol=0)


def test_a_velocity_survives_a_gradient_of_zero():
    """In torchattacks 0 / 0 makes it NaN for ever."""
    d, v = Direction(0.5), torch.rand(2, 3, 4, 4)
    assert torch.equal(d.next(v, torch.zeros_like(v)), v * 0.5)
    x = torch.rand(2, 3, 4, 4)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    nn.init.zeros_(flat[1].weight)
    got = MIM(**ALL, engine="eager").run(flat, x, torch.tensor([0, 1]))
    assert torch.equal(got.x_adv, x)
    assert (got.bad_gradients == 0).all()


def test_nan_gradients_are_counted_and_images_stay_finite():
    class Half(nn.Module):
        """Broken in the upper half of the pixels."""

        def forward(self, x):
            top, rest = x[:, :, :4], x[:, :, 4:]
            return torch.stack([rest.sum((1, 2, 3)) * 3, (top - top).sqrt().sum((1, 2, 3)) + rest.square().sum((1, 2, 3))], 1)

    x, _ = batch(3)
    for options in ({}, ALL):
        got = MIM(steps=3, **options).run(Half(), x, torch.tensor([0, 1, 0]))
        assert got.x_adv.isfinite().all()
        assert ((got.x_adv - x).abs() <= 8 / 255 + 1e-12).all()
        assert (got.bad_gradients > 0).all()
    assert MIM(steps=3).run(Half(), x, torch.tensor([0, 1, 0])).bad_gradients.tolist() == [3 * 3 * 4 * 9] * 3


def test_compiled_networks_under_the_loop_in_python():
    model, (x, y) = net(torch.float32, nn.ReLU), batch(16, torch.float32)
    teacher = net(torch.float32, nn.ReLU, seed=1)
    for attack in (MIM(), MIM(**ALL), PGD(momentum=1.0, loss=OracleL2(teacher), early_stop=True)):
        route = attack.plan(model, x)
        assert str(route) == "chain: every network compiles, under the loop in Python: native code has no momentum"
        a, b = (dataclasses.replace(attack, engine=e).run(model, x, y) for e in ("chain", "eager"))
        assert (a.path, b.path) == ("chain", "eager")
        assert ((a.x_adv - b.x_adv).abs() > 1e-4).double().mean() < 0.01
        assert (a.success != b.success).sum() <= 1
        assert torch.equal(attack(tsrfast.compile(model, x), x, y), a.x_adv)
    assert MIM().plan(net(), x.double()).path == "eager"
    assert PGD(momentum=0.0).plan(model, x).reason == "every network compiles"
    with pytest.raises(InputError, match="model does not compile"):
        MIM(engine="chain").plan(net(torch.float32), x)


def test_a_teacher_runs_in_eval_mode_and_keeps_its_mode():
    model, (x, _) = net(torch.float32), batch(4, torch.float32)
    teacher = nn.Sequential(nn.Dropout(0.9), net(torch.float32, seed=1))
    attack = MIM(loss=OracleL2(teacher))
    want = attack(model, x)
    assert torch.equal(MIM(loss=OracleL2(teacher.eval()))(model, x), want)
    teacher.train()
    attack(model, x)
    assert teacher.training


@pytest.mark.parametrize("options", [{}, ALL, {"nesterov": True, "targeted": True}])
def test_early_stop_follows_each_image(options):
    """What stands is what it is alone; what fell is returned where it fell first."""
    model, (x, _) = net(), batch(24)
    y = (model(x).argmax(1) + bool(options.get("targeted"))) % 10
    attack = MIM(eps=0.02, step_size=0.005, steps=6, early_stop=True, restarts=2, random_start=True, **options)
    got = attack.run(model, x, y)
    assert 0 < got.success.sum() < 24
    assert len(got.queries.unique()) > 1
    for i in {0, 7, 23, *got.success.nonzero().flatten().tolist()[:4]}:
        alone = attack.run(model, x[i : i + 1], y[i : i + 1], index=torch.tensor([i]))
        torch.testing.assert_close(alone.x_adv[0], got.x_adv[i], rtol=0, atol=1e-9)
        assert alone.queries[0] == got.queries[i]
    best = dataclasses.replace(attack, early_stop=False, keep="best").run(model, x, y)
    assert torch.equal(best.success, got.success)
    wrong = model(got.x_adv).argmax(1) == y if options.get("targeted") else model(got.x_adv).argmax(1) != y
    assert torch.equal(wrong, got.success)


def test_callbacks_see_the_iterate_itself():
    model, (x, y) = net(), batch(3)
    seen = []
    got = MIM(steps=3, **ALL, on_step=seen.append).run(model, x, y)
    assert len(seen) == 3
    assert torch.equal(seen[0].x, x)
    torch.testing.assert_close(seen[1].logits, model(seen[1].x))
    assert (got.queries == 3 * 2 + 1).all()
    assert torch.equal(got.x_adv, MIM(steps=3, **ALL)(model, x, y))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3), norm=st.sampled_from(["linf", "l2", "l1"]), mu=st.floats(0, 2), nesterov=st.booleans(),
    prob=st.one_of(st.none(), st.floats(0, 1)), length=st.sampled_from([None, 1, 3, 15]), steps=st.integers(0, 4),
    keep=st.sampled_from(["last", "best"]), early=st.booleans(), targeted=st.booleans(), start=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), last=st.booleans(), ends=st.booleans(),
)  # fmt: skip
def test_stays_in_ball_and_box(n, norm, mu, nesterov, prob, length, steps, keep, early, targeted, start, dtype, last, ends):
    model = net(dtype).train()
    x, y = batch(n, dtype)
    if ends:
        x = x.round()
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept, rng = x.clone(), torch.get_rng_state()
    eps = torch.linspace(0, 0.1, n, dtype=torch.float64) * {"linf": 1, "l2": 5, "l1": 50}[norm]
    attack = MIM(
        norm=norm, eps=eps, step_size=eps / 2, steps=steps, momentum=mu, nesterov=nesterov, keep=keep, early_stop=early,
        diversity=None if prob is None else Diversity(prob), smoothing=None if length is None else Smoothing(length=length),
        targeted=targeted, random_start=start,
    )  # fmt: skip
    got = attack.run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert (got.x_adv.shape, got.x_adv.dtype) == (x.shape, dtype)
    assert not got.x_adv.requires_grad
    if n:
        assert got.x_adv.stride() == x.stride()
        assert got.x_adv.min() >= 0
        assert got.x_adv.max() <= 1
        delta = (got.x_adv.double() - x.double()).flatten(1)
        size = delta.norm(dim=1, p={"linf": math.inf, "l2": 2, "l1": 1}[norm])
        slack = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
        assert (size <= eps * (1 + slack) + slack * (8e-1 if norm == "linf" else x[0].numel() * 0.5)).all()
        if dtype == torch.float64:
            again = [attack_of(attack, eps, i)(model, x[i : i + 1], y[i : i + 1], index=torch.tensor([i])) for i in range(n)]
            torch.testing.assert_close(torch.cat(again), got.x_adv, rtol=0, atol=1e-6)


def attack_of(attack, eps, i):
    return dataclasses.replace(attack, eps=eps[i : i + 1], step_size=eps[i : i + 1] / 2)


def test_batches_change_no_bit_on_the_chain():
    model, (x, y) = net(torch.float32, nn.ReLU), batch(11, torch.float32)
    attack, index = MIM(**ALL, random_start=True, engine="chain"), torch.arange(11)
    whole = attack(model, x, y)
    for cut in (1, 4):
        parts = [attack(model, a, b, index=i) for a, b, i in zip(x.split(cut), y.split(cut), index.split(cut), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(
        dataclasses.replace(attack, seed=1, random_start=False)(model, x, y),
        dataclasses.replace(attack, random_start=False)(model, x, y),
    )


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, ALL])
def test_targeted_lowers_and_untargeted_raises_the_loss(options):
    model, (x, y) = net(), batch()
    before = F.cross_entropy(model(x), y, reduction="none")
    for targeted in (True, False):
        losses = [MIM(eps=0.1, steps=s, targeted=targeted, **options).run(model, x, y).loss for s in (1, 4, 10)]
        sign = -1 if targeted else 1
        assert (sign * (losses[-1] - before) > 0).all()
        assert sign * losses[0].mean() < sign * losses[1].mean() < sign * losses[2].mean()


X, Y = batch(2, torch.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PGD(momentum=-0.1), "momentum must be >= 0 and finite, got -0.1"),
        (lambda: MIM(momentum=math.nan), "momentum must be >= 0 and finite, got nan"),
        (lambda: MIM(diversity=0.5), "diversity must be a function of images and a Draw, or None, got float"),
        (lambda: MIM(smoothing=15), "smoothing must be a Smoothing or None, got int"),
        (lambda: Diversity(prob=1.5), r"prob must be in \[0, 1\], got 1.5"),
        (lambda: Diversity(resize_rate=1.0), r"resize_rate must be in \(0, 1\), got 1.0"),
        (lambda: Smoothing("gauss"), "unknown kernel 'gauss'; did you mean 'gaussian'"),
        (lambda: Smoothing(length=4), "length must be odd, got 4"),
        (lambda: Smoothing(length=0), "length must be an integer >= 1, got 0"),
        (lambda: Smoothing(sigma=0), "sigma must be > 0 and finite, got 0"),
        (lambda: MIM(steps=-1), "steps must be an integer >= 0, got -1"),
        (lambda: MIM()(net(), X * 255, Y), "divide by 255"),
        (lambda: MIM()(net(torch.float32), X, Y.float()), "y must be int64"),
        (lambda: MIM(diversity=Diversity())(nn.Linear(9, 10), X[:, 0, 0], Y), r"x must be images \[N, C, H, W\] for Diversity"),
        (lambda: MIM(smoothing=Smoothing())(nn.Linear(9, 10), X[:, 0, 0], Y), r"x must be images \[N, C, H, W\] for Smoothing"),
        (
            lambda: MIM(diversity=lambda x, draw: F.pad(x, [1] * 4))(net(torch.float32, nn.ReLU), X, Y),
            r"x must be float32 \[N, 3, 9, 9\] on the CPU",
        ),
    ],
)  # fmt: skip
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
