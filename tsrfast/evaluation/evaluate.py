"""Clean and robust accuracy of a network under several attacks, on disk as it goes."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsrfast._files import atomic_write, lock, remove_leftovers
from tsrfast._machine import describe_machine
from tsrfast.attacks import Attack, AutoAttack
from tsrfast.attacks.autoattack import suited
from tsrfast.attacks.cascade import CascadeResult, Progress, device_of, run_cascade
from tsrfast.attacks.threat import check_count
from tsrfast.errors import InputError
from tsrfast.evaluation.images import Images, gather
from tsrfast.evaluation.masking import Finding, GradientMaskingWarning, check_gradient_masking
from tsrfast.evaluation.record import common_threat, make_record
from tsrfast.evaluation.report import render
from tsrfast.evaluation.share import Share


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out.

    Attributes:
        record: what `evaluation.json` holds: JSON values, the same for the same model, data and attacks.
        result: images and outcome of each; what belongs to no JSON file.
        findings: signs of gradient masking; None where nothing was looked for.
    """

    record: dict[str, Any]
    result: CascadeResult
    findings: tuple[Finding, ...] | None

    @property
    def clean(self) -> Share:
        """Right on the images as they are."""
        return Share(self.record["clean"]["count"], self.record["clean"]["of"])

    @property
    def robust(self) -> Share:
        """Right, and fallen to none of the attacks: the worst case over them."""
        return Share(self.record["robust"]["count"], self.record["robust"]["of"])

    @property
    def attacks(self) -> dict[str, Share]:
        """By attack: right and standing after it and all before it; with ``individually``, after it alone."""
        return {a["name"]: Share(a["robust"]["count"], a["robust"]["of"]) for a in self.record["attacks"]}

    def __str__(self) -> str:
        rows = [("clean", self.clean), *self.attacks.items(), ("worst case", self.robust)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {share}" for name, share in rows)


def evaluate(
    model: nn.Module,
    data: Any,
    attacks: Mapping[str, Attack] | Sequence[Attack],
    *,
    out: str | Path | None = None,
    batch_size: int = 500,
    individually: bool = False,
    limit: int | None = None,
    masking_images: int = 64,
    seed: int = 0,
    name: str | None = None,
    data_name: str | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Evaluation:
    """Clean accuracy, and accuracy under each attack and under all of them.

    The attacks run in order, each on what still stands; every fallen image is confirmed by the model (`run_cascade`). Then the images
    that are right when clean, the first `masking_images` of them, are looked at for gradient masking; what is found is warned of.

    Args:
        model: network from ``[N, C, H, W]`` in [0, 1] to logits; run in eval mode, left as it was.
        data: a `tsrfast.data.Split`, ``(x, y)``, or batches of that (a DataLoader that does not shuffle).
            Moved to the model's device a batch at a time.
        attacks: by name, or a sequence, named by their classes. Not targeted. An `AutoAttack` stands for its members.
        out: folder for `evaluation.json`, `run.json` (times, machine), `report.html`, and `checkpoint/`, from which the same call goes on
            after an interruption, to the same bytes in `evaluation.json`. None: nothing is written.
        batch_size: images at a time; no result depends on it but those of networks that draw random numbers.
        individually: every attack on all images that are right when clean, so that each has an accuracy of its own.
        limit: the first so many images.
        masking_images: how many images `check_gradient_masking` gets; 0: none, no checks.
        seed: of those checks. (Attacks have their own.)
        name, data_name: what model and data are called in the report.
        progress: say on standard error how far it is.
        command: for `run.json`.

    Raises:
        InputError: bad model outputs, data or attacks; `out` belongs to an evaluation of something else.
        EnvironmentFault: `out` cannot be written, or another process is using it.

    Warns:
        GradientMaskingWarning: one for each finding.
    """
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    check_count("batch_size", batch_size, 1)
    check_count("masking_images", masking_images, 0)
    if not isinstance(model, nn.Module):
        raise InputError(f"tsrfast.evaluation: model must be a torch.nn.Module, got {type(model).__name__}")
    images = gather(data, limit, data_name)
    named = _members(_named(attacks), model, images, batch_size)
    folder = None if out is None else Path(out)
    with nullcontext() if folder is None else closing(lock(folder)):
        if folder is not None:
            remove_leftovers(folder)
        with ExitStack() as stack:
            update = stack.enter_context(_reporting()) if progress else None
            result = run_cascade(
                model,
                images.x,
                images.y,
                named,
                batch_size=batch_size,
                checkpoint=None if folder is None else folder / "checkpoint",
                progress=update,
                individually=individually,
            )
        because = _no_checks(named, result) if masking_images else "not asked for"
        findings = None if because else _findings(model, images, named, result, masking_images, seed, progress)
        notes = [f"Gradient masking was not looked for: {because}."] if because else []
        record = make_record(model, images, named, result, individually=individually, name=name, findings=findings, notes=notes)
        for finding in findings or ():
            warnings.warn(str(finding), GradientMaskingWarning, stacklevel=2)
        evaluation = Evaluation(record, result, findings)
        if folder is not None:
            write(evaluation, folder, started, time.monotonic() - began, device_of(model, images.x), command)
        return evaluation


def write(
    evaluation: Evaluation, folder: Path, started: str, seconds: float, device: torch.device, command: str | None = None
) -> Path:
    """`evaluation.json`, `run.json` and the report, whose path is returned."""
    run: dict[str, Any] = {
        "started": started,
        "seconds": round(seconds, 1),
        "stages": [{"name": s.name, "seconds": round(s.seconds, 2)} for s in evaluation.result.stages],
        "machine": describe_machine(device),
    }
    if command is not None:
        run["command"] = command
    atomic_write(folder / "evaluation.json", json.dumps(evaluation.record, indent=1, allow_nan=False))
    atomic_write(folder / "run.json", json.dumps(run, indent=1))
    return render(evaluation.record, folder, run=run)


def _named(attacks: Mapping[str, Attack] | Sequence[Attack]) -> dict[str, Attack]:
    """Attacks by name. Their values are checked by `run_cascade`."""
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Sequence) and not isinstance(attacks, str):
        named = {}
        for attack in attacks:
            base = type(attack).__name__.lower()
            same = sum(name.partition("-")[0] == base for name in named)
            named[f"{base}-{same + 1}" if same else base] = attack
    else:
        raise InputError(f"tsrfast.evaluation: attacks must be attacks by name, or a list, got {type(attacks).__name__}")
    if not named:
        raise InputError("tsrfast.evaluation: attacks must hold at least one attack, got none")
    return named


def _members(attacks: dict[str, Attack], model: nn.Module, images: Images, batch_size: int) -> dict[str, Attack]:
    """Each AutoAttack replaced by its members that suit the model, under their names (``name/member`` where that is taken)."""
    flat: dict[str, Attack] = {}
    for name, attack in attacks.items():
        if not isinstance(attack, AutoAttack):
            flat[name] = attack
            continue
        attack._terms().threat.check_images(images.x)
        chosen = suited(
            model, images.x[:batch_size], images.y, attack.members(), random=attack.version == "rand", engine=attack.engine
        )
        for short, member in chosen.items():
            flat[f"{name}/{short}" if short in flat or short in attacks else short] = member
    if not flat:
        raise InputError("tsrfast.evaluation: attacks must hold one that the model has enough classes for, got none")
    return flat


def _no_checks(attacks: Mapping[str, Attack], result: CascadeResult) -> str:
    """Why gradient masking cannot be looked for; empty if it can."""
    threat = common_threat(attacks)
    if threat is None or isinstance(threat.eps, Tensor) or not 0 < threat.eps < math.inf:
        return "the attacks do not have one finite radius above 0 in common"
    if (threat.lo, threat.hi) != (0.0, 1.0):
        return "pixels are not in [0, 1]"
    return "" if bool(result.clean.any()) else "no image is right when clean"


def _findings(
    model: nn.Module,
    images: Images,
    attacks: Mapping[str, Attack],
    result: CascadeResult,
    count: int,
    seed: int,
    progress: bool,
) -> tuple[Finding, ...]:
    threat = common_threat(attacks)
    assert threat is not None  # see `_no_checks`
    right = result.clean.nonzero().squeeze(1)[:count]
    x, y = (t[right].to(device_of(model, images.x)) for t in (images.x, images.y))
    with ExitStack() as stack:
        if progress:
            from tsrfast._progress import Reporter

            stack.enter_context(Reporter().task("checks for gradient masking"))
        return tuple(check_gradient_masking(model, x, y, norm=threat.norm, eps=float(threat.eps), seed=seed))


@contextmanager
def _reporting() -> Iterator[Any]:
    """What `run_cascade` calls: one task an attack."""
    from tsrfast._progress import Reporter  # late: rich

    reporter, current, before = Reporter(), ExitStack(), 0
    update: Any = None
    place = -1

    def told(p: Progress) -> None:
        nonlocal update, place, before
        if p.position != place:
            current.close()
            place, before, update = p.position, 0, current.enter_context(reporter.task(p.stage))
        if math.isnan(p.rate):
            before = p.done  # from the checkpoint
        update(p.done, p.images, f"{p.standing} standing", before)

    with current:
        yield told
