"""The drop-in for foolbox on its own: hooks, calls, and what of foolbox is not inherited."""

from __future__ import annotations

import importlib.util

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

SEARCHES = "L2CarliniWagnerAttack", "EADAttack"
PREPROCESSING = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1], "axis": -3}


def small(attack, size=0.02):
    """An epsilon for its norm."""
    return size * {"LpDistance(inf)": 1, "LpDistance(2)": 10, "LpDistance(1)": 80}[repr(attack.distance)]


class TestHooks:
    def tensors(self):
        """eagerpy where it is installed: what hooks get."""
        return importlib.import_module("eagerpy").Tensor if importlib.util.find_spec("eagerpy") else torch.Tensor

    def test_every_hook_is_asked(self, answered, seeded):
        (model, x, y), asked, kind = answered(), [], self.tensors()

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

    def test_own_loss(self, answered):
        """The way to attack something else than cross-entropy: here, to drive the first logit down."""
        model, x, y = answered()

        class Mine(ours.attacks.LinfPGD):
            def get_loss_fn(self, fmodel, labels):
                return lambda inputs: -fmodel(inputs)[:, 0].sum()

        fmodel = ours.PyTorchModel(model, (0, 1))
        got = Mine(steps=5, random_start=False)(fmodel, x, y, epsilons=0.1)[0]
        assert (model(got)[:, 0] < model(x)[:, 0]).all()
        assert all(p.grad is None for p in model.parameters())

    def test_labels_come_from_criteria_as_hooks_get_them(self, answered, seeded):
        """foolbox's example of a substitute model, whose `run` keeps the labels for its gradients."""
        model, x, y = answered()
        fmodel, kind = ours.PyTorchModel(model, (0, 1)), self.tensors()
        assert isinstance(ours.Misclassification(y).labels, kind)
        assert isinstance(ours.TargetedMisclassification(y).target_classes, kind)
        ep = pytest.importorskip("eagerpy")

        class Substituted(ours.attacks.LinfPGD):
            def value_and_grad(self, loss_fn, x):
                return loss_fn(x), ep.value_and_grad(lambda t: ep.crossentropy(fmodel(t), self.labels).sum(), x)[1]

            def run(self, model, inputs, criterion, *, epsilon, **kwargs):
                self.labels = ours.attacks.base.get_criterion(criterion).labels
                return super().run(model, inputs, criterion, epsilon=epsilon, **kwargs)

        got, _ = seeded(Substituted(steps=3), fmodel, *ep.astensors(x, y), epsilons=0.1)
        want, _ = seeded(ours.attacks.LinfPGD(steps=3), fmodel, x, y, epsilons=0.1)
        assert (got[0].raw - want[0]).abs().max() < 1e-13

    def test_own_attack_and_own_model(self, answered, seeded):
        model, x, y = answered()

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

    def test_eagerpy_in_and_out(self, answered):
        ep = pytest.importorskip("eagerpy")
        model, x, y = answered()
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
    def test_failures_are_not_black_images(self, name, answered):
        model, x, y = answered()
        y = model(x).argmax(1)
        raw, _, adversarial = getattr(ours.attacks, name)(initial_const=1e-9, steps=2, binary_search_steps=1)(
            ours.PyTorchModel(model, (0, 1)), x, y, epsilons=None
        )
        assert torch.equal(raw, x)
        assert not bool(adversarial.any())

    def test_deepfool_that_ends_early_returns_the_image(self, answered):
        model, x, _ = answered()
        y = model(x).argmax(1)
        raw, _, adversarial = ours.attacks.L2DeepFoolAttack(steps=1)(ours.PyTorchModel(model, (0, 1)), x, y, epsilons=None)
        assert not bool(adversarial.all())
        assert torch.equal(raw[~adversarial], x[~adversarial])

    @pytest.mark.parametrize("name", ["LinfPGD", "L2PGD", "L1PGD", "AdamPGD", "L2DeepFoolAttack", "L2CarliniWagnerAttack"])
    def test_model_and_tensors_are_left_alone(self, name, batch):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
        ).double()
        x, _ = batch()
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

    def test_a_black_image_is_judged_as_it_is(self, answered):
        model = answered()[0]
        x = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
        y = model(x).argmax(1)
        assert not ours.attacks.FGSM()(ours.PyTorchModel(model, (0, 1)), x, y, epsilons=0.0)[2].any()


