"""Robust-feature images against a descent by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tsrfast.data import Split
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.training import robust_features
from tsrfast.training.robust_features import representation, start_of


def net(seed: int) -> ConvReLU:
    return ConvReLU((3, 2), image=(1, 8, 8), classes=4, seed=seed, mean=(0.4,), std=(0.3,)).double()


def split(count: int = 9) -> Split:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 8, 8), generator=g, dtype=torch.uint8)
    return Split(images, torch.randint(4, (count,), generator=g))


def features(f: ConvReLU, x: Tensor) -> Tensor:
    """Of one image: the last convolution after ReLU."""
    return f.activations(x[None])[-1].flatten()


def distance(f: ConvReLU, t: ConvReLU, x: Tensor, there: Tensor, alpha: float) -> Tensor:
    """Eq. 35 of one image, without the tiny number under the roots."""
    logits = (t(there[None])[0] - t(x[None])[0]).square().sum()
    return alpha * logits**0.5 + (features(f, there) - features(f, x)).square().sum() ** 0.5


def by_hand(f, t, x, start, alpha, steps, step_size) -> Tensor:
    there = start
    for _ in range(steps):
        leaf = there.clone().requires_grad_()
        g = torch.autograd.grad(distance(f, t, x, leaf, alpha), leaf)[0]
        length = math.sqrt(sum(v * v for v in g.flatten().tolist()))
        there = (there - step_size * g / length).clamp(0, 1)
    return there


@pytest.mark.parametrize("alpha", [0.5, 0.0, 3.0])
def test_it_is_the_descent_by_hand(alpha: float) -> None:
    f, t, data = net(0), net(1), split()
    got = robust_features(f, t, data, alpha=alpha, steps=15, step_size=0.2, seed=5, batch_size=4)
    assert torch.equal(got.labels, data.labels)
    x = data.pixels().double()
    start = x[start_of(data, torch.arange(9), 5)]
    for i in range(9):
        wanted = by_hand(f, t, x[i], start[i], alpha, 15, 0.2)
        # Rounded to 8 bits: half a level, and a rounding of the last bit.
        assert (got.images[i] / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-6


def test_it_comes_closer_than_it_began() -> None:
    f, t, data = net(0), net(1), split(40)
    x, (before, after) = data.pixels().double(), (robust_features(f, t, data, steps=s, step_size=0.1) for s in (0, 60))
    assert torch.equal(before.images, data.images[start_of(data, torch.arange(40), 0)])
    with torch.no_grad():
        first, last = (
            torch.stack([distance(f, t, a, b, 0.5) for a, b in zip(x, d.pixels().double(), strict=True)])
            for d in (before, after)
        )
    own = start_of(data, torch.arange(40), 0) == torch.arange(40)
    assert (last < first)[~own].all()
    assert last.median() < 0.5 * first.median()


def test_batches_and_threads_do_not_matter() -> None:
    f, t, data = net(0), net(1), split()
    seen = []
    whole = robust_features(f, t, data, steps=5)
    cut = robust_features(f, t, data, steps=5, batch_size=2, on_progress=lambda done, of: seen.append((done, of)))
    assert torch.equal(whole.images, cut.images)
    assert seen == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]


def test_native_networks_give_the_same_images() -> None:
    data = split()
    in_64, in_32 = (robust_features(*(getattr(net(s), kind)() for s in (0, 1)), data, steps=5) for kind in ("double", "float"))
    assert (in_64.images.int() - in_32.images.int()).abs().max() <= 1


def test_networks_and_data_are_left_alone() -> None:
    f, t, data = net(0).train(), net(1).train(), split()
    weights, images = [{k: v.clone() for k, v in n.state_dict().items()} for n in (f, t)], data.images.clone()
    robust_features(f, t, data, steps=2)
    assert f.training
    assert t.training
    assert torch.equal(data.images, images)
    for n, before in zip((f, t), weights, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in n.state_dict().items())
        assert all(p.grad is None for p in n.parameters())


def test_representation_is_the_last_layer_after_relu() -> None:
    f, x = net(0), split().pixels().double()
    torch.testing.assert_close(representation(f)(x), f.activations(x)[-1].flatten(1))


def test_starts_are_uniform_and_keyed() -> None:
    data, index = split(10), torch.arange(20000)
    drawn = start_of(data, index, 1)
    counts = torch.bincount(drawn, minlength=10).double()
    assert len(counts) == 10
    assert ((counts - 2000).square() / 2000).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    assert torch.equal(start_of(data, index[500:600], 1), drawn[500:600])
    assert not torch.equal(start_of(data, index, 2), drawn)


@pytest.mark.parametrize(
    "field", [{"alpha": -1}, {"alpha": math.inf}, {"steps": -1}, {"step_size": 0}, {"step_size": math.nan}, {"batch_size": 0}]
)
def test_bad_settings(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))} must be"):
        robust_features(net(0), net(1), split(), **field)
