"""The loop that looks at no value: image by image what the loop that looks at each step gives, and the fallen leave the batch."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tsrfast.attacks import MIM, PGD, Diversity, OracleL2, Smoothing, TargetedDLR, eager, steps
from tsrfast.attacks.loop import Batch, run_loop, undisturbed
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)
# In float64 another batch size rounds 1e-15 differently, and no sign flips.
ATOL = 1e-9


def net(seed=0, dtype=torch.float64):
    return ConvReLU((4,), image=IMAGE, seed=seed).to(dtype).eval().requires_grad_(False)


def batch(n, model, seed=0, dtype=torch.float64):
    x = torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    y = model(x).argmax(1)
    y[3::5] = (y[3::5] + 1) % 10
    return x, y


def both(attack, model, x, y, judge=True):
    recipe, index = attack._recipe(), torch.arange(len(x)) * 3
    with undisturbed(x.device):
        return [
            run_loop(partial(way.attempt, model, recipe), recipe, x.clone(), y, index, judge) for way in (steps, eager)
        ]  # fmt: skip


def assert_same(a, b, atol=ATOL):
    assert torch.equal(a.queries, b.queries)
    assert torch.equal(a.bad, b.bad)
    assert torch.equal(a.best.adversarial, b.best.adversarial)
    torch.testing.assert_close(a.best.x, b.best.x, rtol=0, atol=atol)
    torch.testing.assert_close(a.best.loss, b.best.loss, rtol=0, atol=atol, equal_nan=True)
    assert a.best.x.stride() == b.best.x.stride()


LOSSES = {
    "cross_entropy": lambda n: "cross_entropy",
    "margin": lambda n: "margin",
    "oracle": lambda n: OracleL2(net(1)),
    "targets": lambda n: TargetedDLR((torch.arange(n) * 7) % 10),
}
DIRECTIONS = {
    "gradient": lambda **kw: PGD(**kw),
    "momentum": lambda **kw: PGD(momentum=0.9, **kw),
    "nesterov": lambda **kw: MIM(nesterov=True, **kw),
    "diverse": lambda **kw: MIM(diversity=Diversity(prob=0.7), smoothing=Smoothing(length=3), **kw),
}
EPS = {"linf": 0.1, "l2": 1.5, "l1": 12.0}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 12), seed=st.integers(0, 9), norm=st.sampled_from(list(EPS)), loss=st.sampled_from(list(LOSSES)),
    direction=st.sampled_from(list(DIRECTIONS)), count=st.integers(0, 9), restarts=st.integers(1, 3), keep=st.sampled_from(["last", "best"]),
    stop=st.booleans(), random_start=st.booleans(), each=st.booleans(), every=st.integers(1, 5), last=st.booleans(), judge=st.booleans(),
)  # fmt: skip
def test_as_the_loop_that_looks(
    monkeypatch, n, seed, norm, loss, direction, count, restarts, keep, stop, random_start, each, every, last, judge
):
    monkeypatch.setattr(steps, "EVERY", every)
    model = net()
    x, y = batch(n, model, seed)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    share = torch.linspace(0, 1, n, dtype=torch.float64) if each else torch.tensor(0.5)
    attack = DIRECTIONS[direction](
        norm=norm, eps=EPS[norm] * share, step_size=EPS[norm] / 6 * share, loss=LOSSES[loss](n), steps=count, restarts=restarts,
        keep=keep, early_stop=stop, random_start=random_start,
    )  # fmt: skip
    assert_same(*both(attack, model, x, None if loss == "oracle" else y, judge))


def test_targeted(monkeypatch):
    monkeypatch.setattr(steps, "EVERY", 2)
    model = net()
    x, y = batch(20, model)
    a, b = both(PGD(eps=0.1, step_size=0.01, steps=9, targeted=True, early_stop=True), model, x, (y + 1) % 10)
    assert_same(a, b)
    assert 0 < int(a.best.adversarial.sum()) < 20
    assert len(a.queries.unique()) > 3


def test_velocities_go_along_each_time(monkeypatch):
    monkeypatch.setattr(steps, "EVERY", 2)
    model = net()
    x, y = batch(24, model)
    attack = MIM("l2", 0.6, 0.03, steps=14, early_stop=True, momentum=1.5)
    a, b = both(attack, model, x, y)
    assert_same(a, b)
    assert len(a.queries.unique()) > 4


class Root(nn.Module):
    """Gradients NaN where a pixel is 0."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 0 * x.sqrt().sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bad_gradients_are_counted_while_an_image_stands(momentum):
    model = Root(net())
    x, y = batch(12, model)
    x[::2, 0, 2, 2] = 0.0
    attack = PGD(eps=0.05, step_size=0.005, steps=7, early_stop=True, random_start=False, momentum=momentum)
    a, b = both(attack, model, x, y)
    assert_same(a, b)
    assert len(a.bad.unique()) > 2


