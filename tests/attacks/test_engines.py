"""Native loop and PyTorch loop: the same attack, whatever is given to it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import tsrfast
from tsrfast.attacks import (
    APGD,
    FGSM,
    PGD,
    CrossEntropy,
    DeepFool,
    Margin,
    OracleCrossEntropy,
    OracleKL,
    OracleL2,
    OracleMargin,
    OracleMaxDifference,
    Square,
    native,
)
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.ops.chain import chain_pgd
from tsrfast.reference import pgd_step

NORMS = {"linf": (0.05, 0.02), "l2": (0.7, 0.2), "l1": (4.0, 1.0)}
LABELLED, ORACLES = (CrossEntropy, Margin), (OracleL2, OracleCrossEntropy, OracleMargin, OracleKL, OracleMaxDifference)
BOTH = pytest.mark.parametrize("engine", ["chain", "eager"])
IMAGE = (3, 10, 10)


# Wide: in a narrow network whole channels may be dead, and little is left to compare.
def net(seed=0, widths=(24, 20), image=IMAGE):
    return ConvReLU(widths, image=image, seed=seed).eval()


def batch(n=5, seed=0, image=IMAGE):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *image, generator=r), torch.randint(10, (n,), generator=r)


def make(loss, teacher):
    return loss(teacher) if loss in ORACLES else loss()


def clear(model, x):
    """bool [N]: no ReLU of `model` is so near to its kink, relative to its layer's largest input, that rounding may decide."""
    sure = torch.ones(len(x), dtype=torch.bool)
    for conv in model.convs:
        z = conv(x)
        sure &= z.abs().flatten(1).amin(1) > 2e-6 * z.abs().flatten(1).amax(1)
        x = z.relu()
    return sure


def gradients(loss, student, teacher, x, y):
    """float64 gradient of the loss at x [N, ...], by autograd on the modules; and for which images it is safe from kinks."""
    s, t = student.double(), teacher.double()
    leaf = x.double().requires_grad_()
    value, _ = make(loss, t)(leaf, s(leaf), y)
    (g,) = torch.autograd.grad(value.sum(), leaf)
    with torch.no_grad():
        return g, clear(s, leaf) & clear(t, leaf)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [*LABELLED, *ORACLES])
def test_every_step_follows_the_exact_gradient(loss, norm):
    """The native loop's iterates, each against one step along the float64 gradient at the iterate before.

    linf: the same float32 image bit for bit, except pixels where |g| <= 2e-5 max |g| of the image. The chain's gradient is off by
    some 1e-6 of the largest (float32 has 6e-8 an operation; F(4x4, 3x3) transforms lose a factor of about ten), so above that bound
    a sign cannot differ. A pixel drawn from a spread-out gradient is below it with a chance of about 1e-4.
    l2: the step's direction is a smooth function of g: 1e-4 of the step's length.
    l1: as l2 where it is clear which coordinates are the largest 1 % (the next one smaller by 1e-4); the step's length is shared
    equally, so g itself does not matter.
    """
    eps, size = NORMS[norm]
    student, teacher = net(), net(1, (22, 18))
    n, steps = 8, 6
    x0, y = batch(n)
    start = PGD(norm=norm, eps=eps, step_size=size, steps=0, engine="chain")(student, x0, y)
    chains = [tsrfast.compile(m) for m in (student, teacher)]
    pairs = [(c.plan, c.packed) for c in chains]
    labelled = loss in LABELLED
    got = chain_pgd(
        x0, start, pairs[0], None if labelled else pairs[1], y if labelled else None, loss=loss.name, norm=norm, eps=eps,
        step_size=size, steps=steps, lo=0.0, hi=1.0, targeted=False, keep="last", early_stop=False, judge=True, iterates=True,
    )  # fmt: skip
    assert torch.equal(got.iterates[0], start)
    assert torch.equal(got.iterates[-1], got.x)
    skipped_images = skipped_pixels = 0
    for t in range(steps):
        x, after = got.iterates[t], got.iterates[t + 1]
        g, sure = gradients(loss, student, teacher, x, y)
        most = g.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
        kw = {"step_size": size, "eps": eps, "norm": norm}
        if norm == "linf":
            want, _ = pgd_step(x, x0, g.sign().float(), **kw)
            small = g.abs() <= 2e-5 * most
            wrong = (after != want) & ~small
            skipped_pixels += int(small[sure].sum())
        else:
            want, _ = pgd_step(x.double(), x0.double(), g, **kw)
            distance = (after - want).flatten(1).norm(dim=1)
            wrong = distance > 1e-4 * size
            if norm == "l1":
                room = ((g > 0) & (x < 1)) | ((g < 0) & (x > 0))
                a = (g.abs() * room).flatten(1).sort(dim=1, descending=True).values
                k = math.ceil(0.01 * a.shape[1])
                sure &= a[:, k] < (1 - 1e-4) * a[:, k - 1]
        assert not wrong[sure].any(), f"step {t}"
        skipped_images += int((~sure).sum())
    assert skipped_images <= 0.1 * n * steps
    assert skipped_pixels <= 1e-3 * n * steps * x0[0].numel()


