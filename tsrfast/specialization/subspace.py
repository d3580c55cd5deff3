"""The subspace that natural image patches live in, and filters' distances inside and outside of it.

Yang et al., AISTATS 2021, section 5 (figure 2): a first-layer filter sees only patches; what two filters differ in outside
of the patches' leading principal components is invisible on natural images, but not to an adversary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge

_PATCHES = 1 << 17  # at a time: 28 MB of float64 for 3x3x3


@dataclass(frozen=True, eq=False)
class PatchBasis:
    """Principal components of image patches of D = channels * kernel * kernel values in (channel, row, column) order.

    Attributes (float64, on the CPU):
        mean: [D] mean patch.
        eigenvalues: [D] of the (population) covariance, descending.
        vectors: [D, D], column i belongs to eigenvalue i; its entry of largest magnitude is positive.
        components: how many leading ones count as "inside".
    """

    mean: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    components: int

    @property
    def basis(self) -> Tensor:
        """The leading vectors, [D, components]."""
        return self.vectors[:, : self.components]


def patch_basis(images: Tensor, kernel: int = 3, components: int = 17) -> PatchBasis:
    """Centred PCA of all valid patches of `images`, in float64.

    Args:
        images: ``[N, C, H, W]``, float pixels in [0, 1] or uint8 (divided by 255).
        kernel: side of the patches.
        components: leading components to call the subspace of natural patches (17 of 27 in the paper).

    Raises:
        InputError: no images, a kernel larger than them, `components` outside 1..D, pixels that are not finite.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise InputError(f"tsrfast.patch_basis: images must be non-empty [N, C, H, W], got shape {tuple(images.shape)}")
    _, channels, height, width = images.shape
    if not 1 <= kernel <= min(height, width):
        raise InputError(f"tsrfast.patch_basis: kernel must be in 1..{min(height, width)}, got {kernel}")
    size = channels * kernel * kernel
    if not 1 <= components <= size:
        raise InputError(f"tsrfast.patch_basis: components must be in 1..{size}, got {components}")
    state: CorrelationState | None = None
    for batch in images.split(max(1, _PATCHES // ((height - kernel + 1) * (width - kernel + 1)))):
        x = batch.to(torch.float64) / (255 if batch.dtype == torch.uint8 else 1)
        patches = F.unfold(x, kernel).unsqueeze(3)
        moments = channel_correlation(patches, patches)
        state = moments if state is None else merge(state, moments)
    assert state is not None
    covariance = (state.cross / state.n).cpu()
    if not covariance.isfinite().all():
        raise InputError("tsrfast.patch_basis: images must have finite pixels, got NaN or inf")
    eigenvalues, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return PatchBasis(state.mean_student.cpu(), eigenvalues.flip(0), vectors * largest.sign(), components)


def distance_to_patches(images: Tensor, basis: PatchBasis) -> Tensor:
    """How far images are from the subspace that patches of natural images live in.

    The root of the sum over all valid patches p of |(I - U U^T) (p - mean)|^2, with U the leading vectors of `basis`.

    Args:
        images: ``[N, C, H, W]``, float; computed in their dtype and on their device.
        basis: of patches of the same pixels.

    Returns:
        ``[N]``, of the images' dtype.

    Raises:
        InputError: images whose patches have another number of values than the basis.
    """
    if images.ndim != 4 or not images.is_floating_point():
        given = f"{images.dtype} {tuple(images.shape)}"
        raise InputError(f"tsrfast.distance_to_patches: images must be float [N, C, H, W], got {given}")
    channels = images.shape[1]
    kernel = math.isqrt(len(basis.mean) // channels) if channels else 0
    if channels * kernel**2 != len(basis.mean) or min(images.shape[2:]) < kernel:
        raise InputError(
            f"tsrfast.distance_to_patches: images must have patches of {len(basis.mean)} values as the basis has, "
            f"got shape {tuple(images.shape)}"
        )
    outside = basis.vectors[:, basis.components :]
    if outside.shape[1] == 0:
        return images.new_zeros(len(images))
    filters = outside.mT.reshape(-1, channels, kernel, kernel).to(images)
    return F.conv2d(images, filters, -(outside.mT @ basis.mean).to(images)).flatten(1).norm(dim=1)


def subspace_distance(w_student: Tensor, w_teacher: Tensor, basis: PatchBasis) -> tuple[Tensor, Tensor]:
    """Distance of normalised first-layer filters, inside and outside the patches' subspace (figure 2 of the paper).

    With U the basis and d = w_k / |w_k| - w*_j / |w*_j|: eps_in = |U U^T d|, eps_out = |d - U U^T d|, so that
    eps_in^2 + eps_out^2 = 2 - 2 cos(w_k, w*_j).

    Args:
        w_student: filters ``[n_s, C, k, k]`` or ``[n_s, D]``, without bias.
        w_teacher: ``[n_t, C, k, k]`` or ``[n_t, D]``.
        basis: of patches of the pixels that both sets of filters act on.

    Returns:
        (eps_in, eps_out): float64 ``[n_s, n_t]`` on the CPU, in [0, 2]; NaN for pairs with a filter of norm 0.

    Raises:
        InputError: filters whose size is not the patches', or that are not finite.
    """
    rows = []
    for name, w in (("w_student", w_student), ("w_teacher", w_teacher)):
        if w.ndim < 2 or w[:1].numel() != len(basis.mean) * min(1, len(w)):
            raise InputError(
                f"tsrfast.subspace_distance: {name} must be filters of {len(basis.mean)} values as the patches have, "
                f"got shape {tuple(w.shape)}"
            )
        flat = w.detach().to("cpu", torch.float64).flatten(1)
        if not flat.isfinite().all():
            raise InputError(f"tsrfast.subspace_distance: {name} must be finite, got NaN or inf")
        rows.append(flat / flat.norm(dim=1, keepdim=True))  # 0 / 0 = NaN marks a filter of norm 0
    d = rows[0][:, None] - rows[1]
    inside = d @ basis.basis
    outside = d - inside @ basis.basis.mT
    return inside.norm(dim=2), outside.norm(dim=2)


def eps_curves(rho: Tensor, eps_in: Tensor, eps_out: Tensor, dead_teacher: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distances of every teacher filter to its most correlated student filter, as two sorted curves.

    Args:
        rho: ``[n_s, n_t]`` first-layer correlations; k(j) = argmax_k rho_kj.
        eps_in, eps_out: ``[n_s, n_t]`` from `subspace_distance`.
        dead_teacher: bool ``[n_t]``: teacher nodes to leave out.

    Returns:
        (inside, outside): float64, eps_in[k(j), j] and eps_out[k(j), j], each ascending on its own, without invalid
        (NaN) pairs.

    Raises:
        InputError: shapes differ.
    """
    for name, e in (("eps_in", eps_in), ("eps_out", eps_out)):
        if e.shape != rho.shape or rho.ndim != 2:
            raise InputError(f"tsrfast.eps_curves: {name} must be [n_s, n_t] as rho {tuple(rho.shape)}, got {tuple(e.shape)}")
    best = rho.argmax(0, keepdim=True)
    curves = []
    for e in (eps_in, eps_out):
        chosen = e.gather(0, best)[0]
        keep = ~chosen.isnan() if dead_teacher is None else ~chosen.isnan() & ~dead_teacher
        curves.append(chosen[keep].sort().values)
    return curves[0], curves[1]
