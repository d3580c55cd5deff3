"""Transfer attacks: images made on surrogates, judged on another network."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import APGD, CW, FGSM, MIM, PGD, DeepFool, OracleL2, Square, TargetedDLR, Transfer
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)
COMBINE = pytest.mark.parametrize("combine", ["logits", "probabilities", "loss"])


def net(seed=0, dtype=torch.float32, classes=10):
    return ConvReLU((6, 5), image=IMAGE, classes=classes, seed=seed).to(dtype)


def scaled(seed, dtype=torch.float32):
    """Larger logits: the three ways to average then differ clearly."""
    model = net(seed, dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


def batch(n=6, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (n,), generator=r)


class Target(nn.Module):
    """Counts what it is asked; nothing it does can be differentiated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        assert not torch.is_grad_enabled()
        with torch.no_grad():
            return self.model(x).detach()


def textbook(models, x, y, combine, weights, eps, step, steps):
    """Dong et al. 2018, equations 8 to 10, by autograd: the loss of mean logits, of mean probabilities, or the mean loss."""
    adv = x.clone()
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        z = [m(adv) for m in models]
        if combine == "logits":
            loss = F.cross_entropy(sum(w * a for w, a in zip(weights, z, strict=True)), y, reduction="sum")
        elif combine == "probabilities":
            p = sum(w * a.softmax(1) for w, a in zip(weights, z, strict=True))
            loss = -p.gather(1, y[:, None]).log().sum()
        else:
            loss = sum(w * F.cross_entropy(a, y, reduction="sum") for w, a in zip(weights, z, strict=True))
        (g,) = torch.autograd.grad(loss, adv)
        adv = adv.detach() + step * g.sign()
        adv = torch.minimum(torch.maximum(adv, x - eps), x + eps).clamp(0, 1)
    return adv


@COMBINE
def test_equals_the_textbook_in_double(combine):
    models, (x, y) = [scaled(s, torch.float64).eval() for s in range(3)], batch(dtype=torch.float64)
    attack = Transfer(PGD(eps=0.1, step_size=0.03, steps=7, random_start=False), models, weights=(2, 1, 1), combine=combine)
    want = textbook(models, x, y, combine, (0.5, 0.25, 0.25), 0.1, 0.03, 7)
    torch.testing.assert_close(attack(net(9).double(), x, y), want, rtol=0, atol=1e-12)
    others = {c: textbook(models, x, y, c, (0.5, 0.25, 0.25), 0.1, 0.03, 7) for c in ("logits", "probabilities", "loss")}
    assert all((want - other).abs().max() > 0.01 for c, other in others.items() if c != combine)


# Of the first four images that ART 1.20.1 made of `batch(16)` on EnsembleClassifier(scaled(0), scaled(1), scaled(2)): sums of pixels.
ART_SUMS = [94.586861, 95.540601, 101.965062, 92.112985]


def made_as_art(combine):
    models, (x, y) = [scaled(s).eval() for s in range(3)], batch(16)
    attack = PGD(eps=0.1, step_size=0.03, steps=5, random_start=False, engine="eager")
    return Transfer(attack, models, weights=(2, 1, 1), combine=combine)(net(9), x, y)


def test_mean_loss_equals_what_was_recorded_from_art():
    def off(images):
        return (images[:4].double().sum((1, 2, 3)) - torch.tensor(ART_SUMS, dtype=torch.float64)).abs().max()

    assert off(made_as_art("loss")) < 0.1  # a rounding may turn the sign of a pixel's gradient
    assert off(made_as_art("logits")) > 0.3
    assert off(made_as_art("probabilities")) > 0.3


def test_mean_loss_equals_the_ensemble_of_art():
    """ART's EnsembleClassifier averages gradients of losses."""
    pytest.importorskip("art")
    from art.attacks.evasion import ProjectedGradientDescentNumpy
    from art.estimators.classification import EnsembleClassifier, PyTorchClassifier

    x, y = batch(16)
    settings = {"input_shape": IMAGE, "nb_classes": 10, "clip_values": (0.0, 1.0), "device_type": "cpu"}
    each = [PyTorchClassifier(scaled(s).eval(), nn.CrossEntropyLoss(), **settings) for s in range(3)]
    ensemble = EnsembleClassifier(each, [0.5, 0.25, 0.25], channels_first=True, clip_values=(0.0, 1.0))
    original = ProjectedGradientDescentNumpy(
        ensemble, eps=0.1, eps_step=0.03, max_iter=5, num_random_init=0, batch_size=16, verbose=False
    )
    want = torch.from_numpy(original.generate(x.numpy(), y=y.numpy()))
    assert ((made_as_art("loss") - want).abs() < 1e-6).double().mean() > 0.999


