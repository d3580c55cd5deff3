"""The drop-in against ART 1.20.1 where that is installed, and against numbers recorded from it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from torch import nn

import tsrfast.compat.art.attacks.evasion as ours
from tsrfast.compat._covered import NotCovered
from tsrfast.compat.art.estimators.classification import PyTorchClassifier

LINF = {"eps": 0.05, "eps_step": 0.0125}
L2 = {"norm": 2, "eps": 0.3, "eps_step": 0.1}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("art")
    return pytest.importorskip("art.attacks.evasion")


@pytest.fixture
def both(theirs, wrapped, generated):
    def run(name, arguments, x, **generate):
        """Theirs and ours on the same model, and whether each generator's next number is the same."""
        from art.estimators.classification import PyTorchClassifier as Original

        out = []
        for room, kind in ((theirs, Original), (ours, PyTorchClassifier)):
            attack = getattr(room, name)(wrapped(kind=kind), **arguments)
            if hasattr(attack, "verbose"):
                attack.set_params(verbose=False)
            out.append(generated(attack, x.copy(), **generate))
        return out[0][0], out[1][0], out[0][1] == out[1][1]

    return run


class TestAgainstOriginal:
    @pytest.mark.parametrize("name", ours.__all__)
    def test_signatures(self, theirs, name):
        a, b = (inspect.signature(getattr(room, name)).parameters.values() for room in (theirs, ours))
        assert [(p.name, p.default) for p in a] == [(p.name, p.default) for p in b]
        assert set(getattr(ours, name).attack_params) <= set(getattr(theirs, name).attack_params)

    def test_classifier(self, theirs, wrapped, images):
        from art.estimators.classification import PyTorchClassifier as Original

        x, y = images(), np.arange(8)
        names = [list(inspect.signature(k).parameters) for k in (Original, PyTorchClassifier)]
        assert names[0] == names[1]
        for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MultiMarginLoss(), nn.MSELoss()):
            a, b = wrapped(kind=Original, loss=loss), wrapped(loss=loss)
            assert np.array_equal(a.clip_values, b.clip_values)
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
    def test_linf_same_pixels_and_draws(self, theirs, name, arguments, masked, images, both):
        x = images()
        mask = (np.random.RandomState(1).rand(3, 8, 8) > 0.5).astype(np.float32) if masked else None
        y = np.eye(10)[np.arange(8)] if arguments.get("targeted") else None
        want, got, drawn = both(name, LINF | arguments, x, y=y, mask=mask)
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
    def test_l2_same_where_nothing_is_clipped(self, theirs, name, arguments, images, both):
        want, got, drawn = both(name, L2 | arguments, images(margin=0.4))
        assert drawn
        assert np.abs(want - got).max() < 1e-6

    def test_sizes_of_each_image(self, theirs, images, both):
        sizes = {
            k: np.linspace(0.01, v, 8, dtype=np.float32).reshape(8, 1, 1, 1) for k, v in (("eps", 0.05), ("eps_step", 0.02))
        }
        want, got, _ = both("ProjectedGradientDescent", sizes | {"max_iter": 5, "batch_size": 3}, images())
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
    def test_success_within_the_ball(self, theirs, name, arguments, wrapped, images, wrong, both):
        x = images()
        y = wrapped().predict(x).argmax(1)
        want, got, _ = both(name, arguments, x)
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
    def test_smallest_changes(self, theirs, name, arguments, wrapped, images, wrong, both):
        x = images(4)
        y = wrapped().predict(x).argmax(1)
        want, got, _ = both(name, arguments, x)
        assert wrong(got, y).all()
        fell = wrong(want, y)
        far, near = (np.linalg.norm((r - x).reshape(4, -1), axis=1)[fell].mean() for r in (want, got))
        assert near <= 1.03 * far

    def test_auto_attack(self, theirs, wrapped, images):
        from art.estimators.classification import PyTorchClassifier as Original

        pytest.importorskip("multiprocess")
        x = images()
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
def test_recorded(name, wrapped, images, generated, wrong):
    """A sum of what ART 1.20.1 made of these images, after ``np.random.seed(7)``, and how many it fooled."""
    arguments = LINF if name == "FastGradientMethod" else LINF | {"max_iter": 10}
    if name == "ProjectedGradientDescent":
        arguments = arguments | {"num_random_init": 1}
    x = images()
    got, _ = generated(getattr(ours, name)(wrapped(), **arguments), x)
    y = wrapped().predict(x).argmax(1)
    total = ((got - x).astype(np.float64) * np.linspace(-1, 1, x.size).reshape(x.shape)).sum()
    assert (total, wrong(got, y).sum()) == (pytest.approx(RECORDED[name][0], abs=1e-4), RECORDED[name][1])
