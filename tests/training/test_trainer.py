from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsrfast.attacks import PGD, OracleL2
from tsrfast.data import Split
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU, apply_masks, fan_out_scores, load_checkpoint, prune_masks
from tsrfast.training import OracleAdversarial, Piecewise, TeacherLogits, TrueLabels, train
from tsrfast.training import trainer as module
from tsrfast.training.trainer import epoch_order


def split(count: int = 22, seed: int = 0) -> Split:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 2, 7, 7), generator=g, dtype=torch.uint8)
    return Split(images, torch.randint(3, (count,), generator=g))


def net(seed: int = 0, batch_norm: bool = True) -> ConvReLU:
    return ConvReLU((4, 3), image=(2, 7, 7), classes=3, batch_norm=batch_norm, seed=seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def accuracy(data: Split, model: nn.Module) -> dict[str, float]:
    assert not model.training
    return {"accuracy": float((model(data.pixels()).argmax(1) == data.labels).double().mean())}


def shifted(images: Tensor, index: Tensor, epoch: int) -> Tensor:
    return images.roll(epoch, 3) + 0.01 * (index % 3).view(-1, 1, 1, 1)


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def callback(done: int, total: int, values: dict[str, float]) -> None:
        if done == step:
            raise Stop

    return callback


def settings(**changes: Any) -> dict[str, Any]:
    """3 epochs of 5 + 1 batches (22 = 5 * 4 + 2), so that the last batch of an epoch is smaller."""
    return {"epochs": 3, "batch_size": 4, "lr": "piecewise:0=0.05,2=0.01", "seed": 3, "save_at": (0, 1, 3), **changes}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_overfits_a_tiny_problem() -> None:
    model, data = net(), split(12)
    result = train(model, TrueLabels(), data, epochs=60, batch_size=4, lr="cosine:0.01", optimizer="adam")
    losses = [line["loss"] for line in result.metrics]
    assert losses[0] > 0.7
    assert losses[-1] < 0.05
    assert accuracy(data, model.eval()) == {"accuracy": 1.0}


def test_student_of_a_teacher_learns_its_logits() -> None:
    student, teacher = net(1, batch_norm=False), net(2, batch_norm=False)
    result = train(student, TeacherLogits(teacher), split(16), epochs=40, batch_size=8, lr=0.1, momentum=0.9)
    assert result.metrics[-1]["loss"] < 0.05 * result.metrics[0]["loss"]


@pytest.mark.parametrize(
    ("name", "options"), [("sgd", {"momentum": 0.9, "weight_decay": 0.01}), ("adam", {"weight_decay": 0.01})]
)
def test_equals_a_loop_written_by_hand(name: str, options: dict[str, float]) -> None:
    data, model, other = split(), net().double(), net().double()
    arguments = settings(lr=Piecewise({0: 0.05, 2: 0.01}), optimizer=name, save_at=())
    result = train(model, TrueLabels(), data, **arguments, **options)
    solver = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name](other.parameters(), lr=9.0, **options)
    lines = []
    for epoch in range(3):
        order, losses = epoch_order(22, 3, epoch).tolist(), []
        for start in range(0, 22, 4):
            chosen = order[start : start + 4]
            solver.param_groups[0]["lr"] = 0.05 if epoch < 2 else 0.01
            loss = nn.functional.cross_entropy(other(data.pixels(torch.tensor(chosen)).double()), data.labels[chosen])
            solver.zero_grad()
            loss.backward()
            solver.step()
            losses += [loss.item()] * len(chosen)
        rate = 0.05 if epoch < 2 else 0.01
        lines.append({"epoch": epoch + 1, "step": 6 * epoch + 6, "lr": rate, "loss": sum(losses) / 22})
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert [{**line, "loss": pytest.approx(line["loss"])} for line in lines] == result.metrics
    assert (result.steps, result.resumed_at, result.snapshots) == (18, 0, {})


def test_every_epoch_visits_every_image_once_in_another_order() -> None:
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 6
    assert epoch_order(50, 1, 2).tolist() == list(orders[5])


