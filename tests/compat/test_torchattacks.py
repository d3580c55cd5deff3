"""The drop-in against torchattacks 3.5.1 where that is installed, against numbers recorded from it, and on its own."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tsrfast.compat.torchattacks as ours
from tsrfast.attacks import native
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

ATTACKS = {
    "FGSM": {},
    "BIM": {"steps": 4},
    "PGD": {"steps": 4},
    "PGDL2": {"steps": 4},
    "VANILA": {},
    "GN": {},
}
GRADIENT = [n for n in ATTACKS if n not in ("VANILA", "GN")]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("torchattacks")


def net(dtype=torch.float64, gate=nn.SiLU, seed=0):
    """SiLU: does not compile."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3), gate(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
        return nn.Sequential(*layers).to(dtype)


def batch(n=8, dtype=torch.float64, seed=0):
    r = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 8, 8), generator=r).to(dtype) / 255
    return x, torch.randint(10, (n,), generator=r)


def seeded(call, *args):
    """(result, state of the generator afterwards)"""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return call(*args), torch.get_rng_state()


def assert_as_original(name, got, want):
    if name == "PGDL2":  # the original adds 1e-10 to the norm of the mean loss's gradient
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7 if got.dtype == torch.float64 else 1e-6)
    elif name == "PGD":  # one rounding a step
        torch.testing.assert_close(got, want, rtol=0, atol=8 * torch.finfo(got.dtype).eps)
    else:
        assert torch.equal(got, want)


# Against the original


@pytest.mark.parametrize("mode", [None, "by_label", "random", "least_likely", "by_function"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ATTACKS)
def test_same_pixels_and_draws(theirs, name, dtype, mode):
    if mode and name not in GRADIENT:
        mode = None
    (x, y), results = batch(dtype=dtype), []
    for lib in (ours, theirs):
        atk = getattr(lib, name)(net(dtype), **ATTACKS[name])
        if mode:
            set_mode = getattr(atk, f"set_mode_targeted_{mode}")
            set_mode(**({"target_map_function": lambda images, labels: (labels + 1) % 10} if mode == "by_function" else {}))
        results.append(seeded(atk, x, y))
    (got, state), (want, their_state) = results
    assert torch.equal(state, their_state)
    assert_as_original(name, got, want)


@pytest.mark.parametrize("name", GRADIENT)
def test_compiled_networks_differ_where_a_gradient_is_zero_up_to_rounding(theirs, name):
    model = ConvReLU((12, 8), image=(3, 16, 16), seed=1).eval()
    x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    (got, state), (want, their_state) = (seeded(getattr(lib, name)(model), x, y) for lib in (ours, theirs))
    assert torch.equal(state, their_state)
    assert ((got - want).abs() > 1e-4).double().mean() < 0.005
    assert torch.equal(model(got).argmax(1) != y, model(want).argmax(1) != y)


def test_same_names_arguments_and_defaults(theirs):
    def parameters(function):
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    for name in ours.__all__:
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))
    for name, method in vars(theirs.attack.Attack).items():
        if name.startswith("_") or not callable(getattr(theirs.attack.Attack, name)):
            continue
        mine = getattr(ours.attack.Attack, name)
        # The original's decorator hides signatures: those of the functions inside it.
        inside = method.__closure__[0].cell_contents if getattr(method, "__name__", "") == "wrapper_func" else None
        assert parameters(mine) == parameters(inside or getattr(theirs.attack.Attack, name)), name
    assert parameters(ours.MultiAttack.save) == parameters(theirs.MultiAttack.save)
    a, b = ours.PGD(net()), theirs.PGD(net())
    assert repr(a) == repr(b)
    assert {k for k in vars(b) if not k.startswith("_")} == {k for k in vars(a) if not k.startswith("_")}
    assert ours.__version__ == theirs.__version__


def test_what_is_missing_is_what_the_original_has_besides(theirs):
    missing = {n for names in ours._MISSING.values() for n in names}
    assert missing | set(ours.__all__) == set(theirs.__all__)


