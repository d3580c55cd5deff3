"""Square Attack: the proposals, the search, and the original's results."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast
from tsrfast.attacks import PGD, CrossEntropy, OracleL2, Square, TargetedDLR
from tsrfast.attacks.square import _corner, _pattern, _shift
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 12, 12)
NORMS = {"linf": 0.05, "l2": 0.7, "l1": 4.0}
P = {"linf": math.inf, "l2": 2, "l1": 1}
EVERY = pytest.mark.parametrize("norm", NORMS)
ENGINES = pytest.mark.parametrize("engine", ["chain", "eager"])


def net(seed=0, image=IMAGE, dtype=torch.float32):
    return ConvReLU((8, 6), image=image, seed=seed).to(dtype).eval()


def batch(n=6, seed=0, image=IMAGE, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *image, generator=r, dtype=torch.float64).to(dtype)


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


class Recorder(nn.Module):
    """Says that every image is of class 0, by a margin that rises or not as told, and keeps what it was asked."""

    def __init__(self, score=lambda x: x.new_zeros(len(x))):
        super().__init__()
        self.asked, self.score = [], score

    def forward(self, x):
        self.asked.append(x.clone())
        z = x.new_zeros(len(x), 3)
        z[:, 0] = 1000 - self.score(x)
        return z


def test_linf_proposals_are_stripes_then_squares():
    """Against what the paper says of each: at corners of the ball, in one square, of the side that the schedule asks for."""
    model, x = Recorder(), batch(4)
    attack = Square(eps=0.05, queries=300, p_init=0.8, rescale_schedule=False, engine="eager")
    attack(model, x, torch.zeros(4, dtype=torch.int64))
    clean, start, *proposals = model.asked
    assert torch.equal(clean, x)
    up, down = (x + 0.05).clamp(0, 1), (x - 0.05).clamp(0, 1)
    assert ((start == up) | (start == down)).all()
    rose = (start == up) & (up != down)
    assert torch.equal(rose, rose[:, :, :1].expand_as(rose))  # a column has one sign
    assert 0.3 < rose.double().mean() < 0.7
    corners = set()
    for i, proposal in enumerate(proposals):
        # Nothing improves here: each proposal is made from the start.
        p = 0.8 / 2 ** sum(i > end for end in (10, 50, 200, 500))
        side = round(math.sqrt(p * 144))
        for one, before, high, low in zip(proposal, start, up, down, strict=True):
            changed = (one != before).any(0)
            rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
            for channel in range(3):
                here = one[channel] != before[channel]
                assert ((one[channel] == high[channel])[here]).all() or ((one[channel] == low[channel])[here]).all()
            if len(rows):
                assert rows.max() - rows.min() < side
                assert columns.max() - columns.min() < side
                if i > 200:
                    corners |= {("row", int(r)) for r in rows} | {("column", int(c)) for c in columns}
    assert corners == {(axis, i) for axis in ("row", "column") for i in range(12)}  # the last row and column too


def test_l2_proposals_spend_the_radius():
    """Every proposal is new, inside the ball, and the start uses all of it but what the box takes."""
    eps, x = 0.8, batch(3, dtype=torch.float64)
    model = Recorder(lambda x: x.square().sum((1, 2, 3)))
    Square(norm="l2", eps=eps, queries=40, engine="eager")(model, x, torch.zeros(3, dtype=torch.int64))
    _, start, *proposals = model.asked
    for before, after in zip([start, *proposals], proposals, strict=False):
        length = (after - x).flatten(1).norm(dim=1)
        assert (length <= eps + 1e-12).all()
        assert not torch.equal(before, after)
    d = (start - x).flatten(1).norm(dim=1)
    assert (d > 0.9 * eps).all()


def naive_pattern(side, p):
    """square.py's eta and eta_rectangles, in float64, before transposition."""

    def rectangles(height, width):
        delta = torch.zeros(height, width, dtype=torch.float64)
        row, column = height // 2, width // 2
        for k in range(max(height // 2 + 1, width // 2 + 1)):
            delta[max(row, 0) : min(row + 2 * k + 1, height), max(0, column) : min(column + 2 * k + 1, width)] += (
                1 / (k + 1) ** {2: 2, 1: 4}[p]
            )
            row, column = row - 1, column - 1
        return delta / delta.norm(p=p)

    delta = torch.cat([rectangles(side // 2, side), -rectangles(side - side // 2, side)])
    return delta / delta.norm(p=p)


@pytest.mark.parametrize("p", [2, 1])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 9, 13, 44])
def test_pattern_equals_the_original(side, p):
    torch.testing.assert_close(_pattern(side, p), naive_pattern(side, p), rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [2, 1])
def test_moves_norm_between_squares(p):
    """One proposal by hand, after square.py: outside of two squares nothing changes but by the common factor; the second square is emptied."""
    r = torch.Generator().manual_seed(1)
    delta = torch.randn(40, 3, 9, 11, generator=r, dtype=torch.float64) * 0.01
    u = torch.rand(40, 8, generator=r, dtype=torch.float64)
    eps, side = torch.full((40, 1, 1, 1), 0.5, dtype=torch.float64), 3
    got = _shift(u, side, delta, eps, p)
    tops, lefts = _corner(u[:, :2], side, 9, 11)
    tops2, lefts2 = _corner(u[:, 2:4], side, 9, 11)
    for i in range(40):
        w1 = (slice(int(tops[i]), int(tops[i]) + side), slice(int(lefts[i]), int(lefts[i]) + side))
        w2 = (slice(int(tops2[i]), int(tops2[i]) + side), slice(int(lefts2[i]), int(lefts2[i]) + side))
        mask = torch.zeros(9, 11, dtype=torch.bool)
        mask[w1] = mask[w2] = True
        want = delta[i].clone()
        pattern = naive_pattern(side, p).T if u[i, 4] < 0.5 else naive_pattern(side, p)
        left = max(0.5**p - float(delta[i].abs().pow(p).sum()), 0)
        for c in range(3):
            new = pattern * (-1 if u[i, 5 + c] < 0.5 else 1) + delta[i, c][w1] / delta[i, c][w1].norm(p=p)
            length = left / 3 + float(delta[i, c][mask].abs().pow(p).sum())
            new = new / new.norm(p=p) * (math.sqrt(length) if p == 2 else 3 * length)
            want[c][w2] = 0
            want[c][w1] = new
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("rescale", [True, False])
def test_schedule_equals_the_original(rescale, least):
    """square.py's p_selection, and its lines on s for linf (at least 1) and l2 (at least 3, odd)."""
    attack = Square(queries=700, p_init=0.7, rescale_schedule=rescale)
    for i in range(700) if rescale else [*range(1100), *range(1100, 11000, 100)]:
        it = int(i / 700 * 10000) if rescale else i
        bounds = [(10, 1), (50, 2), (200, 4), (500, 8), (1000, 16), (2000, 32), (4000, 64), (6000, 128), (8000, 256)]
        p = 0.7 / next((d for end, d in bounds if it <= end), 512)
        s = max(round(math.sqrt(p * 30 * 40)), least)
        if least == 3 and s % 2 == 0:
            s += 1
        assert attack._side(i, 30, 40, least) == min(s, 30), i


@EVERY
def test_nan_is_the_worst_score(norm):
    """The search goes as if those answers had been very bad ones."""

    def score(worst):
        return lambda x: torch.where((x.sum((1, 2, 3)) * 1e4).long() % 3 == 0, worst, x.sum((1, 2, 3)))

    x, y, asked = batch(4), torch.zeros(4, dtype=torch.int64), []
    for worst in (torch.nan, -1e4):
        model = Recorder(score(worst))
        Square(norm=norm, eps=NORMS[norm], queries=40, engine="eager")(model, x, y)
        asked.append(torch.stack(model.asked[1:]))
    torch.testing.assert_close(asked[0], asked[1], rtol=0, atol=0)


@EVERY
def test_keeps_what_improves(norm):
    """A model that can be asked for its score: the best so far never falls, and every proposal is made from it."""
    model, x = Recorder(lambda x: x.sum((1, 2, 3))), batch(3)
    result = Square(norm=norm, eps=NORMS[norm], queries=60, engine="eager").run(model, x, torch.zeros(3, dtype=torch.int64))
    assert not result.success.any()
    assert torch.equal(result.x_adv, x)  # not fallen: unchanged
    assert result.queries.tolist() == [62] * 3
    assert result.steps == 60
    scores = torch.stack([a.sum((1, 2, 3)) for a in model.asked[1:]])
    assert (scores[-1] > scores[0]).all()
    if norm == "linf":  # what changes, changes in one square of the best
        best = model.asked[1]
        for asked in model.asked[2:]:
            changed = (asked != best).any(1)
            assert changed.double().mean() < 0.85
            better = asked.sum((1, 2, 3)) > best.sum((1, 2, 3))
            best = torch.where(better[:, None, None, None], asked, best)


@ENGINES
@EVERY
def test_result_says_what_is(norm, engine):
    model, x = net(), batch(30)
    y = answers(model, x)
    y[::7] = (y[::7] + 1) % 10  # already wrong
    attack = Square(norm=norm, eps=NORMS[norm], queries=150, engine=engine)
    result = attack.run(model, x, y)
    assert result.path == engine
    wrong = answers(model, result.x_adv) != y
    assert torch.equal(result.success, wrong)
    assert 0 < wrong.sum() < 30  # the case has both
    assert torch.equal(result.x_adv[::7], x[::7])
    assert (result.queries[::7] == 1).all()
    assert torch.equal(result.x_adv[~wrong], x[~wrong])
    assert (result.queries[~wrong] == 152).all()
    fell = wrong & (torch.arange(30) % 7 != 0)
    assert ((result.queries[fell] >= 2) & (result.queries[fell] <= 152)).all()
    distance = (result.x_adv.double() - x.double()).flatten(1).norm(p=P[norm], dim=1)
    assert (distance <= NORMS[norm] + (4 if norm != "l1" else 432) * 6e-8).all()
    at = PGD(loss="margin", steps=0, random_start=False, engine=engine).run(model, result.x_adv, y)
    torch.testing.assert_close(result.loss, at.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(attack(model, x, y), result.x_adv)


@EVERY
def test_an_image_does_not_depend_on_its_batch(norm):
    """On the chain bit for bit, fallen neighbours or not; in PyTorch's convolutions up to rounding, hence float64 there."""
    for engine, dtype, atol in (("chain", torch.float32, 0.0), ("eager", torch.float64, 1e-9)):
        model, x = net(dtype=dtype), batch(12, dtype=dtype)
        y, index, eps = answers(model, x), torch.arange(12) * 5 + 2, torch.linspace(0, 2 * NORMS[norm], 12)
        attack = Square(norm=norm, eps=eps, queries=60, restarts=2, seed=7, engine=engine)
        whole = attack.run(model, x, y, index)
        assert 0 < whole.success.sum() < 12
        for part in (slice(0, 1), slice(1, 5), slice(5, 12)):
            got = dataclasses.replace(attack, eps=eps[part]).run(model, x[part], y[part], index[part])
            torch.testing.assert_close(got.x_adv, whole.x_adv[part], rtol=0, atol=atol)
            assert torch.equal(got.queries, whole.queries[part])
            assert torch.equal(got.success, whole.success[part])
        other = dataclasses.replace(attack, seed=8).run(model, x, y, index)
        assert not torch.equal(other.x_adv, whole.x_adv)


def test_restarts_go_on_with_the_standing():
    model, x = net(), batch(40)
    y = answers(model, x)
    one, three = (Square(eps=0.03, queries=30, restarts=r).run(model, x, y) for r in (1, 3))
    assert torch.equal(three.x_adv[one.success], one.x_adv[one.success])
    late = three.success & ~one.success
    assert late.any()
    assert ((three.queries[late] > 32) & (three.queries[late] <= 1 + 3 * 31)).all()
    assert (three.queries[~three.success] == 1 + 3 * 31).all()


def test_more_queries_and_larger_radii_are_stronger():
    model, x = net(), batch(60)
    y = answers(model, x)
    rates = [Square(eps=0.03, queries=q).run(model, x, y).success.double().mean() for q in (0, 20, 300)]
    assert rates == sorted(rates)
    assert rates[0] < rates[2]
    assert Square(eps=0.1, queries=20).run(model, x, y).success.double().mean() > rates[1]


@EVERY
def test_targeted_reaches_its_target(norm):
    model, x = net(), batch(20)
    target = (answers(model, x) + 1) % 10
    result = Square(norm=norm, eps=4 * NORMS[norm], queries=300, targeted=True).run(model, x, target)
    assert torch.equal(result.success, answers(model, result.x_adv) == target)
    assert result.success.double().mean() > 0.3


def test_other_losses():
    """Cross-entropy, and a teacher: adversarial where student and teacher disagree."""
    student, teacher, x = net(), net(), batch(20)
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.01).add_(0.002)
    result = Square(eps=0.1, queries=50, loss=OracleL2(teacher)).run(student, x)
    assert torch.equal(result.success, answers(student, result.x_adv) != answers(teacher, result.x_adv))
    y = answers(student, x)
    by_name, by_object = (Square(eps=0.05, queries=50, loss=v)(student, x, y) for v in ("cross_entropy", CrossEntropy()))
    assert torch.equal(by_name, by_object)


def test_losses_with_a_value_an_image():
    """A target class of each image stays with it when others fall."""
    model, x = net(), batch(12)
    y, index = answers(model, x), torch.arange(12)
    targets = (y + 1 + index % 9) % 10
    whole = Square(eps=0.05, queries=80, loss=TargetedDLR(targets)).run(model, x, y)
    assert 0 < whole.success.sum() < 12
    for i in range(12):
        alone = Square(eps=0.05, queries=80, loss=TargetedDLR(targets[i : i + 1])).run(
            model, x[i : i + 1], y[i : i + 1], index[i : i + 1]
        )
        assert torch.equal(alone.x_adv[0], whole.x_adv[i])
        assert alone.queries[0] == whole.queries[i]


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(list(NORMS)), n=st.integers(0, 3), channels=st.integers(1, 3), height=st.integers(5, 14),
    width=st.integers(5, 14), scale=st.floats(0, 3), queries=st.integers(0, 12), p_init=st.floats(0.01, 1),
    seed=st.integers(-(2**63), 2**63 - 1), rescale=st.booleans(), last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_stays_in_ball_and_box(norm, n, channels, height, width, scale, queries, p_init, seed, rescale, last, dtype):
    x = batch(n, image=(channels, height, width)).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    model = Recorder(lambda x: x.double().sum((1, 2, 3)).to(x.dtype))
    kept, rng = x.clone(), torch.get_rng_state()
    eps = scale * NORMS[norm]
    y = torch.zeros(n, dtype=torch.int64)
    result = Square(
        norm=norm, eps=eps, queries=queries, p_init=p_init, seed=seed, rescale_schedule=rescale, engine="eager"
    ).run(model, x, y)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (result.x_adv.shape, result.x_adv.dtype) == (x.shape, x.dtype)
    assert result.x_adv.stride() == x.stride() or not n
    rounding = 2 * torch.finfo(dtype).eps * max(x[:1].numel(), 1) ** (1 / P[norm])
    for asked in model.asked:
        d = (asked.double() - x.double()).flatten(1).norm(p=P[norm], dim=1)
        assert (d <= eps + rounding).all()
        assert asked.min() >= 0
        assert asked.max() <= 1
        assert asked.isfinite().all()


def test_leaves_model_and_images_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 10))
    model.train()
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = batch(4).requires_grad_()
    rng = torch.get_rng_state()
    for engine in ("chain", "eager"):
        out = Square(queries=5, engine=engine)(model, x, torch.arange(4))
        assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_takes_a_chain():
    model, x = net(), batch(4)
    y = answers(model, x)
    assert torch.equal(Square(queries=20)(tsrfast.compile(model), x, y), Square(queries=20)(model, x, y))
    assert Square().plan(model).path == "chain"


X, Y = batch(2), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Square(norm="l3"), "unknown norm 'l3'"),
        (lambda: Square(eps=-1), "eps must be >= 0, got -1"),
        (lambda: Square(queries=-1), "queries must be an integer >= 0, got -1"),
        (lambda: Square(queries=1.5), "queries must be an integer >= 0, got 1.5"),
        (lambda: Square(restarts=0), "restarts must be an integer >= 1, got 0"),
        (lambda: Square(p_init=0), r"p_init must be in \(0, 1\], got 0"),
        (lambda: Square(p_init=float("nan")), r"p_init must be in \(0, 1\], got nan"),
        (lambda: Square(loss="margn"), "unknown loss 'margn'"),
        (lambda: Square(engine="fast"), "unknown engine 'fast'"),
        (lambda: Square()(net(), X), "y is needed by loss 'margin'"),
        (lambda: Square(targeted=True, loss=OracleL2(net()))(net(), X), "targeted needs a loss with labels"),
        (lambda: Square()(net(), X, Y + 10), "y must be in 0..9"),
        (lambda: Square()(net(), X * 255, Y), "divide by 255"),
        (lambda: Square(eps=torch.ones(3))(net(), X, Y), r"eps must be a number or of shape \(2,\)"),
        (lambda: Square()(nn.Linear(4, 3), torch.rand(2, 4), Y), r"x must be images \[N, C, H, W\] for Square"),
        (lambda: Square()(nn.Flatten(0), X, Y), "model must return logits"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
