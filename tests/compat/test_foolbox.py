"""The drop-in against foolbox 3.3.4 where that is installed, against numbers recorded from it, and on its own."""

from __future__ import annotations

import importlib.util
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast.compat.foolbox as ours
from tsrfast.attacks import native
from tsrfast.compat._covered import NotCovered
from tsrfast.errors import InputError

BASES = ("Attack", "FixedEpsilonAttack", "MinimizationAttack")
NAMES = [n for n in ours.attacks.__all__ if n not in BASES]
WITH_ADAM = ("L1AdamBasicIterativeAttack", "L2AdamBasicIterativeAttack")  # which in foolbox step without
SEARCHES = {
    "L2CarliniWagnerAttack": {"steps": 40, "binary_search_steps": 4, "initial_const": 0.1, "abort_early": False},
    "EADAttack": {"steps": 40, "binary_search_steps": 4, "initial_const": 0.1, "abort_early": False},
}
GRADIENT = [n for n in NAMES if n not in SEARCHES and n != "L2DeepFoolAttack"]
PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1], "axis": -3}


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("foolbox")


def net(dtype=torch.float64, gate=nn.SiLU, seed=0):
    """SiLU: does not compile."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3), gate(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
        return nn.Sequential(*layers).to(dtype).eval()


def batch(model, n=6, dtype=torch.float64, seed=0):
    """Images and the model's answers, the first of which is changed."""
    r = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 8, 8), generator=r).to(dtype) / 255
    y = model(x).argmax(1)
    if n:
        y[0] = (y[0] + 1) % 10
    return x, y


def seeded(call, *args, **kwargs):
    """(result, state of the generator afterwards)"""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return call(*args, **kwargs), torch.get_rng_state()


def small(attack, size=0.02):
    """An epsilon for its norm."""
    return size * {"LpDistance(inf)": 1, "LpDistance(2)": 10, "LpDistance(1)": 80}[repr(attack.distance)]


