"""`memory_format` and `autocast`: what they change (the gradient's precision, the images' format), and what they leave."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import FGSM, MIM, PGD, OracleL2, eager
from tsrfast.attacks.losses import CrossEntropy, Margin
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)


class Noting(nn.Module):
    """A network that notes how it was called: dtype of what its first layer computes, format of the images."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = ConvReLU((6, 5), image=IMAGE, seed=seed)
        self.calls = []
        self.net.register_forward_hook(lambda m, args, out: self.calls.append((out.dtype, args[0].stride())))

    def forward(self, x):
        return self.net(x)


def batch(n=12, seed=0):
    x = torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) % 10


def test_defaults_are_as_before():
    attack = PGD()
    assert attack.memory_format is None
    assert attack.autocast is None
    assert FGSM().autocast is None
    assert PGD().plan(ConvReLU((4,), image=IMAGE)).path == "chain"


@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_are_low_and_verdicts_are_not(steps):
    model, (x, y) = Noting().eval(), batch()
    got = PGD(steps=steps, autocast=torch.bfloat16, engine="eager").run(model, x, y)
    assert [d for d, _ in model.calls] == [torch.bfloat16] * steps + [torch.float32]
    assert got.queries.tolist() == [steps + 1] * 12
    z = model.net(got.x_adv)
    assert torch.equal(got.success, z.argmax(1) != y)
    torch.testing.assert_close(got.loss, F.cross_entropy(z, y, reduction="none"))
    assert got.loss.dtype == got.x_adv.dtype == torch.float32


@pytest.mark.parametrize("options", [{"keep": "best"}, {"early_stop": True}, {"on_step": lambda s: None}])
def test_whoever_asks_about_iterates_gets_answers_of_the_model_itself(options):
    model, (x, _) = Noting().eval(), batch()
    y = model.net(x).argmax(1)
    model.calls.clear()
    attack = PGD(eps=0.05, step_size=0.01, steps=3, autocast=torch.bfloat16, **options)
    got = attack.run(model, x, y)
    kinds = [d for d, _ in model.calls]
    assert kinds[:2] == [torch.float32, torch.bfloat16]
    assert kinds[-1] == torch.float32
    if "early_stop" not in options:
        assert kinds == [torch.float32, torch.bfloat16] * 3 + [torch.float32]
        assert got.queries.tolist() == [7] * 12
    assert torch.equal(got.success, model.net(got.x_adv).argmax(1) != y)


def test_states_that_callbacks_see():
    """Logits and loss in full precision; the gradient is that of the loss, not of a scaled one."""
    model, (x, y) = ConvReLU((6, 5), image=IMAGE, seed=0).eval(), batch()
    states, plain = [], []
    attack = PGD(steps=1, random_start=False, autocast=torch.bfloat16, on_step=states.append)
    attack(model, x, y)
    dataclasses.replace(attack, autocast=None, on_step=plain.append)(model, x, y)
    (low,), (full,) = states, plain
    assert torch.equal(low.logits, full.logits)
    assert torch.equal(low.loss, full.loss)
    assert low.gradient.dtype == torch.float32
    error = (low.gradient - full.gradient).flatten(1).norm(dim=1) / full.gradient.flatten(1).norm(dim=1)
    assert 0 < error.median() < 0.01  # 8 bits; a few images have a ReLU that rounding opens or closes


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_nearly_as_strong(norm):
    eps = {"linf": 0.05, "l2": 0.8, "l1": 6.0}[norm]
    model, (x, y) = ConvReLU((6, 5), image=IMAGE, seed=0).eval(), batch(64)
    attack = PGD(norm, eps, eps / 5, steps=10, engine="eager")
    full, low = (dataclasses.replace(attack, autocast=a).run(model, x, y) for a in (None, torch.bfloat16))
    start = dataclasses.replace(attack, steps=0).run(model, x, y)
    assert (low.loss - start.loss).mean() > 0.97 * (full.loss - start.loss).mean()
    assert not torch.equal(low.x_adv, full.x_adv)


def test_teachers_are_lowered_too_and_the_difference_is_not():
    student, teacher = Noting(0).eval(), Noting(1).eval()
    x, _ = batch()
    got = PGD(steps=2, loss=OracleL2(teacher), autocast=torch.bfloat16).run(student, x)
    for net in (student, teacher):
        assert [d for d, _ in net.calls] == [torch.bfloat16, torch.bfloat16, torch.float32]
    torch.testing.assert_close(got.loss, (student.net(got.x_adv) - teacher.net(got.x_adv)).square().sum(1))


class Sees(CrossEntropy):
    """What a loss is given."""

    def __call__(self, x, logits, y):
        assert logits.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return super().__call__(x, logits, y)


def test_losses_are_computed_in_float32():
    PGD(steps=2, loss=Sees(), autocast=torch.bfloat16)(ConvReLU((4,), image=IMAGE).eval(), *batch())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("confidence", [5.0, 18.0, 40.0, 80.0])
