"""Faults that other attack libraries have or had: none of the attacks has one of them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tsrfast.attacks import APGD, FAB, FGSM, MIM, PGD, APGDTargeted, AutoAttack, FABTargeted, Square
from tsrfast.errors import InputError

# AutoAttack has remarks about networks as small and quick to fall as these.
pytestmark = pytest.mark.filterwarnings("ignore:AutoAttack:UserWarning")


class Around(nn.Module):
    """Another network with something done to images and logits."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


# ---- results


def test_logits_of_any_sign(case, kind, images):
    """torchattacks' CW masks with 0, not -inf: no success where all logits are negative. And its gradient is then that of another class.
    Shifted logits mean the same; in double, where a shift by 64 rounds 1e-14 of a logit."""
    net = images.network(kind, torch.float64)
    x, y = images.batch(net, 8, dtype=torch.float64)
    want = case.on(net).run(net, x, y)
    for shift in (-64, 64):
        model = Around(net, after=lambda z, shift=shift: z + shift)
        got = case.on(model).run(model, x, y)
        assert torch.equal(got.success, want.success)
        torch.testing.assert_close(got.x_adv, want.x_adv, rtol=0, atol=1e-6)


def test_what_cannot_be_fooled_is_not_said_to_be(case, images, excess):
    """foolbox' CW returns black images for those it never fooled, and says that they are adversarial."""
    model = Around(images.network("eager"), after=lambda z: z * 0 + F.one_hot(torch.tensor(3), 10))
    x, _ = images.batch(model)
    y = torch.full((5,), 3)
    got = case.on(model).run(model, x, y)
    assert not got.success.any()
    if case.norm is None or case.name.startswith(("FAB", "Square", "AutoAttack")):
        assert torch.equal(got.x_adv, x)
    else:
        assert bool((excess(x, got.x_adv, case.norm, case.attack.eps) <= 0).all())


def test_wrong_images_are_not_made_right(case, kind, images):
    """And what is said to have fallen has fallen in the image that is returned."""
    model = images.network(kind)
    x, y = images.batch(model, 8)
    y = (answers(model, x) + 1) % 10
    got = case.on(model).run(model, x, y)
    assert torch.equal(got.success, answers(model, got.x_adv) != y)
    assert int(got.success.sum()) >= 7 if case.norm else bool(got.success.all())


def test_defaults_of_the_authors():
    """torchattacks' AutoAttack runs 10 steps of each attack."""
    assert [cls().steps for cls in (APGD, APGDTargeted, FAB, FABTargeted)] == [100] * 4
    assert Square().queries == 5000
    assert [cls().target_classes for cls in (APGDTargeted, FABTargeted)] == [9, 9]
    for norm in ("linf", "l2"):
        members = AutoAttack(norm).members()
        assert list(members) == ["apgd-ce", "apgd-t", "fab-t", "square"]
        assert [members[k].steps for k in ("apgd-ce", "apgd-t", "fab-t")] == [100] * 3
        assert [members[k].target_classes for k in ("apgd-t", "fab-t")] == [9, 9]
        assert members["square"].queries == 5000
    rand = AutoAttack(version="rand").members()
    assert {name: (a.steps, a.eot_iter) for name, a in rand.items()} == {"apgd-ce": (100, 20), "apgd-dlr": (100, 20)}
    plus = AutoAttack(version="plus").members()
    assert [plus[k].restarts for k in ("apgd-ce", "apgd-dlr", "fab")] == [5, 5, 5]


L2_STEPS = {
    "FGSM": FGSM("l2", 0.1),
    "PGD": PGD("l2", 0.1, 0.1, steps=1, random_start=False),
    "MIM": MIM("l2", 0.1, 0.1, steps=1),
    "APGD": APGD("l2", 0.1, steps=1, random_start=False, keep="best"),
}


