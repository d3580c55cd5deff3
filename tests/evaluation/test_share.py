"""Score intervals against published ones."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsrfast.errors import InputError
from tsrfast.evaluation import Share


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (score, no continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(count, of, low, high):
    share = Share(count, of)
    assert share.low == pytest.approx(low, abs=5e-5)
    assert share.high == pytest.approx(high, abs=5e-5)
    assert share.value == count / of


def test_the_ends_in_closed_form():
    """None of n: from 0 to z^2 / (n + z^2)."""
    square = 1.959963984540054**2
    assert (Share(0, 50).low, Share(50, 50).high) == (0.0, 1.0)
    assert math.isclose(Share(0, 50).high, square / (50 + square), rel_tol=1e-12)
    assert math.isclose(Share(50, 50).low, 50 / (50 + square), rel_tol=1e-12)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_solve_the_score_equation(case):
    """(p_hat - p)^2 = z^2 p (1 - p) / n at both ends; mirrored for n - count."""
    count, n = case
    share, mirrored = Share(count, n), Share(n - count, n)
    for p in (share.low, share.high):
        assert 0 <= p <= 1
        assert math.isclose((count / n - p) ** 2, 1.959963984540054**2 * p * (1 - p) / n, rel_tol=1e-6, abs_tol=1e-12)
    assert share.low <= share.value <= share.high
    assert math.isclose(share.low, 1 - mirrored.high, abs_tol=1e-12)


@pytest.mark.parametrize(("count", "of"), [(1, 0), (0, 0), (-1, 3), (4, 3)])
def test_bad_counts(count, of):
    with pytest.raises(InputError, match=f"got {count} of {of}"):
        Share(count, of)
