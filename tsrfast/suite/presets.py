"""How large a reproduction is: every size and hyper-parameter, by name, with three presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tsrfast.errors import InputError, unknown
from tsrfast.training import parse_schedule

# The paper's numbers of epochs: the names of columns and curves in every preset.
PAPER_EPOCHS = (50, 100, 150, 200, 300)


@dataclass(frozen=True)
class Preset:
    """All settings of a reproduction. Radii and steps are in pixel units of [0, 1]; ``None`` images means all there are."""

    name: str
    # data
    train_images: int | None
    """Images the teacher is trained on."""
    student_images: int | None
    """Images the students are trained on: the first of the teacher's. Their number makes an epoch."""
    test_images: int | None
    # teacher
    widths: tuple[int, ...]
    prune_ratios: tuple[float, ...]
    teacher_epochs: int
    teacher_optimizer: str
    teacher_lr: str
    teacher_batch_size: int
    teacher_weight_decay: float
    teacher_augment: bool
    finetune_epochs: int
    finetune_lr: str
    finetune_shrunk: bool
    """Drop the pruned channels before fine-tuning, not after it: the same network but for rounding, at the pruned one's cost."""
    # students
    student_factor: float
    epochs: tuple[int, ...]
    """Epochs that stand for the paper's 50, 100, 150, 200 and 300: checkpoints of one run."""
    optimizer: str
    lr: str
    batch_size: int
    # attack in training and evaluation
    eps: float
    train_steps: int
    train_step_size: float
    rft_steps: int
    """Steps towards each robust-feature image (table 5), and their l2 length."""
    rft_step_size: float
    steps: int
    step_size: float
    l2_eps: float
    l1_eps: float
    # evaluation
    repetitions: int
    eval_images: int
    """Images drawn from the test set for each repetition."""
    matrix_images: int
    """Images for the matrix of objectives of table 3."""
    eval_batch_size: int
    correlation_images: int | None
    patch_images: int
    # instead of training it
    oracle: str | None = None
    """File of an oracle of 4 layers (`tsrfast.nets.save_checkpoint`), ``pretrained`` (the package's), or none: trained. That of 5 layers is
    trained all the same."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                least = 0 if f.name in ("teacher_weight_decay", "teacher_epochs", "finetune_epochs") else None
                if not math.isfinite(value) or (value < 0 if least == 0 else value <= 0):
                    raise InputError(f"--set {f.name}: must be {'>= 0' if least == 0 else 'positive'}, got {value}")
        if len(self.epochs) != len(PAPER_EPOCHS) or list(self.epochs) != sorted(set(self.epochs)) or self.epochs[0] < 1:
            raise InputError(f"--set epochs: must be {len(PAPER_EPOCHS)} increasing positive integers, got {list(self.epochs)}")
        if min(self.widths) < 1:
            raise InputError(f"--set widths: must be positive integers, got {list(self.widths)}")
        if not all(0 <= ratio < 1 for ratio in self.prune_ratios):
            raise InputError(f"--set prune_ratios: must be numbers in [0, 1), got {list(self.prune_ratios)}")
        if self.eps > 1:
            raise InputError(
                f"--set eps: must be in pixels of [0, 1], got {self.eps}; did you mean {self.eps}/255 = {self.eps / 255:.4f}?"
            )
        if len(self.prune_ratios) != len(self.widths):
            raise InputError(
                f"--set prune_ratios: must be {len(self.widths)} numbers, one a layer of widths, got {list(self.prune_ratios)}"
            )
        for name in ("teacher_optimizer", "optimizer"):
            if getattr(self, name) not in ("sgd", "adam"):
                raise unknown("optimizer", getattr(self, name), ("sgd", "adam"))
        for name in ("teacher_lr", "finetune_lr", "lr"):
            parse_schedule(getattr(self, name))


# The teacher's rate is not the 0.1 of the authors' command line, with which its loss reaches 7e13 within 80 batches of CIFAR-10 (and that of a
# net of 45-32-32-20 channels NaN after 57). With 0.01 it stays below 12, and falls before the 60th; no whole training has been run with it.
PAPER = Preset(
    name="paper",
    train_images=None, student_images=None, test_images=None,
    widths=(64, 64, 64, 64), prune_ratios=(0.3, 0.5, 0.5, 0.7),
    teacher_epochs=200, teacher_optimizer="sgd", teacher_lr="cosine:0.01", teacher_batch_size=128, teacher_weight_decay=5e-4,
    teacher_augment=True, finetune_epochs=60, finetune_lr="cosine:0.01", finetune_shrunk=True,
    student_factor=1.1, epochs=PAPER_EPOCHS, optimizer="sgd", lr="piecewise:0=0.001,5=0.002,10=0.005,30=0.01", batch_size=64,
    eps=10 / 255, train_steps=40, train_step_size=0.01, rft_steps=1000, rft_step_size=0.1, steps=40, step_size=0.01, l2_eps=0.5, l1_eps=12.0,
    repetitions=10, eval_images=5000, matrix_images=10000, eval_batch_size=500, correlation_images=None, patch_images=4000,
)  # fmt: skip
# Widths of which the students' 25-15-15-11 fit the 16 lanes of a vector. Strong weight decay makes a smooth oracle out of a short
# training, as a long one would; with a rough one no student of this size follows it off the data.
QUICK = dataclasses.replace(
    PAPER,
    name="quick",
    train_images=20000, student_images=6144, test_images=2000,
    widths=(32, 28, 28, 32),
    teacher_epochs=3, teacher_lr="cosine:0.02", teacher_batch_size=64, teacher_weight_decay=0.005, teacher_augment=False,
    finetune_epochs=1, finetune_lr="cosine:0.005", finetune_shrunk=False,
    epochs=(1, 2, 3, 4, 6), optimizer="adam", lr="constant:0.0007", batch_size=32,
    train_steps=5, train_step_size=0.02, rft_steps=20, rft_step_size=0.5, steps=10,
    repetitions=2, eval_images=400, matrix_images=2000, eval_batch_size=100, correlation_images=1000, patch_images=1000,
)  # fmt: skip
SMOKE = dataclasses.replace(
    QUICK,
    name="smoke",
    train_images=1024, student_images=128, test_images=256,
    widths=(12, 12, 12, 12), teacher_epochs=3, teacher_optimizer="adam", teacher_lr="cosine:0.003", teacher_batch_size=32,
    teacher_weight_decay=0.0, finetune_lr="cosine:0.001", train_steps=2, rft_steps=3, steps=3, step_size=0.02,
    repetitions=2, eval_images=32, matrix_images=32, eval_batch_size=32, correlation_images=64, patch_images=64,
)  # fmt: skip

PRESETS = {p.name: p for p in (SMOKE, QUICK, PAPER)}


def preset(name: str, overrides: list[str] = []) -> Preset:  # noqa: B006  (read only)
    """The preset of that name with ``key=value`` overrides.

    Values: numbers, ``true``/``false``, ``all`` where every image may be taken, ``none`` for no file, comma-separated numbers for the lists.

    Raises:
        InputError: unknown preset or key (with the nearest match), or a value that does not fit.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    changes: dict[str, Any] = {}
    types = {f.name: str(f.type) for f in dataclasses.fields(Preset) if f.name != "name"}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"--set: must be key=value, got {item!r}")
        if key not in types:
            raise unknown("setting", key, types)
        changes[key] = _parse(key, types[key], text)
    return dataclasses.replace(PRESETS[name], **changes)


def _parse(key: str, kind: str, text: str) -> Any:
    try:
        if kind.startswith("str"):
            return None if "None" in kind and text == "none" else text
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int | None" and text == "all":
            return None
        number = float if "float" in kind else int
        return tuple(number(t) for t in text.split(",")) if kind.startswith("tuple") else number(text)
    except (ValueError, KeyError):
        wanted = {"bool": "true or false", "int | None": "an integer or 'all'", "int": "an integer", "float": "a number"}
        raise InputError(f"--set {key}: must be {wanted.get(kind, 'numbers separated by commas')}, got {text!r}") from None
