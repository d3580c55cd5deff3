"""Substitute training by Jacobian-based augmentation (Papernot et al. 2017, "Practical black-box attacks against machine learning",
algorithm 1): a copy of a network that answers with labels alone, learned from few questions, for transfer attacks. With the periodic
step and the reservoir sampling of Papernot et al. 2016 ("Transferability in machine learning", section 4 and algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tsrfast._identity import describe, digest
from tsrfast._modes import evaluating
from tsrfast.attacks import FGSM, Loss, Threat
from tsrfast.attacks.loop import check_logits
from tsrfast.data import Split
from tsrfast.errors import InputError
from tsrfast.nets.checkpoint import load_tensors
from tsrfast.nets.tensor_file import read_tensor_file, write_tensor_file
from tsrfast.training import trainer
from tsrfast.training.objectives import TrueLabels
from tsrfast.training.schedule import Schedule

QUESTIONS = "questions.safetensors"
_WHO = "tsrfast.train_substitute"
_PIECE = 512  # images whose gradients are computed at a time


@dataclass(frozen=True, eq=False)
class SubstituteResult:
    """What `train_substitute` asked, and how well it learned.

    Attributes:
        x: the images asked about ``[M, ...]``, the given ones first.
        labels: int64 ``[M]``, the oracle's answers.
        queries: how many questions each round asked, the given images first; their sum is M.
        losses: mean loss of the last epoch of each training.
    """

    x: Tensor
    labels: Tensor
    queries: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class _LabelLogit(Loss):
    """z_y: a row of the Jacobian is its gradient."""

    name: ClassVar[str] = "label_logit"
    needs_labels: ClassVar[bool] = True

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return logits.gather(1, y[:, None]).squeeze(1), y


@dataclass(frozen=True, eq=False)
class _Points(Split):
    """Images that are not bytes."""

    def __post_init__(self) -> None:
        pass

    def pixels(self, index: Tensor | slice | None = None) -> Tensor:
        return self.images if index is None else self.images[index]


def periodic_step(step: float, period: int | None, round: int) -> float:
    """lambda_rho = lambda (-1)^floor(rho / tau) at round rho, from 0; no period: lambda."""
    return step if period is None or round // period % 2 == 0 else -step


def reservoir_sample(count: int, size: int, *, seed: int, round: int) -> Tensor:
    """Positions of `size` of `count` items (all, if there are no more), int64 on the CPU, each item with the same probability.

    The reservoir is filled with the first items; each later item i takes the place r, uniform in 0..i, if that is in the reservoir.
    Positions first and their images later: as sampling images, without the gradients of those that are replaced.
    """
    kept = torch.arange(min(size, count), device="cpu")
    later = torch.arange(len(kept), count, device="cpu")
    random = torch.Generator().manual_seed(int(digest(["reservoir", seed, round])[:15], 16))
    place = (torch.rand(len(later), generator=random, dtype=torch.float64, device="cpu") * (later + 1)).long()
    for item in (place < size).nonzero().squeeze(1).tolist():
        kept[place[item]] = later[item]
    return kept


def jacobian_step(substitute: nn.Module, x: Tensor, labels: Tensor, step: float) -> Tensor:
    """clip(x + step sign(d z_label / d x), 0, 1), like x: one step on the logit of each image's label; a negative step goes down.

    Args:
        substitute: network from images to logits; run in eval mode, left as it was.
        x: images ``[N, ...]`` in [0, 1].
        labels: int64 ``[N]``.

    Raises:
        InputError: as an attack.
    """
    attack = FGSM(eps=abs(step), loss=_LabelLogit(), targeted=step < 0, engine="eager")
    pieces = zip(x.split(_PIECE), labels.split(_PIECE), strict=True)
    return torch.cat([attack(substitute, images, y) for images, y in pieces])


def train_substitute(
    oracle: Callable[[Tensor], Tensor],
    substitute: nn.Module,
    x: Tensor,
    *,
    budget: int,
    rounds: int = 6,
    step: float = 0.1,
    period: int | None = 3,
    reservoir: tuple[int, int] | None = (400, 3),
    epochs: int = 10,
    batch_size: int = 128,
    lr: Schedule | float | str = 0.001,
    optimizer: str = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    folder: Path | None = None,
) -> SubstituteResult:
    """Train `substitute` in place to answer as `oracle` does, and leave it in eval mode.

    The oracle labels `x`. Then, `rounds` times: the substitute is trained on all answers so far, every image asked about is moved by
    `jacobian_step` along the gradient of the logit of its label, and the oracle labels the new images. At last the substitute is trained
    on all of it. Every training starts from the weights that were given. Rounds double the set (n 2^rounds questions in all), or with
    the reservoir add at most kappa images each from round sigma on (n 2^sigma + kappa (rounds - sigma), where no round has fewer). When
    the budget has fewer questions left than a round has images, a reservoir sample of that number is asked about, and it is the last.

    Same arguments, machine and thread count: same bits. Another thread count rounds otherwise, which can turn the sign of a gradient
    near 0. The substitute must draw no random numbers from the global state (dropout does).

    Args:
        oracle: from images like `x` (never more at a time than a round asks) to int64 labels ``[n]``; called without gradients. To ask a
            network: ``lambda x: network(x).argmax(1)``.
        substitute: network from images to logits of the oracle's classes, on x's device and in its dtype. On the CPU it is put in
            channels_last format.
        x: the attacker's own images ``[n, ...]`` in [0, 1].
        budget: questions, one an image; never exceeded.
        rounds: how often new images are made, >= 0.
        step: lambda, in pixel units, > 0.
        period: tau, rounds after which the step changes its sign; None: never.
        reservoir: (kappa, sigma); None: every round doubles the set.
        epochs, batch_size, lr, optimizer, momentum, weight_decay: of each training, as in `train`.
        seed: of the order of the images in training, and of the reservoir.
        folder: keeps the answers after each round and the state of the trainings: killed, the same call with a freshly built substitute
            goes on without asking again (but for the questions of a round that was just being answered, which are not counted twice).
            What the oracle is cannot be seen: it must be the same.

    Raises:
        InputError: a wrong argument; an oracle that returns something else than labels of the substitute's classes; a folder with a run of
            other settings.
        EnvironmentFault: the folder cannot be written.
    """
    classes = _check(substitute, x, budget, rounds, step, period, reservoir)
    fit = {
        **{"epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer},
        **{"momentum": momentum, "weight_decay": weight_decay, "seed": seed},
    }
    # What `train` refuses should not cost questions.
    trainer._check(substitute, _Points(x, x), epochs, batch_size, seed, (), None, 0.0)
    trainer._optimizer(optimizer, substitute, momentum, weight_decay)
    trainer._schedule(lr)
    given = {"substitute": substitute, "x": x, "budget": budget, "rounds": rounds, "step": step, "period": period}
    settings = (
        {k: digest(describe(v)) for k, v in (given | {"reservoir": reservoir} | fit).items()} if folder is not None else {}
    )
    initial = {name: t.detach().clone() for name, t in substitute.state_dict().items()}
    asked = _Asked(x.detach()[:0].clone(), x.new_empty(0, dtype=torch.int64))
    path = None if folder is None else Path(folder) / QUESTIONS
    if path is not None and path.exists():
        asked.load(path, settings)
    else:
        asked.ask(oracle, x.detach(), classes, path, settings)
    while True:
        round = len(asked.queries) - 1
        load_tensors(substitute, initial, "substitute")
        where = None if folder is None else Path(folder) / f"training_{round:02d}"
        done = trainer.train(substitute, TrueLabels(), _Points(asked.x, asked.labels), folder=where, **fit)  # type: ignore[arg-type]
        asked.losses.append(done.metrics[-1]["loss"])
        left = budget - len(asked.x)
        if round == rounds or not left:
            substitute.eval()
            return SubstituteResult(asked.x, asked.labels, tuple(asked.queries), tuple(asked.losses))
        size = min(left, reservoir[0]) if reservoir is not None and round >= reservoir[1] else left
        chosen = reservoir_sample(len(asked.x), size, seed=seed, round=round).to(x.device)
        new = jacobian_step(substitute, asked.x[chosen], asked.labels[chosen], periodic_step(step, period, round))
        asked.ask(oracle, new, classes, path, settings)


@dataclass(eq=False)
class _Asked:
    """All questions and answers so far, the questions of each round, and the loss of each training."""

    x: Tensor
    labels: Tensor
    queries: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def ask(
        self,
        oracle: Callable[[Tensor], Tensor],
        images: Tensor,
        classes: int,
        path: Path | None,
        settings: Mapping[str, str],
    ) -> None:
        """One round of questions, saved at once."""
        with torch.no_grad():
            answers = oracle(images.clone())
        if not isinstance(answers, Tensor) or answers.dtype != torch.int64 or answers.shape != images.shape[:1]:
            what = f"{answers.dtype} of shape {tuple(answers.shape)}" if isinstance(answers, Tensor) else type(answers).__name__
            hint = "to ask a network: lambda x: network(x).argmax(1)"
            raise InputError(f"{_WHO}: oracle must return int64 labels of shape ({len(images)},), got {what}; {hint}")
        if not bool(((answers >= 0) & (answers < classes)).all()):
            bad = answers[(answers < 0) | (answers >= classes)][0].item()
            raise InputError(f"{_WHO}: oracle must return labels in 0..{classes - 1}, the substitute's classes, got {bad}")
        self.x = torch.cat([self.x, images])
        self.labels = torch.cat([self.labels, answers.to(self.labels.device)])
        self.queries.append(len(images))
        if path is not None:
            document = {"settings": dict(settings), "queries": self.queries, "losses": self.losses}
            write_tensor_file(path, {"x": self.x, "labels": self.labels}, document)

    def load(self, path: Path, settings: Mapping[str, str]) -> None:
        tensors, document = read_tensor_file(path)
        if tensors.keys() != {"x", "labels"} or document.keys() != {"settings", "queries", "losses"}:
            raise InputError(f"{path} holds no questions and answers")
        differing = sorted(k for k in settings if document["settings"].get(k) != settings[k])
        if differing:
            got = f"{path.parent}, whose run differs in {', '.join(differing)}"
            raise InputError(f"{_WHO}: folder must be empty or hold a run of the same settings, got {got}")
        self.x, self.labels = tensors["x"].to(self.x), tensors["labels"].to(self.labels)
        self.queries, self.losses = document["queries"], document["losses"]


def _check(
    substitute: nn.Module,
    x: Tensor,
    budget: int,
    rounds: int,
    step: float,
    period: int | None,
    reservoir: tuple[int, int] | None,
) -> int:
    """Refuse bad arguments; return how many classes the substitute knows."""
    if not isinstance(substitute, nn.Module):
        raise InputError(f"{_WHO}: substitute must be an nn.Module, got {type(substitute).__name__}")
    Threat("linf", 0.0).check_images(x)
    if x.ndim != 4 or not len(x):
        raise InputError(f"{_WHO}: x must be images [N, C, H, W], at least one, got shape {tuple(x.shape)}")
    weight = next(substitute.parameters(), x)
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        wanted, got = (f"{t.dtype} on {t.device}" for t in (weight, x))
        raise InputError(f"{_WHO}: x must be as the substitute's weights, {wanted}, got {got}")
    if reservoir is not None and not (isinstance(reservoir, tuple) and len(reservoir) == 2):
        raise InputError(f"{_WHO}: reservoir must be (kappa, sigma) or None, got {reservoir!r}")
    kappa, sigma = (1, 0) if reservoir is None else reservoir
    counts = {"rounds": (rounds, 0), "period": (1 if period is None else period, 1), "budget": (budget, len(x))}
    for name, (value, least) in (counts | {"reservoir[0]": (kappa, 1), "reservoir[1]": (sigma, 0)}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = ", a question for each of x" if name == "budget" else ""
            raise InputError(f"{_WHO}: {name} must be an integer >= {least}{why}, got {value!r}")
    if not 0 < step < math.inf:
        raise InputError(f"{_WHO}: step must be a number > 0, got {step}")
    with evaluating(substitute), torch.no_grad():
        logits = substitute(x[:1].clone())
    check_logits(logits, x[:1])
    return logits.shape[1]
