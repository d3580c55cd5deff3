from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.specialization import PatchBasis, eps_curves, patch_basis, subspace_distance


def images(n: int = 9, c: int = 3, side: int = 11, seed: int = 0) -> Tensor:
    """uint8 images whose neighbouring pixels and channels are alike, as natural ones are."""
    noise = torch.rand(n, c + 1, side + 2, side + 2, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1)
    return ((smooth[:, :c] + 2 * smooth[:, c:]) * 80).to(torch.uint8)


def numpy_patches(x: np.ndarray, kernel: int) -> np.ndarray:
    n, _, h, w = x.shape
    return np.array(
        [
            x[i, :, a : a + kernel, b : b + kernel].ravel()
            for i in range(n)
            for a in range(h - kernel + 1)
            for b in range(w - kernel + 1)
        ]
    )


@pytest.mark.parametrize(("c", "kernel"), [(3, 3), (1, 2), (2, 1)])
def test_patch_basis_is_numpys_pca(c, kernel, monkeypatch):
    monkeypatch.setattr("tsrfast.specialization.subspace._PATCHES", 250)  # several batches
    x = images(c=c)
    basis = patch_basis(x, kernel=kernel, components=2)
    patches = numpy_patches(x.numpy() / 255.0, kernel)
    covariance = np.cov(patches.T, bias=True)
    np.testing.assert_allclose(basis.mean, patches.mean(0), rtol=1e-12)
    np.testing.assert_allclose(basis.eigenvalues, np.linalg.eigvalsh(covariance)[::-1], rtol=0, atol=1e-14)
    v = basis.vectors.numpy()
    np.testing.assert_allclose(v @ np.diag(basis.eigenvalues) @ v.T, covariance, rtol=0, atol=1e-14)
    np.testing.assert_allclose(v.T @ v, np.eye(len(v)), rtol=0, atol=1e-12)
    assert basis.basis.shape == (c * kernel * kernel, 2)
    assert (basis.eigenvalues.diff() <= 0).all()


def test_bytes_and_pixels_give_one_basis():
    x = images()
    a, b = patch_basis(x), patch_basis(x.to(torch.float32) / 255)
    assert a.components == 17
    torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(a.basis @ a.basis.mT, b.basis @ b.basis.mT, rtol=0, atol=1e-3)


def test_components_have_a_fixed_sign():
    v = patch_basis(images()).vectors
    assert (v.gather(0, v.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (images()[:0], {}, "images must be non-empty"),
        (images()[0], {}, "images must be non-empty"),
        (images(), {"kernel": 12}, r"kernel must be in 1\.\.11, got 12"),
        (images(), {"components": 28}, r"components must be in 1\.\.27, got 28"),
        (images() / torch.zeros(()), {}, "images must have finite pixels"),
    ],
)
def test_bad_images(x, arguments, message):
    with pytest.raises(InputError, match=message):
        patch_basis(x, **arguments)


def filters(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 3, 3, generator=torch.Generator().manual_seed(seed))


BASIS = patch_basis(images())


@settings(max_examples=30, deadline=None)
@given(n_s=st.integers(1, 6), n_t=st.integers(1, 6), components=st.integers(1, 27), seed=st.integers(0, 99))
def test_parseval(n_s, n_t, components, seed):
    w_s, w_t = filters(n_s, seed), filters(n_t, seed + 1000)
    basis = PatchBasis(BASIS.mean, BASIS.eigenvalues, BASIS.vectors, components)
    eps_in, eps_out = subspace_distance(w_s, w_t, basis)
    assert eps_in.shape == eps_out.shape == (n_s, n_t)
    assert eps_in.dtype == torch.float64
    cos = torch.nn.functional.cosine_similarity(w_s.double().flatten(1)[:, None], w_t.double().flatten(1)[None], dim=2)
    torch.testing.assert_close(eps_in**2 + eps_out**2, 2 - 2 * cos, rtol=0, atol=1e-12)
    if components == 27:
        assert eps_out.max() < 1e-12


def test_distances_by_hand():
    basis = PatchBasis(torch.zeros(3), torch.ones(3), torch.eye(3, dtype=torch.float64), 2)
    eps_in, eps_out = subspace_distance(torch.tensor([[2.0, 0, 0], [0, 0, 5.0]]), torch.tensor([[0, 3.0, 0]]), basis)
    torch.testing.assert_close(eps_in, torch.tensor([[2.0], [1.0]], dtype=torch.float64).sqrt())
    torch.testing.assert_close(eps_out, torch.tensor([[0.0], [1.0]], dtype=torch.float64))


def test_a_network_with_itself_whatever_the_norms():
    w = filters(5, 0)
    scale = torch.tensor([0.1, 1.0, 2.0, 30.0, 1e-6]).view(-1, 1, 1, 1)
    for e in subspace_distance(w * scale, w, BASIS):
        assert e.diagonal().max() < 1e-6  # float32 scaling rounds
        assert e[0, 1] > 0.1


def test_filters_of_norm_zero_are_invalid():
    w = filters(3, 0)
    w[1] = 0
    eps_in, eps_out = subspace_distance(w, filters(2, 1), BASIS)
    assert eps_in.isnan().tolist() == eps_out.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_bad_filters():
    with pytest.raises(InputError, match=r"w_student must be filters of 27 values .*, got shape \(2, 3, 5, 5\)"):
        subspace_distance(torch.ones(2, 3, 5, 5), filters(2, 0), BASIS)
    with pytest.raises(InputError, match="w_teacher must be finite"):
        subspace_distance(filters(2, 0), filters(2, 0) * torch.inf, BASIS)


def test_curves_by_hand():
    rho = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.8, 0.7]])
    eps_in = torch.tensor([[3.0, 9.0, 9.0], [9.0, 2.0, 1.0]])
    eps_out = torch.tensor([[0.1, 9.0, 9.0], [9.0, 0.2, torch.nan]])
    inside, outside = eps_curves(rho, eps_in, eps_out)
    assert inside.tolist() == [1, 2, 3]
    torch.testing.assert_close(outside, torch.tensor([0.1, 0.2]))  # sorted on its own, without the invalid pair
    inside, outside = eps_curves(rho, eps_in, eps_out, dead_teacher=torch.tensor([True, False, False]))
    assert inside.tolist() == [1, 2]
    with pytest.raises(InputError, match=r"eps_out must be \[n_s, n_t\] as rho \(2, 3\), got \(3, 2\)"):
        eps_curves(rho, eps_in, eps_out.mT)


def test_curves_of_a_permuted_copy_are_zero():
    w = filters(6, 0)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    rho = torch.eye(6)[order]
    inside, outside = eps_curves(rho, *subspace_distance(w[order], w, BASIS))
    assert inside.max() < 1e-12
    assert outside.max() < 1e-12
