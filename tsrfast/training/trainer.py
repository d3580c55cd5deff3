"""The one training loop: deterministic batches, exact resume, snapshots, metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from tsrfast._files import atomic_write
from tsrfast._identity import describe, digest
from tsrfast._modes import evaluating
from tsrfast._threads import one_thread_for_torch
from tsrfast.errors import InputError, unknown
from tsrfast.nets.checkpoint import architecture, save_checkpoint
from tsrfast.training.objectives.protocol import Objective
from tsrfast.training.ranks import ALONE, Ranks
from tsrfast.training.schedule import Constant, Schedule, parse_schedule
from tsrfast.training.state import Progress, load_state, save_state

if TYPE_CHECKING:
    from tsrfast.data import Split

STATE, METRICS = "state.safetensors", "metrics.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        steps: steps of the whole run.
        resumed_at: the step at which this call took over (0: from the start; `steps`: the run was already finished).
        metrics: one dict per epoch: epoch (1-based), step, loss (mean over the epoch's images), lr (of its last step),
            and what `evaluate` returned.
        snapshots: epoch -> checkpoint file.
    """

    steps: int
    resumed_at: int
    metrics: list[dict[str, Any]]
    snapshots: dict[int, Path]


def train(
    model: nn.Module,
    objective: Objective,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: Schedule | float | str,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    augment: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    after_step: Callable[[nn.Module], object] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    save_at: Sequence[int] = (),
    folder: Path | None = None,
    checkpoint_every: float = 60.0,
    on_progress: Callable[[int, int, dict[str, float]], object] | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Train `model` in place on `split` and leave it in train mode.

    The order of the images is a permutation drawn from (seed, epoch); the last batch may be smaller. With a `folder`,
    the run can be killed at any moment: called again with the same arguments and a freshly built model, it goes on from
    its last saved state and ends with the same weights, bit for bit, as a run that was never stopped (same machine; the
    model and the callbacks must draw no random numbers from the global state). A finished run is not
    repeated: its weights are loaded and its result is returned. On the CPU, PyTorch is held to one thread, so that weights do not depend on
    the number of threads; native attacks in the objective use them all.

    Args:
        model: on the device where it is to be trained; on the CPU it is put in channels_last format, which is faster
            there.
        objective: the loss; see `tsrfast.training.objectives`.
        split: images and labels; its size is the size of an epoch.
        lr: a schedule, a constant rate, or a spelling that `parse_schedule` knows.
        optimizer: "sgd" (with `momentum`) or "adam"; `weight_decay` is the L2 term of either.
        augment: (pixels [N, C, H, W] on the model's device, index int64 [N], epoch 0-based) -> pixels, such as
            `tsrfast.data.augment.Augment`; for an exact resume it must depend on these alone.
        after_step: called with the model after every step, e.g. to zero pruned weights again.
        evaluate: called with the model in eval mode after every epoch; its numbers join the metrics.
        save_at: epochs after which the model is saved as `epoch_0005.safetensors`; 0 is the untrained model.
        folder: for the state, the metrics (`metrics.jsonl`) and the snapshots; made if it does not exist.
        checkpoint_every: seconds between saved states (0: every step); the end of the run is always saved.
        on_progress: called after every step with (steps done, all steps, {"loss", "lr"}).
        ranks: processes that all make this call with equal arguments and share each batch. Images, their order, augmentation and
            attacks are those of one process; gradients are summed in another order, so weights differ from those of one process by
            rounding, which many steps amplify. All processes end with the same weights. The first one writes to `folder`, which all
            must see; a run may go on with another number of processes.

    Raises:
        InputError: a wrong argument; a folder with a run of other settings; a loss that is not finite; batch normalisation, whose
            statistics are those of a whole batch, with several processes.
        EnvironmentFault: the folder cannot be written, or another of the processes has stopped.
    """
    rate = _schedule(lr)
    save_at = _check(model, split, epochs, batch_size, seed, save_at, folder, checkpoint_every)
    if ranks.size > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InputError(f"tsrfast.train: model must have no batch normalisation with {ranks.size} processes, got some")
    folder = None if folder is None else Path(folder)
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    if on_cpu:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    solver = _optimizer(optimizer, model, momentum, weight_decay)
    per_epoch = math.ceil(len(split) / batch_size)
    total = epochs * per_epoch
    progress = Progress()
    settings: dict[str, Any] = {}
    if folder is not None:
        described = {
            **{
                "model": model,
                "objective": objective,
                "split": split,
                "epochs": epochs,
                "batch_size": batch_size,
                "lr": rate,
            },
            **{
                "optimizer": optimizer,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "seed": seed,
                "augment": augment,
            },
            **{"after_step": after_step, "evaluate": evaluate, "save_at": save_at},
        }
        settings = {key: digest(describe(value)) for key, value in described.items()}
        if (folder / STATE).exists():
            progress = load_state(folder / STATE, model, solver, settings)
        if ranks.first:
            _write_metrics(folder, progress)  # drops the lines of epochs after the saved state
    resumed_at = progress.step
    snapshots = {} if folder is None else {epoch: folder / f"epoch_{epoch:04d}.safetensors" for epoch in save_at}
    _require([path for epoch, path in snapshots.items() if 0 < epoch * per_epoch <= resumed_at])

    def snapshot(epoch: int, metrics: Mapping[str, Any]) -> None:
        if epoch in snapshots and ranks.first:
            details = {
                "objective": objective.name,
                "epoch": epoch,
                "step": progress.step,
                "seed": seed,
                "metrics": dict(metrics),
            }
            save_checkpoint(snapshots[epoch], model, training=details)

    if progress.step == 0:
        snapshot(0, {})
    saved = time.monotonic()
    model.train()
    with one_thread_for_torch(device):  # weights must not depend on how many there are
        for epoch in range(progress.step // per_epoch, epochs):
            order = epoch_order(len(split), seed, epoch)
            for step in range(progress.step, (epoch + 1) * per_epoch):
                position = (step - epoch * per_epoch) * batch_size
                index = order[position : position + batch_size]
                mine = _part(objective, index, ranks)
                images, labels = _batch(model, split, mine, augment, epoch, on_cpu)
                step_lr = rate(step, per_epoch, total)
                value = objective(model, images, labels, mine.to(images.device), epoch)
                # Every process has the batch whole, or a part of it; its images count as they do in the whole.
                share = 1 / ranks.size if len(mine) == len(index) else len(mine) / len(index)
                loss = _step(solver, value, step, epoch, step_lr, ranks, share)
                if after_step is not None:
                    after_step(model)
                progress.step = step + 1
                progress.loss_sum += loss * len(index)
                progress.images += len(index)
                if progress.step == (epoch + 1) * per_epoch:
                    _end_epoch(model, progress, epoch, step_lr, evaluate)
                    snapshot(epoch + 1, progress.metrics[-1])
                    if folder is not None and ranks.first:
                        _write_metrics(folder, progress)
                if (
                    folder is not None
                    and ranks.first
                    and (progress.step == total or time.monotonic() - saved >= checkpoint_every)
                ):
                    save_state(folder / STATE, model, solver, settings, progress)
                    saved = time.monotonic()
                if on_progress is not None:
                    on_progress(progress.step, total, {"loss": loss, "lr": step_lr})
    return TrainResult(total, resumed_at, progress.metrics, snapshots)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order, int64 [count], in which epoch `epoch` (0-based) of a run with `seed` visits `count` images."""
    number = int(digest(["epoch order", seed, epoch])[:15], 16)
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))


