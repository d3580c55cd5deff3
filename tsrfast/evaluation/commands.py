"""The commands ``tsrfast attack`` and ``tsrfast evaluate``: from paths and words to files."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tsrfast._files import atomic_write, lock, remove_leftovers
from tsrfast._modes import evaluating
from tsrfast._progress import Reporter, Update
from tsrfast.attacks import Attack, Transfer
from tsrfast.attacks.cascade import (
    ORDER,
    STANDS,
    WRONG_WHEN_CLEAN,
    CascadeResult,
    Chunks,
    Stage,
    distances,
    identity,
    inside,
    open_chunks,
)
from tsrfast.attacks.loop import check_labels, check_logits, undisturbed
from tsrfast.attacks.losses import wrong
from tsrfast.data import load
from tsrfast.errors import InputError, unknown
from tsrfast.evaluation.evaluate import Evaluation, evaluate, write
from tsrfast.evaluation.images import Images, gather
from tsrfast.evaluation.options import build, build_several, split_settings
from tsrfast.evaluation.record import make_record
from tsrfast.nets import load_checkpoint
from tsrfast.nets.tensor_file import write_tensor_file

COLUMNS = ("index", "label", "clean_answer", "answer", "right_when_clean", "fallen", "queries", *ORDER)


@dataclass(frozen=True)
class Subject:
    """What is attacked, in words.

    Attributes:
        model: path of a checkpoint.
        data, split: data set (`tsrfast.data.load`), ``test`` or ``train``.
        limit: the first so many images; None: all.
        device: where to compute.
        batch_size: images at a time.
    """

    model: Path
    data: str
    split: str
    limit: int | None
    device: torch.device
    batch_size: int

    def open(self) -> tuple[nn.Module, Images]:
        """The model and the images, both on the device, the images in the model's dtype.

        Raises:
            InputError: a file or word that cannot be used, or images that the model does not take.
            EnvironmentFault: a file that cannot be read.
        """
        if self.split not in ("test", "train"):
            raise unknown("split", self.split, ("test", "train"))
        for option, value in (("limit", self.limit), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"--{option}: must be 1 or more, got {value}")
        model = load_model(self.model, self.device)
        few = {"test": 1, "train": 1, self.split: self.limit}
        data = load(self.data, train=few["train"], test=few["test"])
        images = gather(getattr(data, self.split), None, f"{data.name}, {self.split}")
        dtype = next(model.parameters()).dtype
        x, y = images.x.to(self.device, dtype), images.y.to(self.device)
        try:
            with torch.no_grad():
                model(x[:1])
        except (RuntimeError, InputError) as e:
            what = f"{tuple(x.shape[1:])} of --data {self.data}: {str(e).partition(chr(10))[0]}"
            raise InputError(f"--model: {self.model.name} cannot take images {what}") from None
        return model, Images(x, y, images.name)


def load_model(path: Path, device: torch.device) -> nn.Module:
    return load_checkpoint(path)[0].to(device)


def run_evaluation(
    subject: Subject,
    attacks: str,
    settings: Sequence[tuple[str, str]],
    sets: Sequence[str],
    out: Path,
    *,
    individually: bool,
    masking_images: int,
    seed: int,
    reporter: Reporter,
) -> Path:
    """``tsrfast evaluate``: the report's path."""
    chosen = build_several(attacks, [*settings, *split_settings(sets)])
    if masking_images < 0:
        raise InputError(f"--masking-images: must be 0 or more, got {masking_images}")
    with reporter.task("model and data"):
        model, images = subject.open()
    result = evaluate(
        model,
        (images.x, images.y),
        chosen,
        out=out,
        batch_size=subject.batch_size,
        individually=individually,
        masking_images=masking_images,
        seed=seed,
        name=subject.model.stem,
        data_name=images.name,
        command=" ".join(["tsrfast", *sys.argv[1:]]),
    )
    reporter.say(str(result))
    return out / "report.html"