# The authors of APGD divide by the gradient's length plus 1e-12, and so does ours: not for exp(-60).
@pytest.mark.parametrize(
    ("name", "confidence"), [(name, c) for name in L2_STEPS for c in (1.0, 18.0, 60.0) if (name, c) != ("APGD", 60.0)]
)
def test_l2_steps_of_confident_images_are_whole_in_any_batch(name, confidence):
    """The mean of a loss over a batch, plus 1e-10 or 1e-6 for safety, makes steps of confident images shorter, the more the larger the
    batch. Here gradients are exp(-60) or so at the least, and every step is as long as it should be: 1e-5 for what float32 adds up."""
    torch.manual_seed(0)
    attack = L2_STEPS[name]
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).requires_grad_(False)
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    x = 0.3 + 0.4 * torch.rand(1, 3, 4, 4)
    y = torch.tensor([0])
    model[1].bias[:] = 0
    z = model(x)[0]
    model[1].bias[0] = confidence - (z[0] - z[1])
    others = 0.3 + 0.4 * torch.rand(127, 3, 4, 4)
    attack.run(model, x, y)
    alone = seen[-1]  # where a loss of exactly 0 is not exceeded, APGD does not return it
    attack.run(model, torch.cat([x, others]), torch.cat([y, torch.ones(127, dtype=torch.int64)]))
    among = seen[-1][:1]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-6)
    assert (alone - x).norm() == pytest.approx(0.1, rel=1e-5)


class Root(nn.Module):
    """Gradient NaN where a pixel is 0 (0 times inf), and everywhere in an image that says so."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        poison = torch.where(x[:, :1, 0, 0] > 0.9, x[:, 0].sum((1, 2))[:, None] * 0, torch.zeros_like(x[:, :1, 0, 0])).sqrt()
        return self.net(x) + poison + 0 * x.sqrt().sum((1, 2, 3))[:, None]


def test_nan_gradients_make_no_nan_images(case, kind, images, excess):
    """In torchattacks, foolbox and others one NaN in a gradient makes an l2 image NaN altogether."""
    net = images.network(kind)
    x, y = images.batch(net)
    x[:, 0, 0, 0], x[1, 0, 0, 0], x[2, 1, 3, 3] = 0.5, 1.0, 0.0
    model = Root(net)
    assert torch.equal(answers(model, x), answers(net, x))
    got = case.on(model).run(model, x, y)
    assert bool(((got.x_adv >= 0) & (got.x_adv <= 1)).all())  # NaN is not
    if case.norm is not None:
        assert bool((excess(x, got.x_adv, case.norm, case.attack.eps) <= 0).all())
    asks_gradients = not case.name.startswith("Square")
    assert bool(got.bad_gradients.any()) == asks_gradients


def test_ends_of_the_box_and_radii_of_images(case, kind, images, excess):
    """Clamped and then projected, projected and then clamped, or not clamped at all: results outside of box or ball."""
    model = images.network(kind)
    x, _ = images.batch(model)
    x = x.round()
    y = answers(model, x)
    if case.norm is None:
        got = case.on(model)(model, x, y)
    else:
        eps = case.attack.eps * torch.tensor([0.0, 0.1, 1.0, 30.0, 3.0])
        got = case.on(model, eps=eps)(model, x, y)
        assert bool((excess(x, got, case.norm, eps) <= 0).all())
        torch.testing.assert_close(got[0], x[0], rtol=0, atol=1e-7 if case.norm == "l1" else 0.0)  # a rounding
    assert bool(((got >= 0) & (got <= 1)).all())


# ---- what belongs to the caller


class Stops(Exception):
    pass


class Moody(nn.Module):
    """Does not compile; draws random numbers of all kinds of PyTorch's, and stops at a call if it is to."""

    def __init__(self, net, stop=None):
        super().__init__()
        self.net, self.stop, self.calls = net, stop, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.stop:
            raise Stops
        return self.net(x) + 1e-4 * torch.randn(len(x), 10, device=x.device)


def state(model):
    """Everything about a network that an attack might change."""
    return {
        "modes": {name: m.training for name, m in model.named_modules()},
        "tensors": {name: t.clone() for name, t in model.state_dict(keep_vars=False).items()},
        "versions": {name: t._version for name, t in model.state_dict(keep_vars=True).items()},
        "grad": {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": {
            name: [
                list(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            ]
            for name, m in model.named_modules()
        },
        "attributes": {name: sorted(k for k in vars(m) if k != "calls") for name, m in model.named_modules()},
    }


def assert_same(before, after):
    for key, was in before.items():
        now = after[key]
        assert was.keys() == now.keys()
        for name, value in was.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, now[name]), (key, name)
            elif isinstance(value, tuple):
                assert value[0] == now[name][0], (key, name)
                assert torch.equal(value[1], now[name][1]), (key, name)
            else:
                assert value == now[name], (key, name)


