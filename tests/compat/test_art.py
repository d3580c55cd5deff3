"""The drop-in against ART 1.20.1 where that is installed, against numbers recorded from it, and on its own."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tsrfast.compat.art.attacks.evasion as ours
from tsrfast.attacks import native
from tsrfast.compat._covered import NotCovered
from tsrfast.compat.art.estimators.classification import PyTorchClassifier
from tsrfast.errors import InputError

PREPROCESSING = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1])
LINF = {"eps": 0.05, "eps_step": 0.0125}
L2 = {"norm": 2, "eps": 0.3, "eps_step": 0.1}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("art")
    return pytest.importorskip("art.attacks.evasion")


def net(gate=nn.SiLU, seed=0):
    """SiLU: does not compile."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3), gate(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10)
        return nn.Sequential(*layers).eval()


def wrapped(model=None, kind=PyTorchClassifier, **kwargs):
    fields = {"clip_values": (0.0, 1.0), "device_type": "cpu", "preprocessing": PREPROCESSING} | kwargs
    return kind(
        model or net(),
        kwargs.pop("loss", nn.CrossEntropyLoss()),
        (3, 8, 8),
        10,
        **{k: v for k, v in fields.items() if k != "loss"},
    )


def batch(n=8, seed=0, margin=0.0):
    """Images, with pixels at least `margin` from the ends of the range."""
    return (margin + (1 - 2 * margin) * np.random.RandomState(seed).randint(256, size=(n, 3, 8, 8)) / 255).astype(np.float32)


def seeded(attack, *args, **kwargs):
    """(result, next number of NumPy's generator)"""
    np.random.seed(7)
    return attack.generate(*args, **kwargs), np.random.rand()


def both(theirs, name, arguments, x, **generate):
    """Theirs and ours on the same model, and each generator's next number."""
    from art.estimators.classification import PyTorchClassifier as Original

    out = []
    for room, kind in ((theirs, Original), (ours, PyTorchClassifier)):
        attack = getattr(room, name)(wrapped(kind=kind), **arguments)
        if hasattr(attack, "verbose"):
            attack.set_params(verbose=False)
        out.append(seeded(attack, x.copy(), **generate))
    return out[0][0], out[1][0], out[0][1] == out[1][1]


def wrong(x, y):
    return wrapped().predict(x).argmax(1) != y


