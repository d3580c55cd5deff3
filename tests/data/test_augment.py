"""Augmentations against one image at a time, and their independence of the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tsrfast.data.augment import NAMES, Augment, gaussian, horizontal_flip, random_crop, rotate
from tsrfast.errors import InputError


def batch(n: int = 6, c: int = 3, h: int = 32, w: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(n + h), dtype=dtype)


def uniform(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_crop_is_a_slice_of_the_padded_image(n, c, h, w, padding, seed):
    x, u = batch(n, c, h, w), uniform(n, 2, seed)
    out = random_crop(x, u, padding)
    assert out.shape == x.shape
    for i in range(n):
        top, left = (math.floor(float(v) * (2 * padding + 1)) for v in u[i])
        padded = torch.zeros(c, h + 2 * padding, w + 2 * padding)
        padded[:, padding : padding + h, padding : padding + w] = x[i]
        assert torch.equal(out[i], padded[:, top : top + h, left : left + w])


def test_crop_reaches_every_place_and_no_other():
    edges = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24], [0.5, 0.5]])  # the last float32 below 1 included
    x = torch.ones(3, 1, 8, 8)
    out = random_crop(x, edges, 4)
    assert torch.equal(out[0], functional.pad(x[0, :, :4, :4], (4, 0, 4, 0)))
    assert torch.equal(out[1], functional.pad(x[0, :, :4, :4], (0, 4, 0, 4)))
    assert torch.equal(out[2], x[2])
    below = math.floor(9 / 11 * 2**24) / 2**24  # 11 u is just below 9, and 9 in float32
    row = random_crop(torch.ones(1, 1, 8, 1), torch.tensor([[below, 0.5]]), 5)
    assert row.flatten().tolist() == [1] * 5 + [0] * 3


def test_flip():
    x, u = batch(200, 1, 3, 4), uniform(200, 1)
    out = horizontal_flip(x, u)
    for i in range(200):
        assert torch.equal(out[i], torch.flip(x[i], [2]) if u[i] < 0.5 else x[i])
    assert torch.equal(horizontal_flip(x, u * 0, 0.0), x)
    assert torch.equal(horizontal_flip(x, u, 1.0), x.flip(3))


@pytest.mark.parametrize("shape", [(32, 32), (7, 7), (5, 8)])
def test_rotation_by_right_angles(shape):
    x = batch(3, 2, *shape, dtype=torch.float64)
    u = torch.tensor([[0.5], [0.0], [0.75]])  # 0, -180 and +90 degrees
    out = rotate(x, u, 180)
    torch.testing.assert_close(out[0], x[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1], x[1].flip(1, 2), rtol=0, atol=1e-12)
    if shape[0] == shape[1]:
        torch.testing.assert_close(out[2], torch.rot90(x[2], 1, (1, 2)), rtol=0, atol=1e-12)
    single = rotate(x.float(), u, 180)
    torch.testing.assert_close(single, out.float(), rtol=0, atol=2e-5)  # float32 grid: positions to 1e-6 pixels


def test_rotation_is_affine_grid_and_grid_sample_on_squares():
    x, u = batch(8, dtype=torch.float64), uniform(8, 1)
    out = rotate(x, u, 15)
    for i in range(8):
        a = math.radians(15) * (2 * float(u[i]) - 1)
        theta = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]], dtype=torch.float64)
        grid = functional.affine_grid(theta[None], [1, 3, 32, 32], align_corners=False)
        one = functional.grid_sample(x[i : i + 1], grid, "bilinear", "zeros", align_corners=False)
        torch.testing.assert_close(out[i : i + 1], one, rtol=0, atol=1e-12)


def test_rotation_of_a_wide_picture_does_not_shear():
    # A disc stays a disc: its second moments stay equal.
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(48.0), indexing="ij")
    disc = torch.sigmoid(8 - ((y - 11.5) ** 2 + (x - 23.5) ** 2).sqrt())[None, None]
    turned = rotate(disc, torch.tensor([[0.9]]), 45)
    assert (turned - disc).abs().max() < 0.05


def test_gaussian_has_the_right_moments_and_no_clipping():
    x = torch.zeros(40, 3, 31, 33)  # an odd number of values
    noise = gaussian(x, uniform(40, 3 * 31 * 33 + 1), 0.1).double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.1 / math.sqrt(n)
    assert abs(noise.std() - 0.1) < 5 * 0.1 / math.sqrt(2 * n)
    z = noise / 0.1
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z.abs() > 2).double().mean() - 0.0455) < 5 * math.sqrt(0.0455 / n)
    flat = noise.flatten(1)
    half = flat.shape[1] // 2
    assert abs((flat[:, :half] * flat[:, half + 1 :]).mean()) < 5 * 0.01 / math.sqrt(n / 2)  # the two of a pair
    assert noise.min() < -0.3
    assert torch.equal(gaussian(batch(), uniform(6, 3072), 0), batch())


def test_gaussian_formula_at_the_ends():
    u = torch.tensor([[0.0, 1 - 2**-24, 0.0, 0.25]])
    out = gaussian(torch.zeros(1, 1, 2, 2), u, 1.0)[0, 0].flatten()
    r = math.sqrt(48 * math.log(2))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, r]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [*[(name,) for name in NAMES], NAMES])
def test_an_image_does_not_see_its_batch(names):
    augment = Augment(names, seed=7)
    x, index = batch(16), torch.arange(100, 116)
    whole = augment(x, index, 3)
    assert whole.dtype == x.dtype
    assert whole.shape == x.shape
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(x[order], index[order], 3), whole[order])
    for n in (1, 5):
        parts = [augment(x[i : i + n], index[i : i + n], 3) for i in range(0, 16, n)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(Augment(names, seed=7)(x, index, 3), whole)
    assert not torch.equal(augment(x, index, 4), whole)
    assert not torch.equal(augment(x, index + 16, 3), whole)
    assert not torch.equal(Augment(names, seed=8)(x, index, 3), whole)
    assert augment(x[:0], index[:0], 3).shape == (0, 3, 32, 32)


def test_draws_differ_between_augmentations_and_epochs(monkeypatch):
    seen = []

    def philox(seed, index, count, *, draw=0):
        seen.append((seed, draw))
        return torch.full((len(index), count), 0.5)

    monkeypatch.setattr("tsrfast.data.augment.philox_uniform", philox)
    for epoch in range(5):
        Augment(NAMES, seed=1)(batch(2), torch.arange(2), epoch)
    assert len(set(seen)) == 20
    assert all(0 <= draw < 2**32 for _, draw in seen)
    assert seen[0][0] != 1  # not the key that an attack with this seed has
    only = seen[NAMES.index("rotate")]
    seen.clear()
    Augment(("rotate",), seed=1)(batch(2), torch.arange(2), 0)
    assert seen == [only]  # the other augmentations do not matter
    seen.clear()
    Augment(NAMES, seed=2**63 - 1)(batch(2), torch.arange(2), 2**30 - 1)
    assert all(0 <= seed < 2**63 and 0 <= draw < 2**32 for seed, draw in seen)


def test_the_order_is_that_of_the_names(monkeypatch):
    x, index = batch(4), torch.arange(4)
    both = Augment(("gaussian", "crop"), seed=3)(x, index, 0)
    by_hand = Augment(("crop",), seed=3)(Augment(("gaussian",), seed=3)(x, index, 0), index, 0)
    assert torch.equal(both, by_hand)
    assert torch.equal(Augment(())(x, index, 0), x)


def test_strengths_are_passed_on():
    x, index = batch(4), torch.arange(4)
    still = Augment(NAMES, padding=0, probability=0, degrees=0, sigma=0)
    torch.testing.assert_close(still(x, index, 1), x, rtol=0, atol=1e-5)
    assert torch.equal(Augment(("flip",), probability=1)(x, index, 0), x.flip(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: Augment(("corp",)), "unknown augmentation 'corp'; did you mean 'crop'"),
        (lambda x: Augment("crop"), "names must be a sequence of names"),
        (lambda x: Augment(("crop", "crop")), "names must not repeat"),
        (lambda x: Augment(seed=-1), r"seed must be in 0\.\.2\^63-1, got -1"),
        (lambda x: Augment()(x, torch.arange(5), 0), r"index must be int64 \[6\]"),
        (lambda x: Augment()(x, torch.arange(6).int(), 0), r"index must be int64 \[6\], got torch\.int32"),
        (lambda x: Augment()(x, torch.arange(6), -1), "epoch must be in"),
        (lambda x: Augment()(x.to(torch.uint8), torch.arange(6), 0), "x must be floating-point"),
        (lambda x: random_crop(x, uniform(6, 1)), r"u must be float32 \[6, 2\]"),
        (lambda x: random_crop(x, uniform(6, 2), -1), "padding must be at least 0, got -1"),
        (lambda x: horizontal_flip(x, uniform(6, 1), 1.5), r"probability must be in \[0, 1\], got 1\.5"),
        (lambda x: rotate(x[0], uniform(6, 1)), "x must be floating-point"),
        (lambda x: rotate(x, uniform(6, 1), math.nan), "degrees must be finite and at least 0, got nan"),
        (lambda x: gaussian(x, uniform(6, 3072).double()), r"u must be float32 \[6, 3072\]"),
        (lambda x: gaussian(x, uniform(6, 3072), -0.1), r"sigma must be finite and at least 0, got -0\.1"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make(batch())