def script_normalised(lib, model, x, y):
    atk = lib.PGD(model, eps=8 / 255, alpha=2 / 225, steps=3, random_start=True)
    atk.set_normalization_used(mean=MEAN, std=STD)
    mean, std = torch.tensor(MEAN).reshape(1, 3, 1, 1), torch.tensor(STD).reshape(1, 3, 1, 1)
    adv = atk((x - mean) / std, y)
    again = atk((x - mean) / std, y)
    return atk.inverse_normalize(adv), again, atk.normalize(x)


def script_targeted(lib, model, x, y):
    atk = lib.PGD(model, eps=8 / 255, alpha=2 / 255, steps=3)
    atk.set_mode_targeted_random()
    random = atk(x, y)
    atk.set_mode_targeted_least_likely(2)
    least, mode = atk(x, y), atk.get_mode()
    atk.set_mode_targeted_by_function(target_map_function=lambda images, labels: (labels + 1) % 10)
    mapped = atk(x, y)
    atk.set_mode_targeted_by_label(quiet=True)
    label = atk(x, (y + 1) % 10)
    atk.set_mode_default()
    return random, least, mapped, label, atk(x, y), mode, str(atk)


def script_written_attributes(lib, model, x, y):
    atk, out = lib.PGD(model, steps=1), []
    for eps in (1 / 255, 4 / 255):
        atk.eps, atk.alpha, atk.steps, atk.random_start = eps, eps / 4, 3, eps < 2 / 255
        out.append(atk(x, y))
    return *out, str(atk)


def script_own_attack(lib, model, x, y):
    class Momentum(lib.attack.Attack):
        def __init__(self, model, eps=0.03):
            super().__init__("Momentum", model)
            self.eps = eps
            self.supported_mode = ["default", "targeted"]

        def forward(self, images, labels):
            images = images.clone().detach().to(self.device)
            labels = labels.clone().detach().to(self.device)
            if self.targeted:
                target_labels = self.get_target_label(images, labels)
            adv_images = images.clone().detach()
            for _ in range(3):
                adv_images.requires_grad = True
                outputs = self.get_logits(adv_images)
                cost = -F.cross_entropy(outputs, target_labels) if self.targeted else F.cross_entropy(outputs, labels)
                grad = torch.autograd.grad(cost, adv_images)[0]
                adv_images = torch.clamp(adv_images.detach() + self.eps / 3 * grad.sign(), 0, 1)
            return adv_images

    atk = Momentum(model)
    plain = atk(x, labels=y)
    atk.set_normalization_used(MEAN, STD)
    atk.set_mode_targeted_least_likely()
    return plain, atk(atk.normalize(x), y), str(atk)