def run_attack(
    subject: Subject,
    name: str,
    settings: Sequence[tuple[str, str]],
    sets: Sequence[str],
    out: Path,
    *,
    teacher: Path | None,
    surrogates: Sequence[Path],
    reporter: Reporter,
) -> Path:
    """``tsrfast attack``: writes the adversarial images, a row of `images.csv` for each, and an evaluation of the one attack.

    All images are attacked; an interrupted run goes on from `checkpoint/` in `out`. With a loss that needs no labels, right is what the
    loss says: the teacher's answer on the same image.
    """
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    oracle = None if teacher is None else load_model(teacher, subject.device)
    attack = build(name, dict([*settings, *split_settings(sets)]), oracle)
    if attack._terms().targeted:
        raise InputError("--set targeted: must be false: the labels of the data are the true ones, no targets")
    if surrogates:
        attack = Transfer(attack, [load_model(path, subject.device) for path in surrogates])
    with reporter.task("model and data"):
        model, images = subject.open()
    index, size = torch.arange(len(images.x)), subject.batch_size
    with closing(lock(out)):
        remove_leftovers(out)
        chunks = open_chunks(
            out / "checkpoint", lambda: identity(model, images.x, images.y, {name: attack}, index, size, individually=True)
        )
        with chunks as store, reporter.task(name) as update:
            result, answers = attack_all(model, images, name, attack, size, update, store)
        loss = attack._terms().loss
        notes = ["All images were attacked, also those that are wrong as they are; these count as neither standing nor fallen."]
        if loss is not None and not loss.needs_labels:
            notes.append(f"Right is what the teacher answers on the same image (loss {loss.name}); the labels play no part.")
        record = make_record(
            model, images, {name: attack}, result, individually=True, name=subject.model.stem, findings=None, notes=notes
        )
        tensors = {"x_adv": result.x_adv, "y": images.y, "right_when_clean": result.clean, "fallen": result.fallen_to == 0}
        write_tensor_file(out / "adversarial.safetensors", tensors, {"evaluation": record})
        atomic_write(out / "images.csv", _csv(images, result, answers))
        evaluation = Evaluation(record, result, None)
        reporter.say(str(evaluation))
        seconds, command = time.monotonic() - began, " ".join(["tsrfast", *sys.argv[1:]])
        return write(evaluation, out, started, seconds, subject.device, command)


def attack_all(
    model: nn.Module, images: Images, name: str, attack: Attack, batch_size: int, update: Update, store: Chunks
) -> tuple[CascadeResult, Tensor]:
    """One attack on every image; fallen is what was right and is no longer, by the loss's own notion and within ball and box.

    Args:
        model, images, name, attack, batch_size: as for a cascade.
        update: told after each batch.
        store: where batches are kept, and found again.

    Returns:
        The result as that of a cascade of one attack, but with every image as the attack left it; and the model's answers, int64
        ``[N, 2]``, on clean and on adversarial images.
    """
    terms = attack._terms()
    models = terms.loss.models() if terms.loss is not None else ()

    def judge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The model's answers, and which of them are wrong."""
        with undisturbed(x.device), evaluating(model, *(m for m in models if isinstance(m, nn.Module))), torch.no_grad():
            logits = model(x)
            check_logits(logits, x)
            check_labels(y, logits.shape[1])
            right = y if terms.loss is None or terms.loss.needs_labels else terms.loss(x, logits, y)[1]
            return logits.argmax(1), wrong(logits, right)

    def work(index: Tensor) -> dict[str, Tensor]:
        began = time.monotonic()
        x, y = images.x[index], images.y[index]
        before, misses = judge(x, y)
        got = attack.run(model, x, y, index)
        after, missed = judge(got.x_adv, y)
        found = missed & inside(x, got.x_adv, terms.threat)
        return {
            "x_adv": got.x_adv,
            "clean": ~misses,
            "fallen": found & ~misses,
            "queries": got.queries,
            "bad_gradients": got.bad_gradients,
            "answers": torch.stack([before, after], 1),
            "refuted": (got.success & ~found).sum()[None],
            "eager": torch.tensor([got.path != "chain"]),
            "seconds": torch.tensor([time.monotonic() - began], dtype=torch.float64),
        }

    count, before, parts = len(images.x), 0, []
    for k, index in enumerate(torch.arange(count, device=images.x.device).split(batch_size)):
        parts.append(store.chunk(f"all-{k:05d}", lambda index=index: work(index)))  # type: ignore[misc]
        done = int(index[-1]) + 1
        before = done if bool(parts[-1].pop("resumed")) else before
        update(done, count, "", before)
    got = {key: torch.cat([part[key].to(images.x.device) for part in parts]) for key in parts[0]}
    clean, fallen, queries, bad = (got[key] for key in ("clean", "fallen", "queries", "bad_gradients"))
    robust = clean & ~fallen
    stage = Stage(
        name=name,
        attacked=count,
        fallen=int(fallen.sum()),
        robust_accuracy=float(robust.double().mean()),
        seconds=float(got["seconds"].sum()),
        queries=int(queries.sum()),
        success=fallen,
        distance=_far(images.x, got["x_adv"], terms.threat.norm).where(fallen, torch.nan),
        refuted=int(got["refuted"].sum()),
        bad_gradients=int(bad.sum()),
        path="eager" if bool(got["eager"].any()) else "chain",
    )
    fallen_to = torch.where(fallen, 0, torch.where(clean, STANDS, WRONG_WHEN_CLEAN))
    return CascadeResult(got["x_adv"], clean, robust, fallen_to, queries, bad, (stage,)), got["answers"]


def _far(x: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    """float64 ``[N]``; by pieces, for they are float64 too."""
    return torch.cat([distances(a, b, norm) for a, b in zip(x.split(500), x_adv.split(500), strict=True)])


def _csv(images: Images, result: CascadeResult, answers: Tensor) -> str:
    rows = zip(
        range(len(images.x)),
        images.y.tolist(),
        *answers.T.tolist(),
        result.clean.int().tolist(),
        (result.fallen_to == 0).int().tolist(),
        result.queries.tolist(),
        *(_far(images.x, result.x_adv, norm).tolist() for norm in ORDER),
        strict=True,
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return out.getvalue()