class Sizes(nn.Module):
    """Another network, and the sizes of the batches that it has been shown."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.net(x)


def test_the_fallen_leave_the_batch():
    model = Sizes(net())
    x, y = batch(24, model)
    attack = PGD(eps=0.03, step_size=0.002, steps=11, early_stop=True)
    recipe = attack._recipe()
    model.seen = []
    got = run_loop(partial(steps.attempt, model, recipe), recipe, x, y, torch.arange(24), True)
    seen, stood = model.seen, [int((got.queries > t).sum()) for t in range(12)]
    assert len(seen) == 12
    assert seen[: steps.EVERY] == [24] * steps.EVERY
    # Gathered after every EVERY steps, and once more before the last look.
    assert seen[4:8] == [stood[4]] * 4
    assert seen[8:11] == [stood[8]] * 3
    assert seen[11] == stood[11]
    assert stood[0] > stood[4] > stood[8] > 0


def test_what_fills_a_batch_up_is_nobodys():
    state = {"x": torch.arange(6.0).reshape(6, 1), "standing": torch.ones(6, dtype=torch.bool)}
    into = steps.room(state, 4)
    steps.fill(into, state, torch.tensor([5, 2]))
    assert into["x"].flatten().tolist() == [5, 2, 5, 5]
    assert into["standing"].tolist() == [True, True, False, False]


def test_all_fallen_end_the_loop():
    model = Sizes(net())
    x, y = batch(6, model)
    model.seen = []
    recipe = PGD(eps=0.3, step_size=0.1, steps=40, early_stop=True)._recipe()
    got = run_loop(partial(steps.attempt, model, recipe), recipe, x, (y + 1) % 10, torch.arange(6), True)
    assert bool(got.best.adversarial.all())
    assert len(model.seen) <= 2 * steps.EVERY


@pytest.mark.parametrize("attack", [PGD(steps=9), PGD(steps=9, keep="best"), PGD(steps=9, loss=OracleL2(net(1)))])
def test_nobody_leaves_where_success_is_not_the_goal(attack):
    model = Sizes(net())
    x, y = batch(8, model)
    y = (y + 1) % 10  # all have fallen before the first step
    model.seen = []
    recipe = attack._recipe()
    got = run_loop(partial(steps.attempt, model, recipe), recipe, x, y, torch.arange(8), True)
    assert model.seen == [8] * 10
    assert got.queries.tolist() == [10] * 8


def test_numbers_in_tensors_are_looked_at_once():
    model = net()
    x, y = batch(4, model)
    attack = PGD(eps=torch.tensor(0.05), step_size=torch.tensor(0.01), steps=3)
    recipe = steps.plain_numbers(attack._recipe())
    assert isinstance(recipe.threat.eps, float)
    assert isinstance(recipe.step_size, float)
    assert_same(*both(attack, model, x, y))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_step_waits_for_the_gpu():
    """Once an `EVERY` steps, and nothing else: the driver refuses the host to wait between."""
    model = net(dtype=torch.float32)
    x, y = batch(32, model, dtype=torch.float32)
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    recipe = PGD(eps=0.05, step_size=0.01, steps=steps.EVERY, early_stop=True, engine="eager", momentum=0.5)._recipe()
    rows = torch.arange(32, device="cuda")
    one = steps.OneByOne(model, recipe)
    made = one.begin(steps.begin(recipe, Batch(rows, x, y, rows, recipe.threat, recipe.step_size), x.clone()))
    one.advance(made, 0, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in range(1, steps.EVERY):
            one.advance(made, t, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_on_a_gpu(engine):
    model = net()
    x, y = batch(40, model)
    attack = PGD(eps=0.06, step_size=0.01, steps=20, early_stop=True, engine="eager")
    want = attack.run(model, x, y)
    got = dataclasses.replace(attack, engine=engine).run(model.cuda(), x.cuda(), y.cuda())
    assert got.path == engine
    assert torch.equal(got.queries.cpu(), want.queries)
    assert torch.equal(got.success.cpu(), want.success)
    torch.testing.assert_close(got.x_adv.cpu(), want.x_adv, rtol=0, atol=1e-6)
