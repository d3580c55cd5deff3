"""Attack after attack on the images that still stand, in full batches, checked by the model itself, resumable: robust accuracy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

import tsrfast
from tsrfast._files import atomic_write, lock, remove_leftovers
from tsrfast._identity import describe, digest, tensor_hash
from tsrfast._modes import evaluating
from tsrfast.attacks.attack import Attack, AttackResult, _check_integers
from tsrfast.attacks.loop import check_labels, check_logits, own_copy, select, undisturbed
from tsrfast.attacks.losses import Loss, wrong
from tsrfast.attacks.threat import Threat, check_count
from tsrfast.chain import Chain
from tsrfast.errors import EnvironmentFault, InputError

MANIFEST = "cascade.json"
STANDS, WRONG_WHEN_CLEAN = -1, -2
ORDER = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


@dataclass(frozen=True)
class Progress:
    """What `progress` is told after every batch.

    Attributes:
        stage: the attack's name; `position` is its place, from 0, among `stages`.
        done, images: images of this stage that the attack is done with, and all of them.
        standing: images of the whole data set that are right when clean and have not fallen so far.
        rate: images a second in this stage, without those read from the checkpoint; NaN before there are any.
    """

    stage: str
    position: int
    stages: int
    done: int
    images: int
    standing: int
    rate: float


@dataclass(frozen=True, eq=False)
class Stage:
    """How one attack went.

    Attributes:
        name: its key in `attacks`.
        attacked: images it was given.
        fallen: images for which it found an adversarial image that the model confirms.
        robust_accuracy: share of all images that are right when clean and stand after this attack (individually: after it alone);
            NaN if there are none.
        seconds: its wall time with the checks, over all runs of an interrupted cascade.
        queries: forward passes of single images.
        success: bool ``[N]``, the fallen.
        distance: float64 ``[N]``, how far the fallen were moved, in the norm of the attack; NaN for the others.
        refuted: images that the attack says are adversarial and that are not: the model answers `y`, or they lie outside of ball or box.
        bad_gradients: gradient entries without a direction (NaN).
        path: which code ran, ``chain``, or ``eager`` where PyTorch ran for some (steps that were replayed as a graph included); empty if no
            image was attacked.
    """

    name: str
    attacked: int
    fallen: int
    robust_accuracy: float
    seconds: float
    queries: int
    success: Tensor
    distance: Tensor
    refuted: int
    bad_gradients: int
    path: str


@dataclass(frozen=True, eq=False)
class CascadeResult:
    """What is left standing of N images.

    Attributes:
        x_adv: as x; the adversarial image of the first attack that found one, else the clean image.
        clean: bool ``[N]``, right when clean.
        robust: bool ``[N]``, right when clean and fallen to no attack.
        fallen_to: int64 ``[N]``, position of the first attack that it fell to; -1 stands, -2 wrong when clean.
        queries: int64 ``[N]``, forward passes of all attacks.
        bad_gradients: int64 ``[N]``, gradient entries without a direction (NaN), over all attacks.
        stages: one an attack, in order.
    """

    x_adv: Tensor
    clean: Tensor
    robust: Tensor
    fallen_to: Tensor
    queries: Tensor
    bad_gradients: Tensor
    stages: tuple[Stage, ...]

    @property
    def clean_accuracy(self) -> float:
        return _share(self.clean)

    @property
    def robust_accuracy(self) -> float:
        return _share(self.robust)


def run_cascade(
    model: nn.Module | Chain,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    *,
    index: Tensor | None = None,
    batch_size: int = 500,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    individually: bool = False,
) -> CascadeResult:
    """Attack the images that are right when clean, each until it falls.

    An image has fallen when the model, in eval mode and in PyTorch, does not answer `y` at what an attack returned (one more forward
    pass, whatever code the attack ran), and that lies in the attack's ball and box (`inside`). What the attack itself says does not
    count; where it says more than that, `Stage.refuted` does.

    Args:
        model: network to logits ``[N, classes]``; a `Chain` is used as it is. Batches are moved to its device.
        x: clean images in the box of the attacks, on any device; results are there too.
        y: int64 ``[N]``, the true labels.
        attacks: by name, in order; not targeted. Values an image (`eps`, ...) are those of the N images.
        index: int64 ``[N]``, the images' numbers, as in `Attack`; default 0..N-1.
        batch_size: images at a time. Every attack gets full batches of those that stand.
        checkpoint: folder for what is done, made if there is none. The same call on the same folder goes on where it was interrupted, with
            the result of a run without interruption, bit for bit (a network that draws random numbers must also find PyTorch's generators
            in the same state).
        progress: called after every batch.
        individually: every attack on all images that are right when clean.

    Raises:
        InputError: bad images, labels or attacks; logits that are NaN at a clean image; `checkpoint` belongs to another call.
        EnvironmentFault: `checkpoint` cannot be read or written, or another process is using it.
    """
    index = _check(x, y, attacks, index, batch_size)
    with open_chunks(checkpoint, lambda: identity(model, x, y, attacks, index, batch_size, individually)) as store:
        return _cascade(store, model, x, y, attacks, index, batch_size, progress, individually)


def _cascade(
    store: Chunks,
    model: nn.Module | Chain,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    index: Tensor,
    batch_size: int,
    progress: Callable[[Progress], None] | None,
    individually: bool,
) -> CascadeResult:
    """What `run_cascade` says, of checked arguments."""
    call = _Call(model, x, y, index, device_of(model, x))
    clean = store.chunk("clean", lambda: {"clean": call.clean(batch_size)})["clean"].to(x.device)
    x_adv = own_copy(x)
    fallen_to = torch.where(clean, STANDS, WRONG_WHEN_CLEAN)
    queries, bad = torch.zeros_like(fallen_to), torch.zeros_like(fallen_to)
    stages = []
    for position, (name, attack) in enumerate(attacks.items()):
        attacked = (clean if individually else fallen_to == STANDS).nonzero().squeeze(1)
        success, distance = torch.zeros_like(clean), torch.full(clean.shape, math.nan, dtype=torch.float64, device=x.device)
        totals = dict.fromkeys(("seconds", "refuted", "fresh", "fresh_seconds", "eager", "queries", "bad_gradients"), 0.0)
        for k, rows in enumerate(attacked.split(batch_size) if len(attacked) else ()):
            began = time.perf_counter()
            got = store.chunk(f"{position:02d}-{k:05d}", lambda attack=attack, rows=rows: call.attack(attack, rows))  # type: ignore[misc]
            got = {key: value.to(x.device) for key, value in got.items()}
            if not bool(got["resumed"]):
                totals["fresh"] += len(rows)
                totals["fresh_seconds"] += time.perf_counter() - began
            fallen = got["fallen"]
            first = fallen & (fallen_to[rows] == STANDS)
            x_adv[rows[first]] = got["x_adv"][first[fallen]]
            fallen_to[rows[first]] = position
            success[rows], distance[rows[fallen]] = fallen, got["distance"]
            for key, per_image in (("queries", queries), ("bad_gradients", bad)):
                per_image[rows] += got[key]
            for key in ("seconds", "refuted", "eager", "queries", "bad_gradients"):
                totals[key] += got[key].sum().item()
            if progress is not None:
                rate = totals["fresh"] / totals["fresh_seconds"] if totals["fresh"] else math.nan
                standing = int((fallen_to == STANDS).sum())
                done = min((k + 1) * batch_size, len(attacked))
                progress(Progress(name, position, len(attacks), done, len(attacked), standing, rate))
        stages.append(
            Stage(
                name,
                len(attacked),
                int(success.sum()),
                _share(clean & ~success if individually else fallen_to == STANDS),
                totals["seconds"],
                int(totals["queries"]),
                success,
                distance,
                int(totals["refuted"]),
                int(totals["bad_gradients"]),
                ("eager" if totals["eager"] else "chain") if len(attacked) else "",
            )
        )
    return CascadeResult(x_adv, clean, fallen_to == STANDS, fallen_to, queries, bad, tuple(stages))


def inside(x0: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """bool ``[N]``: `x` is in the box exactly, and in the ball up to rounding.

    The tolerance is 4 u (D^(1/p) + eps) with u the unit of x's dtype: every one of D pixels near 1 may be rounded by u, and a radius
    that was computed by u of itself, each a few times.
    """
    eps = torch.as_tensor(threat.eps, dtype=torch.float64, device=x.device)
    allowed = eps + 4 * torch.finfo(x.dtype).eps * (x[0].numel() ** (1 / ORDER[threat.norm]) + eps)
    # NaN compares false.
    return (distances(x0, x, threat.norm) <= allowed) & ((x >= threat.lo) & (x <= threat.hi)).flatten(1).all(1)


def distances(x0: Tensor, x: Tensor, norm: str) -> Tensor:
    """float64 ``[N]`` from each image to what became of it."""
    return torch.linalg.vector_norm((x.double() - x0.double()).flatten(1), ORDER[norm], dim=1)


@dataclass(frozen=True, eq=False)
class _Call:
    """Model and data of a cascade."""

    model: nn.Module | Chain
    x: Tensor
    y: Tensor
    index: Tensor
    device: torch.device

    def logits(self, x: Tensor) -> Tensor:
        """Of the model itself, in eval mode, without gradient."""
        modules = (self.model,) if isinstance(self.model, nn.Module) else ()
        with undisturbed(self.device), evaluating(*modules), torch.no_grad():
            out: Tensor = self.model(x.clone())  # a model may write to its input
            check_logits(out, x)
            return out

    def clean(self, batch_size: int) -> Tensor:
        """bool ``[N]``: right when clean."""
        right = [torch.zeros(0, dtype=torch.bool)]
        for x, y in zip(self.x.split(batch_size), self.y.split(batch_size), strict=True):
            if not len(x):
                continue
            x, y = x.detach().to(self.device), y.to(self.device)
            logits = self.logits(x)
            check_labels(y, logits.shape[1])
            if bad := int(logits.isnan().any(1).sum()):
                raise InputError(
                    f"tsrfast.attacks: model must return logits that are no NaN, got NaN for {bad} of {len(x)} images"
                )
            right.append((~wrong(logits, y)).cpu())
        return torch.cat(right)

    def attack(self, attack: Attack, rows: Tensor) -> dict[str, Tensor]:
        """One attack on the images at these positions; of the images, those that fell."""
        began = time.perf_counter()
        attack = _of_images(attack, rows, len(self.x), self.device)
        x, y, index = (t.to(self.device) for t in (select(self.x.detach(), rows), self.y[rows], self.index[rows]))
        got: AttackResult = attack.run(self.model, x, y, index)
        threat = attack._terms().threat
        fallen = wrong(self.logits(got.x_adv), y) & inside(x, got.x_adv, threat)
        return {
            "x_adv": got.x_adv[fallen].contiguous(),
            "fallen": fallen,
            "distance": distances(x[fallen], got.x_adv[fallen], threat.norm),
            "queries": got.queries,
            "refuted": (got.success & ~fallen).sum(),
            "bad_gradients": got.bad_gradients,
            "eager": torch.tensor(got.path != "chain"),
            "seconds": torch.tensor(time.perf_counter() - began, dtype=torch.float64),
        }


@dataclass(frozen=True)
class Chunks:
    """The folder of a cascade (None: nothing is kept): a manifest that says of which call, and a file for each piece of work."""

    folder: Path | None

    def chunk(self, name: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `work` returns, or returned in an earlier run; `resumed` says which."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is not None and path.exists():
            try:
                return {**load(path.read_bytes()), "resumed": torch.tensor(True)}
            except OSError as e:
                raise EnvironmentFault(f"cannot read {path}: {e.strerror or e}") from e
            except SafetensorError as e:
                raise EnvironmentFault(
                    f"cannot read {path}: it is damaged ({e}); without it, its images are attacked again"
                ) from e
        got = work()
        if path is not None:
            atomic_write(path, save({key: value.detach().cpu().contiguous() for key, value in got.items()}))
        return {**got, "resumed": torch.tensor(False)}


@contextmanager
def open_chunks(folder: Path | None, identity: Callable[[], dict[str, Any]]) -> Iterator[Chunks]:
    """The folder, new or of the same call as `identity` says, closed to other processes.

    Raises:
        InputError: `folder` holds other files, or belongs to another call.
        EnvironmentFault: it cannot be read or written, or another process is using it.
    """
    if folder is None:
        yield Chunks(None)
        return
    folder, now = Path(folder), identity()
    manifest = folder / MANIFEST
    try:
        if folder.is_dir() and not manifest.exists() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise InputError(
                f"tsrfast.attacks: checkpoint must be a new folder, or one of a cascade, got {folder} with other files"
            )
    except OSError as e:
        raise EnvironmentFault(f"cannot read {folder}: {e.strerror or e}") from e
    with closing(lock(folder)):
        try:
            remove_leftovers(folder)
            before = json.loads(manifest.read_text()) if manifest.exists() else None
        except OSError as e:
            raise EnvironmentFault(f"cannot read {folder}: {e.strerror or e}") from e
        except ValueError as e:
            raise InputError(
                f"tsrfast.attacks: checkpoint must be a folder of a cascade, got {folder} with another {MANIFEST}"
            ) from e
        if before is None:
            atomic_write(manifest, json.dumps(now, indent=1))
        elif other := _differences(before, json.loads(json.dumps(now))):
            raise InputError(
                f"tsrfast.attacks: checkpoint must be a new folder, or one of the same call, got {folder} of a call with other "
                + ", ".join(other)
            )
        yield Chunks(folder)


def _check(x: Tensor, y: Tensor, attacks: Mapping[str, Attack], index: Tensor | None, batch_size: int) -> Tensor:
    """The arguments, before anything runs; the images' numbers."""
    check_count("batch_size", batch_size, 1)
    if not isinstance(attacks, Mapping):
        raise InputError(f"tsrfast.attacks: attacks must be attacks by name, got {type(attacks).__name__}")
    Threat("linf", 0.0, -math.inf, math.inf).check_images(x)
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise InputError(f"tsrfast.attacks: attacks must be Attack objects, got {type(attack).__name__} for {name!r}")
        terms = attack._terms()
        if terms.targeted:
            raise InputError(f"tsrfast.attacks: attacks must not be targeted, got {name!r}: y are the true labels")
        terms.threat.check_images(x)
        for field, value in {**terms.sizes, **(terms.loss.per_image() if terms.loss is not None else {})}.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != x.shape[:1]:
                raise InputError(f"tsrfast.attacks: {field} must be a number or of shape ({len(x)},), got {tuple(value.shape)}")
    if _check_integers("y", y, x) is None:
        raise InputError("tsrfast.attacks: y is needed: the true labels")
    index = _check_integers("index", index, x)
    return torch.arange(len(x), device=x.device) if index is None else index


