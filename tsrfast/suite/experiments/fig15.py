"""Figure 15: sorted best normalized correlation of each layer after robust-feature training."""

from __future__ import annotations

from typing import Any

from tsrfast.suite.claims import compare
from tsrfast.suite.experiments._common import AT150, RFT150, ST150, ST300, size_note, training_settings
from tsrfast.suite.experiments._specialization import bnc_panels
from tsrfast.suite.lab import Lab

SOURCE = "appendix A.11, Fig. 15"


def layer_claims(layer: int, rft: float, st150: float, st300: float, at: float) -> list[dict[str, Any]]:
    """What the paper says of a layer, by the MBNC of the four."""
    images = (
        "Size: the robust-feature images come from few steps and from an AT student that is hardly robust yet, so they teach less than the "
        "images themselves (table 5 says how close they come). More steps and epochs would decide."
    )
    return [
        compare(f"layer {layer}: MBNC of AT(150) is above all others", at, ">", max(rft, st150, st300), source=SOURCE,
                if_failed="Size: after so few updates AT has hardly begun to specialize, and ST(300) has had twice as many. More epochs would "
                "decide."),
        compare(f"layer {layer}: MBNC of RFT(150) is above that of ST(150)", rft, ">", st150, source=SOURCE, if_failed=images),
        compare(f"layer {layer}: MBNC of RFT(150) is closer to ST(300) than to ST(150)", abs(rft - st300), "<", abs(rft - st150),
                source=SOURCE + ' ("close")', if_failed=images + " Where ST(150) and ST(300) differ little, this says little."),
    ]  # fmt: skip


def run(lab: Lab) -> dict[str, Any]:
    """Four panels, one a conv layer."""
    students = (RFT150, ST150, ST300, AT150)
    curves, cells, scores = bnc_panels(lab, students)
    claims = [c for layer, values in enumerate(zip(*scores.values(), strict=True)) for c in layer_claims(layer, *values)]
    return {
        "title": "Figure 15: specialization after training on robust features",
        "summary": "RFT(150) goes on from ST(150) on images that an adversarially trained student cannot tell from the data's. For each node of the "
        "oracle, the largest normalized correlation with any student node of the same layer (BNC), sorted. The paper finds AT best, and RFT "
        "close to ST(300) and above ST(150).",
        "cells": cells,
        "curves": curves,
        "claims": claims,
        "settings": {**training_settings(lab), "images for correlation": lab.preset.correlation_images},
        "notes": [size_note(lab), "How RFT is read: see Table 5."],
    }