@pytest.mark.parametrize("loss", [*LABELLED, *ORACLES])
@pytest.mark.parametrize("norm", NORMS)
def test_both_engines_are_equally_strong(loss, norm):
    """Single signs flip and paths part, but not the outcome: losses within 1 %, verdicts of all but 1 of 48 images."""
    eps, size = NORMS[norm]
    student, teacher, (x, y) = net(), net(1, (22, 18)), batch(48)
    attack = PGD(norm=norm, eps=eps, step_size=size, steps=5, loss=make(loss, teacher))
    a, b = (dataclasses.replace(attack, engine=e).run(student, x, y) for e in ("chain", "eager"))
    assert (a.path, b.path) == ("chain", "eager")
    assert ((a.x_adv - b.x_adv).abs() > 1e-4).double().mean() < 0.01
    assert abs(a.loss.mean() / b.loss.mean() - 1) < 0.01
    assert (a.success != b.success).sum() <= 1
    for got in (a, b):
        at = dataclasses.replace(attack, engine="eager", steps=0, random_start=False).run(student, got.x_adv, y)
        torch.testing.assert_close(got.loss, at.loss, rtol=1e-4, atol=1e-5)
        assert (got.success != at.success).sum() <= 1
        assert got.queries.tolist() == [6] * 48
        assert got.steps == 5
        assert got.x_adv.dtype == x.dtype


@pytest.mark.parametrize("options", [
    {"restarts": 3}, {"keep": "best", "step_size": 0.04, "steps": 5}, {"keep": "best", "restarts": 2, "targeted": True},
    {"targeted": True, "loss": "margin"},
    {"random_start": False}, {"steps": 0}, {"eps": torch.linspace(0, 0.1, 6), "step_size": torch.linspace(0.03, 0, 6)},
    {"lo": -math.inf, "hi": math.inf}, {"norm": "l2", "eps": torch.linspace(0, 1, 6), "step_size": 0.2}, {"norm": "l1", "eps": 3, "step_size": 1},
])  # fmt: skip
def test_options_mean_the_same(options):
    model, (x, y) = net(), batch(6)
    attack = PGD(**{"eps": 0.05, "step_size": 0.01, "steps": 3, **options})
    a, b = (dataclasses.replace(attack, engine=e).run(model, x, y) for e in ("chain", "eager"))
    assert ((a.x_adv - b.x_adv).abs() > 1e-5).double().mean() <= 0.005
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-3, atol=1e-4)
    assert torch.equal(a.success, b.success)
    assert torch.equal(a.queries, b.queries)
    assert a.steps == b.steps


