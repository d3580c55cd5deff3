"""Checks for gradient masking: networks that really mask, each for the reason it is known for, and honest ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tsrfast.data import load
from tsrfast.errors import InputError
from tsrfast.evaluation import check_gradient_masking
from tsrfast.evaluation.masking import _by_chance

EPS = 4 / 255


class Around(nn.Module):
    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


@pytest.fixture(scope="module")
def honest():
    """A small network, trained on generated images until it is right on most."""
    torch.manual_seed(0)
    split = load("synthetic", train=2048, test=64).train
    x, y = split.pixels(), split.labels
    model = nn.Sequential(
        Around(nn.Conv2d(3, 8, 5, 2, 2), lambda x: 4 * x - 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for part in torch.randperm(len(x)).split(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def images():
    split = load("synthetic", train=1, test=40).test
    return split.pixels(), split.labels


def names(findings):
    return {f.check for f in findings}


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.3), ("l1", 3.0), ("linf", 0.5 / 255), ("linf", 16 / 255)])
def test_an_honest_network_gives_no_finding(honest, images, norm, eps):
    assert check_gradient_masking(honest, *images, norm=norm, eps=eps) == []


def test_one_image_at_the_border_is_no_sign():
    """Noise fells it as PGD does, and a ball four times as large holds no other."""

    class Bright(nn.Module):
        def forward(self, x):
            above = 4 * (x.mean((1, 2, 3)) - 0.5)
            return torch.stack([-above, above], 1)

    x = torch.tensor([0.1, 0.2, 0.8, 0.9, 0.5001])[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    assert check_gradient_masking(Bright(), x, torch.tensor([0, 0, 1, 1, 1]), eps=0.01) == []


def test_a_saturated_softmax(honest, images):
    """Logits times 1e4: cross-entropy's gradient underflows to 0 in float32, and the network is as weak as before."""
    findings = check_gradient_masking(Around(honest, after=lambda z: 1e4 * z), *images, eps=EPS)
    found = {f.check: f for f in findings}
    assert {"zero_gradient", "black_box_beats_white_box", "unbounded_attack_fails"} <= found.keys()
    zero = found["zero_gradient"].numbers
    assert 0.9 * zero["images"] < zero["zero"] <= zero["images"]
    assert str(zero["zero"]) in found["zero_gradient"].text
    assert "dlr" in found["zero_gradient"].reason
    beaten = found["black_box_beats_white_box"].numbers
    assert beaten["square"] > beaten["white_box"]
    assert beaten["p_value"] < 0.01


def test_a_quantised_input(honest, images):
    """round() has gradient 0 everywhere."""
    findings = check_gradient_masking(Around(honest, lambda x: (x * 16).round() / 16), *images, eps=EPS)
    found = {f.check: f for f in findings}
    assert {"zero_gradient", "unbounded_attack_fails"} <= found.keys()
    assert found["zero_gradient"].numbers["zero"] == found["zero_gradient"].numbers["images"]
    assert names(findings) & {"noise_as_good", "black_box_beats_white_box"}


def test_noise_at_test_time(honest, images):
    findings = check_gradient_masking(Around(honest, lambda x: x + 0.1 * torch.randn_like(x)), *images, eps=EPS)
    found = {f.check: f for f in findings}
    assert "random_outputs" in found
    assert found["random_outputs"].numbers["largest_change"] > 0
    assert "eot_iter" in found["random_outputs"].reason


def test_probabilities_instead_of_logits(honest, images):
    findings = check_gradient_masking(Around(honest, after=lambda z: z.softmax(1)), *images, eps=EPS)
    assert "probabilities" in names(findings)


def test_gradients_that_are_not_numbers(honest, images):
    # The square root's slope at 0 is infinite, and 0 * inf is NaN.
    findings = check_gradient_masking(Around(honest, lambda x: x + 0 * (x - x).sqrt()), *images, eps=EPS)
    broken = next(f for f in findings if f.check == "broken_gradient")
    assert broken.numbers["broken"] == broken.numbers["images"]


class _Backward(torch.autograd.Function):
    """The identity, with the gradient turned against whoever follows it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def test_a_gradient_that_points_the_wrong_way(honest, images):
    found = names(check_gradient_masking(Around(honest, _Backward.apply), *images, eps=EPS))
    assert {"black_box_beats_white_box", "unbounded_attack_fails"} <= found


class _OneStep(nn.Module):
    """Masked after the first step: off the data's own grid of bytes, the gradient points the wrong way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        clean = ((x * 255 - (x * 255).round()).abs().amax((1, 2, 3)) < 1e-3)[:, None, None, None]
        return self.model(torch.where(clean, x, _Backward.apply(x)))


def test_one_step_that_beats_many(honest, images):
    findings = check_gradient_masking(_OneStep(honest), *images, eps=EPS)
    finding = next(f for f in findings if f.check == "one_step_beats_many")
    assert finding.numbers["fgsm"] > finding.numbers["pgd"]


def test_nothing_is_disturbed_and_the_same_is_found_again(honest, images):
    x, y = (t.clone() for t in images)
    fresh = copy.deepcopy(honest)
    for p in fresh.parameters():
        p.grad = None
    model = Around(fresh, lambda x: x + 0.1 * torch.randn_like(x))
    model.train()
    fresh.eval()
    state = torch.get_rng_state()
    first = check_gradient_masking(model, x, y, eps=EPS, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not fresh.training
    assert torch.equal(x, images[0])
    assert all(p.grad is None for p in fresh.parameters())
    assert check_gradient_masking(model, x, y, eps=EPS, seed=3) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 0}, "eps must be a finite number > 0, got 0"),
        ({"eps": float("inf")}, "eps must be a finite number > 0, got inf"),
        ({"eps": torch.ones(40)}, "eps must be a finite number > 0, got tensor"),
        ({"norm": "l7"}, "unknown norm 'l7'"),
        ({"y": torch.zeros(40)}, r"y must be int64 of shape \(40,\), got torch.float32"),
        ({"y": torch.full((40,), 10)}, r"y must be in 0\.\.9"),
        ({"x": torch.zeros(40, 3, 32, 32, dtype=torch.uint8)}, "floating-point"),
        ({"x": torch.full((40, 3, 32, 32), 255.0)}, r"0\.\.255\? divide by 255"),
    ],
)
def test_bad_input(honest, images, change, message):
    given = {"x": images[0], "y": images[1], "eps": EPS} | change
    with pytest.raises(InputError, match=message):
        check_gradient_masking(honest, given.pop("x"), given.pop("y"), **given)


def test_a_model_that_is_never_right(honest, images):
    with torch.no_grad():
        worst = honest(images[0]).argmin(1)
    with pytest.raises(InputError, match="right on some of the images, got none"):
        check_gradient_masking(honest, images[0], worst, eps=EPS)


def test_the_sign_test():
    """By hand: of 4 images that one attack alone fells, all 4 for A: 1/16; 3 of 4: 5/16."""
    a = torch.tensor([1, 1, 1, 1, 0, 1]).bool()
    b = torch.tensor([0, 0, 0, 0, 0, 1]).bool()
    assert _by_chance(a, b) == 1 / 16
    assert _by_chance(b, a) == 1.0
    b[4], a[4] = True, False
    assert _by_chance(a, b) == 6 / 32
    assert _by_chance(b, b) == 1.0