@pytest.mark.parametrize("attack", [PGD(eps=0.05), FGSM(eps=0.05), APGD(steps=5), MIM(steps=3), CW(steps=5), DeepFool(steps=3)])
def test_one_surrogate_is_the_attack_itself(attack):
    surrogate, (x, y) = net(1), batch()
    for surrogates in (surrogate, [surrogate]):
        assert torch.equal(Transfer(attack, surrogates)(net(2), x, y), attack(surrogate, x, y))
    assert Transfer(attack, surrogate).plan(net(2), x).path == attack.plan(surrogate, x).path


def test_two_times_the_same_surrogate_is_one():
    surrogate, (x, y) = net(1, torch.float64), batch(dtype=torch.float64)
    attack = PGD(eps=0.05, steps=5)
    for combine in ("logits", "probabilities", "loss"):
        got = Transfer(attack, [surrogate, surrogate], combine=combine)(net(2), x, y)
        torch.testing.assert_close(got, attack(surrogate, x, y), rtol=0, atol=1e-12)


def test_target_is_asked_once_and_never_differentiated():
    target, (x, y) = Target(net(5)), batch(20)
    attack = Transfer(PGD(eps=0.2, steps=5), [net(1), net(2)])
    x_adv = attack(target, x, y)
    assert target.calls == 0
    got = attack.run(target, x, y)
    assert target.calls == 1
    assert torch.equal(got.x_adv, x_adv)
    with torch.no_grad():
        z = target.model.eval()(x_adv)
    assert torch.equal(got.success, z.argmax(1) != y)
    torch.testing.assert_close(got.loss, F.cross_entropy(z, y, reduction="none"))
    assert got.queries.tolist() == [1] * 20
    assert got.bad_gradients.tolist() == [0] * 20
    assert (got.steps, got.path) == (5, "chain")


def test_success_is_that_on_the_target_not_on_the_surrogates():
    """Surrogates that fall, a target that says the label whatever it is shown, and one that never does."""

    class Says(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return F.one_hot(self.label, 10).to(x.dtype)

    x, y = batch(5)
    attack = Transfer(APGD(eps=0.5, steps=10), [net(1), net(2)])
    assert attack.run(net(1), x, y).success.any()
    assert not attack.run(Says(y), x, y).success.any()
    assert attack.run(Says((y + 1) % 10), x, y).success.all()
    targeted = Transfer(PGD(targeted=True), [net(1), net(2)])
    assert targeted.run(Says(y), x, y).success.all()
    assert not targeted.run(Says((y + 1) % 10), x, y).success.any()


def test_target_may_be_a_chain():
    target, (x, y) = net(5).eval(), batch(20)
    chain = tsrfast.compile(target, IMAGE)
    attack = Transfer(PGD(eps=0.2, steps=5), [net(1), net(2)])
    a, b = attack.run(chain, x, y), attack.run(target, x, y)
    assert torch.equal(a.x_adv, b.x_adv)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-5)


@COMBINE
def test_surrogates_may_be_chains(combine):
    """Compiled, given as chains, and in PyTorch: the same attack, but for roundings where the gradient is nearly 0."""
    models, (x, y) = [net(1).eval(), net(2).eval()], batch(16)
    chains = [tsrfast.compile(m, IMAGE) for m in models]

    def made(engine, surrogates):
        return Transfer(PGD(eps=0.1, steps=5, engine=engine), surrogates, combine=combine)(net(9), x, y)

    native, eager = made("chain", chains), made("eager", models)
    assert torch.equal(native, made("auto", models))
    assert torch.equal(native, made("auto", [chains[0], models[1]]))
    assert ((native - eager).abs() < 1e-5).double().mean() > 0.99


def test_plan_names_the_surrogate_that_does_not_compile():
    class Odd(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10].sin()

    x, y = batch()
    assert Transfer(PGD(), [net(1), net(2)]).plan(net(3), x).path == "chain"
    route = Transfer(PGD(), [net(1), Odd()]).plan(net(3), x)
    assert route.path == "eager"
    assert "surrogates[1] does not compile" in route.reason
    Transfer(PGD(), [tsrfast.compile(net(1), IMAGE), Odd()])(net(3), x, y)  # one natively, one not
    with pytest.raises(InputError, match=r"engine must be .*surrogates\[1\] does not compile"):
        Transfer(PGD(engine="chain"), [net(1), Odd()])(net(3), x, y)


