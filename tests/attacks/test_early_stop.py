"""early_stop: an image stops at its first adversarial iterate, the others go on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from tsrfast.attacks import PGD, Margin, OracleL2
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

# The chain computes in float32, every image by itself; in PyTorch float64 keeps another batch size's rounding below 1e-9.
ENGINES = pytest.mark.parametrize(("engine", "dtype", "atol"), [("chain", torch.float32, 0.0), ("eager", torch.float64, 1e-9)])


def net(dtype, seed=0, widths=(6, 5)):
    return ConvReLU(widths, image=(3, 8, 8), seed=seed).to(dtype).eval()


def batch(n, dtype, seed=0):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=r, dtype=torch.float64).to(dtype)


def iterates(attack, model, x, y):
    """Every iterate of the plain attack with its verdict: [steps + 1, N, ...], bool [steps + 1, N]."""
    runs = [
        dataclasses.replace(attack, steps=t, early_stop=False, keep="last").run(model, x, y) for t in range(attack.steps + 1)
    ]
    return torch.stack([r.x_adv for r in runs]), torch.stack([r.success for r in runs])


def first(verdicts):
    """Number of each image's first True, or one more than there are."""
    return torch.where(verdicts.any(0), verdicts.int().argmax(0), len(verdicts))


# From "half of the images fall at the start" to "few fall": y is the model's answer, or the next class as a target.
CASES = {
    "cross_entropy": {"eps": 0.05, "step_size": 0.01},
    "margin": {"loss": Margin(), "eps": 0.05, "step_size": 0.01},
    "targeted": {"targeted": True, "eps": 0.3, "step_size": 0.03},
    "l2": {"norm": "l2", "eps": 0.8, "step_size": 0.2},
    "l1": {"norm": "l1", "eps": 6.0, "step_size": 1.0},
    "from_the_image": {"random_start": False, "eps": 0.05, "step_size": 0.01},
    "best": {"keep": "best", "eps": 0.05, "step_size": 0.02},
}


def case(name, dtype, n=24):
    model, x = net(dtype), batch(n, dtype)
    answer = model(x).argmax(1)
    y = (answer + 1) % 10 if name == "targeted" else torch.where(torch.arange(n) % 5 == 0, (answer + 1) % 10, answer)
    return PGD(steps=6, early_stop=True, **CASES[name]), model, x, y


@ENGINES
@pytest.mark.parametrize("name", CASES)
def test_stops_at_the_first_adversarial_iterate(name, engine, dtype, atol):
    attack, model, x, y = case(name, dtype)
    attack = dataclasses.replace(attack, engine=engine)
    got = attack.run(model, x, y)
    every, verdicts = iterates(attack, model, x, y)
    at = first(verdicts)
    fell = at <= attack.steps
    assert fell.any()
    assert (~fell).any()  # the case has both
    assert torch.equal(got.success, fell)
    assert torch.equal(got.queries, (at + 1).clamp(max=attack.steps + 1))
    want = every[at.clamp(max=attack.steps), torch.arange(len(x))]
    if attack.keep == "best":
        best = dataclasses.replace(attack, early_stop=False).run(model, x, y)
        assert torch.equal(best.success, fell)
        want = torch.where(fell.reshape(-1, 1, 1, 1), want, best.x_adv)
    torch.testing.assert_close(got.x_adv, want, rtol=0, atol=atol)
    assert got.path == engine
    assert got.x_adv.stride() == x.stride()
    # The verdict and the loss are those of the returned images.
    judged = dataclasses.replace(attack, steps=0, random_start=False, early_stop=False).run(model, got.x_adv, y)
    torch.testing.assert_close(got.loss, judged.loss, rtol=0, atol=atol)
    assert torch.equal(attack(model, x, y), got.x_adv)


@ENGINES
def test_oracle_loss_stops_where_student_and_teacher_disagree(engine, dtype, atol):
    student, teacher, x = net(dtype), net(dtype, 1), batch(32, dtype)
    with torch.no_grad():  # a teacher near its student, so that not all images fall at the start
        for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
            t.copy_(s + 0.1 * (t - s))
    attack = PGD(steps=5, eps=0.03, step_size=0.01, loss=OracleL2(teacher), early_stop=True, engine=engine)
    got = attack.run(student, x)
    disagree = student(got.x_adv).argmax(1) != teacher(got.x_adv).argmax(1)
    assert torch.equal(got.success, disagree)
    assert 0 < disagree.sum() < len(x)
    assert (got.queries[~disagree] == 6).all()
    every, verdicts = iterates(attack, student, x, None)
    torch.testing.assert_close(got.x_adv, every[first(verdicts).clamp(max=5), torch.arange(32)], rtol=0, atol=atol)