class TestAgainstOriginal:
    @pytest.mark.parametrize("name", NAMES)
    def test_signatures(self, theirs, name):
        original, mine = getattr(theirs.attacks, name), getattr(ours.attacks, name)
        assert repr(mine()) == repr(original())
        kinds = {k: p.kind for k, p in inspect.signature(original).parameters.items()}
        if name not in SEARCHES:
            assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}
            with pytest.raises(TypeError):
                mine(0.1)
        else:
            assert list(inspect.signature(mine).parameters) == list(kinds)

    @pytest.mark.parametrize("bounds", [(0, 1), (-1, 2)])
    @pytest.mark.parametrize("name", [n for n in GRADIENT if n not in WITH_ADAM])
    def test_same_pixels_and_draws(self, theirs, name, bounds):
        model = net()
        p = {k: torch.tensor(v).double() if k != "axis" else v for k, v in PREPROCESSING.items()}
        a, b = (lib.PyTorchModel(model, bounds, preprocessing=p) for lib in (theirs, ours))
        x, _ = batch(model)
        x = x * (bounds[1] - bounds[0]) + bounds[0]
        y = a(x).argmax(1)
        attack = getattr(ours.attacks, name)()
        eps = [small(attack), small(attack, 0.05)]
        want, state = seeded(getattr(theirs.attacks, name)(), a, x, y, epsilons=eps)
        got, mine = seeded(attack, b, x, y, epsilons=eps)
        assert torch.equal(state, mine)
        assert torch.equal(want[2], got[2])
        assert got[2].shape == (2, len(x))
        for p_, q in zip(want[0] + want[1], got[0] + got[1], strict=True):
            # float64, rounding alone; Adam divides by it.
            assert (p_ - q).abs().max() <= (1e-8 if "Adam" in name else 1e-13)

    def test_adam_where_the_original_forgot_it(self, theirs):
        model = net()
        x, y = batch(model)
        for name in WITH_ADAM:
            plain = name.replace("Adam", "")
            a = theirs.PyTorchModel(model, (0, 1))
            forgotten, without = (getattr(theirs.attacks, n)()(a, x, y, epsilons=0.5)[0] for n in (name, plain))
            assert torch.equal(forgotten, without)
            mine = getattr(ours.attacks, name)()(ours.PyTorchModel(model, (0, 1)), x, y, epsilons=0.5)[0]
            assert (mine - without).abs().max() > 1e-3

    @pytest.mark.parametrize("kind", ["labels", "targets"])
    @pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD"])
    def test_criteria(self, theirs, name, kind):
        model = net()
        x, y = batch(model)

        def run(lib):
            goal = lib.Misclassification(y) if kind == "labels" else lib.TargetedMisclassification((y + 1) % 10)
            attack = getattr(lib.attacks, name)(steps=5, abs_stepsize=0.01)
            return seeded(attack, lib.PyTorchModel(model, (0, 1)), x, goal, epsilons=0.1)[0]

        for p, q in zip(run(theirs), run(ours), strict=True):
            assert (p.double() - q.double()).abs().max() <= 1e-13
            assert p.shape == q.shape

    @pytest.mark.parametrize("epsilons", [None, 0.3, [0.1, None]])
    def test_deepfool(self, theirs, epsilons):
        model = net()
        x, y = batch(model)
        for kwargs in ({}, {"candidates": 3, "overshoot": 0.1}, {"loss": "crossentropy", "candidates": None}):
            want, got = (
                lib.attacks.L2DeepFoolAttack(**kwargs)(lib.PyTorchModel(model, (0, 1)), x, y, epsilons=epsilons)
                for lib in (theirs, ours)
            )
            assert torch.equal(want[2], got[2])
            flat = [(torch.stack(list(t)) if isinstance(t, list) else t) for t in (*want[:2], *got[:2])]
            assert (flat[0] - flat[2]).abs().max() < 1e-12
            assert (flat[1] - flat[3]).abs().max() < 1e-12

    @pytest.mark.parametrize("name", SEARCHES)
    def test_searches_find_as_much_as_near(self, theirs, name):
        model = net()
        x, y = batch(model)
        y = model(x).argmax(1)
        want, got = (
            getattr(lib.attacks, name)(**SEARCHES[name])(lib.PyTorchModel(model, (0, 1)), x, y, epsilons=None)
            for lib in (theirs, ours)
        )
        assert bool(want[2].all())
        assert bool(got[2].all())
        far, near = (ours.distances.l2(x, r[0]) for r in (want, got))
        # EAD: the same to rounding. CW: whether an iterate falls hangs on roundings, foolbox's constants being float32.
        assert (
            (near - far).abs().max() < 1e-9
            if name == "EADAttack"
            else (near <= far * 1.2).all() and near.mean() < 1.05 * far.mean()
        )

    def test_distances(self, theirs):
        x, y = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64)
        for name in ("l1", "l2", "linf"):
            a, b = getattr(theirs.distances, name), getattr(ours.distances, name)
            assert (a(x, y) - b(x, y)).abs().max() < 1e-12
            assert (a.clip_perturbation(x, y, 0.3) - b.clip_perturbation(x, y, 0.3)).abs().max() < 1e-12

    def test_models(self, theirs):
        model = net()
        x, y = batch(model)
        p = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.3, 0.1]), "axis": -3, "flip_axis": -3}
        a, b = (lib.PyTorchModel(model, (0, 1), preprocessing=p) for lib in (theirs, ours))
        assert torch.equal(a(x), b(x))
        assert theirs.accuracy(a, x, y) == ours.accuracy(b, x, y)
        for kwargs in ({}, {"wrapper": True}):
            c, d = (m.transform_bounds((-3, 5), **kwargs) for m in (a, b))
            assert (c(x * 8 - 3) - d(x * 8 - 3)).abs().max() < 1e-5
            assert d.bounds == (-3, 5)
            assert b.bounds == (0, 1)


def test_recorded():
    """Sums of what foolbox 3.3.4 made of these images, after `torch.manual_seed(7)`."""
    model = net()
    x, y = batch(model)
    got = {
        name: seeded(getattr(ours.attacks, name)(), ours.PyTorchModel(model, (0, 1)), x, y, epsilons=eps)[0]
        for name, eps in (("LinfPGD", 0.05), ("L2PGD", 0.5), ("L1PGD", 4.0), ("FGSM", 0.05), ("MIFGSM", 0.05))
    }
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    found = {n: ((r[0] - x).mul(weights).sum().item(), r[2].sum().item()) for n, r in got.items()}
    assert found == {n: (pytest.approx(v, abs=1e-9), k) for n, (v, k) in RECORDED.items()}


RECORDED = {
    "LinfPGD": (0.6765056094015327, 5),
    "L2PGD": (-0.10855736647421244, 5),
    "L1PGD": (0.04504749476161268, 5),
    "FGSM": (1.0094112536413358, 5),
    "MIFGSM": (0.7547978739714836, 5),
}


