"""Figure 8: sorted best normalized correlation, standard training on logits against labels, over epochs."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare, monotone
from tsrfast.suite.experiments._common import ST, ST_LABEL, UNTRAINED, size_note, training_settings
from tsrfast.suite.experiments._specialization import bnc_panels
from tsrfast.suite.lab import Lab

SOURCE = "section 5.5, Fig. 8"


def layer_claims(layer: int, logit: list[float], label: list[float]) -> list[dict[str, Any]]:
    """What the paper says of a layer, by the MBNC at 50 to 300 epochs."""
    short = (
        "Size: a few hundred updates lie between checkpoints, and MBNC goes up and down by about as much as it rises. More epochs, or means over "
        "seeds, would decide."
    )
    gap = [a - b for a, b in zip(logit, label, strict=True)]
    return [
        compare(f"layer {layer}: MBNC of ST-logit is above that of ST-label at every epoch (smallest gap)", min(gap), ">", 0.0, source=SOURCE,
                if_failed=short),
        monotone(f"layer {layer}: MBNC of ST-logit rises with epochs", logit, "increasing", source=SOURCE, if_failed=short),
        monotone(f"layer {layer}: MBNC of ST-label rises with epochs", label, "increasing", source=SOURCE, if_failed=short),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Four panels, one a conv layer; logit solid, label dashed, light to dark with epochs."""
    curves, cells, scores = bnc_panels(lab, (UNTRAINED, *ST, *ST_LABEL))
    claims = []
    for layer in range(len(scores[ST[0]])):
        claims += layer_claims(layer, [scores[s][layer] for s in ST], [scores[s][layer] for s in ST_LABEL])
    return {
        "title": "Figure 8: logits specialize neurons more than labels do",
        "summary": "For each node of the oracle, the largest normalized correlation with any student node of the same layer (BNC), sorted, after "
        "standard training on the oracle's logits and on its labels alone.",
        "cells": cells,
        "curves": curves,
        "claims": claims,
        "settings": {**training_settings(lab), "images for correlation": lab.preset.correlation_images},
        "notes": [size_note(lab), "Labels are the oracle's on clean images, not the data set's."],
    }
