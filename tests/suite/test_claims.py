"""Claims come out true or false by their numbers alone."""

import json
import math

import pytest

from tsrfast.suite.claims import compare, monotone

NAN = math.nan


@pytest.mark.parametrize(
    ("left", "relation", "right", "holds"),
    [
        (2, ">", 1, True), (1, ">", 1, False), (0, ">", 1, False),
        (1, "<", 2, True), (1, "<", 1, False), (2, "<", 1, False),
        (1, ">=", 1, True), (0.9, ">=", 1, False), (1, "<=", 1, True), (1.1, "<=", 1, False),
    ],
)  # fmt: skip
def test_compare(left, relation, right, holds):
    claim = compare("text", left, relation, right, source="Table 9", if_failed="why")
    assert claim == {
        "text": "text", "left": left, "relation": relation, "right": right, "holds": holds, "source": "Table 9", "strong": False,
        "analysis": None if holds else "why",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "increasing", "decreasing"),
    [
        ([1, 2, 3], True, False), ([3, 2, 1], False, True), ([1, 3, 2], False, False), ([1, 1, 2], False, False), ([2, 2], False, False),
        ([1, 2, 3, 2.9], False, False),
    ],
)  # fmt: skip
def test_monotone(values, increasing, decreasing):
    assert monotone("text", values, "increasing", source="s")["holds"] is increasing
    assert monotone("text", values, "decreasing", source="s")["holds"] is decreasing
    assert monotone("text", values, "increasing", source="s", strong=True)["strong"] is True


@pytest.mark.parametrize("relation", [">", "<", ">=", "<="])
def test_nothing_holds_of_nan_and_it_is_null_in_json(relation):
    for left, right in ((NAN, 1.0), (1.0, NAN), (NAN, NAN)):
        claim = compare("text", left, relation, right, source="s", if_failed="why")
        assert claim["holds"] is False
        assert claim["analysis"] == "why"
        json.dumps(claim, allow_nan=False)
    for values in ([1.0, NAN], [NAN, 1.0], [1.0, NAN, 3.0]):
        for direction in ("increasing", "decreasing"):
            claim = monotone("text", values, direction, source="s")
            assert (claim["holds"], claim["left"], claim["right"]) == (False, None, None)


def test_holds_is_a_plain_bool():
    """numpy's and torch's booleans are no JSON."""
    import numpy as np

    assert compare("text", np.float64(2), ">", np.float64(1), source="s")["holds"] is True
    assert monotone("text", [np.float32(1), np.float32(2)], "increasing", source="s")["holds"] is True


def test_unknown_relation():
    with pytest.raises(KeyError):
        compare("text", 1, "=", 1, source="s")