class TestHooks:
    def tensors(self):
        """eagerpy where it is installed: what hooks get."""
        return importlib.import_module("eagerpy").Tensor if importlib.util.find_spec("eagerpy") else torch.Tensor

    def test_every_hook_is_asked(self):
        model, asked, kind = net(), [], self.tensors()
        x, y = batch(model)

        def telling(name):
            def hook(self, *args, **kwargs):
                asked.append(name)
                assert all(isinstance(a, kind) for a in args if "ensor" in type(a).__name__)
                return getattr(super(mine, self), name)(*args, **kwargs)

            return hook

        for name in ("get_loss_fn", "get_optimizer", "value_and_grad", "get_random_start", "normalize", "project"):
            mine = type("Mine", (ours.attacks.LinfPGD,), {name: telling(name)})
            fmodel = ours.PyTorchModel(model, (0, 1))
            got, _ = seeded(mine(steps=3), fmodel, x, y, epsilons=0.1)
            want, _ = seeded(ours.attacks.LinfPGD(steps=3), fmodel, x, y, epsilons=0.1)
            assert (got[0] - want[0]).abs().max() < 1e-13
            assert asked.count(name) in (1, 3)

    def test_own_loss(self):
        """The way to attack something else than cross-entropy: here, to drive the first logit down."""
        model = net()
        x, y = batch(model)

        class Mine(ours.attacks.LinfPGD):
            def get_loss_fn(self, fmodel, labels):
                return lambda inputs: -fmodel(inputs)[:, 0].sum()

        fmodel = ours.PyTorchModel(model, (0, 1))
        got = Mine(steps=5, random_start=False)(fmodel, x, y, epsilons=0.1)[0]
        assert (model(got)[:, 0] < model(x)[:, 0]).all()
        assert all(p.grad is None for p in model.parameters())

    def test_own_attack_and_own_model(self):
        model = net()
        x, y = batch(model)

        class Noise(ours.attacks.FixedEpsilonAttack):
            distance = ours.distances.linf

            def run(self, fmodel, inputs, criterion, *, epsilon, **kwargs):
                return inputs + 2 * epsilon

        class Mine(ours.Model):
            bounds = ours.types.Bounds(0, 1)

            def __call__(self, inputs):
                return ours.PyTorchModel(model, (0, 1))(inputs)

        raw, clipped, _ = Noise()(Mine(), x, y, epsilons=0.1)
        assert torch.allclose(raw, x + 0.2)
        assert torch.allclose(clipped, (x + 0.1).clamp(0, 1))
        want, _ = seeded(ours.attacks.LinfPGD(steps=3), ours.PyTorchModel(model, (0, 1)), x, y, epsilons=0.1)
        got, _ = seeded(ours.attacks.LinfPGD(steps=3), Mine(), x, y, epsilons=0.1)
        assert torch.equal(want[0], got[0])

    def test_eagerpy_in_and_out(self):
        ep = pytest.importorskip("eagerpy")
        model = net()
        x, y = batch(model)
        fmodel = ours.PyTorchModel(model, (0, 1))
        for attack in (ours.attacks.FGSM(), ours.attacks.L2DeepFoolAttack(), ours.attacks.FGSM().repeat(2)):
            want = attack(fmodel, x, y, epsilons=[0.1])
            got = attack(fmodel, ep.astensor(x), ours.Misclassification(ep.astensor(y)), epsilons=[0.1])
            assert torch.equal(got[0][0].raw, want[0][0])
            assert torch.equal(got[2].raw, want[2])
        assert isinstance(fmodel(ep.astensor(x)), ep.Tensor)
        with pytest.raises(InputError, match=r"PyTorch's, got ndarray"):
            fmodel(np.zeros((1, 3, 8, 8)))