class TestCall:
    def test_results_by_epsilons(self, answered):
        model, x, y = answered()
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

    def test_repeat_keeps_what_fell(self, answered, seeded):
        model, x, y = answered(16)
        fmodel, attack = ours.PyTorchModel(model, (0, 1)), ours.attacks.LinfPGD(steps=2)
        once, _ = seeded(attack, fmodel, x, y, epsilons=[0.02])
        often, _ = seeded(attack.repeat(2).repeat(2), fmodel, x, y, epsilons=[0.02])
        assert (often[2] | ~once[2]).all()
        assert torch.equal(often[0][0][once[2][0]], once[0][0][once[2][0]])
        assert torch.equal(often[2][0], model(often[1][0]).argmax(1) != y)
        with pytest.raises(ValueError, match="times >= 1"):
            attack.repeat(0)

    def test_criteria_join(self, answered):
        model, x, y = answered()
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
    def test_targets_come_nearer(self, name, answered):
        model, x, y = answered()
        t = (y + 1) % 10
        attack = getattr(ours.attacks, name)(random_start=False)
        got = attack(ours.PyTorchModel(model, (0, 1)), x, ours.TargetedMisclassification(t), epsilons=small(attack))[1]
        assert (F.cross_entropy(model(got), t, reduction="none") < F.cross_entropy(model(x), t, reduction="none")).all()

    def test_native_code_runs_where_it_can(self, monkeypatch, batch, seeded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        fmodel = ours.PyTorchModel(model, (0, 1), preprocessing=PREPROCESSING)
        x, _ = batch(dtype=torch.float32)
        y = fmodel(x).argmax(1)
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

    def test_bad_input(self, answered):
        model, x, y = answered()
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

    def test_empty_and_without_gradients(self, answered):
        model, x, y = answered(0)
        fmodel = ours.PyTorchModel(model, (0, 1))
        for name in ("LinfPGD", "L1PGD", "L2DeepFoolAttack"):
            raw, clipped, adversarial = getattr(ours.attacks, name)()(fmodel, x, y, epsilons=0.1)
            assert raw.shape == clipped.shape == x.shape
            assert adversarial.shape == (0,)
        model, x, y = answered()
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
        with pytest.raises(NotCovered, match="ThresholdingWrapper"):
            ours.models.ThresholdingWrapper  # noqa: B018
        with pytest.raises(NotCovered, match="samples"):
            ours.samples(None, dataset="cifar10")
        for room in (ours, ours.attacks, ours.models):
            with pytest.raises(AttributeError):
                room.NoSuchThing  # noqa: B018


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["LinfPGD", "L2PGD", "L1PGD", "FGSM", "MIFGSM", "L2AdamPGD"]),
    eps=st.floats(0, 0.5),
    n=st.integers(1, 4),
    low=st.sampled_from([-2.0, 0.0]),
)
def test_within_ball_and_bounds(name, eps, n, low, answered):
    model, x, y = answered(n)
    x = x * (1 - low) + low
    attack = getattr(ours.attacks, name)(**({} if name == "FGSM" else {"steps": 3}))
    _, clipped, adversarial = attack(ours.PyTorchModel(model, (low, 1)), x, y, epsilons=eps)
    assert clipped.min() >= low
    assert clipped.max() <= 1
    assert clipped.dtype == x.dtype
    assert clipped.shape == x.shape
    assert (attack.distance(x, clipped) <= eps + 1e-12).all()
    assert torch.equal(adversarial, model(clipped).argmax(1) != y)


@pytest.mark.parametrize("name", SEARCHES)
def test_short_searches_go_to_their_end(name, answered):
    """An image alone looks stalled sooner than a batch's sum: in a short run it would end with more change than it needs."""
    (model, x, y), kind = answered(), getattr(ours.attacks, name)
    fmodel = ours.PyTorchModel(model, (0, 1))
    given = {"steps": 20, "binary_search_steps": 2, "initial_const": 10.0}
    short, full = (kind(**given, abort_early=abort)(fmodel, x, y, epsilons=None)[1] for abort in (True, False))
    assert torch.equal(short, full)
    assert not torch.equal(full, x)
