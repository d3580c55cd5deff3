"""The drop-in for cleverhans 4.0.0, beside the original where it is installed."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tsrfast.compat.cleverhans import NotCovered, __version__
from tsrfast.compat.cleverhans.torch.attacks.carlini_wagner_l2 import carlini_wagner_l2
from tsrfast.compat.cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
from tsrfast.compat.cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
from tsrfast.compat.cleverhans.torch.utils import clip_eta

OURS = {f.__name__: f for f in (fast_gradient_method, projected_gradient_descent, carlini_wagner_l2)}
INF = np.inf
PGD = {"eps": 0.1, "eps_iter": 0.03, "nb_iter": 5, "norm": INF}


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("cleverhans.torch.attacks.projected_gradient_descent")
    return {n: getattr(importlib.import_module(f"cleverhans.torch.attacks.{n}"), n) for n in OURS}


def test_same_arguments_and_defaults(theirs):
    assert __version__ == "4.0.0"
    for name, function in OURS.items():
        mine, other = (inspect.signature(f).parameters.values() for f in (function, theirs[name]))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in other]


@pytest.mark.parametrize("gate", [nn.SiLU, nn.ReLU])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fast_gradient_method", {"eps": 0.1, "norm": INF}),
        ("fast_gradient_method", {"eps": 0.5, "norm": 2, "labels": True}),
        ("fast_gradient_method", {"eps": 0.1, "norm": INF, "clip_min": 0, "clip_max": 1, "labels": True, "targeted": True}),
        ("projected_gradient_descent", PGD),
        ("projected_gradient_descent", {**PGD, "clip_min": 0, "clip_max": 1, "labels": True}),
        ("projected_gradient_descent", {**PGD, "rand_minmax": 0.3, "labels": True, "targeted": True}),
        ("projected_gradient_descent", {**PGD, "rand_init": False, "norm": 2}),
        ("projected_gradient_descent", {**PGD, "norm": 2, "eps": 0.5, "eps_iter": 0.2}),
    ],
)
def test_same_pixels_as_the_original(theirs, net, batch, seeded, name, options, gate):
    model, (x, y) = net(torch.float32, gate).eval(), batch(dtype=torch.float32)
    options = dict(options)
    given = {"y": y} if options.pop("labels", False) else {}
    (got, state), (want, their_state) = (seeded(f, model, x, **options, **given) for f in (OURS[name], theirs[name]))
    assert torch.equal(state, their_state)
    if gate is nn.ReLU:  # native code: single pixels where a gradient is 0 up to rounding
        assert ((got - want).abs() > 1e-5).double().mean() < 0.005
    else:
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=5e-7)


def test_carlini_wagner_is_as_near_as_the_original(theirs, net, batch):
    model, (x, _) = net(torch.float32).eval(), batch(dtype=torch.float32)
    options = {"initial_const": 1.0, "binary_search_steps": 4, "max_iterations": 100, "lr": 0.01}
    y = model(x).argmax(1)
    far = []
    for function in (carlini_wagner_l2, theirs["carlini_wagner_l2"]):
        got = function(model, x, 10, **options)
        assert (model(got).argmax(1) != y).all()
        far.append((got - x).flatten(1).norm(dim=1).mean().item())
    assert far[0] <= 1.05 * far[1]


# Recorded from cleverhans 4.0.0, torch 2.13, torch.manual_seed(11), on tiny(torch.float32) and its labels.
RECORDED = [
    ("fast_gradient_method", {"eps": 0.3, "norm": 2}, [-0.108559, 0.393824, 0.81015, 0.932023, -0.080296, 0.689869, 0.351368, 0.496894]),
    ("projected_gradient_descent", {**PGD, "clip_min": 0, "clip_max": 1}, [0.0, 0.5, 0.7, 0.88, 0.0, 0.6, 0.4, 0.6]),
    ("projected_gradient_descent", {**PGD, "norm": 2}, [0.034641, 0.400321, 0.670564, 0.952636, 0.000841, 0.560623, 0.317473, 0.624817]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "want"), RECORDED)
def test_recorded_images(tiny, name, options, want):
    model, x, y = tiny(torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        got = OURS[name](model, x, y=y, **options)
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3), eps=st.floats(1e-3, 0.5), norm=st.sampled_from([INF, 2]), clip=st.booleans(), targeted=st.booleans(),
    start=st.booleans(), gate=st.sampled_from([nn.ReLU, nn.SiLU]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_in_the_ball_and_nothing_else_touched(net, batch, n, eps, norm, clip, targeted, start, gate, dtype):
    model, (x, y) = net(dtype, gate).train(), batch(n, dtype)
    model[0].eval()
    modes, before = [m.training for m in model.modules()], x.clone()
    bounds = {"clip_min": 0.0, "clip_max": 1.0} if clip else {}
    with torch.no_grad():
        got = projected_gradient_descent(
            model, x, eps, eps / 2, 3, norm, y=y, targeted=targeted, rand_init=start, **bounds
        )  # fmt: skip
    assert torch.equal(x, before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not got.requires_grad
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    assert ((got - x).double().flatten(1).norm(p=norm, dim=1) <= eps + 1e-6).all()
    if clip and n:
        assert got.min() >= 0
        assert got.max() <= 1


def test_plain_functions(net, batch):
    model, (x, y) = net().eval(), batch()
    for function, more in (
        (projected_gradient_descent, {**PGD, "rand_init": False}),
        (fast_gradient_method, {"eps": 0.1, "norm": 2}),
    ):
        assert torch.equal(function(lambda z: model(z), x, y=y, **more), function(model, x, y=y, **more))
        assert torch.equal(function(model, x, **more), function(model, x, y=model(x).argmax(1), **more))
    got = carlini_wagner_l2(lambda z: model(z), x, 10, max_iterations=5, binary_search_steps=2)
    assert torch.equal(got, carlini_wagner_l2(model, x, 10, max_iterations=5, binary_search_steps=2))


def test_a_step_does_not_depend_on_the_batch():
    """The original divides the mean loss's gradient by 1e-6 at least: of images that the model is sure of 7 % of a step is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    model[1].weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64)
    model[1].bias.data = torch.tensor([12.0, 0], dtype=torch.float64)
    x, y = torch.full((64, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    for n in (1, 64):
        moved = fast_gradient_method(model, x[:n], 0.2, 2, y=y[:n]) - x[:n]
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((n,), 0.2, dtype=torch.float64))
    model[1].weight.data[0, 0] = torch.nan
    assert torch.equal(fast_gradient_method(model, x, 0.2, 2, y=y), x)


def test_clip_eta():
    eta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert clip_eta(eta, INF, 1).tolist() == eta.clamp(-1, 1).tolist()
    torch.testing.assert_close(clip_eta(eta, 2, 1), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert eta[0, 0] == 3  # the original scales its argument in place
    with pytest.raises(NotImplementedError):
        clip_eta(eta, 1, 1)
    with pytest.raises(ValueError, match="norm must be"):
        clip_eta(eta, 3, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"norm": 1}, NotImplementedError, "norm=np.inf or 2"),
        ({"norm": 3}, ValueError, "np.inf or 2"),
        ({"eps": -1}, ValueError, "eps must be greater"),
        ({"eps_iter": -1}, ValueError, "eps_iter must be greater"),
        ({"eps_iter": 0.2}, AssertionError, "eps_iter must be <= eps"),
        ({"clip_min": 1, "clip_max": 0}, ValueError, "clip_min must be less"),
        ({"clip_min": 0}, ValueError, "one-sided"),
        ({"clip_min": 0.5, "clip_max": 1}, AssertionError, "x must be in"),
        ({"clip_min": 0.5, "clip_max": 1, "sanity_checks": False}, ValueError, "pixels in"),
        ({"clip_min": -1, "clip_max": 1, "eps": 3, "eps_iter": 1}, AssertionError, "eps must be <= clip_max"),
        ({"y": torch.zeros(8)}, ValueError, "labels must be int64"),
        ({"y": torch.full((8,), 10)}, ValueError, r"0\.\.9"),
        ({"x": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, ValueError, "floating-point"),
    ],
)
def test_bad_input(net, batch, changes, error, message):
    x, y = batch()
    with pytest.raises(error, match=message):
        projected_gradient_descent(net(), **{"x": x, "y": y, **PGD, **changes})