def mixed(model):
    """Train mode here, eval mode there, some parameters frozen, gradients from before, and a hook."""
    model.train()
    for i, m in enumerate(model.modules()):
        m.training = i % 2 == 0
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
        p.grad = torch.ones_like(p) if i % 2 else None
    next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: None)
    return model


def test_models_are_left_as_they_were(case, kind, images):
    """Others: eval mode for all afterwards, statistics of batch normalisation changed, gradients accumulated in parameters."""
    for wrap in (lambda net: net, Moody):
        model = mixed(wrap(images.network(kind)))
        x, y = images.batch(images.network(kind))
        before = state(model)
        case.on(model).run(model, x, y)
        assert_same(before, state(model))


def test_results_are_those_of_eval_mode(case, kind, images):
    net = images.network(kind)
    x, y = images.batch(net)
    want = case.on(net)(net, x, y)
    model = mixed(copy.deepcopy(net))
    if kind == "eager":  # with a hook nothing compiles, and signs flip
        assert torch.equal(case.on(model)(model, x, y), want)
    model = copy.deepcopy(net).train()
    assert torch.equal(case.on(model)(model, x, y), want)


@pytest.mark.parametrize("at", [1, 2])
def test_models_and_random_states_are_left_when_the_attack_fails(case, images, at):
    net = images.network("eager")
    model = mixed(Moody(images.network("eager"), stop=at))
    x, _ = images.batch(net, 4)
    y = answers(net, x)
    before, numbers = state(model), torch.get_rng_state()
    with pytest.raises(Stops):
        case.on(model).run(model, x, y)
    assert_same(before, state(model))
    assert torch.equal(torch.get_rng_state(), numbers)
    with pytest.raises(InputError):
        case.on(model).run(model, x, y + 10)
    assert_same(before, state(model))


def test_random_states_are_not_set_and_not_used(case, kind, images):
    """The authors' APGD, FAB, Square and AutoAttack seed PyTorch anew; others draw from it, or from numpy."""
    for wrap in (lambda net: net, Moody):
        model = wrap(images.network(kind))
        x, y = images.batch(images.network(kind))
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        case.on(model).run(model, x, y)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
        assert random.getstate() == before[2]


def test_random_states_have_no_effect(case, images):
    model = images.network("chain")
    x, y = images.batch(model)
    got = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        got.append(case.on(model)(model, x, y))
    assert torch.equal(*got)


def test_tensors_of_the_caller_are_left(case, kind, images):
    model = images.network(kind)
    x, y = images.batch(model)
    x, index, changes = x.requires_grad_(), torch.tensor([7, 3, 1, 0, 2]), {}
    if case.norm is not None:
        changes["eps"] = case.attack.eps * torch.tensor([1.0, 0.5, 1.0, 2.0, 0.0])
    given = [x, y, index, *changes.values()]
    copies, versions = [t.detach().clone() for t in given], [t._version for t in given]
    attack = case.on(model, **changes)
    got = attack.run(model, x, y, index)
    for t, was, version in zip(given, copies, versions, strict=True):
        assert torch.equal(t.detach(), was)
        assert t._version == version
    assert x.requires_grad
    assert x.is_leaf
    assert x.grad is None
    for out in (got.x_adv, got.loss, got.success, got.queries, got.bad_gradients):
        assert not out.requires_grad
        assert out.grad_fn is None
        assert all(out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in given)
    with torch.no_grad():
        got.x_adv.zero_()  # the caller's, to do with as he likes
    assert torch.equal(attack(model, x, y, index), attack(model, copies[0], y, index))


def test_no_steps_and_no_radius_return_another_tensor(case, images):
    """cleverhans returns the images themselves where eps is 0."""
    model = images.network("eager")
    x, y = images.batch(model)
    changes = {"eps": 0.0} if case.norm is not None else {"steps": 0}
    got = case.on(model, **changes)(model, x, y)
    assert torch.equal(got, x)
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
