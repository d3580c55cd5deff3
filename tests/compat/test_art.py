"""The drop-in for ART on its own: labels, masks, ranges, parameters, and what of ART is not inherited."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast.compat.art.attacks.evasion as ours
from tsrfast.attacks import native
from tsrfast.compat._covered import NotCovered
from tsrfast.errors import InputError

LINF = {"eps": 0.05, "eps_step": 0.0125}
L2 = {"norm": 2, "eps": 0.3, "eps_step": 0.1}


class TestOwn:
    def test_auto_attack_reports(self, wrapped, images, wrong):
        x = images(4)
        whole = ours.AutoAttack(wrapped(), eps=0.05)
        assert [type(a).__name__ for a in whole.attacks] == [*["AutoProjectedGradientDescent"] * 2, "DeepFool", "SquareAttack"]
        whole.attacks[-1].set_params(max_iter=20)
        y = wrapped().predict(x).argmax(1)
        got = whole.generate(x)
        fell = whole.best_attacks >= 0
        assert np.array_equal(wrong(got, y), fell)
        assert np.array_equal(got[~fell], x[~fell])
        assert repr(whole).startswith("AutoAttack(targeted=False")
        assert repr(whole).count("image ") == 4
        aiming = ours.AutoAttack(
            wrapped(), eps=0.05, attacks=[ours.BasicIterativeMethod(wrapped(), max_iter=2, eps=0.05)], targeted=True
        )
        assert (aiming.generate(x).shape, aiming.attacks[0].targeted) == (x.shape, False)

    def test_starts_keep_what_fooled_the_labels(self, wrapped, images, generated, wrong):
        """The original compares with the model's answer: it would take a start that leads a wrong answer to the right one."""
        x = images(16)
        y = wrapped().predict(x).argmax(1)
        y[:8] = (y[:8] + 1) % 10
        attack = ours.ProjectedGradientDescent(wrapped(), eps=0.1, eps_step=0.001, max_iter=1, num_random_init=1)
        once, _ = generated(attack, x, y)
        attack.set_params(num_random_init=6, batch_size=16)
        often, _ = generated(attack, x, y)
        assert (wrong(often, y) >= wrong(once, y)).all()
        assert wrong(often, y).sum() > wrong(once, y).sum()

    @pytest.mark.parametrize(
        "name", ["FastGradientMethod", "ProjectedGradientDescent", "CarliniL2Method", "DeepFool", "SquareAttack"]
    )
    def test_model_and_arrays_are_left_alone(self, name, wrapped, images):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
        ).train()
        model[0].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        x = images()
        clean, state = x.copy(), torch.get_rng_state()
        more = {"max_iter": 2} if name != "FastGradientMethod" else {}
        getattr(ours, name)(wrapped(model), **more).generate(x)
        assert np.array_equal(x, clean)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert [m.training for m in model] == [False, True, True, True, True, True]
        assert model.training
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize(
        "loss", [nn.MSELoss(), nn.CrossEntropyLoss(label_smoothing=0.1), lambda z, y: -(z * y).sum(1).mean()]
    )
    def test_own_losses_do_not_depend_on_the_batch(self, loss, wrapped, images):
        x = images()
        estimator = wrapped(loss=loss)
        y = estimator.predict(x).argmax(1)
        whole, parts = (ours.ProjectedGradientDescent(estimator, **L2, max_iter=5, batch_size=n).generate(x, y) for n in (8, 3))
        assert np.abs(whole - parts).max() < 1e-5
        before, after = (estimator.compute_loss(t, y, "mean").mean() for t in (x, whole))
        assert after > before

    def test_losses_are_taken_image_by_image(self, wrapped, images):
        x = images()
        for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss(), nn.MSELoss()):
            estimator = wrapped(loss=loss)
            logits, y = torch.from_numpy(estimator.predict(x)), torch.arange(8)
            value = estimator.attack_loss()(torch.from_numpy(x), logits, y)[0]
            want = estimator.compute_loss(x, y.numpy()).reshape(8, -1).sum(1)
            assert np.allclose(value.numpy(), want, atol=1e-6)

    @pytest.mark.parametrize("norm", [np.inf, 1, 2])
    def test_mask(self, norm, wrapped, images):
        x, mask = images(), np.random.RandomState(1).rand(8, 3, 8, 8) > 0.5
        for starts in (0, 1):
            attack = ours.ProjectedGradientDescent(wrapped(), norm, 0.3, 0.1, max_iter=3, num_random_init=starts)
            got = attack.generate(x, mask=mask)
            assert np.abs(got - x)[~mask].max() < 1e-7
            assert np.abs(got - x)[mask].max() > 1e-3

    def test_changes_beyond_eps_are_no_success_of_auto_attack(self, wrapped, images):
        x = images()
        whole = ours.AutoAttack(wrapped(), eps=1e-4, attacks=[ours.DeepFool(wrapped())])
        assert np.array_equal(whole.generate(x), x)
        assert (whole.best_attacks == -1).all()

    def test_labels_of_every_form(self, wrapped, images):
        x, y = images(), np.arange(8)
        attack = ours.FastGradientMethod(wrapped())
        want = attack.generate(x, y)
        for form in (
            y[:, None],
            np.eye(10)[y],
            np.eye(10, dtype=int)[y],
            y.astype(np.float32),
            y.tolist(),
            torch.from_numpy(y),
        ):
            assert np.array_equal(attack.generate(x, form), want)
        assert np.array_equal(attack.generate(torch.from_numpy(x), y), want)
        assert np.array_equal(attack.generate(x.astype(np.float64), y), want)
        answers = wrapped().predict(x).argmax(1)
        assert np.array_equal(attack.generate(x), attack.generate(x, answers))

    def test_other_ranges(self, wrapped, images):
        x = images() * 255
        estimator = wrapped(clip_values=(0, 255), preprocessing=(127.5, 100.0))
        got = ours.ProjectedGradientDescent(estimator, eps=8, eps_step=2, max_iter=5).generate(x.round().astype(np.uint8))
        assert got.dtype == np.float32
        assert got.min() >= 0
        assert got.max() <= 255
        assert np.abs(got - x.round()).max() == 8
        free = wrapped(clip_values=None, preprocessing=None)
        assert ours.FastGradientMethod(free, eps=0.5).generate(images()).min() < 0
        for attack in (ours.CarliniL2Method(free, max_iter=2), ours.DeepFool(free, max_iter=2)):
            assert attack.generate(images()).shape == x.shape

    def test_seed_is_numpys(self, wrapped, images, generated):
        x = images()
        attack = ours.SquareAttack(wrapped(), eps=0.02, max_iter=20)
        first, second = (generated(attack, x)[0] for _ in range(2))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, attack.generate(x))

    def test_native_code_runs_where_it_can(self, monkeypatch, wrapped, images):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        ran, attempt, x = [], native.attempt, images()
        monkeypatch.setattr(native, "attempt", lambda *a, **k: ran.append(1) or attempt(*a, **k))
        attack = ours.ProjectedGradientDescent(wrapped(model), **LINF, max_iter=3)
        got = attack.generate(x)
        assert ran
        # A mask that hides nothing: PyTorch's path.
        assert (np.abs(got - attack.generate(x, mask=np.ones((1, 1, 1, 1), bool))) > 1e-6).mean() < 0.01
        assert len(ran) == 1

    def test_parameters(self, wrapped):
        attack = ours.ProjectedGradientDescent(wrapped())
        attack.set_params(eps=0.1, eps_step=0.05, max_iter=3, norm="inf")
        assert (attack.eps, attack.max_iter) == (0.1, 3)
        assert "eps=0.1" in repr(attack)
        with pytest.raises(ValueError, match='"epsilon" cannot be set'):
            attack.set_params(epsilon=0.1)
        for bad in (
            {"eps": -1},
            {"eps_step": 0},
            {"num_random_init": -1},
            {"batch_size": 0},
            {"max_iter": -1},
            {"targeted": 1},
        ):
            with pytest.raises(ValueError):
                ours.ProjectedGradientDescent(wrapped(), **bad)
        with pytest.raises(TypeError, match="same type"):
            ours.ProjectedGradientDescent(wrapped(), eps=np.ones((8, 1, 1, 1)), eps_step=0.1)
        for bad in ({"norm": 3}, {"summary_writer": True}, {"random_eps": True}):
            with pytest.raises(InputError, match=next(iter(bad))):
                ours.ProjectedGradientDescent(wrapped(), **bad)
        for bad in ({"norm": 1}, {"loss": len}, {"adv_criterion": len}):
            with pytest.raises(InputError, match=next(iter(bad))):
                ours.SquareAttack(wrapped(), **bad)

    def test_bad_input(self, net, wrapped, images):
        x, y = images(), np.arange(8)
        attack = ours.FastGradientMethod(wrapped())
        for bad in (x * 255, x - 1, np.full_like(x, np.nan)):
            with pytest.raises(InputError, match="x must be"):
                attack.generate(bad, y)
        for labels in (y[:3], y + 5, y - 1, y + 0.5, np.eye(9)[y], np.full((8, 10), 0.1)):
            with pytest.raises(InputError, match="y must"):
                attack.generate(x, labels)
        with pytest.raises(ValueError, match="Target labels"):
            ours.ProjectedGradientDescent(wrapped(), targeted=True).generate(x)
        for mask in (-np.ones((8, 8)), np.ones((8, 8), int), np.ones((5, 5))):
            with pytest.raises(ValueError, match="mask"):
                attack.generate(x, y, mask=mask)
        with pytest.raises(InputError, match="must be x and y for this attack, got 'mask'"):
            ours.DeepFool(wrapped()).generate(x, mask=np.ones((8, 8)))
        with pytest.raises(InputError, match="must be x, y and mask for this attack, got 'masks'"):
            attack.generate(x, y, masks=None)
        with pytest.raises(InputError, match=r"y must be in 0\.\.9, got 10$"):
            attack.generate(x, y + 3)
        with pytest.raises(InputError, match=r"label must be in 0\.\.9, got 99$"):
            wrapped().class_gradient(x, 99)
        with pytest.raises(InputError, match="one an image"):
            ours.FastGradientMethod(wrapped(), eps=np.ones((8, 8)), eps_step=np.ones((8, 8))).generate(x)
        with pytest.raises(InputError, match="estimator must be"):
            ours.DeepFool(net())
        for bad in ({"use_amp": True}, {"preprocessing_defences": [1]}, {"preprocessing": len}):
            with pytest.raises(NotCovered):
                wrapped(**bad)
        for bad in ((1, 0), (0, 0.5, 1), (0, 0)):
            with pytest.raises(InputError, match="clip_values must be least and greatest"):
                wrapped(clip_values=bad)
        with pytest.raises(NotCovered, match="clip_values"):
            ours.DeepFool(wrapped(clip_values=(np.zeros(3), np.array([1, 1, 2])))).generate(x)
        with pytest.raises(NotCovered, match="fit must"):
            wrapped().fit(x, y)

    def test_empty(self, wrapped, images):
        for name in ("ProjectedGradientDescent", "FastGradientMethod", "DeepFool", "SquareAttack"):
            assert getattr(ours, name)(wrapped()).generate(images(0)).shape == (0, 3, 8, 8)

    def test_not_covered(self):
        import tsrfast.compat.art.estimators.classification as classifiers

        for name in ("HopSkipJump", "CarliniLInfMethod", "BrendelBethgeAttack"):
            with pytest.raises(ImportError, match=name):
                getattr(ours, name)
        with pytest.raises(ImportError, match="'utils' must be imported from art"):
            from tsrfast.compat.art import utils  # noqa: F401
        with pytest.raises(NotCovered, match="KerasClassifier"):
            classifiers.KerasClassifier  # noqa: B018
        with pytest.raises(AttributeError):
            ours.NoSuchAttack  # noqa: B018


@settings(max_examples=15, deadline=None)
@given(
    norm=st.sampled_from([np.inf, "inf", 1, 2]),
    eps=st.floats(0, 0.5),
    n=st.integers(1, 4),
    starts=st.integers(0, 2),
    kind=st.sampled_from(["FastGradientMethod", "ProjectedGradientDescent"]),
)
def test_within_ball_and_range(norm, eps, n, starts, kind, wrapped, images):
    x = images(n)
    more = {"max_iter": 3} if kind != "FastGradientMethod" else {}
    got = getattr(ours, kind)(wrapped(), norm, eps, 0.1, num_random_init=starts, **more).generate(x)
    assert got.shape == x.shape
    assert got.min() >= 0
    assert got.max() <= 1
    length = np.linalg.norm((got - x).astype(np.float64).reshape(n, -1), ord=np.inf if norm == "inf" else norm, axis=1)
    assert (length <= eps * (1 + 1e-4) + 1e-6).all()