def script_subclass(lib, model, x, y):
    class Blind(lib.BIM):
        def get_logits(self, inputs, labels=None, *args, **kwargs):
            return super().get_logits(inputs * torch.tensor([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1))

    atk = Blind(model, steps=2)
    plain = atk(x, y)
    atk.set_normalization_used(MEAN, STD)
    return plain, atk(atk.normalize(x), y)


def script_multi(lib, model, x, y):
    attacks = [lib.FGSM(model, eps=0.01), lib.BIM(model, eps=0.02, steps=3), lib.BIM(model, eps=0.05)]
    atk = lib.MultiAttack(attacks, verbose=True)
    plain = atk(x, y)
    with pytest.raises(ValueError, match="not supported"):
        atk.set_mode_targeted_by_label()
    some = lib.MultiAttack([lib.BIM(model, eps=1e-3), lib.BIM(model, eps=2e-3)], verbose=True)(x, model(x).argmax(1))
    atk.set_normalization_used(MEAN, STD)
    return plain, some, atk(atk.normalize(x), y), attacks[1].normalization_used is not None


def script_dropout(lib, model, x, y):
    model = nn.Sequential(model, nn.Dropout(0.3), nn.BatchNorm1d(10).double()).train()
    atk = lib.PGD(model, steps=3)
    atk.set_model_training_mode(model_training=True, batchnorm_training=False, dropout_training=True)
    random = atk(x, y)
    atk.set_model_training_mode(model_training=False)
    return random, atk(x, y), model[2].running_mean.clone()


def script_drawing_model(lib, model, x, y):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(torch.float32, nn.ReLU)

        def forward(self, x):
            return self.inner(x + 0.01 * torch.rand(1))

    return (lib.BIM(Noisy(), steps=3)(x.float(), y),)


def script_nested(lib, model, x, y):
    class Pair(lib.attack.Attack):
        def __init__(self, model):
            super().__init__("Pair", model)
            self.supported_mode = ["default", "targeted"]
            self.parts = {"one": [lib.FGSM(model)], "two": lib.BIM(model, steps=2)}

        def forward(self, images, labels):
            return self.parts["two"](self.parts["one"][0](images, labels), labels)

    atk = Pair(model)
    plain = atk(x, y)
    atk.set_mode_targeted_by_label(quiet=True)
    atk.set_normalization_used(MEAN, STD)
    atk.set_device("cpu")
    return plain, atk(atk.normalize(x), y), atk.parts["two"].get_mode()


SCRIPTS = [v for k, v in list(globals().items()) if k.startswith("script_")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_users_scripts_run_unchanged(theirs, script, capsys):
    x, y = batch()
    results, said = [], []
    for lib in (ours, theirs):
        results.append(seeded(script, lib, net(), x, y))
        said.append(capsys.readouterr().out)
    (got, state), (want, their_state) = results
    for mine, other in zip(got, want, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-13)
        else:
            assert mine == other
    assert torch.equal(state, their_state)
    if script is not script_nested:  # the original tells a nested attack twice
        assert said[0] == said[1]


@pytest.mark.parametrize("save_type", ["float", "int"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("multi", [False, True])
def test_save_and_load(theirs, tmp_path, capsys, save_type, normalised, multi):
    model, (x, y) = net(torch.float32), batch(12, torch.float32)
    norm = {"mean": MEAN, "std": STD}
    results, said = [], []
    for lib in (ours, theirs):
        atk = lib.BIM(model, eps=0.05, steps=3)
        if multi:
            atk = lib.MultiAttack([lib.FGSM(model, eps=0.02), atk])
        if normalised:
            atk.set_normalization_used(**norm)
        loader = DataLoader(TensorDataset(atk.normalize(x) if normalised else x, y), batch_size=5)
        more = {} if multi else {"save_clean_inputs": True, "save_type": save_type}
        results.append(atk.save(loader, tmp_path / lib.__name__, return_verbose=True, save_predictions=True, **more))
        said.append(re.sub(r"[0-9.]+ it/s", "", capsys.readouterr().out))
    for mine, other in zip(results[0][:-1], results[1][:-1], strict=True):
        assert mine == pytest.approx(other)
    assert said[0] == said[1]
    options = {
        "load_predictions": True,
        "load_clean_inputs": not multi,
        "normalize": norm if normalised else None,
        "batch_size": 7,
    }
    for a, b in zip(
        ours.PGD.load(tmp_path / ours.__name__, **options), theirs.PGD.load(tmp_path / "torchattacks", **options), strict=True
    ):
        assert len(a) == len(b) == 4 - multi
        for mine, other in zip(a, b, strict=True):
            assert torch.equal(mine, other)
    for a, b in zip(
        ours.PGD.load(tmp_path / "torchattacks"), theirs.PGD.load(tmp_path / ours.__name__), strict=True
    ):  # each other's files
        assert all(map(torch.equal, a, b))


# Against numbers recorded from the original

# torchattacks 3.5.1, torch 2.13, torch.manual_seed(11), on tiny() and tiny_batch()
RECORDED = [
    ("FGSM", {"eps": 0.05}, [0.05, 0.35, 0.65, 0.93, 0.0, 0.55, 0.35, 0.65]),
    ("BIM", {"steps": 3},
     [0.076470588, 0.376470588, 0.623529412, 0.956470588, 0.0, 0.523529412, 0.323529412, 0.676470588]),
    ("PGD", {"eps": 0.3, "alpha": 0.05, "steps": 3},
     [0.0, 0.692029394, 0.9, 0.770945927, 0.0, 0.8, 0.381516508, 0.4]),
    ("PGDL2", {"eps": 0.5, "alpha": 0.2, "steps": 3},
     [0.0, 0.543095334, 0.948225901, 0.706210514, 0.0, 0.91822994, 0.378084055, 0.447972001]),
    ("GN", {"std": 0.2}, [0.0, 0.439568372, 0.722294656, 0.818381469, 0.125835336, 1.0, 0.20397284, 0.783740601]),
]  # fmt: skip
TARGETS = {"random": [2, 0], "least_likely": [1, 1], "by_label": [0, 3]}  # torch.manual_seed(12)


def tiny():
    m = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for k, p in enumerate(m.parameters()):
        p.data = (torch.arange(p.numel(), dtype=torch.float64) * 1.7 + k).sin().reshape(p.shape)
    return m


def tiny_batch():
    x = torch.tensor([[0.1, 0.4, 0.6, 0.98], [0.02, 0.5, 0.3, 0.7]], dtype=torch.float64)
    return x.reshape(2, 1, 2, 2), torch.tensor([0, 3])


@pytest.mark.parametrize(("name", "options", "want"), RECORDED)
def test_recorded_images(name, options, want):
    x, y = tiny_batch()
    with torch.random.fork_rng():
        torch.manual_seed(11)
        got = getattr(ours, name)(tiny(), **options)(x, y)
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", TARGETS)
def test_recorded_targets(mode):
    atk = ours.BIM(tiny())
    getattr(atk, f"set_mode_targeted_{mode}")(quiet=True)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        assert atk.get_target_label(*tiny_batch()).tolist() == TARGETS[mode]


# On its own


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(GRADIENT), n=st.integers(0, 4), eps=st.floats(0, 0.5), steps=st.integers(0, 3), start=st.booleans(),
    gate=st.sampled_from([nn.ReLU, nn.SiLU]), channels_last=st.booleans(), targeted=st.booleans(), normalised=st.booleans(),
    each=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_in_the_ball_and_the_box_and_nothing_else_touched(
    name, n, eps, steps, start, gate, channels_last, targeted, normalised, each, dtype
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
def test_one_image_is_what_it_is_in_a_batch(gate):
    model, (x, y) = net(gate=gate), batch()
    for name in GRADIENT:
        atk = getattr(ours, name)(model)
        atk.random_start = False
        torch.testing.assert_close(atk(x, y)[3:4], atk(x[3:4], y[3:4]), rtol=0, atol=1e-9)


def test_native_code_runs_what_it_can(monkeypatch):
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


def test_normalisation_follows_what_is_set():
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


def test_normalised_images_may_have_been_rounded_out_of_the_box():
    model, x = net(torch.float32), torch.tensor([0.0, 1.0]).repeat(96).reshape(1, 3, 8, 8)
    atk = ours.PGD(model)
    atk.set_normalization_used([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])  # CIFAR-10's
    given = atk.normalize(x)
    assert not atk.inverse_normalize(given).clamp(0, 1).equal(atk.inverse_normalize(given))  # there is something to put back
    assert (atk.inverse_normalize(atk(given, torch.tensor([3]))) - x).abs().max() < 8 / 255 + 1e-6


def test_soft_labels():
    """As CrossEntropyLoss takes them: one-hot ones give what labels give."""
    model, (x, y) = net(), batch()
    atk = ours.BIM(model, steps=3)
    assert torch.equal(atk(x, F.one_hot(y, 10).double()), atk(x, y))
    smooth = 0.5 * F.one_hot(y, 10).double() + 0.05
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), smooth), leaf)
    assert torch.equal(ours.FGSM(model, eps=0.1)(x, smooth), (x + 0.1 * g.sign()).clamp(0, 1))


def test_targeted_lowers_the_targets_loss():
    model, (x, y) = net(), batch()
    for name in GRADIENT:
        atk = getattr(ours, name)(model)
        atk.set_mode_targeted_least_likely(quiet=True)
        target = atk.get_target_label(x, y)
        assert (target != y).all()
        assert F.cross_entropy(model(atk(x, y)), target) < F.cross_entropy(model(x), target)


def test_targets():
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


def test_errors_of_modes():
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
def test_bad_input(change, message):
    model = net()
    atk = ours.PGD(model)
    with pytest.raises(InputError, match=message):
        atk(*change(*batch()))
    assert model.training


def test_bad_models():
    x, y = batch()

    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(InputError, match="logits"):
        ours.PGD(Two())(x, y)
    with pytest.raises(AttributeError):
        ours.PGD(lambda x: x.flatten(1))(x, y)  # as the original


def test_a_model_without_parameters_leaves_images_where_they_are(capsys):
    atk = ours.BIM(nn.Flatten())
    assert atk.device is None
    assert "Failed to set device automatically" in capsys.readouterr().out
    x, y = batch()
    assert (atk(x, y) != x).any()


def test_an_error_leaves_the_attack_usable():
    model, (x, y) = net(), batch()
    atk = ours.BIM(model)
    atk.set_normalization_used(MEAN, STD)
    want = atk(atk.normalize(x), y)
    with pytest.raises(InputError):
        atk(atk.normalize(x), y + 10)
    assert torch.equal(atk(atk.normalize(x), y), want)


def test_inference_mode_and_half_precision():
    model, (x, y) = net(), batch()
    with torch.inference_mode():
        got = ours.BIM(model)(x.clone(), y.clone())
    assert torch.equal(got, ours.BIM(model)(x, y))
    half = ours.PGD(net(torch.bfloat16))(x.bfloat16(), y)
    assert half.dtype == torch.bfloat16
    assert (half.double() - x.bfloat16().double()).abs().max() < 8 / 255 + 0.005


def test_batch_norm_learns_only_where_asked():
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


def test_held_attacks_have_their_models_in_eval_mode_too():
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


def test_output_with_eval_nograd():
    model, (x, _) = nn.Sequential(net(), nn.BatchNorm1d(10).double()).train(), batch()
    before = copy.deepcopy(model)
    got = ours.PGD(model).get_output_with_eval_nograd(x)
    assert not got.requires_grad
    assert torch.equal(got, before.eval()(x))
    assert model[1].training


def test_mean_and_std_of_another_precision():
    """The original turns float32 images into float64 by means from NumPy, which the model then refuses."""
    (x, y), atk = batch(dtype=torch.float32), ours.BIM(net(torch.float32))
    atk.set_normalization_used(np.array(MEAN), np.array(STD))
    got = atk(atk.normalize(x), y)
    assert got.dtype == torch.float32
    atk.set_normalization_used(MEAN, STD)
    assert torch.equal(got, atk(atk.normalize(x), y))


def test_copies_and_pickles():
    model, (x, y) = net(), batch()
    atk = ours.BIM(model, steps=2)
    atk.set_mode_targeted_least_likely(quiet=True)
    atk.set_normalization_used(MEAN, STD)
    want = atk(atk.normalize(x), y)
    for other in (copy.deepcopy(atk), pickle.loads(pickle.dumps(atk))):
        assert repr(other) == repr(atk)
        assert torch.equal(other(other.normalize(x), y), want)


def test_normalisation_of_mair():
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


def test_what_is_missing_says_so():
    with pytest.raises(InputError, match=r"got 'CW': torchattacks has it.*PGDL2.*tsrfast\.attacks has .*PGD"):
        _ = ours.CW
    with pytest.raises(ImportError, match="got 'AutoAttack'"):
        from tsrfast.compat.torchattacks import AutoAttack  # noqa: F401
    assert not hasattr(ours, "NoSuchAttack")
    with pytest.raises(ImportError, match="NoSuchAttack"):
        from tsrfast.compat.torchattacks import NoSuchAttack  # noqa: F401
    assert not hasattr(ours.PGD(net()), "set_return_type")  # gone from the original before 3.5.1