class TestNotInherited:
    @pytest.mark.parametrize("name", SEARCHES)
    def test_failures_are_not_black_images(self, name):
        model = net()
        x, y = batch(model)
        y = model(x).argmax(1)
        raw, _, adversarial = getattr(ours.attacks, name)(initial_const=1e-9, steps=2, binary_search_steps=1)(
            ours.PyTorchModel(model, (0, 1)), x, y, epsilons=None
        )
        assert torch.equal(raw, x)
        assert not bool(adversarial.any())

    @pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD", "AdamPGD", "L2DeepFoolAttack", "L2CarliniWagnerAttack"])
    def test_model_and_tensors_are_left_alone(self, name):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
        ).double()
        x, _ = batch(lambda t: torch.zeros(len(t), 10))
        model[0].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.warns(UserWarning, match="training mode"):
            fmodel = ours.PyTorchModel(model, (0, 1))
        clean, y = x.clone(), fmodel(x).argmax(1)
        kwargs = {"steps": 3} | ({"binary_search_steps": 2} if "Carlini" in name else {})
        got = getattr(ours.attacks, name)(**kwargs)(fmodel, x.requires_grad_(), y, epsilons=0.3)
        assert not got[0].requires_grad
        assert torch.equal(x, clean)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert x.grad is None
        assert [m.training for m in model] == [False, True, True, True, True, True]
        assert model.training

    @pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD"])
    def test_nan_gradient_is_no_nan_image(self, name):
        class Broken(nn.Module):
            def forward(self, x):
                flat = x.flatten(1)[:, :10]
                return flat + (flat - flat).sqrt()  # inf - inf on the way back

        x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
        raw, _, _ = getattr(ours.attacks, name)(steps=3)(
            ours.PyTorchModel(Broken().eval(), (0, 1)), x, torch.zeros(3, dtype=torch.int64), epsilons=0.3
        )
        assert not raw.isnan().any()

    def test_a_black_image_is_judged_as_it_is(self):
        model = net()
        x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
        y = model(x).argmax(1)
        assert not ours.attacks.FGSM()(ours.PyTorchModel(model, (0, 1)), x, y, epsilons=0.0)[2].any()


