from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast.errors import InputError
from tsrfast.specialization import (
    NormalizedCorrelation,
    bnc,
    mbnc,
    pearson,
    sorted_bnc,
    specialization_frequency,
    specialized_counts,
)

# Student 3 is dead, teacher 2 is dead.
RHO = [
    [0.95, -0.30, 0.0],
    [0.91, 0.90, 0.0],
    [0.10, -0.99, 0.0],
    [0.00, 0.00, 0.0],
    [0.20, 0.85, 0.0],
]
LAYER = NormalizedCorrelation(
    torch.tensor(RHO, dtype=torch.float64),
    torch.tensor([False, False, False, True, False]),
    torch.tensor([False, False, True]),
    1000,
)


def test_best_correlations_by_hand():
    assert bnc(LAYER).tolist() == [0.95, 0.90]  # signed, and without the dead teacher node
    assert mbnc(LAYER) == pytest.approx(0.925)
    assert sorted_bnc(LAYER).tolist() == [0.90, 0.95]


def test_counts_by_hand():
    assert specialized_counts(LAYER) == (2, 2, 1)  # best: .95 .91 | .10 .00 | .85
    assert specialized_counts(LAYER).ratio == 1
    assert specialized_counts(LAYER, side="teacher") == (1, 0, 1)  # 0.90 is not above 0.9
    assert specialized_counts(LAYER, low=0.85, high=0.95) == (0, 2, 3)  # strict on both sides
    assert specialized_counts(LAYER, low=0.85, high=0.95).ratio == math.inf
    assert specialization_frequency(LAYER).tolist() == [2, 0, 0]
    assert specialization_frequency(LAYER, threshold=0.8).tolist() == [2, 2, 0]


def test_all_teacher_nodes_dead():
    layer = NormalizedCorrelation(
        torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool), 5
    )
    assert len(bnc(layer)) == 0
    assert math.isnan(mbnc(layer))
    assert specialized_counts(layer) == (0, 2, 0)
    assert specialized_counts(layer, side="teacher") == (0, 0, 0)
    assert math.isnan(specialized_counts(layer, side="teacher").ratio)


def test_bad_thresholds():
    with pytest.raises(InputError, match=r"low must be at most high, got low=0.9, high=0.8"):
        specialized_counts(LAYER, low=0.9, high=0.8)
    with pytest.raises(InputError, match="side must be 'student' or 'teacher', got 'oracle'"):
        specialized_counts(LAYER, side="oracle")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 200),
    slope=st.floats(-2, 2),
    offset=st.sampled_from([0.0, 1e6]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_pearson_is_numpys(n, slope, offset, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    y = scale * (slope * x + torch.randn(n, generator=g, dtype=torch.float64)) + offset * scale
    r, count, p = pearson(x, y)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert count == n
    assert 0 <= p <= 1


# scipy.stats.pearsonr's p is P(|T| > t); here from closed forms of Student's t with 1, 2 and 4 degrees of freedom.
@pytest.mark.parametrize("r", [-0.999, -0.7, -0.2, 0.0, 1e-4, 0.3, 0.6, 0.9, 0.9999])
def test_p_value_against_closed_forms(r):
    def p_of(n: int) -> float:
        u = torch.zeros(n, dtype=torch.float64)
        v = torch.zeros(n, dtype=torch.float64)
        u[0], u[1] = 1, -1
        w = torch.arange(n, dtype=torch.float64) % 3
        w = w - w.mean()
        w = w - u * (w @ u) / 2
        v = r * u / u.norm() + math.sqrt(1 - r * r) * w / w.norm()
        got = pearson(u, v)
        assert got.r == pytest.approx(r, abs=1e-12)
        return got.p_value

    t = abs(r) / math.sqrt(1 - r * r)  # times sqrt(degrees)
    assert p_of(3) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
    assert p_of(4) == pytest.approx(1 - abs(r), rel=1e-9)
    s = t * 2 / math.sqrt(4 + 4 * t * t)
    assert p_of(6) == pytest.approx(1 - s * (1.5 - s * s / 2), rel=1e-7)


def test_p_value_of_many_pairs():
    """With 2250 pairs t is normal to three digits."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 45, generator=g, dtype=torch.float64)
    y = 0.05 * x + torch.randn(50, 45, generator=g, dtype=torch.float64)
    r, n, p = pearson(x, y)
    t = abs(r) * math.sqrt((n - 2) / (1 - r * r))
    assert p == pytest.approx(math.erfc(t / math.sqrt(2)), rel=0.05)
    assert pearson(x, x + 0.01 * y).p_value < 1e-300


def test_pearson_leaves_out_invalid_pairs():
    x, y = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([1.0, 2.0, 3.0, torch.nan])
    r, n, p = pearson(x, y)
    assert (r, n) == (pytest.approx(1.0), 2)
    assert math.isnan(p)
    assert math.isnan(pearson(torch.ones(5), torch.arange(5.0)).r)
    assert math.isnan(pearson(torch.full((5,), 0.1), torch.arange(5.0)).r)
    assert pearson(torch.zeros(0), torch.zeros(0)).n == 0
    with pytest.raises(InputError, match=r"y must have x's shape \(4,\), got \(3,\)"):
        pearson(x, y[:3])
    with pytest.raises(InputError, match="finite or NaN"):
        pearson(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0]))