def _of_images(attack: Attack, rows: Tensor, count: int, device: torch.device) -> Attack:
    """The attack with its values of these images alone, of those that it has for each of `count`."""
    if not dataclasses.is_dataclass(attack):
        return attack
    terms = attack._terms()

    def mine(value: Tensor) -> Tensor:
        return value[rows.to(value.device)].to(device)

    changed: dict[str, Any] = {}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if isinstance(value, Loss) and value.per_image():
            changed[field.name] = dataclasses.replace(value, **{k: mine(v) for k, v in value.per_image().items()})  # type: ignore[type-var]
        elif isinstance(value, Attack):  # one within another: Transfer
            changed[field.name] = _of_images(value, rows, count, device)
        elif field.name in ("eps", *terms.sizes) and isinstance(value, Tensor) and value.ndim and len(value) == count:
            changed[field.name] = mine(value)
    return dataclasses.replace(attack, **changed) if changed else attack


def identity(
    model: nn.Module | Chain,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    index: Tensor,
    batch_size: int,
    individually: bool,
) -> dict[str, Any]:
    """What the result depends on, as JSON values."""
    return {
        "tsrfast": tsrfast.__version__,
        "model": digest(describe(model)),
        "images": tensor_hash(x),
        "labels": tensor_hash(y),
        "index": tensor_hash(index),
        "batch_size": batch_size,
        "individually": individually,
        "attacks": [[name, describe(attack)] for name, attack in attacks.items()],
    }