class TestCall:
    def test_results_by_epsilons(self):
        model = net()
        x, y = batch(model)
        fmodel = ours.PyTorchModel(model, (0, 1))
        one = ours.attacks.FGSM()(fmodel, x, y, epsilons=np.float64(0.1))
        several = ours.attacks.FGSM()(fmodel, x, y, epsilons=np.array([0.1, 0.2]))
        assert isinstance(several[0], list)
        assert several[2].shape == (2, 6)
        assert one[2].shape == (6,)
        assert torch.equal(several[0][0], one[0])
        assert torch.equal(several[2][0], one[2])
        assert torch.equal(one[2], model(one[1]).argmax(1) != y)
        with pytest.raises(NotImplementedError):
            ours.attacks.FGSM()(fmodel, x, y, epsilons=None)
        with pytest.raises(InputError, match="epsilons must"):
            ours.attacks.FGSM()(fmodel, x, y, epsilons=[])
        assert torch.equal(ours.attacks.FGSM().run(fmodel, x, y, epsilon=0.1), one[0])

    def test_repeat_keeps_what_fell(self):
        model = net()
        x, y = batch(model, 16)
        fmodel, attack = ours.PyTorchModel(model, (0, 1)), ours.attacks.LinfPGD(steps=2)
        once, _ = seeded(attack, fmodel, x, y, epsilons=[0.02])
        often, _ = seeded(attack.repeat(2).repeat(2), fmodel, x, y, epsilons=[0.02])
        assert (often[2] | ~once[2]).all()
        assert torch.equal(often[0][0][once[2][0]], once[0][0][once[2][0]])
        assert torch.equal(often[2][0], model(often[1][0]).argmax(1) != y)
        with pytest.raises(ValueError, match="times >= 1"):
            attack.repeat(0)

    def test_criteria_join(self):
        model = net()
        x, y = batch(model)
        goal = ours.Misclassification(y) & ours.TargetedMisclassification((y + 1) % 10)
        logits = F.one_hot((y + 1) % 10, 10)
        assert goal(x, logits).all()
        assert not goal(x, F.one_hot((y + 2) % 10, 10)).any()
        with pytest.raises(ValueError, match="unsupported criterion"):
            ours.attacks.LinfPGD()(ours.PyTorchModel(model, (0, 1)), x, goal, epsilons=0.1)
        for attack in (ours.attacks.FGSM(), ours.attacks.FGM()):
            with pytest.raises(ValueError, match="unsupported criterion"):
                attack(ours.PyTorchModel(model, (0, 1)), x, ours.TargetedMisclassification(y), epsilons=0.1)
        with pytest.raises(NotCovered, match="Misclassification"):
            ours.attacks.L2DeepFoolAttack()(
                ours.PyTorchModel(model, (0, 1)), x, ours.TargetedMisclassification(y), epsilons=0.1
            )

    @pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD", "AdamPGD", "MIFGSM"])
    def test_targets_come_nearer(self, name):
        model = net()
        x, y = batch(model)
        t = (y + 1) % 10
        attack = getattr(ours.attacks, name)(random_start=False)
        got = attack(ours.PyTorchModel(model, (0, 1)), x, ours.TargetedMisclassification(t), epsilons=small(attack))[1]
        assert (F.cross_entropy(model(got), t, reduction="none") < F.cross_entropy(model(x), t, reduction="none")).all()

    def test_native_code_runs_where_it_can(self, monkeypatch):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        fmodel = ours.PyTorchModel(model, (0, 1), preprocessing=PREPROCESSING)
        x, y = batch(fmodel, dtype=torch.float32)
        ran = []
        attempt = native.attempt
        monkeypatch.setattr(native, "attempt", lambda *a, **k: ran.append(1) or attempt(*a, **k))
        got, _ = seeded(ours.attacks.LinfPGD(steps=3), fmodel, x, y, epsilons=0.05)
        assert ran

        class Eager(ours.attacks.LinfPGD):
            def normalize(self, gradients, *, x, bounds):
                return gradients.sign()

        want, _ = seeded(Eager(steps=3), fmodel, x, y, epsilons=0.05)
        assert ((got[0] - want[0]).abs() > 1e-6).float().mean() < 0.01

    def test_bad_input(self):
        model = net()
        x, y = batch(model)
        fmodel = ours.PyTorchModel(model, (0, 1))
        for attack in (ours.attacks.FGSM(), ours.attacks.L2DeepFoolAttack(), ours.attacks.FGSM().repeat(2)):
            for bad in (x * 255, x - 1, torch.full_like(x, torch.nan)):
                with pytest.raises(AssertionError, match=r"inputs must be within the model's bounds \(0, 1\)"):
                    attack(fmodel, bad, y, epsilons=0.1)
        for labels in (y.int(), y[:2], y.double(), F.one_hot(y, 10), y + 10):
            with pytest.raises(ValueError):
                ours.attacks.LinfPGD()(fmodel, x, labels, epsilons=0.1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
            ours.attacks.LinfPGD()(fmodel, x, y, epsilons=0.1, mask=1)
        with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
            ours.PyTorchModel(lambda t: t, (0, 1))
        with pytest.raises(ValueError, match="unknown preprocessing key: sdt"):
            ours.PyTorchModel(model, (0, 1), preprocessing={"sdt": 1})

    def test_empty_and_without_gradients(self):
        model = net()
        x, y = batch(model, 0)
        fmodel = ours.PyTorchModel(model, (0, 1))
        for name in ("LinfPGD", "L1PGD", "L2DeepFoolAttack"):
            raw, clipped, adversarial = getattr(ours.attacks, name)()(fmodel, x, y, epsilons=0.1)
            assert raw.shape == clipped.shape == x.shape
            assert adversarial.shape == (0,)
        x, y = batch(model)
        want = ours.attacks.L1FastGradientAttack()(fmodel, x, y, epsilons=1.0)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(ours.attacks.L1FastGradientAttack()(fmodel, x, y, epsilons=1.0)[0], want[0])

    def test_not_covered(self):
        for name in ("HopSkipJumpAttack", "LinfDeepFoolAttack", "DDNAttack"):
            with pytest.raises(NotCovered, match=f"'{name}': foolbox has it"):
                getattr(ours.attacks, name)
        for name in ("TensorFlowModel", "zoo", "plot"):
            with pytest.raises(ImportError, match=name):
                getattr(ours, name)
        with pytest.raises(NotCovered, match="samples"):
            ours.samples(None, dataset="cifar10")
        for room in (ours, ours.attacks):
            with pytest.raises(AttributeError):
                room.NoSuchThing  # noqa: B018

    def test_every_attack_of_the_original_is_here_or_named(self, theirs):
        for name in dir(theirs.attacks):
            if isinstance(getattr(theirs.attacks, name), type) and name not in ours.attacks.__all__:
                with pytest.raises(NotCovered, match=f"'{name}'"):
                    getattr(ours.attacks, name)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["LinfPGD", "L2PGD", "L1PGD", "FGSM", "MIFGSM", "L2AdamPGD"]),
    eps=st.floats(0, 0.5),
    n=st.integers(1, 4),
    low=st.sampled_from([-2.0, 0.0]),
)
def test_within_ball_and_bounds(name, eps, n, low):
    model = net()
    x, y = batch(model, n)
    x = x * (1 - low) + low
    attack = getattr(ours.attacks, name)(**({} if name == "FGSM" else {"steps": 3}))
    _, clipped, adversarial = attack(ours.PyTorchModel(model, (low, 1)), x, y, epsilons=eps)
    assert clipped.min() >= low
    assert clipped.max() <= 1
    assert clipped.dtype == x.dtype
    assert clipped.shape == x.shape
    assert (attack.distance(x, clipped) <= eps + 1e-12).all()
    assert torch.equal(adversarial, model(clipped).argmax(1) != y)