def _batch(
    model: nn.Module,
    split: Split,
    index: Tensor,
    augment: Callable[[Tensor, Tensor, int], Tensor] | None,
    epoch: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    images = split.pixels(index).to(next(model.parameters()))  # device and dtype
    if augment is not None:
        images = augment(images, index, epoch)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, split.labels[index].to(images.device)


def _part(objective: Objective, index: Tensor, ranks: Ranks) -> Tensor:
    """This process's images of the batch `index`: all, where parts would not add up to the objective's value on the whole."""
    splits = getattr(objective, "splits", None)
    if len(index) < ranks.size or (splits is not None and not splits(len(index), ranks.size)):
        return index
    return index[ranks.part]


def _step(solver: Optimizer, loss: Tensor, step: int, epoch: int, lr: float, ranks: Ranks, share: float) -> float:
    """One optimiser step on the sum over `ranks` of `share` times `loss`; the sum as a number."""
    loss = share * loss
    solver.zero_grad(set_to_none=True)  # after the objective: an attack may leave gradients in the parameters
    loss.backward()
    value = ranks.sum_gradients((p for group in solver.param_groups for p in group["params"]), loss).item()
    if not math.isfinite(value):
        raise InputError(
            f"tsrfast.train: loss must stay finite, got {value} at step {step} (epoch {epoch}) with lr {lr:g}; try a smaller lr"
        )
    for group in solver.param_groups:
        group["lr"] = lr
    solver.step()
    return value


def _end_epoch(
    model: nn.Module,
    progress: Progress,
    epoch: int,
    lr: float,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
) -> None:
    """Add the epoch's metrics line and start the next epoch's sums."""
    line: dict[str, Any] = {
        "epoch": epoch + 1,
        "step": progress.step,
        "lr": lr,
        "loss": progress.loss_sum / progress.images,
    }
    if evaluate is not None:
        with evaluating(model):
            line |= {name: float(value) for name, value in evaluate(model).items()}
    progress.metrics.append(line)
    progress.loss_sum, progress.images = 0.0, 0


def _write_metrics(folder: Path, progress: Progress) -> None:
    # Sorted, as the saved state sorts them: a resumed run writes the same bytes.
    lines = (json.dumps(line, sort_keys=True) + "\n" for line in progress.metrics)
    atomic_write(folder / METRICS, "".join(lines))


def _optimizer(name: str, model: nn.Module, momentum: float, weight_decay: float) -> Optimizer:
    if name not in ("sgd", "adam"):
        raise unknown("optimizer", name, ("sgd", "adam"))
    if not (0 <= momentum < 1):
        raise InputError(f"tsrfast.train: momentum must be in [0, 1), got {momentum}")
    if not (0 <= weight_decay < math.inf):
        raise InputError(f"tsrfast.train: weight_decay must be a number >= 0, got {weight_decay}")
    # The rate is set before every step; the one given here is never used.
    if name == "sgd":
        return SGD(model.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise InputError(f"tsrfast.train: momentum must be 0 with optimizer 'adam', got {momentum}")
    return Adam(model.parameters(), lr=1.0, weight_decay=weight_decay)


def _schedule(lr: Schedule | float | str) -> Schedule:
    if isinstance(lr, str):
        return parse_schedule(lr)
    return lr if callable(lr) else Constant(lr)


def _check(
    model: nn.Module,
    split: Split,
    epochs: int,
    batch_size: int,
    seed: int,
    save_at: Sequence[int],
    folder: Path | None,
    checkpoint_every: float,
) -> tuple[int, ...]:
    """Refuse bad arguments; return `save_at` sorted, each epoch once."""
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"tsrfast.train: {name} must be an integer >= {least}, got {value!r}")
    if len(split) == 0:
        raise InputError("tsrfast.train: split must hold at least one image, got none")
    if not checkpoint_every >= 0:
        raise InputError(f"tsrfast.train: checkpoint_every must be seconds >= 0, got {checkpoint_every}")
    if any(isinstance(e, bool) or not isinstance(e, int) or not 0 <= e <= epochs for e in save_at):
        raise InputError(f"tsrfast.train: save_at must list epochs in 0..{epochs}, got {list(save_at)}")
    if save_at:
        if folder is None:
            raise InputError("tsrfast.train: folder must be given where save_at is")
        architecture(model)
    return tuple(sorted(set(save_at)))


def _require(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            advice = f"remove {path.parent / STATE} to train again"
            raise InputError(f"tsrfast.train: folder must still hold the snapshots of its run, {path} is gone; {advice}")
