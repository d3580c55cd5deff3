"""The same experiments with several seeds, hence several trainings, as one set of results: means, spreads, and each seed's verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from tsrfast.errors import InputError
from tsrfast.suite.claims import holds

SHARED = ("schema", "preset", "data", "device", "settings")
"""What results must have in common to be joined: all that is not random."""


def checked_seeds(seed: int | Sequence[int]) -> list[int]:
    """One seed or several as a list.

    Raises:
        InputError: none, a negative one, or one twice.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seed: must be 0 or more, each once, got {', '.join(map(str, seeds)) or 'none'}")
    return seeds


def over_seeds(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join results of several seeds, each as `load_results` returns them.

    Cells: the mean over seeds, its spread (root of the population variance) over seeds, and the sum of n. Curves: the mean of y, or all
    points together where x is measured too. Claims: judged on the means of what they compare, each seed's verdict beside it.

    Args:
        results: one for each seed; at least one. One alone is returned as it is.

    Returns:
        Results in the same form, with the list of seeds as ``seed`` and ``seeds`` in each claim.

    Raises:
        InputError: none, a seed twice, results of several seeds already, or results that differ in more than their seed.
    """
    if not results:
        raise InputError("tsrfast.suite.over_seeds: results must be at least one, got none")
    first = results[0]
    if len(results) == 1:
        return first
    seeds = [r["seed"] for r in results]
    if any(isinstance(seed, list) for seed in seeds):
        raise InputError(f"tsrfast.suite.over_seeds: results must be of one seed each, got seeds {seeds}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"tsrfast.suite.over_seeds: results must be of different seeds, got {seeds}")
    for other in results[1:]:
        for key in SHARED:
            if other[key] != first[key]:
                raise InputError(
                    f"tsrfast.suite.over_seeds: results must differ in their seed alone, but {key} of seed {other['seed']} is not "
                    f"that of seed {first['seed']}"
                )
        if list(other["experiments"]) != list(first["experiments"]):
            raise InputError(
                f"tsrfast.suite.over_seeds: results must have the same experiments, got {', '.join(first['experiments'])} with seed "
                f"{first['seed']}, {', '.join(other['experiments'])} with seed {other['seed']}"
            )
    experiments = {
        name: _experiment(dict(zip(seeds, (r["experiments"][name] for r in results), strict=True)))
        for name in first["experiments"]
    }
    return {**first, "seed": seeds, "experiments": experiments}


Parts = dict[int, dict[str, Any]]
"""One and the same thing as each seed has it."""


def _experiment(by_seed: Parts) -> dict[str, Any]:
    first = next(iter(by_seed.values()))
    own = [f"Seed {seed}: {note}" for seed, e in by_seed.items() for note in e["notes"] if not _everywhere(note, by_seed)]
    return {
        **first,
        "cells": [_cell(parts) for parts in _matched(by_seed, "cells", _place)],
        "curves": [curve for parts in _matched(by_seed, "curves", _name) for curve in _curves(parts)],
        "claims": [_claim(parts) for parts in _matched(by_seed, "claims", lambda c: c["text"])],
        "settings": _settings([e["settings"] for e in by_seed.values()]),
        "notes": [
            f"Means over seeds {', '.join(map(str, by_seed))}: each has an oracle, students and random starts of its own. ± is the spread "
            "over seeds. Claims are judged on the means of the numbers that they compare; each seed's own verdict stands beside.",
            *(note for note in first["notes"] if _everywhere(note, by_seed)),
            *own,
        ],
    }


def _everywhere(note: str, by_seed: Parts) -> bool:
    return all(note in e["notes"] for e in by_seed.values())


def _place(cell: dict[str, Any]) -> Hashable:
    return cell.get("group", "main"), cell["row"], cell["column"]


def _name(curve: dict[str, Any]) -> Hashable:
    return curve["panel"], curve["name"]


def _matched(by_seed: Parts, what: str, key: Callable[[dict[str, Any]], Hashable]) -> Iterable[Parts]:
    """The same item of every seed that has it, in order of first appearance. An item that occurs twice is matched in its order."""
    found: dict[Hashable, Parts] = {}
    for seed, e in by_seed.items():
        seen: dict[Hashable, int] = {}
        for item in e[what]:
            nth = seen[key(item)] = seen.get(key(item), -1) + 1
            found.setdefault((key(item), nth), {})[seed] = item
    return found.values()


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _cell(parts: Parts) -> dict[str, Any]:
    first = next(iter(parts.values()))
    values = [c["measured"] for c in parts.values() if c["measured"] is not None]
    sizes = [c["n"] for c in parts.values() if c["measured"] is not None and c["n"] is not None]
    mean = _mean(values) if values else None
    joined = {
        **first,
        "measured": mean,
        "std": None if mean is None else math.sqrt(_mean([(v - mean) ** 2 for v in values])),
        "n": sum(sizes) if sizes else None,
    }
    without = [str(seed) for seed, c in parts.items() if c["measured"] is None]
    if values and without:
        note = f"not defined with seed {', '.join(without)}"
        joined["note"] = f"{first['note']}; {note}" if first.get("note") else note
    return joined


def _curves(parts: Parts) -> list[dict[str, Any]]:
    """One curve; several where x is the same quantity at other places, so that means would be of unlike things."""
    curves = list(parts.values())
    first = curves[0]
    if first.get("kind") == "scatter":
        points = {axis: [v for c in curves for v in c[axis]] for axis in ("x", "y")}
        return [{**_without_words(first, curves), **points}]
    if all(c["x"] == first["x"] for c in curves):
        y = [None if any(v is None for v in at) else _mean(at) for at in zip(*(c["y"] for c in curves), strict=True)]
        return [{**_without_words(first, curves), "y": y}]
    return [{**c, "name": f"{c['name']}, seed {seed}"} for seed, c in parts.items()]


def _without_words(first: dict[str, Any], curves: list[dict[str, Any]]) -> dict[str, Any]:
    """`first` without annotation and marks that are not the same with every seed: they speak of one training's numbers."""
    same = {key for key in ("annotation", "marks") if all(c.get(key) == first.get(key) for c in curves)}
    return {k: v for k, v in first.items() if k not in ("annotation", "marks") or k in same}


def _claim(parts: Parts) -> dict[str, Any]:
    first = next(iter(parts.values()))
    run = {seed: c for seed, c in parts.items() if c["holds"] is not None}
    left, right = (_side([c[side] for c in run.values()]) for side in ("left", "right"))
    verdict = holds(left, first["relation"], right) if run else None
    analyses = [c["analysis"] for c in run.values() if c.get("analysis")]
    return {
        **first,
        "left": left,
        "right": right,
        "holds": verdict,
        "analysis": analyses[0] if analyses and not verdict else None,
        "seeds": [{"seed": s, **{k: c[k] for k in ("left", "right", "holds")}} for s, c in parts.items()],
    }


def _side(values: list[Any]) -> Any:
    """The mean of one side of a claim: of numbers, of lists place by place; None where a seed has none."""
    if not values or any(v is None for v in values):
        return None
    if isinstance(values[0], list):
        return [_mean(at) for at in zip(*values, strict=True)]
    return _mean(values)


def _settings(given: list[Any]) -> Any:
    """Settings as they are where all seeds have the same; the list of all seeds' values where not."""
    if all(s == given[0] for s in given):
        return given[0]
    if all(isinstance(s, dict) and s.keys() == given[0].keys() for s in given):
        return {key: _settings([s[key] for s in given]) for key in given[0]}
    return given