def test_no_radius_no_change(net, batch):
    x, _ = batch()
    for got in (
        projected_gradient_descent(net(), x, 0, 0, 3, INF),
        projected_gradient_descent(net(), x, 0.1, 0, 3, INF),
        fast_gradient_method(net(), x, 0, INF),
    ):
        assert torch.equal(got, x)
        assert got.data_ptr() != x.data_ptr()


def test_what_is_missing_says_so(net, batch):
    for module in ("hop_skip_jump_attack", "spsa", "noise", "semantic", "sparse_l1_descent"):
        with pytest.raises(ImportError, match=f"got {module!r}: cleverhans has it") as e:
            importlib.import_module(f"tsrfast.compat.cleverhans.torch.attacks.{module}")
        assert isinstance(e.value, NotCovered)
    with pytest.raises(ImportError, match="optimize_linear"):
        from tsrfast.compat.cleverhans.torch.utils import optimize_linear  # noqa: F401
    with pytest.raises(ImportError, match="no_such"):
        from tsrfast.compat.cleverhans.torch.utils import no_such  # noqa: F401
    with pytest.raises(NotCovered, match="norm=1"):
        fast_gradient_method(net(), batch()[0], 0.1, 1)
    with pytest.raises(ValueError, match="Norm order"):
        fast_gradient_method(net(), batch()[0], 0.1, 3)