@BOTH
def test_fgsm(engine):
    model, (x, y) = net(), batch()
    attack = FGSM(eps=0.03, step_size=0.01, engine=engine)
    assert attack.run(model, x, y).path == engine
    assert torch.equal(
        attack(model, x, y), PGD(eps=0.03, step_size=0.01, steps=1, random_start=False, engine=engine)(model, x, y)
    )


@pytest.mark.parametrize("norm", NORMS)
def test_batches_and_threads_change_no_bit(norm):
    eps, size = NORMS[norm]
    student, teacher, (x, _) = net(), net(1, (22, 18)), batch(37)
    attack = PGD(norm=norm, eps=eps, step_size=size, steps=4, loss=OracleL2(teacher), engine="chain")
    index, before = torch.arange(37), torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for cut in (1, 3, 37):
                parts = [attack.run(student, a, index=i) for a, i in zip(x.split(cut), index.split(cut), strict=True)]
                results[threads, cut] = torch.cat([p.x_adv for p in parts]), torch.cat([p.loss for p in parts])
    finally:
        torch.set_num_threads(before)
    # The starts of l2 and l1 come from PyTorch's cos, log and pow, whose last bit depends on the length of the tensor.
    images, losses = results[1, 37]
    for key, (other, loss) in results.items():
        if norm == "linf" or key[1] == 37:
            assert torch.equal(other, images), key
            assert torch.equal(loss, losses), key
        else:
            torch.testing.assert_close(loss, losses, rtol=1e-2, atol=1e-6)
    # Without a random start nothing is left that could depend on it.
    attack = dataclasses.replace(attack, random_start=False)
    whole = attack(student, x)
    for cut in (1, 3):
        assert torch.equal(torch.cat([attack(student, a) for a in x.split(cut)]), whole)


@BOTH
def test_two_threads_attack_at_once(engine):
    student, teacher, (x, _) = net(), net(1, (22, 18)), batch(16)
    student.train(engine == "chain")  # in PyTorch the threads would take the mode from each other
    attack = PGD(steps=10, loss=OracleL2(teacher), engine=engine)
    want = attack(student, x)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: attack(student, x), range(8)):
            assert torch.equal(got, want)
    assert student.training == (engine == "chain")


@BOTH
def test_nan_weights_are_counted_and_images_stay_in_the_ball(engine):
    model, (x, y) = net(), batch(3)
    with torch.no_grad():
        model.head.weight[2] = torch.nan
    result = PGD(steps=4, engine=engine).run(model, x, y)
    assert result.x_adv.isfinite().all()
    assert (result.x_adv - x).abs().max() <= 8 / 255 + 6e-8
    assert (result.bad_gradients > 0).all()
    assert result.loss.isnan().all()
    twice = PGD(steps=4, restarts=2, engine=engine).run(model, x, y)
    assert torch.equal(twice.bad_gradients, 2 * result.bad_gradients)
    assert (PGD(steps=4, engine=engine).run(net(), x, y).bad_gradients == 0).all()


@BOTH
@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch_and_single_image(engine, norm):
    model, (x, y) = net(), batch(1)
    result = PGD(norm=norm, engine=engine, early_stop=True).run(model, x[:0], y[:0])
    assert result.x_adv.shape == (0, *IMAGE)
    assert [len(v) for v in (result.success, result.loss, result.queries, result.bad_gradients)] == [0] * 4
    assert result.path == engine
    assert PGD(norm=norm, engine=engine)(model, x, y).shape == x.shape


def test_pieces_change_no_bit(monkeypatch):
    x, y = batch(23)
    eps = torch.linspace(0, 0.1, 23)
    attack = PGD(eps=eps, step_size=eps / 4, steps=3, engine="chain", restarts=2, loss="margin")
    whole = attack.run(net(), x, y)
    monkeypatch.setattr(native, "PIECE", 7)
    pieces = attack.run(net(), x.to(memory_format=torch.channels_last), y)
    for name in ("x_adv", "success", "loss", "queries", "bad_gradients"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name))
    assert pieces.x_adv.is_contiguous(memory_format=torch.channels_last)