def test_loss_with_a_teacher_and_values_of_each_image():
    models, teacher, (x, _) = [net(1, torch.float64), net(2, torch.float64)], net(3, torch.float64), batch(dtype=torch.float64)
    eps = torch.linspace(0, 0.2, len(x), dtype=torch.float64)
    attack = Transfer(PGD(eps=eps, loss=OracleL2(teacher), random_start=False), models, combine="loss")
    got = attack.run(net(4, torch.float64), x)
    assert ((got.x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-12).all()
    assert torch.equal(got.x_adv[0], x[0])

    def mean_loss(at):
        with torch.no_grad():
            return sum((m.eval()(at) - teacher.eval()(at)).square().sum(1) for m in models)

    assert (mean_loss(got.x_adv) > mean_loss(x))[1:].all()


def test_loss_with_values_of_each_image_when_some_have_fallen():
    """Images that stand keep their own targets: each alone gives what all of them give together."""
    models, (x, y) = [net(1, torch.float64), net(2, torch.float64)], batch(12, dtype=torch.float64)
    with torch.no_grad():
        y = torch.where(torch.arange(12) % 2 == 0, sum(m.eval()(x) for m in models).argmax(1), y)  # half of them stand
    targets = (y + 1 + torch.arange(12) % 9) % 10

    def made(rows):
        loss = TargetedDLR(targets[rows])
        attack = PGD(eps=0.05, steps=4, loss=loss, random_start=False, early_stop=True)
        return Transfer(attack, models, combine="loss")(net(3, torch.float64), x[rows], y[rows])

    alone = torch.cat([made(slice(i, i + 1)) for i in range(12)])
    torch.testing.assert_close(made(slice(None)), alone, rtol=0, atol=1e-12)


def test_weights_choose():
    """Nearly all weight on one surrogate is that surrogate."""
    models, (x, y) = [scaled(1, torch.float64), scaled(2, torch.float64)], batch(dtype=torch.float64)
    attack = PGD(eps=0.05, steps=4)
    for combine in ("logits", "loss"):
        got = Transfer(attack, models, weights=(1, 1e9), combine=combine)(net(3), x, y)
        assert ((got - attack(models[1], x, y)).abs() < 1e-9).double().mean() > 0.99


ATTACKS = {
    "pgd": lambda eps, targeted: PGD(eps=eps, steps=3, targeted=targeted, restarts=2),
    "early": lambda eps, targeted: PGD(eps=eps, steps=3, targeted=targeted, early_stop=True),
    "l2": lambda eps, targeted: PGD(norm="l2", eps=eps, step_size=0.1, steps=3, targeted=targeted),
    "fgsm": lambda eps, targeted: FGSM(eps=eps, targeted=targeted),
    "mim": lambda eps, targeted: MIM(eps=eps, steps=3, targeted=targeted, nesterov=True),
    "apgd": lambda eps, targeted: APGD(eps=eps, steps=4, targeted=targeted),
    "square": lambda eps, targeted: Square(eps=eps, queries=4, targeted=targeted),
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(ATTACKS)),
    st.sampled_from(["logits", "probabilities", "loss"]),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_properties(name, combine, targeted, n, cut, dtype):
    """In the ball and the box, of the same kind, the same under any cut of the batch; what was given is left as it was."""
    x, y = batch(n, dtype=dtype)
    eps = torch.linspace(0, 0.3, n, dtype=torch.float64)
    models = [net(1, dtype).train(), net(2, dtype).eval()]
    models[0].convs[1].eval()  # a mixed state
    weight = next(models[0].parameters())
    weight.grad = torch.full_like(weight, 7)
    target = net(3, dtype).train()
    everyone = [m for model in (*models, target) for m in model.modules()]
    modes, before, random = [m.training for m in everyone], (x.clone(), y.clone()), torch.get_rng_state()
    attack = Transfer(ATTACKS[name](eps, targeted), models, combine=combine)
    got = attack.run(target, x, y)
    assert [m.training for m in everyone] == modes
    assert torch.equal(weight.grad, torch.full_like(weight, 7))
    assert all(p.grad is None for model in models for p in model.parameters() if p is not weight)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(torch.get_rng_state(), random)
    assert (got.x_adv.dtype, got.x_adv.shape, got.success.shape, got.queries.shape) == (dtype, x.shape, (n,), (n,))
    assert ((got.x_adv >= 0) & (got.x_adv <= 1)).all()
    change = (got.x_adv.double() - x.double()).flatten(1)
    length = change.norm(dim=1) if name == "l2" else change.abs().amax(1)
    assert (length <= eps * (1 + 1e-6) + 1e-7).all()
    cut = min(cut, n)
    if dtype == torch.float64:
        parts = [
            Transfer(ATTACKS[name](eps[rows], targeted), models, combine=combine)(
                target, x[rows], y[rows], torch.arange(n)[rows]
            )
            for rows in (slice(0, cut), slice(cut, n))
        ]
        torch.testing.assert_close(torch.cat(parts), got.x_adv, rtol=0, atol=1e-12)


def test_more_surrogates_transfer_better():
    """Networks trained alike on a small task: images made on four fool a fifth more often than those made on one do on average.

    Not always more often than those of the best one, which nobody knows beforehand: of six seeds in three.
    """
    r = torch.Generator().manual_seed(0)
    templates = torch.rand(4, *IMAGE, generator=r)

    def sample(n):
        y = torch.randint(4, (n,), generator=r)
        return (templates[y] * 0.3 + 0.35 + 0.15 * torch.randn(n, *IMAGE, generator=r)).clamp(0, 1), y

    def trained(seed):
        model, (x, y) = net(seed, classes=4), sample(256)
        solver = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            solver.zero_grad()
            F.cross_entropy(model(x), y).backward()
            solver.step()
        return model.eval()

    *surrogates, target = [trained(s) for s in range(5)]
    x, y = sample(400)
    attack = PGD(eps=0.08, step_size=0.02, steps=8)
    alone = [Transfer(attack, s).run(target, x, y).success.double().mean() for s in surrogates]
    together = Transfer(attack, surrogates).run(target, x, y).success.double().mean()
    clean = (target(x).argmax(1) != y).double().mean()
    assert together > sum(alone) / 4 + 0.1  # by 0.12 to 0.4 on six seeds
    assert sum(alone) / 4 > clean + 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transfer("pgd", [net()]), "attack must be an attack other than Transfer, got str"),
        (lambda: Transfer(Transfer(PGD(), net()), net()), "attack must be an attack other than Transfer, got Transfer"),
        (lambda: Transfer(PGD(), []), "surrogates must be one network at least, got none"),
        (lambda: Transfer(PGD(), None), "surrogates must be an nn.Module or a Chain, or several, got NoneType"),
        (lambda: Transfer(PGD(), [net(), "b"]), "surrogates must be .* got str"),
        (
            lambda: Transfer(PGD(), [net()] * 2, weights=[1]),
            r"weights must be 2 positive numbers, one a surrogate, got \[1.0\]",
        ),
        (lambda: Transfer(PGD(), [net()] * 2, weights=[1, -1]), "weights must be 2 positive"),
        (lambda: Transfer(PGD(), [net()] * 2, weights=[1, math.nan]), "weights must be 2 positive"),
        (lambda: Transfer(PGD(), [net()] * 2, weights=[1, math.inf]), "weights must be 2 positive"),
        (lambda: Transfer(PGD(), net(), combine="logit"), "unknown combine 'logit'; did you mean 'logits'"),
        (lambda: Transfer(CW(), net(), combine="loss"), "combine='loss' needs an attack with a field loss, got CW"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_refuses_when_called():
    x, y = batch()
    attack = Transfer(PGD(), [net(1), net(2)])
    with pytest.raises(InputError, match=r"model must be an nn\.Module or a Chain, got function"):
        attack(lambda x: x, x, y)
    with pytest.raises(InputError, match="surrogates must have the same classes, got 10 and 7 logits"):
        Transfer(PGD(), [net(1), net(2, classes=7)])(net(), x, y)
    with pytest.raises(InputError, match=r"y must be in 0\.\.4, the model's classes"):
        attack.run(net(3, classes=5), x, torch.full_like(y, 9))

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match=r"model must return logits \[6, classes\], got tuple"):
        attack.run(Pair(), x, y)
    with pytest.raises(InputError, match=r"model must return logits \[6, classes\], got tuple"):
        Transfer(PGD(), [net(1), Pair()])(net(), x, y)
