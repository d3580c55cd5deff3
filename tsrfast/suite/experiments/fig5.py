"""Figure 5: figures 3 and 4 again for networks of five conv layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from tsrfast.suite.experiments._common import AT, ST300, UNTRAINED, size_note, training_settings
from tsrfast.suite.experiments._specialization import bnc_panels, eps_panels
from tsrfast.suite.experiments.fig3 import layer_claims
from tsrfast.suite.experiments.fig4 import distance_claims
from tsrfast.suite.lab import NETS, Lab

AT5 = tuple(dataclasses.replace(s, nets=NETS[1]) for s in AT)
ST5, UNTRAINED5 = (dataclasses.replace(s, nets=NETS[1]) for s in (ST300, UNTRAINED))
LAYERS = (0, 2, 4)
SOURCE = "section 5.4, Fig. 5"


def run(lab: Lab) -> dict[str, Any]:
    """Left: sorted BNC of layers 0, 2 and 4. Right: sorted eps_in and eps_out of the first layer."""
    curves, cells, scores = bnc_panels(lab, (UNTRAINED5, *AT5, ST5), LAYERS)
    claims = []
    for i, layer in enumerate(LAYERS):
        claims += layer_claims(layer, [scores[s][i] for s in AT5], scores[ST5][i], SOURCE)
    distances, means_of, means = eps_panels(lab, (UNTRAINED5, *AT5, ST5))
    return {
        "title": "Figure 5: five layers show what four do",
        "summary": "Specialization and distance of filters for an oracle and students with one more conv layer: adversarial training against "
        "standard training on logits.",
        "cells": cells + means_of,
        "curves": curves + distances,
        "claims": claims + distance_claims(means, AT5, ST5, UNTRAINED5, SOURCE),
        "settings": {
            **training_settings(lab, UNTRAINED5),
            "images for correlation": lab.preset.correlation_images,
            "components": lab.basis.components,
        },
        "notes": [
            size_note(lab),
            "The paper adds one more conv layer of 64 channels and says no more. It is put before the last one here and pruned like the one before "
            "it; the student is 1.1 times as wide as the result. The oracle is another network, trained in the same way.",
        ],
    }
