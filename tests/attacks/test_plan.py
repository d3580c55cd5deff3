"""Which path a call takes, and why; compiled networks given instead of modules."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

import tsrfast
from tsrfast.attacks import FGSM, PGD, CrossEntropy, OracleL2, OracleMaxDifference, Route
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)
X = torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 2])


def net(seed=0, **options):
    return ConvReLU((4,), image=IMAGE, seed=seed, **options).eval()


class Louder(CrossEntropy):
    """What a user's subclass may do."""

    def __call__(self, x, logits, y):
        value, answer = super().__call__(x, logits, y)
        return 2 * value, answer


class Sine(nn.Module):
    def forward(self, x):
        return x.sin().flatten(1)[:, :10]


def test_chain_where_everything_compiles():
    for attack in (PGD(), FGSM(), PGD(loss=OracleL2(net(1))), PGD(loss=OracleMaxDifference(net(1)), early_stop=True)):
        route = attack.plan(net(), X)
        assert route.path == "chain"
        assert attack.run(net(), X, Y).path == "chain"
    assert PGD().plan(net()).path == "chain"  # the net says what it takes
    assert str(Route("chain", "every network compiles")) == "chain: every network compiles"


@pytest.mark.parametrize(
    ("attack", "model", "x", "reason"),
    [
        (PGD(engine="eager"), net(), X, "engine='eager' asks for it"),
        (FGSM(engine="eager"), net(), X, "engine='eager' asks for it"),
        (PGD(on_step=str), net(), X, "on_step is called from PyTorch's loop"),
        (PGD(loss=Louder()), net(), X, "native code does not know the loss Louder"),
        (PGD(), net().double(), X.double(), "x is float64 on cpu, native code takes float32 on cpu or cuda"),
        (PGD(), net().to("meta"), X.to("meta"), "x is float32 on meta"),
        (PGD(), net().double(), None, "model does not compile: .*float64"),
        (PGD(), Sine(), X, "model does not compile: .*"),
        (PGD(loss=OracleL2(Sine())), net(), X, "teacher does not compile: .*"),
    ],
)
def test_eager_and_why(attack, model, x, reason):
    route = attack.plan(model, x)
    assert route.path == "eager"
    assert str(route).startswith("eager: ")
    assert re.match(reason, route.reason)
    if attack.engine == "auto":
        with pytest.raises(InputError, match="engine must be 'auto' or 'eager' for this call, got 'chain': " + reason):
            dataclasses.replace(attack, engine="chain").plan(model, x)
    if x is not None and x.device.type == "cpu":
        assert attack.run(model, x, Y).path == "eager"


def test_wide_linear_layers_are_left_to_pytorch():
    wide, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 6000), nn.ReLU(), nn.Linear(6000, 10)), X
    assert re.search("wide linear layers", PGD().plan(wide, x).reason)
    assert PGD(engine="chain").plan(wide, x).path == "chain"
    assert PGD().plan(tsrfast.compile(wide, IMAGE), x).path == "chain"
    assert PGD().plan(nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.ReLU(), nn.Linear(100, 10)), x).path == "chain"


def test_autocast_keeps_pytorch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert re.match("model does not compile: .*autocast", PGD().plan(net(), X).reason)
    assert PGD().plan(net(), X).path == "chain"


def test_without_images_the_network_must_say_what_it_takes():
    unsaid = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    with pytest.raises(InputError, match="x must be given, model does not say what images it takes"):
        PGD().plan(unsaid)
    assert PGD().plan(unsaid, X).path == "chain"
    assert PGD(loss=OracleL2(unsaid)).plan(net()).path == "chain"  # the teacher sees the student's images


def test_flat_images_and_networks_that_flatten_first():
    """A first layer that is linear takes flat images; the teacher may begin otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 10))
    for model, x in ((student, X), (student, X.reshape(2, 8, 24)), (student[1:], X.flatten(1)), (net(), X)):
        loss = OracleL2(student if model is not student else net(1)) if x.ndim == 4 else "cross_entropy"
        attack = PGD(steps=3, loss=loss, engine="chain")
        got, want = attack(model, x, Y), dataclasses.replace(attack, engine="eager")(model, x, Y)
        assert got.shape == x.shape
        assert ((got - want).abs() > 1e-5).double().mean() < 0.01


def test_plan_and_refusal_leave_modes_alone():
    model = net().train()
    PGD().plan(model, X)
    with pytest.raises(InputError):
        PGD(engine="chain", on_step=print).plan(model, X)
    assert all(m.training for m in model.modules())


def test_unknown_engine_and_things_that_are_no_model():
    with pytest.raises(InputError, match="unknown engine 'native'"):
        PGD(engine="native")
    with pytest.raises(InputError, match="unknown engine 'Chain'; did you mean 'chain'"):
        FGSM(engine="Chain")
    with pytest.raises(InputError, match=r"model must be an nn\.Module or a Chain, got function"):
        PGD()(lambda x: x, X, Y)


def test_chains_are_used_as_they_are():
    student, teacher = net(), net(1)
    attack = PGD(steps=3, loss=OracleL2(teacher), engine="chain")
    want = attack(student, X)
    compiled = tsrfast.compile(student), tsrfast.compile(teacher)
    with torch.no_grad():
        for p in (*student.parameters(), *teacher.parameters()):
            p.neg_()
    snapshot = dataclasses.replace(attack, loss=OracleL2(compiled[1]), engine="auto")
    assert torch.equal(snapshot(compiled[0], X), want)
    assert not torch.equal(attack(student, X), want)
    for p in (*student.parameters(), *teacher.parameters()):
        p.data.neg_()
    # Half compiled, half a module.
    assert torch.equal(snapshot(student, X), want)
    assert torch.equal(attack(compiled[0], X), want)
    assert snapshot.plan(compiled[0]).path == "chain"


@pytest.mark.parametrize(
    ("attack", "x", "reason"),
    [
        (PGD(engine="eager"), X, "engine='eager' asks for it"),
        (PGD(on_step=str), X, "on_step is called from PyTorch's loop"),
        (PGD(loss=Louder()), X, "native code does not know the loss Louder"),
        (PGD(), X.double(), "x is float64 on cpu"),
        (PGD(loss=OracleL2(Sine())), X, "teacher does not compile"),
    ],
)
def test_a_chain_has_no_eager_path(attack, x, reason):
    chain = tsrfast.compile(net())
    for call in (lambda: attack(chain, x, Y), lambda: attack.plan(chain, x)):
        with pytest.raises(InputError, match=f"a Chain has no autograd, and the native loop cannot run this call: {reason}"):
            call()


def test_a_teacher_chain_has_no_eager_path():
    teacher = tsrfast.compile(net(1))
    with pytest.raises(InputError, match=r"a Chain has no autograd.*model does not compile"):
        PGD(loss=OracleL2(teacher))(Sine(), X)


def test_chain_for_other_images():
    chain = tsrfast.compile(net())
    with pytest.raises(
        InputError, match=r"x must have the shape \[N, 3, 8, 8\] that model was compiled for, got \(2, 3, 9, 9\)"
    ):
        PGD()(chain, torch.rand(2, 3, 9, 9), Y)
    teacher = tsrfast.compile(ConvReLU((4,), image=(3, 9, 9)))
    with pytest.raises(InputError, match=r"x must have the shape \[N, 3, 9, 9\] that teacher was compiled for"):
        PGD(loss=OracleL2(teacher))(net(), X)