def test_gradients_of_confident_images_do_not_underflow(dtype, confidence):
    """exp(-18) and below is 0 in float16: without a scale nothing would move, though nothing is said."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x, _ = batch(6)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        x = x[:1]
        y = model(x).argmax(1)
        model[3].bias[y] += confidence
    plain, low = [], []
    attack = PGD("l2", 1e-3, 1e-4, steps=1, random_start=False, engine="eager")
    dataclasses.replace(attack, on_step=plain.append)(model, x, y)
    got = dataclasses.replace(attack, on_step=low.append, autocast=dtype).run(model, x, y)
    a, b = (s[0].gradient.double().flatten() for s in (low, plain))
    assert bool(b.any())
    assert float(a @ b / (a.norm() * b.norm())) > 0.99
    # Its length is that of exp(-confidence), which rounded logits change: by a spacing of numbers there at most.
    assert abs(float(a.norm() / b.norm()) - 1) < 1.1 * confidence * torch.finfo(dtype).eps + 0.02
    assert got.bad_gradients.tolist() == [0]
    assert float((got.x_adv - x).norm()) == pytest.approx(1e-4, rel=1e-3)


def test_the_scale_is_a_power_of_two_for_each_image():
    logits = torch.tensor(
        [[0.0, 20.0, 1.0], [3.0, 3.0, 3.0], [0.0, 95.0, 0.0], [1e4, -1e4, 0.0], [float("nan")] * 3], requires_grad=True
    )
    y = torch.tensor([1, 0, 1, 0, 2])
    at = eager.Evaluation(logits, logits, *CrossEntropy()(logits, logits, y), False, True)
    scale = at._scale()
    (d,) = torch.autograd.grad(at.loss.nansum(), logits)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((5,), 0.5))
    most = (d.abs().amax(1) * scale)[:2]
    assert bool(((most >= 32) & (most < 64)).all())
    assert scale[3:].tolist() == [1, 1]  # 0 and NaN have none


def test_overflow_is_counted():
    """Weights of 1e5 are infinite in float16, which is said; bfloat16 has the range."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e7)
        model[2].weight.mul_(1e-7)
    x, y = batch(3)[0], torch.zeros(3, dtype=torch.int64)
    bad = {d: PGD("l2", 1.0, 0.2, steps=1, autocast=d).run(model, x, y).bad_gradients for d in (torch.float16, torch.bfloat16)}
    assert bad[torch.bfloat16].tolist() == [0, 0, 0]
    assert bool((bad[torch.float16] > 0).all())


def test_channels_last_is_what_networks_are_shown():
    model, (x, y) = Noting().eval(), batch()
    weights = [p.stride() for p in model.parameters()]
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:1]):
        model.calls.clear()
        got = PGD(steps=2, memory_format=torch.channels_last, engine="eager").run(model, given, y[: len(given)])
        assert all(stride[1:] == (1, 24, 3) for _, stride in model.calls)
        assert len(model.calls) == 3
        assert got.x_adv.stride() == given.stride()
        want = PGD(steps=2, engine="eager").run(model, given, y[: len(given)])
        assert ((got.x_adv - want.x_adv).abs() > 1e-5).double().mean() < 0.01
    assert [p.stride() for p in model.parameters()] == weights
    model.calls.clear()
    got = PGD(steps=1, memory_format=torch.contiguous_format, engine="eager").run(
        model, x.contiguous(memory_format=torch.channels_last), y
    )
    assert all(stride == x.stride() for _, stride in model.calls)
    assert got.x_adv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("attack", [
    PGD(steps=2), FGSM(), MIM(steps=2), PGD(steps=2, momentum=0.5), PGD(steps=2, loss=Margin(most=1.0)), PGD(steps=3, early_stop=True),
])  # fmt: skip
def test_they_ask_for_pytorch(attack):
    model, (x, y) = ConvReLU((4,), image=IMAGE).eval(), batch()
    for options, words in (
        ({"autocast": torch.bfloat16}, "autocast asks for PyTorch"),
        ({"memory_format": torch.channels_last}, "memory_format asks for PyTorch"),
        ({"memory_format": torch.channels_last, "autocast": torch.bfloat16}, "memory_format and autocast ask for PyTorch"),
    ):
        changed = dataclasses.replace(attack, **options)
        assert str(changed.plan(model, x)) == f"eager: {words}"
        got = changed.run(model, x, y)
        assert (got.path, got.reason) == ("eager", words)
        assert bool(((got.x_adv - x).abs() <= 8 / 255 + 1e-6).all())
        with pytest.raises(InputError, match=f"engine must be 'auto', 'graph' or 'eager' for this call, got 'chain': {words}"):
            dataclasses.replace(changed, engine="chain")(model, x, y)
        with pytest.raises(InputError, match=f"model must be an nn.Module for this call, got a Chain: {words}"):
            changed(tsrfast.compile(model), x, y)


BAD = [
    ({"autocast": torch.float32}, "autocast must be torch.float16, torch.bfloat16 or None, got torch.float32"),
    ({"autocast": True}, "autocast must be torch.float16, torch.bfloat16 or None, got True"),
    ({"autocast": "float16"}, "autocast must be .*, got 'float16'"),
    ({"memory_format": torch.preserve_format}, "memory_format must be torch.channels_last, torch.contiguous_format or None, got torch.pres"),
    ({"memory_format": "channels_last"}, "memory_format must be .*, got 'channels_last'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_refused_values(options, message):
    for make in (PGD, FGSM, MIM):
        with pytest.raises(InputError, match=message):
            make(**options)


def test_refused_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).eval()
    with pytest.raises(InputError, match=re.escape("x must be images [N, C, H, W] for channels_last, got shape (2, 12)")):
        PGD(memory_format=torch.channels_last)(model, torch.zeros(2, 12), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"x must be float32 for autocast, got torch.float64"):
        PGD(autocast=torch.bfloat16)(model.double(), torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