class TestAgainstOriginal:
    @pytest.mark.parametrize("name", ours.__all__)
    def test_signatures(self, theirs, name):
        a, b = (inspect.signature(getattr(room, name)).parameters.values() for room in (theirs, ours))
        assert [(p.name, p.default) for p in a] == [(p.name, p.default) for p in b]
        assert set(getattr(ours, name).attack_params) <= set(getattr(theirs, name).attack_params)

    def test_classifier(self, theirs):
        from art.estimators.classification import PyTorchClassifier as Original

        x, y = batch(), np.arange(8)
        names = [list(inspect.signature(k).parameters) for k in (Original, PyTorchClassifier)]
        assert names[0] == names[1]
        for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MultiMarginLoss(), nn.MSELoss()):
            a, b = wrapped(kind=Original, loss=loss), wrapped(loss=loss)
            hot = np.eye(10, dtype=np.float32)[y]
            assert np.array_equal(a.predict(x, batch_size=3), b.predict(x, batch_size=3))
            assert np.array_equal(a.loss_gradient(x, hot), b.loss_gradient(x, y))
            assert np.array_equal(a.compute_loss(x, hot), b.compute_loss(x, y))
        for label in (None, 3, y):
            assert np.array_equal(a.class_gradient(x, label), b.class_gradient(x, label))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("FastGradientMethod", {}),
            ("FastGradientMethod", {"num_random_init": 1, "batch_size": 3}),
            ("FastGradientMethod", {"minimal": True}),
            ("ProjectedGradientDescent", {"max_iter": 10}),
            ("ProjectedGradientDescent", {"max_iter": 10, "num_random_init": 1, "batch_size": 3}),
            ("ProjectedGradientDescentPyTorch", {"max_iter": 10, "targeted": True}),
            ("BasicIterativeMethod", {"max_iter": 10}),
            ("MomentumIterativeMethod", {"max_iter": 10}),
        ],
    )
    def test_linf_same_pixels_and_draws(self, theirs, name, arguments, masked):
        x = batch()
        mask = (np.random.RandomState(1).rand(3, 8, 8) > 0.5).astype(np.float32) if masked else None
        y = np.eye(10)[np.arange(8)] if arguments.get("targeted") else None
        want, got, drawn = both(theirs, name, LINF | arguments, x, y=y, mask=mask)
        assert drawn
        assert got.dtype == np.float32
        assert np.abs(want - got).max() < 1e-7  # one rounding of float32
        if masked:
            assert np.array_equal(got * (1 - mask), x * (1 - mask))

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("FastGradientMethod", {}),
            ("FastGradientMethod", {"minimal": True}),
            ("ProjectedGradientDescent", {"max_iter": 10, "num_random_init": 1, "batch_size": 3}),
            ("MomentumIterativeMethod", {"max_iter": 10}),
        ],
    )
    def test_l2_same_where_nothing_is_clipped(self, theirs, name, arguments):
        want, got, drawn = both(theirs, name, L2 | arguments, batch(margin=0.4))
        assert drawn
        assert np.abs(want - got).max() < 1e-6

    def test_sizes_of_each_image(self, theirs):
        sizes = {
            k: np.linspace(0.01, v, 8, dtype=np.float32).reshape(8, 1, 1, 1) for k, v in (("eps", 0.05), ("eps_step", 0.02))
        }
        want, got, _ = both(theirs, "ProjectedGradientDescent", sizes | {"max_iter": 5, "batch_size": 3}, batch())
        assert np.abs(want - got).max() < 1e-7

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("ProjectedGradientDescent", {"norm": 1, "eps": 5.0, "eps_step": 0.5, "max_iter": 10}),
            ("AutoProjectedGradientDescent", {"eps": 0.02, "max_iter": 20}),
            (
                "AutoProjectedGradientDescent",
                {"norm": 2, "eps": 0.2, "max_iter": 20, "nb_random_init": 2, "loss_type": "difference_logits_ratio"},
            ),
            ("SquareAttack", {"eps": 0.05}),
            ("SquareAttack", {"eps": 0.5, "norm": 2, "max_iter": 40}),
        ],
    )
    def test_success_within_the_ball(self, theirs, name, arguments):
        x = batch()
        y = wrapped().predict(x).argmax(1)
        want, got, _ = both(theirs, name, arguments, x)
        # One image of 8 more or less: other random numbers.
        assert wrong(got, y).sum() >= wrong(want, y).sum() - 1
        norm = arguments.get("norm", np.inf)
        assert np.linalg.norm((got - x).reshape(8, -1), ord=norm, axis=1).max() <= arguments["eps"] * (1 + 1e-5)

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("CarliniL2Method", {"batch_size": 4, "binary_search_steps": 5}),
            ("DeepFool", {"batch_size": 4, "max_iter": 10}),
            ("ElasticNet", {"batch_size": 4, "binary_search_steps": 4, "max_iter": 15, "initial_const": 0.1}),
        ],
    )
    def test_smallest_changes(self, theirs, name, arguments):
        x = batch(4)
        y = wrapped().predict(x).argmax(1)
        want, got, _ = both(theirs, name, arguments, x)
        assert wrong(got, y).all()
        fell = wrong(want, y)
        far, near = (np.linalg.norm((r - x).reshape(4, -1), axis=1)[fell].mean() for r in (want, got))
        assert near <= 1.03 * far

    def test_auto_attack(self, theirs):
        from art.estimators.classification import PyTorchClassifier as Original

        pytest.importorskip("multiprocess")
        x = batch()
        y = wrapped().predict(x).argmax(1)
        y[0] = (y[0] + 1) % 10
        robust = []
        for room, kind in ((theirs, Original), (ours, PyTorchClassifier)):
            attacks = [
                room.FastGradientMethod(wrapped(kind=kind), eps=0.01),
                room.ProjectedGradientDescent(wrapped(kind=kind), eps=0.02, eps_step=0.005, max_iter=10, verbose=False),
            ]
            whole = room.AutoAttack(wrapped(kind=kind), eps=0.02, attacks=attacks)
            got = whole.generate(x, y)
            robust.append((whole.best_attacks.tolist(), np.abs(got - x).max() <= 0.02 * (1 + 1e-4)))
        assert robust[0] == robust[1]
        assert robust[1][0][0] == -2

    def test_every_attack_of_the_original_is_here_or_named(self, theirs):
        for name in dir(theirs):
            if isinstance(getattr(theirs, name), type) and name not in ours.__all__:
                with pytest.raises(NotCovered, match=f"'{name}': art has it"):
                    getattr(ours, name)


