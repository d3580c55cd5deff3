"""Which student nodes have become copies of which teacher nodes (Yang et al., AISTATS 2021, sections 3 and 5).

`correlation` measures it on activations (normalised correlation), `scores` sums it up (BNC, MBNC, counts), `subspace`
splits the distance of first-layer filters into the part that natural images see and the rest.
"""

from tsrfast.specialization.correlation import ChannelCorrelation, NormalizedCorrelation, correlate
from tsrfast.specialization.scores import (
    Pearson,
    SpecializedCounts,
    bnc,
    mbnc,
    pearson,
    sorted_bnc,
    spearman,
    specialization_frequency,
    specialized_counts,
)
from tsrfast.specialization.subspace import PatchBasis, distance_to_patches, eps_curves, patch_basis, subspace_distance

__all__ = [
    "ChannelCorrelation",
    "NormalizedCorrelation",
    "PatchBasis",
    "Pearson",
    "SpecializedCounts",
    "bnc",
    "correlate",
    "distance_to_patches",
    "eps_curves",
    "mbnc",
    "patch_basis",
    "pearson",
    "sorted_bnc",
    "spearman",
    "specialization_frequency",
    "specialized_counts",
    "subspace_distance",
]