def test_global_random_state_neither_matters_nor_changes() -> None:
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        before, model = torch.get_rng_state(), net()
        train(model, TrueLabels(), split(), **settings(save_at=()))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("every", [0.0, 3.5, math.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 5e-4}, {"optimizer": "adam", "lr": 0.01}],
    ids=["sgd", "momentum", "adam"],
)
def test_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], every: float) -> None:
    """Stopped three times, anywhere; state saved every step, every fourth tick of the clock, or at the end only."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks))
    data = split()
    extra = {"augment": shifted, "evaluate": functools.partial(accuracy, data), "checkpoint_every": every}
    arguments = settings(**options, **extra)
    whole = net()
    wanted = train(whole, TrueLabels(), data, folder=tmp_path / "whole", **arguments)
    for step in (3, 6, 13):
        with pytest.raises(Stop):
            train(net(), TrueLabels(), data, folder=tmp_path / "cut", on_progress=stop_at(step), **arguments)
    model, steps = net(), []
    arguments["on_progress"] = lambda step, total, values: steps.append((step, total))
    result = train(model, TrueLabels(), data, folder=tmp_path / "cut", **arguments)
    assert same(weights(model), weights(whole))
    assert result.metrics == wanted.metrics
    assert result.resumed_at == {0.0: 13, 3.5: 12, math.inf: 0}[every]
    assert steps == [(s, 18) for s in range(result.resumed_at + 1, 19)]
    # Weights, optimiser state, metrics, snapshots: every byte of every file.
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert sorted(files(tmp_path / "cut")) == [
        *(f"epoch_{e:04d}.safetensors" for e in (0, 1, 3)),
        "metrics.jsonl",
        "state.safetensors",
    ]


@pytest.mark.parametrize("place", ["objective", "after_step", "evaluate", "save_state", "save_checkpoint"])
def test_resumes_after_a_failure_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    data, armed = split(), [False]

    def fail_sometimes(*_: Any) -> dict[str, float]:
        if armed[0]:
            raise Stop
        return {}

    class Fragile(TrueLabels):
        def __call__(self, student: nn.Module, images: Tensor, labels: Tensor, index: Tensor, epoch: int) -> Tensor:
            if place == "objective" and len(index) == 2:
                fail_sometimes()
            return super().__call__(student, images, labels, index, epoch)

    arguments = settings(checkpoint_every=0, momentum=0.5)
    arguments |= {name: fail_sometimes for name in ("after_step", "evaluate") if name == place}
    train(net(), Fragile(), data, folder=tmp_path / "whole", **arguments)
    if place.startswith("save_"):
        original = getattr(module, place)

        def broken(*a: Any, **k: Any) -> None:
            if not (place == "save_checkpoint" and "0000" in str(a[0])):
                fail_sometimes()
            original(*a, **k)

        monkeypatch.setattr(module, place, broken)
    armed[0] = True
    with pytest.raises(Stop):
        train(net(), Fragile(), data, folder=tmp_path / "cut", **arguments)
    armed[0] = False
    train(net(), Fragile(), data, folder=tmp_path / "cut", **arguments)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_metrics_lines_after_the_saved_state_are_dropped(tmp_path: Path) -> None:
    arguments = settings(folder=tmp_path, checkpoint_every=0)
    with pytest.raises(Stop):
        train(net(), TrueLabels(), split(), on_progress=stop_at(8), **arguments)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "step": 12, "loss": 1.0}\n{"epo')
    with pytest.raises(Stop):
        train(net(), TrueLabels(), split(), on_progress=stop_at(9), **arguments)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1]
    train(net(), TrueLabels(), split(), **arguments)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 12), (3, 18)]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first, again = net(), net()
    wanted = train(first, TrueLabels(), split(), folder=tmp_path, **settings())
    before = files(tmp_path)
    result = train(again, TrueLabels(), split(), folder=tmp_path, on_progress=stop_at(18), **settings())
    assert same(weights(first), weights(again))
    assert result.resumed_at == 18
    assert result.metrics == wanted.metrics
    assert files(tmp_path) == before
    (tmp_path / "epoch_0001.safetensors").unlink()
    with pytest.raises(InputError, match=r"epoch_0001.safetensors is gone; remove .*state.safetensors"):
        train(net(), TrueLabels(), split(), folder=tmp_path, **settings())


def test_snapshots_are_the_models_of_their_epochs(tmp_path: Path) -> None:
    seen = []
    model = net()
    arguments = settings(folder=tmp_path, save_at=(3, 0, 1), evaluate=lambda m: seen.append(weights(m)) or {})
    result = train(model, TrueLabels(), split(), **arguments)
    assert list(result.snapshots) == [0, 1, 3]
    for epoch, wanted in ((0, weights(net())), (1, seen[0]), (3, seen[2])):
        loaded, metadata = load_checkpoint(result.snapshots[epoch])
        assert same(weights(loaded), wanted)
        assert metadata["training"]["epoch"] == epoch
        assert metadata["training"]["step"] == 6 * epoch
        assert metadata["training"]["objective"] == "cross_entropy"
    assert same(seen[2], weights(model))


def test_masks_hold_through_training_and_resume(tmp_path: Path) -> None:
    def masked() -> tuple[ConvReLU, list[Tensor]]:
        model = net()
        masks = prune_masks(model, [0.5, 0.4])
        apply_masks(model, masks)
        return model, masks

    model, masks = masked()
    mask_again = functools.partial(apply_masks, masks=masks)
    arguments = settings(folder=tmp_path, momentum=0.9, checkpoint_every=0, after_step=mask_again)
    with pytest.raises(Stop):
        train(model, TrueLabels(), split(), on_progress=stop_at(7), **arguments)
    model, _ = masked()
    train(model, TrueLabels(), split(), **arguments)
    for layer, mask in enumerate(masks):
        assert (fan_out_scores(model, layer) == 0).tolist() == (~mask).tolist()
    arguments["after_step"] = functools.partial(apply_masks, masks=[~m for m in masks])
    with pytest.raises(InputError, match="differs in after_step"):
        train(masked()[0], TrueLabels(), split(), **arguments)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    message = r"loss must stay finite, got (nan|inf) at step \d+ \(epoch \d+\) with lr 1e\+30"
    with pytest.raises(InputError, match=message):
        train(net(batch_norm=False), TrueLabels(), split(), epochs=5, batch_size=4, lr=1e30)


def test_progress_reports_loss_and_rate() -> None:
    seen = []
    result = train(net(), TrueLabels(), split(), on_progress=lambda *a: seen.append(a), **settings(save_at=()))
    assert [s for s, _, _ in seen] == list(range(1, 19))
    assert [v["lr"] for _, _, v in seen] == [0.05] * 12 + [0.01] * 6
    first = [v["loss"] * n for (_, _, v), n in zip(seen[:6], [4, 4, 4, 4, 4, 2], strict=True)]
    assert result.metrics[0]["loss"] == pytest.approx(sum(first) / 22)


def test_the_number_of_threads_changes_nothing() -> None:
    """PyTorch's gradients of weights are sums over a batch that its threads cut up; the attack in the loop has as many as it likes."""
    g = torch.Generator().manual_seed(1)
    data = Split(torch.randint(256, (96, 3, 16, 16), generator=g, dtype=torch.uint8), torch.zeros(96, dtype=torch.int64))
    teacher, before, ends = ConvReLU((16, 16), image=(3, 16, 16), seed=2), torch.get_num_threads(), []
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=2, loss=OracleL2(teacher))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            student = ConvReLU((16, 16), image=(3, 16, 16), seed=1)
            train(student, OracleAdversarial(teacher, attack), data, epochs=2, batch_size=48, lr=0.1)
            assert torch.get_num_threads() == threads  # held in the loop only
            ends.append(weights(student))
    finally:
        torch.set_num_threads(before)
    assert all(same(end, ends[0]) for end in ends)