@ENGINES
def test_restarts_go_on_with_the_standing_only(engine, dtype, atol):
    attack, model, x, y = case("cross_entropy", dtype, 32)
    attack = dataclasses.replace(attack, steps=2, engine=engine)
    one, three = (dataclasses.replace(attack, restarts=r).run(model, x, y) for r in (1, 3))
    torch.testing.assert_close(three.x_adv[one.success], one.x_adv[one.success], rtol=0, atol=atol)
    assert torch.equal(three.queries[one.success], one.queries[one.success])
    late = three.success & ~one.success
    assert late.any()
    assert ((three.queries[late] > 3) & (three.queries[late] <= 9)).all()
    never = ~three.success
    assert never.any()
    assert (three.queries[never] == 9).all()
    # Of the standing the best by loss, as without early_stop.
    plain = dataclasses.replace(attack, restarts=3, early_stop=False).run(model, x, y)
    torch.testing.assert_close(three.loss[never], plain.loss[never], rtol=0, atol=atol)
    torch.testing.assert_close(three.x_adv[never], plain.x_adv[never], rtol=0, atol=atol)


@ENGINES
@pytest.mark.parametrize("keep", ["last", "best"])
def test_every_image_keeps_what_is_its_own(engine, dtype, atol, keep):
    """eps, step_size, label and number (random start) of an image, whoever else has fallen: as when it is alone."""
    _, model, x, y = case("cross_entropy", dtype, 12)
    eps, index = torch.linspace(0, 0.1, 12), torch.arange(12) * 7 + 3
    attack = PGD(steps=5, restarts=2, eps=eps, step_size=eps / 4, early_stop=True, keep=keep, engine=engine)
    whole = attack.run(model, x, y, index)
    assert 0 < whole.success.sum() < 12
    for i in range(12):
        alone = dataclasses.replace(attack, eps=eps[i : i + 1], step_size=eps[i : i + 1] / 4)
        single = alone.run(model, x[i : i + 1], y[i : i + 1], index[i : i + 1])
        torch.testing.assert_close(whole.x_adv[i], single.x_adv[0], rtol=0, atol=atol)
        assert whole.queries[i] == single.queries[0]
        assert whole.success[i] == single.success[0]


@ENGINES
def test_all_fall_at_the_start(engine, dtype, atol):
    model, x = net(dtype), batch(7, dtype)
    y = (model(x).argmax(1) + 1) % 10
    got = PGD(steps=9, restarts=2, random_start=False, early_stop=True, engine=engine).run(model, x, y)
    assert torch.equal(got.x_adv, x)
    assert got.queries.tolist() == [1] * 7
    assert got.success.all()


@pytest.mark.parametrize("engine", ["chain", "eager"])
def test_channels_last_stays(engine):
    attack, model, x, y = case("cross_entropy", torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    got = dataclasses.replace(attack, engine=engine).run(model, x, y)
    assert got.x_adv.stride() == x.stride()
    assert (got.x_adv - x).abs().max() <= attack.eps + 6e-8


def test_callback_sees_only_images_that_step():
    attack, model, x, y = case("cross_entropy", torch.float64)
    seen = []
    got = dataclasses.replace(attack, on_step=seen.append, restarts=2).run(model, x, y)
    steps = torch.zeros(len(x), dtype=torch.int64)
    for s in seen:
        assert len(s.rows) == len(s.x) == len(s.logits) == len(s.loss) == len(s.gradient)
        assert not s.adversarial.any()
        assert torch.equal(model(s.x).argmax(1) == y[s.rows], torch.ones_like(s.adversarial))
        torch.testing.assert_close(s.loss, cross_entropy(model(s.x), y[s.rows], reduction="none"))
        assert ((s.x - x[s.rows]).abs() <= attack.eps + 1e-9).all()
        steps[s.rows] += 1
    # Each evaluation but an attempt's last one was followed by a step.
    attempts = torch.where(got.success & (got.queries <= 7), 1, 2)
    assert torch.equal(steps, got.queries - attempts)


@pytest.mark.parametrize("engine", ["chain", "eager"])
def test_errors_are_the_same(engine):
    model, x = net(torch.float32), batch(2, torch.float32)
    with pytest.raises(InputError, match=r"y must be in 0..9, the model's classes, got 10"):
        PGD(early_stop=True, engine=engine)(model, x, torch.tensor([1, 10]))
