"""The commands ``tsrfast attack`` and ``tsrfast evaluate``: from paths and words to files."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tsrfast._files import atomic_write, remove_leftovers
from tsrfast._modes import evaluating
from tsrfast._progress import Reporter, Update
from tsrfast.attacks import Attack, Transfer
from tsrfast.attacks.cascade import STANDS, WRONG_WHEN_CLEAN, CascadeResult, Stage, inside
from tsrfast.attacks.loop import check_labels, check_logits, undisturbed
from tsrfast.attacks.losses import wrong
from tsrfast.attacks.threat import check_count
from tsrfast.data import load
from tsrfast.errors import InputError, unknown
from tsrfast.evaluation.evaluate import Evaluation, evaluate, write
from tsrfast.evaluation.images import Images, gather
from tsrfast.evaluation.options import build, build_several, split_settings
from tsrfast.evaluation.record import distances, make_record
from tsrfast.nets import load_checkpoint
from tsrfast.nets.tensor_file import write_tensor_file

COLUMNS = ("index", "label", "clean_answer", "answer", "right_when_clean", "fallen", "queries", "linf", "l2", "l1")


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

    All images are attacked. With a loss that needs no labels, right is what the loss says: the teacher's answer on the same image.
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
    with reporter.task(name) as update:
        result, answers = attack_all(model, images, name, attack, subject.batch_size, update)
    loss = attack._terms().loss
    notes = ["All images were attacked, also those that are wrong as they are; these count as neither standing nor fallen."]
    if loss is not None and not loss.needs_labels:
        notes.append(f"Right is what the teacher answers on the same image (loss {loss.name}); the labels play no part.")
    record = make_record(
        model, images, {name: attack}, result, individually=True, name=subject.model.stem, findings=None, notes=notes
    )
    remove_leftovers(out)
    tensors = {"x_adv": result.x_adv, "y": images.y, "right_when_clean": result.clean, "fallen": result.fallen_to == 0}
    write_tensor_file(out / "adversarial.safetensors", tensors, {"evaluation": record})
    atomic_write(out / "images.csv", _csv(images, result, answers))
    evaluation = Evaluation(record, result, None)
    reporter.say(str(evaluation))
    seconds, command = time.monotonic() - began, " ".join(["tsrfast", *sys.argv[1:]])
    return write(evaluation, out, started, seconds, subject.device, command)


def attack_all(
    model: nn.Module, images: Images, name: str, attack: Attack, batch_size: int, update: Update
) -> tuple[CascadeResult, Tensor]:
    """One attack on every image; fallen is what was right and is no longer, by the loss's own notion and within ball and box.

    Returns:
        The result as that of a cascade of one attack, but with every image as the attack left it; and the model's answers, int64
        ``[N, 2]``, on clean and on adversarial images.
    """
    check_count("batch_size", batch_size, 1)
    terms = attack._terms()
    parts: list[tuple[Tensor, ...]] = []
    began, refuted, path = time.monotonic(), 0, ""

    def judge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The model's answers, and which of them are wrong."""
        with undisturbed(x.device), evaluating(model, *(m for m in models if isinstance(m, nn.Module))), torch.no_grad():
            logits = model(x)
            check_logits(logits, x)
            check_labels(y, logits.shape[1])
            right = y if terms.loss is None or terms.loss.needs_labels else terms.loss(x, logits, y)[1]
            return logits.argmax(1), wrong(logits, right)

    models = terms.loss.models() if terms.loss is not None else ()
    count = len(images.x)
    for index in torch.arange(count, device=images.x.device).split(batch_size):
        x, y = images.x[index], images.y[index]
        before, misses = judge(x, y)
        got = attack.run(model, x, y, index)
        after, missed = judge(got.x_adv, y)
        found = missed & inside(x, got.x_adv, terms.threat)
        refuted += int((got.success & ~found).sum())
        path = got.path
        parts.append((got.x_adv, ~misses, found & ~misses, got.queries, got.bad_gradients, torch.stack([before, after], 1)))
        update(int(index[-1]) + 1, count)
    x_adv, clean, fallen, queries, bad, answers = (torch.cat(part) for part in zip(*parts, strict=True))
    robust = clean & ~fallen
    stage = Stage(
        name=name,
        attacked=count,
        fallen=int(fallen.sum()),
        robust_accuracy=float(robust.double().mean()),
        seconds=time.monotonic() - began,
        queries=int(queries.sum()),
        success=fallen,
        refuted=refuted,
        bad_gradients=int(bad.sum()),
        path=path,
    )
    fallen_to = torch.where(fallen, 0, torch.where(clean, STANDS, WRONG_WHEN_CLEAN))
    return CascadeResult(x_adv, clean, robust, fallen_to, queries, bad, (stage,)), answers


def _csv(images: Images, result: CascadeResult, answers: Tensor) -> str:
    far = distances(images.x, result.x_adv)
    rows = zip(
        range(len(images.x)),
        images.y.tolist(),
        *answers.T.tolist(),
        result.clean.int().tolist(),
        (result.fallen_to == 0).int().tolist(),
        result.queries.tolist(),
        *(far[norm].tolist() for norm in ("linf", "l2", "l1")),
        strict=True,
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return out.getvalue()