def test_many_small_images():
    model = net(widths=(3,), image=(1, 4, 4))
    x, y = batch(10_001, image=(1, 4, 4))
    attack = PGD(steps=2, engine="chain")
    result = attack.run(model, x, y)
    assert (result.x_adv - x).abs().max() <= 8 / 255 + 6e-8
    tail = attack(model, x[9_990:], y[9_990:], index=torch.arange(9_990, 10_001))
    assert torch.equal(result.x_adv[9_990:], tail)
    logits = model(result.x_adv)
    torch.testing.assert_close(result.loss, nn.functional.cross_entropy(logits, y, reduction="none").detach())


@BOTH
def test_models_stay_as_they_are(engine):
    student, teacher, (x, _) = net(), net(1, (22, 18)), batch()
    student.train()
    student.convs[0].eval()
    student.head.weight.requires_grad_(False)
    student.head.bias.grad = torch.ones_like(student.head.bias)
    modes = [m.training for m in student.modules()]
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    rng = torch.get_rng_state()
    PGD(steps=2, loss=OracleL2(teacher), engine=engine)(student, x)
    assert [m.training for m in student.modules()] == modes
    assert not any(m.training for m in teacher.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(weights[k], v) for k, v in student.state_dict().items())
    assert not student.head.weight.requires_grad
    assert torch.equal(student.head.bias.grad, torch.ones_like(student.head.bias))
    assert all(p.grad is None for p in (*teacher.parameters(), *student.convs.parameters()))


def test_random_numbers_that_a_network_draws_are_given_back():
    class Noisy(nn.Module):
        def forward(self, x):
            return (x + torch.rand(3, 1, 1)).flatten(1)[:, :10]

    x, y = batch(2)
    rng = torch.get_rng_state()
    attack = PGD(steps=2)
    assert attack.plan(Noisy(), x).path == "eager"
    attack(Noisy(), x, y)
    assert torch.equal(torch.get_rng_state(), rng)


@BOTH
def test_follows_the_weights(engine):
    """An attack in the middle of training sees the network as it is now, not as it was when it was first compiled."""
    model, (x, y) = net(), batch()
    attack = PGD(steps=2, engine=engine)
    before = attack(model, x, y)
    with torch.no_grad():
        model.convs[0].weight.neg_()
    after = attack(model, x, y)
    assert not torch.equal(before, after)
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, attack(fresh, x, y))


def test_one_network_as_student_and_teacher_and_shared_modules():
    model, (x, _) = net(), batch()
    attack = PGD(steps=3, loss=OracleL2(model), engine="chain")
    result = attack.run(model, x)
    assert torch.equal(result.x_adv, dataclasses.replace(attack, steps=0)(model, x))  # the gradient is 0 everywhere
    assert result.loss.tolist() == [0] * 5
    # Student and teacher share their first convolution, one ReLU serves twice.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        relu, first = nn.ReLU(), nn.Conv2d(3, 20, 3)
        student, teacher = (
            nn.Sequential(first, relu, nn.Conv2d(20, 16, 3), relu, nn.Flatten(), nn.Linear(576, 10)) for _ in range(2)
        )
    attack = dataclasses.replace(attack, loss=OracleL2(teacher))
    a, b = (dataclasses.replace(attack, engine=e)(student, x) for e in ("chain", "eager"))
    assert ((a - b).abs() > 1e-5).double().mean() < 0.01