RECORDED = {
    "FastGradientMethod": (0.9113862526882139, 7),
    "ProjectedGradientDescent": (0.4568996997001044, 7),
    "BasicIterativeMethod": (0.630091535851226, 7),
    "MomentumIterativeMethod": (0.6079400055538198, 7),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded(name):
    """A sum of what ART 1.20.1 made of these images, after ``np.random.seed(7)``, and how many it fooled."""
    arguments = LINF if name == "FastGradientMethod" else LINF | {"max_iter": 10}
    if name == "ProjectedGradientDescent":
        arguments = arguments | {"num_random_init": 1}
    x = batch()
    got, _ = seeded(getattr(ours, name)(wrapped(), **arguments), x)
    y = wrapped().predict(x).argmax(1)
    total = ((got - x).astype(np.float64) * np.linspace(-1, 1, x.size).reshape(x.shape)).sum()
    assert (total, wrong(got, y).sum()) == (pytest.approx(RECORDED[name][0], abs=1e-4), RECORDED[name][1])


class TestOwn:
    def test_auto_attack_reports(self):
        x = batch(4)
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

    def test_starts_keep_what_fooled_the_labels(self):
        """The original compares with the model's answer: it would take a start that leads a wrong answer to the right one."""
        x = batch(16)
        y = wrapped().predict(x).argmax(1)
        y[:8] = (y[:8] + 1) % 10
        attack = ours.ProjectedGradientDescent(wrapped(), eps=0.1, eps_step=0.001, max_iter=1, num_random_init=1)
        once, _ = seeded(attack, x, y)
        attack.set_params(num_random_init=6, batch_size=16)
        often, _ = seeded(attack, x, y)
        assert (wrong(often, y) >= wrong(once, y)).all()
        assert wrong(often, y).sum() > wrong(once, y).sum()

    @pytest.mark.parametrize(
        "name", ["FastGradientMethod", "ProjectedGradientDescent", "CarliniL2Method", "DeepFool", "SquareAttack"]
    )
    def test_model_and_arrays_are_left_alone(self, name):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
        ).train()
        model[0].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        x = batch()
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
    def test_own_losses_do_not_depend_on_the_batch(self, loss):
        x = batch()
        estimator = wrapped(loss=loss)
        y = estimator.predict(x).argmax(1)
        whole, parts = (ours.ProjectedGradientDescent(estimator, **L2, max_iter=5, batch_size=n).generate(x, y) for n in (8, 3))
        assert np.abs(whole - parts).max() < 1e-5
        before, after = (estimator.compute_loss(t, y, "mean").mean() for t in (x, whole))
        assert after > before

    def test_losses_are_taken_image_by_image(self):
        x = batch()
        for loss in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss(), nn.MSELoss()):
            estimator = wrapped(loss=loss)
            logits, y = torch.from_numpy(estimator.predict(x)), torch.arange(8)
            value = estimator.attack_loss()(torch.from_numpy(x), logits, y)[0]
            want = estimator.compute_loss(x, y.numpy()).reshape(8, -1).sum(1)
            assert np.allclose(value.numpy(), want, atol=1e-6)

    @pytest.mark.parametrize("norm", [np.inf, 1, 2])
    def test_mask(self, norm):
        x, mask = batch(), np.random.RandomState(1).rand(8, 3, 8, 8) > 0.5
        for starts in (0, 1):
            attack = ours.ProjectedGradientDescent(wrapped(), norm, 0.3, 0.1, max_iter=3, num_random_init=starts)
            got = attack.generate(x, mask=mask)
            assert np.abs(got - x)[~mask].max() < 1e-7
            assert np.abs(got - x)[mask].max() > 1e-3

    def test_changes_beyond_eps_are_no_success_of_auto_attack(self):
        x = batch()
        whole = ours.AutoAttack(wrapped(), eps=1e-4, attacks=[ours.DeepFool(wrapped())])
        assert np.array_equal(whole.generate(x), x)
        assert (whole.best_attacks == -1).all()

    def test_labels_of_every_form(self):
        x, y = batch(), np.arange(8)
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

    def test_other_ranges(self):
        x = batch() * 255
        estimator = wrapped(clip_values=(0, 255), preprocessing=(127.5, 100.0))
        got = ours.ProjectedGradientDescent(estimator, eps=8, eps_step=2, max_iter=5).generate(x.round().astype(np.uint8))
        assert got.dtype == np.float32
        assert got.min() >= 0
        assert got.max() <= 255
        assert np.abs(got - x.round()).max() == 8
        free = wrapped(clip_values=None, preprocessing=None)
        assert ours.FastGradientMethod(free, eps=0.5).generate(batch()).min() < 0
        for attack in (ours.CarliniL2Method(free, max_iter=2), ours.DeepFool(free, max_iter=2)):
            assert attack.generate(batch()).shape == x.shape

    def test_seed_is_numpys(self):
        x = batch()
        attack = ours.SquareAttack(wrapped(), eps=0.02, max_iter=20)
        first, second = (seeded(attack, x)[0] for _ in range(2))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, attack.generate(x))

    def test_native_code_runs_where_it_can(self, monkeypatch):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
        ran, attempt, x = [], native.attempt, batch()
        monkeypatch.setattr(native, "attempt", lambda *a, **k: ran.append(1) or attempt(*a, **k))
        attack = ours.ProjectedGradientDescent(wrapped(model), **LINF, max_iter=3)
        got = attack.generate(x)
        assert ran
        # A mask that hides nothing: PyTorch's path.
        assert (np.abs(got - attack.generate(x, mask=np.ones((1, 1, 1, 1), bool))) > 1e-6).mean() < 0.01
        assert len(ran) == 1

    def test_parameters(self):
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

    def test_bad_input(self):
        x, y = batch(), np.arange(8)
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
        with pytest.raises(InputError, match="'mask'"):
            ours.DeepFool(wrapped()).generate(x, mask=np.ones((8, 8)))
        with pytest.raises(InputError, match="one an image"):
            ours.FastGradientMethod(wrapped(), eps=np.ones((8, 8)), eps_step=np.ones((8, 8))).generate(x)
        with pytest.raises(InputError, match="estimator must be"):
            ours.DeepFool(net())
        for bad in ({"use_amp": True}, {"preprocessing_defences": [1]}, {"preprocessing": len}):
            with pytest.raises(NotCovered):
                wrapped(**bad)
        with pytest.raises(NotCovered, match="clip_values"):
            ours.DeepFool(wrapped(clip_values=(np.zeros(3), np.array([1, 1, 2])))).generate(x)
        with pytest.raises(NotCovered, match="fit must"):
            wrapped().fit(x, y)

    def test_empty(self):
        for name in ("ProjectedGradientDescent", "FastGradientMethod", "DeepFool", "SquareAttack"):
            assert getattr(ours, name)(wrapped()).generate(batch(0)).shape == (0, 3, 8, 8)

    def test_not_covered(self):
        import tsrfast.compat.art.estimators.classification as classifiers

        for name in ("HopSkipJump", "CarliniLInfMethod", "BrendelBethgeAttack"):
            with pytest.raises(ImportError, match=name):
                getattr(ours, name)
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
def test_within_ball_and_range(norm, eps, n, starts, kind):
    x = batch(n)
    more = {"max_iter": 3} if kind != "FastGradientMethod" else {}
    got = getattr(ours, kind)(wrapped(), norm, eps, 0.1, num_random_init=starts, **more).generate(x)
    assert got.shape == x.shape
    assert got.min() >= 0
    assert got.max() <= 1
    length = np.linalg.norm((got - x).astype(np.float64).reshape(n, -1), ord=np.inf if norm == "inf" else norm, axis=1)
    assert (length <= eps * (1 + 1e-4) + 1e-6).all()
