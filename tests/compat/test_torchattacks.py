"""The drop-in for torchattacks on its own; against the original: test_torchattacks_parity.py."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast.compat.torchattacks as ours
from tsrfast.attacks import native
from tsrfast.errors import InputError

GRADIENT = ["FGSM", "BIM", "PGD", "PGDL2", "EOTPGD", "MIFGSM", "NIFGSM"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(GRADIENT), n=st.integers(0, 4), eps=st.floats(0, 0.5), steps=st.integers(0, 3), start=st.booleans(),
    gate=st.sampled_from([nn.ReLU, nn.SiLU]), channels_last=st.booleans(), targeted=st.booleans(), normalised=st.booleans(),
    each=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_in_the_ball_and_the_box_and_nothing_else_touched(
    name, n, eps, steps, start, gate, channels_last, targeted, normalised, each, dtype, net, batch
):
    model, (x, y) = net(dtype, gate).train(), batch(n, dtype)
    model[0].eval()  # a mixed state
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    atk = getattr(ours, name)(model)
    radius = torch.linspace(0, eps, n) if each and not start and n else torch.full((n,), eps)
    atk.eps = radius if each and not start and n else eps
    if name != "FGSM":
        atk.alpha, atk.steps, atk.random_start = eps / 2, steps, start
    if targeted:
        atk.set_mode_targeted_by_label(quiet=True)
    if normalised:
        atk.set_normalization_used(MEAN, STD)
        x = atk.normalize(x)
    before, modes = (x.clone(), y.clone()), [m.training for m in model.modules()]
    x.requires_grad_()
    with torch.no_grad():
        got = atk(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert [m.training for m in model.modules()] == modes
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not got.requires_grad
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    if n and not normalised:
        assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    pixels, clean = (atk.inverse_normalize(t.detach()) if normalised else t.detach() for t in (got, x))
    slack = 2e-6 if normalised else 5e-7
    if n:
        assert pixels.min() >= -slack * normalised
        assert pixels.max() <= 1 + slack * normalised
        distance = (pixels.double() - clean.double()).flatten(1).norm(p=2 if name == "PGDL2" else math.inf, dim=1)
        assert (distance <= radius + slack * 10).all()


@pytest.mark.parametrize("gate", [nn.ReLU, nn.SiLU])
def test_one_image_is_what_it_is_in_a_batch(gate, net, batch):
    model, (x, y) = net(gate=gate), batch()
    for name in GRADIENT:
        atk = getattr(ours, name)(model)
        atk.random_start = False
        torch.testing.assert_close(atk(x, y)[3:4], atk(x[3:4], y[3:4]), rtol=0, atol=1e-9)


def test_native_code_runs_what_it_can(monkeypatch, net, batch):
    calls, original = [], native.attempt
    monkeypatch.setattr(native, "attempt", lambda *args: calls.append(1) or original(*args))
    model, (x, y) = net(torch.float32, nn.ReLU), batch(dtype=torch.float32)

    def takes(atk, *args):
        del calls[:]
        atk(*args)
        return bool(calls)

    atk = ours.PGD(model)
    assert takes(atk, x, y)
    atk.set_normalization_used(MEAN, STD)
    assert takes(atk, atk.normalize(x), y)
    assert takes(copy.deepcopy(atk), atk.normalize(x), y)
    atk.set_model_training_mode(True)
    assert not takes(atk, atk.normalize(x), y)
    atk = ours.PGD(model)
    atk.get_logits = lambda inputs: model(inputs)
    assert not takes(atk, x, y)
    assert not takes(ours.PGD(model), x, F.one_hot(y, 10).float())
    assert not takes(ours.PGD(net(torch.float32)), x, y)


def test_normalisation_follows_what_is_set(net, batch):
    """The module that normalises is kept between calls: it must not outlive the model, mean or std it was made of."""
    (x, y), models = batch(dtype=torch.float32), [net(torch.float32, nn.ReLU, seed) for seed in (0, 1)]
    kept = ours.BIM(models[0])
    for model, mean in ((models[0], MEAN), (models[0], STD), (models[1], STD)):
        fresh = ours.BIM(model)
        kept.set_model(model)
        results = []
        for atk in (kept, fresh):
            atk.set_normalization_used(mean, STD)
            results.append(atk(atk.normalize(x), y))
        assert torch.equal(*results)
    kept.normalization_used["std"] *= 2
    fresh.normalization_used["std"] *= 2
    assert torch.equal(kept(kept.normalize(x), y), fresh(fresh.normalize(x), y))


def test_normalised_images_may_have_been_rounded_out_of_the_box(net):
    model, x = net(torch.float32), torch.tensor([0.0, 1.0]).repeat(96).reshape(1, 3, 8, 8)
    atk = ours.PGD(model)
    atk.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])  # CIFAR-10's
    given = atk.normalize(x)
    assert not atk.inverse_normalize(given).clamp(0, 1).equal(atk.inverse_normalize(given))  # there is something to put back
    assert (atk.inverse_normalize(atk(given, torch.tensor([3]))) - x).abs().max() < 8 / 255 + 1e-6


def test_soft_labels(net, batch):
    """As CrossEntropyLoss takes them: one-hot ones give what labels give."""
    model, (x, y) = net(), batch()
    atk = ours.BIM(model, steps=3)
    assert torch.equal(atk(x, F.one_hot(y, 10).double()), atk(x, y))
    smooth = 0.5 * F.one_hot(y, 10).double() + 0.05
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), smooth), leaf)
    assert torch.equal(ours.FGSM(model, eps=0.1)(x, smooth), (x + 0.1 * g.sign()).clamp(0, 1))


def test_targeted_lowers_the_targets_loss(net, batch):
    model, (x, y) = net(), batch()
    for name in GRADIENT:
        atk = getattr(ours, name)(model)
        atk.set_mode_targeted_least_likely(quiet=True)
        target = atk.get_target_label(x, y)
        assert (target != y).all()
        assert F.cross_entropy(model(atk(x, y)), target) < F.cross_entropy(model(x), target)


def test_targets(net, batch):
    model, (x, y) = net(), batch(32)
    atk = ours.PGD(model)
    logits = model(x).detach()
    for k in range(1, 10):
        atk.set_mode_targeted_least_likely(kth_min=k, quiet=True)
        for target, label, row in zip(atk.get_target_label(x, y).tolist(), y.tolist(), logits.tolist(), strict=True):
            assert target == sorted((v, i) for i, v in enumerate(row) if i != label)[k - 1][1]
    atk.set_mode_targeted_random(quiet=True)
    drawn = torch.stack([atk.get_target_label(x, y) for _ in range(50)])
    assert (drawn != y).all()
    assert set(drawn.unique().tolist()) == set(range(10))
    assert (atk.get_random_target_label(x) != logits.argmax(1)).all()  # without labels: the predictions


def test_errors_of_modes(net, batch):
    model, (x, y) = net(), batch()
    for name in ("VANILA", "GN"):
        with pytest.raises(ValueError, match="Targeted mode is not supported"):
            getattr(ours, name)(model).set_mode_targeted_by_label()
    atk = ours.FGSM(model)
    atk.targeted = True
    with pytest.raises(ValueError, match="target_map_function is not initialized"):
        atk(x, y)
    with pytest.raises(AssertionError):
        atk.set_mode_targeted_least_likely(kth_min=0)
    atk.set_mode_targeted_least_likely(kth_min=10, quiet=True)  # of 9 others
    with pytest.raises(RuntimeError):
        atk(x, y)
    atk.set_mode_targeted_random(quiet=True)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.9"):
        atk(x, y + 10)
    atk.set_mode_targeted_by_function(lambda images, labels: labels.float(), quiet=True)
    with pytest.raises(ValueError, match="labels must be int64"):
        atk(x, y)
    with pytest.raises(NotImplementedError):
        ours.attack.Attack("mine", model)(x, y)
    with pytest.raises(ValueError, match="is not a valid type"):
        atk.to_type(x, "double")
    with pytest.raises(ValueError, match="More than two attacks"):
        ours.MultiAttack([atk])
    with pytest.raises(ValueError, match="different model"):
        ours.MultiAttack([atk, ours.FGSM(net())])
    with pytest.raises(InputError, match="set_normalization_used"):
        atk.normalize(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), r"images must be in \[0, 1\], got .*normalised"),
        (lambda x, y: ((x * 255).byte(), y), "floating-point"),
        (lambda x, y: (x.where(x < 0.9, torch.nan), y), "finite"),
        (lambda x, y: (x, y.int()), "labels must be int64"),
        (lambda x, y: (x, y[1:]), "labels must be int64"),
        (lambda x, y: (x, y + 10), r"y must be in 0\.\.9"),
        (lambda x, y: (x, None), "labels must be int64"),
        (lambda x, y: (x, y.double()), "labels must be int64"),
    ],
)
def test_bad_input(change, message, net, batch):
    model = net()
    atk = ours.PGD(model)
    with pytest.raises(InputError, match=message):
        atk(*change(*batch()))
    assert model.training


def test_bad_models(batch):
    x, y = batch()

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match="logits"):
        ours.PGD(Two())(x, y)
    with pytest.raises(AttributeError):
        ours.PGD(lambda x: x.flatten(1))(x, y)  # as the original


def test_a_model_without_parameters_leaves_images_where_they_are(capsys, batch):
    atk = ours.BIM(nn.Flatten())
    assert atk.device is None
    assert "Failed to set device automatically" in capsys.readouterr().out
    x, y = batch()
    assert (atk(x, y) != x).any()


def test_an_error_leaves_the_attack_usable(net, batch):
    model, (x, y) = net(), batch()
    atk = ours.BIM(model)
    atk.set_normalization_used(MEAN, STD)
    want = atk(atk.normalize(x), y)
    with pytest.raises(InputError):
        atk(atk.normalize(x), y + 10)
    assert torch.equal(atk(atk.normalize(x), y), want)


def test_inference_mode_and_half_precision(net, batch):
    model, (x, y) = net(), batch()
    with torch.inference_mode():
        got = ours.BIM(model)(x.clone(), y.clone())
    assert torch.equal(got, ours.BIM(model)(x, y))
    half = ours.PGD(net(torch.bfloat16))(x.bfloat16(), y)
    assert half.dtype == torch.bfloat16
    assert (half.double() - x.bfloat16().double()).abs().max() < 8 / 255 + 0.005


def test_batch_norm_learns_only_where_asked(net, batch):
    model, (x, y) = nn.Sequential(net(), nn.BatchNorm1d(10).double()).train(), batch()
    atk, statistics = ours.BIM(model), model[1].running_mean
    before = statistics.clone()
    atk(x, y)
    atk.set_model_training_mode(True)
    atk(x, y)
    assert torch.equal(statistics, before)
    atk.set_model_training_mode(True, batchnorm_training=True)
    atk(x, y)
    assert not torch.equal(statistics, before)
    assert model[1].training


def test_l2_steps_do_not_depend_on_the_batch_or_the_size_of_gradients():
    """The original: 0.88 of alpha alone, 0.07 in a batch, for gradients of 1e-9. Its NaN gradients make NaN images."""
    x = torch.full((64, 1, 2, 2), 0.5, dtype=torch.float64)
    y = torch.zeros(64, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    model[1].weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64)
    model[1].bias.data = torch.tensor([20.0, 0], dtype=torch.float64)
    for n in (1, 64):
        moved = ours.PGDL2(model, alpha=0.2, steps=1, random_start=False)(x[:n], y[:n]) - x[:n]
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((n,), 0.2, dtype=torch.float64))
    model[1].weight.data[0, 0] = torch.nan
    assert torch.equal(ours.PGDL2(model, random_start=False)(x, y), x)


def test_held_attacks_have_their_models_in_eval_mode_too(net, batch):
    (x, y), seen = batch(), []

    class Through(ours.attack.Attack):
        def __init__(self, model, other):
            super().__init__("Through", model)
            self.other = ours.FGSM(other)

        def forward(self, images, labels):
            seen.append((self.model.training, self.other.model.training))
            return images

    atk = Through(net(), net(seed=1))
    atk(x, y)
    assert seen == [(False, False)]
    assert atk.model.training
    assert atk.other.model.training


def test_output_with_eval_nograd(net, batch):
    model, (x, _) = nn.Sequential(net(), nn.BatchNorm1d(10).double()).train(), batch()
    before = copy.deepcopy(model)
    got = ours.PGD(model).get_output_with_eval_nograd(x)
    assert not got.requires_grad
    assert torch.equal(got, before.eval()(x))
    assert model[1].training


def test_mean_and_std_of_another_precision(net, batch):
    """The original turns float32 images into float64 by means from NumPy, which the model then refuses."""
    (x, y), atk = batch(dtype=torch.float32), ours.BIM(net(torch.float32))
    atk.set_normalization_used(np.array(MEAN), np.array(STD))
    got = atk(atk.normalize(x), y)
    assert got.dtype == torch.float32
    atk.set_normalization_used(MEAN, STD)
    assert torch.equal(got, atk(atk.normalize(x), y))


def test_copies_and_pickles(net, batch):
    model, (x, y) = net(), batch()
    atk = ours.BIM(model, steps=2)
    atk.set_mode_targeted_least_likely(quiet=True)
    atk.set_normalization_used(MEAN, STD)
    want = atk(atk.normalize(x), y)
    for other in (copy.deepcopy(atk), pickle.loads(pickle.dumps(atk))):
        assert repr(other) == repr(atk)
        assert torch.equal(other(other.normalize(x), y), want)


def test_normalisation_of_mair(net):
    class RobModel(nn.Module):
        def __init__(self, mean, std):
            super().__init__()
            self.inner, self.mean, self.std = net(), torch.tensor(mean), torch.tensor(std)

    assert ours.PGD(RobModel([0.0] * 3, [1.0] * 3)).normalization_used is None
    assert ours.PGD(RobModel(MEAN, STD)).normalization_used["mean"].flatten().tolist() == pytest.approx(MEAN)


def test_load_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"adv_inputs": Trap()}, tmp_path / "trap")
    with pytest.raises(pickle.UnpicklingError):
        ours.PGD.load(tmp_path / "trap")


def test_what_is_missing_says_so(net):
    with pytest.raises(InputError, match=r"got 'Jitter': torchattacks has it.*PGD.*tsrfast\.attacks has .*PGD"):
        _ = ours.Jitter
    with pytest.raises(ImportError, match="got 'SPSA'"):
        from tsrfast.compat.torchattacks import SPSA  # noqa: F401
    assert not hasattr(ours, "NoSuchAttack")
    with pytest.raises(ImportError, match="NoSuchAttack"):
        from tsrfast.compat.torchattacks import NoSuchAttack  # noqa: F401
    assert not hasattr(ours.PGD(net()), "set_return_type")  # gone from the original before 3.5.1