@BOTH
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced", "expanded", "readonly", "graph", "inference"])
def test_any_layout_and_kind_of_tensor(engine, kind):
    model, (x, y) = net(), batch(4)
    if kind == "expanded":
        x = x[:1].expand(4, -1, -1, -1).contiguous()
    attack = PGD(steps=3, engine=engine)
    want = attack(model, x, y)
    given = x
    if kind == "channels_last":
        given = x.contiguous(memory_format=torch.channels_last)
    elif kind == "transposed":
        given = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    elif kind == "sliced":
        given = torch.cat([x, x], 3)[..., :10]
    elif kind == "expanded":
        given = x[:1].expand(4, -1, -1, -1)
    elif kind == "readonly":
        array = x.numpy().copy()
        array.flags.writeable = False
        with warnings.catch_warnings():  # torch warns, once a process
            warnings.simplefilter("ignore")
            given = torch.from_numpy(array)
    elif kind == "graph":
        given = x.clone().requires_grad_() * 1
    elif kind == "inference":
        with torch.inference_mode():
            given, y = x.clone(), y.clone()
    kept = given.detach().clone()
    got = attack(model, given, y)
    assert not got.requires_grad
    assert not got.is_inference()
    assert torch.equal(kept, given.detach())
    assert given.grad_fn is not None or given.grad is None
    if kind == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)
    if engine == "chain":
        assert torch.equal(got, want)
    else:  # PyTorch's convolutions sum in another order for another memory format
        assert ((got - want).abs() > 1e-5).double().mean() < 0.01


@BOTH
def test_zero_images(engine):
    model = net()
    x, y = torch.zeros(3, *IMAGE), torch.tensor([0, 1, 2])
    got = PGD(steps=3, random_start=False, engine=engine).run(model, x, y)
    assert (got.x_adv >= 0).all()
    assert (got.bad_gradients == 0).all()
    assert (got.x_adv > 0).any()


@BOTH
def test_errors_are_the_same(engine):
    model, (x, y) = net(), batch(2)
    few = ConvReLU((4,), image=IMAGE, classes=7).eval()
    for attack, labels, message in (
        (PGD(engine=engine), y + 10, r"y must be in 0..9, the model's classes, got 1\d"),
        (PGD(engine=engine), -1 - y, r"y must be in 0..9"),
        (PGD(loss=OracleL2(few), engine=engine), None, r"teacher must give the student's logits \(2, 10\), got \(2, 7\)"),
        (PGD(eps=torch.ones(3), engine=engine), y, r"eps must be a number or of shape \(2,\)"),
        (PGD(step_size=torch.ones(3), engine=engine), y, r"step_size must be a number or of shape \(2,\)"),
        (PGD(engine=engine), None, "y is needed by loss 'cross_entropy'"),
    ):
        with pytest.raises(InputError, match=message):
            attack(model, x, labels)


def test_a_model_that_changes_its_input_is_refused():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.sub_(0.5).flatten(1)[:, :10]

    x, y = batch(2)
    for attack in (PGD(steps=0), Square(queries=5)):
        with pytest.raises(InputError, match="must not change its input in place"):
            attack.run(InPlace(), x, y)


def test_infinite_steps_are_refused():
    for step_size in (math.inf, torch.tensor([0.1, math.inf])):
        with pytest.raises(InputError, match="step_size must be finite"):
            PGD(step_size=step_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_of_another_dtype(dtype):
    class Cast(nn.Module):
        def forward(self, x):
            return x.to(dtype).flatten(1)[:, :10]

    x, y = batch(6)
    for attack in (APGD(steps=3), APGD(steps=3, loss="dlr"), PGD(steps=3, early_stop=True), DeepFool(steps=3)):
        assert attack(Cast(), x, y).dtype == torch.float32


def test_a_teacher_that_stays_with_pytorch_is_said():
    class Sine(nn.Module):
        def forward(self, x):
            return x.sin().flatten(1)[:, :10]

    x, y = batch(2)
    attack = APGD(loss=OracleL2(Sine()), steps=2)
    assert attack.plan(net(), x).path == attack.run(net(), x, y).path == "eager"
    with pytest.raises(InputError, match="teacher does not compile"):
        dataclasses.replace(attack, engine="chain").plan(net(), x)


def test_two_threads_and_a_teacher():
    student, teacher, (x, y) = net().train(), net(1, (22, 18)).train(), batch(4)
    attack = APGD(steps=4, loss=OracleL2(teacher))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: attack(student, x, y), range(8)))
    assert student.training
    assert teacher.training
