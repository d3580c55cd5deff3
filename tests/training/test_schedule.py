from __future__ import annotations

import math

import pytest

from tsrfast.errors import InputError
from tsrfast.training import Constant, Cosine, Piecewise, parse_schedule


def test_constant() -> None:
    assert [Constant(0.3)(step, 4, 40) for step in (0, 17, 39)] == [0.3] * 3


def test_cosine_runs_from_the_rate_to_zero() -> None:
    schedule = Cosine(0.1)
    assert schedule(0, 10, 100) == pytest.approx(0.1)
    assert schedule(50, 10, 100) == pytest.approx(0.05)
    assert schedule(25, 10, 100) == pytest.approx(0.1 * (2 + math.sqrt(2)) / 4)
    assert 0 < schedule(99, 10, 100) < 0.1 * 1e-3
    rates = [schedule(step, 10, 100) for step in range(100)]
    assert rates == sorted(rates, reverse=True)


def test_piecewise_changes_at_the_first_step_of_an_epoch() -> None:
    schedule = Piecewise({30: 0.01, 0: 0.001, 5: 0.002, 10: 0.005})
    wanted = {0: 0.001, 4: 0.001, 5: 0.002, 9: 0.002, 10: 0.005, 29: 0.005, 30: 0.01, 299: 0.01}
    for epoch, rate in wanted.items():
        assert schedule(epoch * 7, 7, 2100) == schedule(epoch * 7 + 6, 7, 2100) == rate


def test_parse() -> None:
    assert parse_schedule("constant:0.01") == Constant(0.01)
    assert parse_schedule("cosine: 1e-1") == Cosine(0.1)
    authors = Piecewise({0: 0.001, 5: 0.002, 10: 0.005, 30: 0.01})
    assert parse_schedule("piecewise:0=0.001,5=0.002,10=0.005,30=0.01") == authors
    assert parse_schedule("piecewise: 30=0.01, 10=0.005, 5=0.002, 0=0.001") == authors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin:0.1", "unknown learning-rate schedule 'cosin'; did you mean 'cosine'"),
        ("", "unknown learning-rate schedule"),
        ("0.1", "unknown learning-rate schedule '0.1'"),
        ("constant", "rate must be a number, got ''"),
        ("constant:fast", "rate must be a number, got 'fast'"),
        ("cosine:-1", "lr must be a positive number, got -1.0"),
        ("constant:0", "lr must be a positive number"),
        ("constant:nan", "lr must be a positive number"),
        ("constant:inf", "lr must be a positive number"),
        ("piecewise:", "must list epoch=rate pairs"),
        ("piecewise:0.1", "must list epoch=rate pairs"),
        ("piecewise:0=0.1,-3=0.2", "must list epoch=rate pairs.*got '-3=0.2'"),
        ("piecewise:0=0.1,1.5=0.2", "must list epoch=rate pairs"),
        ("piecewise:0=0.1,5=x", "rate must be a number, got 'x'"),
        ("piecewise:0=0.1,5=0.2,5=0.3", "each epoch once, got 5 twice"),
        ("piecewise:5=0.1", "must have a rate for epoch 0"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_schedule(text)


def test_bad_points() -> None:
    for points in ({}, {0: -1.0}, {0.5: 1.0, 0: 1.0}, {-1: 1.0, 0: 1.0}):
        with pytest.raises(InputError):
            Piecewise(points)
    for rate in ("0.1", True, None):
        with pytest.raises(InputError, match="lr must be"):
            Constant(rate)
