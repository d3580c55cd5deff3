"""Distance of images to the patches' subspace, and rank correlation, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast.errors import InputError
from tsrfast.specialization import distance_to_patches, patch_basis, spearman


def images(n: int = 5, channels: int = 3, side: int = 7) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("components", [1, 17, 26])
def test_distance_is_numpys(dtype: torch.dtype, tolerance: float, components: int) -> None:
    x = images()
    basis = patch_basis(x, components=components)
    patches = torch.nn.functional.unfold(x, 3).permute(0, 2, 1).numpy() - basis.mean.numpy()
    u = basis.vectors.numpy()[:, :components]
    wanted = np.sqrt(((patches - patches @ u @ u.T) ** 2).sum((1, 2)))
    got = distance_to_patches(x.to(dtype), basis)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.numpy(), wanted, rtol=tolerance)


def test_distance_is_nothing_inside_and_everything_of_a_step_outside() -> None:
    x = images(1)
    assert distance_to_patches(x, patch_basis(x, components=27)).tolist() == [0.0]
    with_noise = images(20).mean(0, keepdim=True) + 0.1 * torch.randn(1, 3, 7, 7, dtype=torch.float64)
    basis = patch_basis(images(20), components=17)
    squares = [distance_to_patches(with_noise, b).square() for b in (basis, patch_basis(images(20), components=1))]
    assert squares[0] < squares[1]  # fewer components leave more outside


def test_distance_says_what_is_wrong() -> None:
    basis = patch_basis(images())
    for bad in (images(channels=1), images(side=2), (255 * images()).to(torch.uint8), images()[0]):
        with pytest.raises(InputError, match="distance_to_patches: images must"):
            distance_to_patches(bad, basis)


def ranks(values: list[float]) -> np.ndarray:
    """Mean rank of equal values, by comparing every pair."""
    return np.array([sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=20))
def test_spearman_is_pearson_of_ranks(pairs: list[tuple[int, int]]) -> None:
    x, y = (list(map(float, side)) for side in zip(*pairs, strict=True))
    got = spearman(torch.tensor(x), torch.tensor(y))
    assert got.n == len(pairs)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(got.r)
    else:
        assert got.r == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)


def test_spearman_knows_order_alone_and_leaves_nan_out() -> None:
    x = torch.tensor([1.0, 2.0, math.nan, 3.0, 10.0])
    assert spearman(x, x.exp()).r == pytest.approx(1)
    assert spearman(x, -(x**3)).r == pytest.approx(-1)
    assert spearman(x, x).n == 4
    with pytest.raises(InputError, match="y must have x's shape"):
        spearman(x, x[:2])
