"""`evaluation.json`, schema 1: everything that came out, and what it came from; no times, no paths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import tsrfast
from tsrfast._identity import describe, tensor_hash, weights_hash
from tsrfast.attacks import Attack, Square, Threat
from tsrfast.attacks.cascade import CascadeResult, device_of
from tsrfast.evaluation.images import Images
from tsrfast.evaluation.masking import Finding
from tsrfast.evaluation.share import Share

SCHEMA = 1
_BLIND = 0.002  # share of the images; AutoAttack's own limit


def make_record(
    model: nn.Module,
    images: Images,
    attacks: Mapping[str, Attack],
    result: CascadeResult,
    *,
    individually: bool,
    name: str | None,
    findings: tuple[Finding, ...] | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The document. Its numbers are those of `result`, counted once more from its masks."""
    n = len(images.x)
    standing = result.clean.clone()
    entries = []
    for stage, attack in zip(result.stages, attacks.values(), strict=True):
        standing &= ~stage.success
        after = result.clean & ~stage.success if individually else standing
        threat = attack._terms().threat
        moved = stage.distance[stage.success]
        entries.append(
            {
                "name": stage.name,
                "attack": type(attack).__name__,
                "threat": _threat(threat),
                "attacked": stage.attacked,
                "fallen": stage.fallen,
                "robust": Share(int(after.sum()), n).record(),
                "median_distance": float(moved.median()) if len(moved) else None,
                "queries": stage.queries,
                "refuted": stage.refuted,
                "bad_gradients": stage.bad_gradients,
                "path": stage.path,
                "settings": _finite(describe(attack)["fields"]),
            }
        )
    common = common_threat(attacks)
    return {
        "schema": SCHEMA,
        "tsrfast": tsrfast.__version__,
        "model": {
            "name": name,
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "sha256": weights_hash(model),
        },
        "data": {
            "name": images.name,
            "images": n,
            "shape": list(images.x.shape[1:]),
            "sha256": {"images": tensor_hash(images.x), "labels": tensor_hash(images.y)},
        },
        "device": device_of(model, images.x).type,
        "threat": None if common is None else _threat(common),
        "individually": individually,
        "clean": Share(int(result.clean.sum()), n).record(),
        "robust": Share(int(result.robust.sum()), n).record(),
        "attacks": entries,
        "masking": None if findings is None else [_finite(_fields(f)) for f in findings],
        "notes": [*notes, *_notes(attacks, result, common, individually)],
    }


def common_threat(attacks: Mapping[str, Attack]) -> Threat | None:
    """What all attacks may do, if that is the same."""
    threats = [attack._terms().threat for attack in attacks.values()]
    first = threats[0]
    if any(isinstance(t.eps, Tensor) for t in threats):
        return None
    same = all((t.norm, t.eps, t.lo, t.hi) == (first.norm, first.eps, first.lo, first.hi) for t in threats)
    return first if same else None


def _threat(threat: Threat) -> dict[str, Any]:
    """`eps`: a number; the least and the most where images have their own; null where any distance is allowed."""
    if isinstance(threat.eps, Tensor):
        eps: Any = [float(threat.eps.min()), float(threat.eps.max())] if threat.eps.ndim else float(threat.eps)
    else:
        eps = float(threat.eps) if math.isfinite(threat.eps) else None
    return {"norm": threat.norm, "eps": eps}


def _notes(attacks: Mapping[str, Attack], result: CascadeResult, threat: Threat | None, individually: bool) -> list[str]:
    notes = []
    if not individually and len(result.stages) > 1:
        notes.append("Each attack was given only what stood after those before it: the order matters for all but the last row.")
    if threat is None:
        notes.append(
            "The attacks have different threats (norm, radius or box): the worst case is over the union of what they may do."
        )
    for position, stage in enumerate(result.stages):
        own = attacks[stage.name]._terms().threat
        if not isinstance(own.eps, Tensor) and math.isinf(own.eps):
            notes.append(
                f"{stage.name}: it looks for the nearest wrong image and has no radius: an image has fallen where it found one at any "
                "distance, so that accuracy and worst case say little; the median distance does."
            )
        blind = isinstance(attacks[stage.name], Square) and not individually
        if blind and position and stage.fallen > _BLIND * len(result.clean):
            notes.append(
                f"{stage.name}: {stage.fallen} images that no attack before it could fell. It does not use gradients: those of the "
                "model mislead, and the robust accuracy is probably too high."
            )
        if stage.refuted:
            notes.append(
                f"{stage.name}: {stage.refuted} images that the attack says are adversarial are not (the model is right on them, or "
                "they lie outside of the ball or the box); they count as standing."
            )
        if stage.bad_gradients:
            notes.append(f"{stage.name}: {stage.bad_gradients} gradient entries were NaN: the model is broken there.")
    return notes


def _fields(finding: Finding) -> dict[str, Any]:
    return {name: getattr(finding, name) for name in ("check", "text", "reason", "source", "numbers")}


def _finite(value: Any) -> Any:
    """JSON has no infinities: as text."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
