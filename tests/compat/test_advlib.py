"""The drop-in for adv-lib 0.2.8, beside the original where it is installed and imports."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import types

import pytest
import torch
from torch import nn

import tsrfast.compat.advlib as package
from tsrfast.compat.advlib import attacks as ours
from tsrfast.errors import InputError

INF = math.inf


@pytest.fixture(scope="module")
def theirs():
    """The package imports torchvision (which a PyTorch for the CPU may refuse) and visdom, for other attacks and plots."""
    if importlib.util.find_spec("adv_lib") is None:
        pytest.skip("adv_lib is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchvision", "torchvision.models", "visdom"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules["torchvision"], "models", sys.modules["torchvision.models"], raising=False)
        return importlib.import_module("adv_lib.attacks")


@pytest.fixture(scope="module")
def judged(net, batch):
    model = net(torch.float32).eval()
    x, _ = batch(24, torch.float32)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def fallen(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) != y


def test_same_arguments_and_defaults(theirs):
    assert package.__version__ == "0.2.8"
    for name in ours.__all__:
        mine, other = (inspect.signature(getattr(lib, name)).parameters.values() for lib in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in other]
    missing = {n for names in ours._MISSING.values() for n in names}
    assert missing | set(ours.__all__) == {n for n, f in vars(theirs).items() if inspect.isfunction(f)}


@pytest.mark.parametrize(
    ("name", "options", "atol"),
    [
        ("pgd_linf", {"ε": 0.03, "steps": 10}, 1e-6),
        ("pgd_linf", {"ε": torch.linspace(0, 0.05, 24), "steps": 10, "random_init": False}, 1e-6),
        ("pgd_linf", {"ε": 0.01, "loss_function": "DL", "restarts": 3, "steps": 6}, 1e-6),
        ("pgd_linf", {"ε": 0.1, "targeted": True, "absolute_step_size": 0.01, "steps": 10}, 1e-6),
        (
            "carlini_wagner_l2",
            {"max_iterations": 40, "binary_search_steps": 4, "initial_const": 1.0, "abort_early": False},
            1e-5,
        ),
        (
            "carlini_wagner_l2",
            {"max_iterations": 40, "binary_search_steps": 10, "confidence": 0.01, "abort_early": False},
            1e-5,
        ),
        ("fab", {"norm": INF, "n_iter": 10}, 1e-5),
        ("fab", {"norm": 2, "n_iter": 10, "η": 1.1, "β": 0.8}, 1e-5),
        ("fab", {"norm": 1, "n_iter": 10, "targeted_restarts": True, "restarts": 3}, 1e-4),
    ],
)
def test_same_pixels_as_the_original(theirs, judged, seeded, name, options, atol):
    model, x, y = judged
    labels = (y + 3) % 10 if options.get("targeted") else y
    (got, state), (want, their_state) = (seeded(getattr(lib, name), model, x, labels, **options) for lib in (ours, theirs))
    assert torch.equal(state, their_state)
    assert (got != x).any()
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("apgd", {"eps": 0.02, "norm": INF}),
        ("apgd", {"eps": 0.02, "norm": INF, "loss_function": "ce", "best_loss": True}),
        ("apgd", {"eps": torch.linspace(0, 0.5, 24), "norm": 2}),
        ("apgd", {"eps": 3.0, "norm": 1, "use_large_reps": True}),
        ("apgd_targeted", {"eps": 0.02, "norm": INF, "num_targets": 3}),
        ("apgd_targeted", {"eps": 0.2, "norm": 2, "n_restarts": 2}),
        ("pgd_linf", {"ε": 0.02, "steps": 20, "loss_function": "dlr"}),
        ("df", {}),
    ],
)
def test_as_many_fall_as_with_the_original(theirs, judged, seeded, name, options):
    model, x, y = judged
    if name.startswith("apgd"):
        options = {"n_iter": 20, **options}
    (got, state), (want, their_state) = (seeded(getattr(lib, name), model, x, y, **options) for lib in (ours, theirs))
    if "targeted" not in name and options.get("n_restarts", 1) == 1:
        assert torch.equal(state, their_state)
    fell = fallen(model, got, y)
    assert fell.any()
    assert fell.double().mean() >= fallen(model, want, y).double().mean() - 0.05
    if name == "df":
        far = [(adv - x).flatten(1).norm(dim=1).mean().item() for adv in (got, want)]
        assert far[0] <= 1.02 * far[1]
        return
    norm, eps = options.get("norm", INF), options.get("eps", options.get("ε"))
    assert ((got - x).flatten(1).norm(p=norm, dim=1) <= torch.as_tensor(eps) + 1e-5).all()


# Recorded from adv-lib 0.2.8, torch 2.13, torch.manual_seed(11), on tiny(torch.float32) and its answers.
RECORDED = [
    ("pgd_linf", {"ε": 0.3, "steps": 6}, [0.1, 0.4, 0.6, 0.98, 0.020366, 0.66616, 0.399851, 0.427063], 1e-6),
    ("carlini_wagner_l2", {"max_iterations": 50, "binary_search_steps": 3, "initial_const": 1.0, "abort_early": False},
     [0.1, 0.4, 0.6, 0.98, 0.011682, 0.564043, 0.31903, 0.631987], 1e-5),
    ("fab", {"norm": 2, "n_iter": 5}, [0.024846, 0.63472, 0.6415, 0.734586, 0.0, 0.55991, 0.321785, 0.634477], 1e-5),
    ("df", {}, [0.0, 0.628053, 0.682687, 0.730639, 0.0, 0.559485, 0.321855, 0.634884], 2e-4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "want", "atol"), RECORDED)
def test_recorded_images(tiny, name, options, want, atol):
    model, x, _ = tiny(torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        got = getattr(ours, name)(model, x, model(x).argmax(1), **options)
    torch.testing.assert_close(got.flatten(), torch.tensor(want), rtol=0, atol=atol)


def test_pgd_returns_the_latest_adversarial_iterate_before_the_last_step(judged):
    """Against the loop written out: iterates 0..n-1 count, the n-th does not, and without any the clean image is returned."""
    model, x, y = judged
    ε, steps, some = 0.02, 8, []
    for n in range(1, steps + 1):
        want, z = x.clone(), x.clone()
        for _ in range(n):
            leaf = z.clone().requires_grad_()
            logits = model(leaf)
            want = torch.where((logits.argmax(1) != y)[:, None, None, None], z, want)
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), leaf)
            z = torch.min(torch.max(z + ε / 4 * g.sign(), x - ε), x + ε).clamp(0, 1)
        got = ours.pgd_linf(model, x, y, ε, steps=n, random_init=False, relative_step_size=0.25)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        some.append(int((got != x).flatten(1).any(1).sum()))
    assert some[0] == 0
    assert 0 < some[-1] < len(x)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd_linf", {"ε": 0.05}),
        ("apgd", {"eps": 0.05, "norm": INF, "n_iter": 8}),
        ("apgd_targeted", {"eps": 0.05, "norm": INF, "n_iter": 8}),
        ("carlini_wagner_l2", {"max_iterations": 10, "binary_search_steps": 2}),
        ("df", {"steps": 3}),
        ("fab", {"norm": 2, "n_iter": 3}),
    ],
)
def test_nothing_else_is_touched_and_functions_will_do(net, batch, seeded, name, options):
    model, (x, y) = net(torch.float32).train(), batch(4, torch.float32)
    model[0].eval()
    modes, before = [m.training for m in model.modules()], (x.clone(), y.clone())
    with torch.no_grad():
        got = seeded(getattr(ours, name), model, x, y, **options)[0]
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not got.requires_grad
    assert got.shape == x.shape
    assert got.min() >= 0
    assert got.max() <= 1
    model.eval()
    assert torch.equal(seeded(getattr(ours, name), lambda z: model(z), x, y, **options)[0], got)
    assert getattr(ours, name)(model, x[:0], y[:0], **options).shape == (0, 3, 8, 8)
    for images, labels, message in (
        (x * 255, y, r"pixels in \[0, 1\]"),
        ((x * 255).byte(), y, "floating-point"),
        (x, y.int(), "labels must be int64"),
        (x, y + 10, r"must be in 0\.\.9"),
    ):
        with pytest.raises(InputError, match=message):
            getattr(ours, name)(model, images, labels, **options)


def test_untargeted_attacks_asked_for_targets(judged):
    model, x, y = judged
    with pytest.warns(UserWarning, match="untargeted only"):
        assert ours.df(model, x, y, targeted=True) is x
    with pytest.warns(UserWarning, match="untargeted only"):
        assert ours.fab(model, x, y, 2, targeted=True) is x


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pgd_linf", {"ε": 0.1, "callback": print}, "callback must be None"),
        ("pgd_linf", {"ε": -0.1}, "eps must be >= 0"),
        ("pgd_linf", {"ε": 0.1, "loss_function": "l2"}, "loss_function"),
        ("carlini_wagner_l2", {"β_1": 0.5}, "β_1"),
        ("carlini_wagner_l2", {"callback": print}, "callback"),
        ("apgd", {"eps": 0.1, "norm": 3}, "norm must be"),
        ("apgd_targeted", {"eps": 0.1, "norm": 2, "targeted": True}, "targeted must be False"),
        ("apgd_targeted", {"eps": 0.1, "norm": 2, "loss_function": "ce"}, "loss_function"),
        ("df", {"norm": INF}, "norm must be 2"),
        ("df", {"return_targets": True}, "return_targets"),
        ("fab", {"norm": 2, "restarts": 2}, "restarts must be"),
    ],
)
def test_values_that_are_not_allowed(judged, name, options, message):
    model, x, y = judged
    with pytest.raises(InputError, match=message):
        getattr(ours, name)(model, x, y, **options)


def test_what_is_missing_says_so():
    with pytest.raises(InputError, match="got 'ddn': advlib has it"):
        _ = ours.ddn
    with pytest.raises(ImportError, match="got 'fmn'"):
        from tsrfast.compat.advlib.attacks import fmn  # noqa: F401
    assert not hasattr(ours, "no_such")
