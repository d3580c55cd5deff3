"""Which student nodes have become copies of which teacher nodes (Yang et al., AISTATS 2021, sections 3 and 5).

`correlation` measures it on activations (normalised correlation), `scores` sums it up (BNC, MBNC, counts), `subspace`
splits the distance of first-layer filters into the part that natural images see and the rest, `gradient_rule` gives the matrices
by which the gradient couples nodes.
"""

from tsrfast.specialization.correlation import ChannelCorrelation, NormalizedCorrelation, correlate
from tsrfast.specialization.gradient_rule import GradientMatrices, GradientRule, gradient_rows, hidden_layers
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
    "GradientMatrices",
    "GradientRule",
    "NormalizedCorrelation",
    "PatchBasis",
    "Pearson",
    "SpecializedCounts",
    "bnc",
    "correlate",
    "distance_to_patches",
    "eps_curves",
    "gradient_rows",
    "hidden_layers",
    "mbnc",
    "patch_basis",
    "pearson",
    "sorted_bnc",
    "spearman",
    "specialization_frequency",
    "specialized_counts",
    "subspace_distance",
]