def _differences(before: Any, now: dict[str, Any]) -> list[str]:
    """In words, what two manifests differ in."""
    if not isinstance(before, dict):
        return ["contents"]
    other = []
    for key, value in now.items():
        was = before.get(key)
        if was == value:
            continue
        if key in ("model", "images", "labels", "index", "attacks"):
            other.append(key)
        else:
            other.append(f"{key} ({was} then, {value} now)")
        if key == "attacks" and isinstance(was, list):
            pairs = itertools.zip_longest(was, value)
            name, old, new = next((b[0] if b else a[0], a, b) for a, b in pairs if a != b)
            fields = [
                f for f in (new[1].get("fields", {}) if new else {})
                if old and old[0] == new[0] and old[1].get("fields", {}).get(f) != new[1]["fields"][f]
            ]  # fmt: skip
            other[-1] += f" (from {name!r} on{': ' + ', '.join(fields) if fields else ''})"
    return other


def device_of(model: nn.Module | Chain, x: Tensor) -> torch.device:
    """Where the model's parameters are; x's device if it has none."""
    if isinstance(model, nn.Module):
        for t in itertools.chain(model.parameters(), model.buffers()):
            return t.device
    return x.device


def _share(chosen: Tensor) -> float:
    return chosen.double().mean().item()
