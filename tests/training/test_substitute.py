"""Substitute training: the augmentation, the questions it asks, and that what it learns transfers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast._identity import digest
from tsrfast.attacks import FGSM
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.training import train_substitute, trainer
from tsrfast.training.substitute import QUESTIONS, jacobian_step, periodic_step, reservoir_sample
from tsrfast.training.trainer import epoch_order

IMAGE = (2, 7, 7)


def net(seed: int = 0, dtype: torch.dtype = torch.float32, batch_norm: bool = False) -> ConvReLU:
    return ConvReLU((4, 3), image=IMAGE, classes=4, batch_norm=batch_norm, seed=seed).to(dtype)


def pictures(count: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Oracle:
    """Labels alone: the brightest of four patches. Counts and keeps the questions; fails at the one it is told to."""

    def __init__(self, fail_at: int = -1) -> None:
        self.asked: list[Tensor] = []
        self.fail_at = fail_at

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(x.clone())
        patches = x.mean(1)[:, :6, :6].reshape(-1, 2, 3, 2, 3).mean((2, 4)).flatten(1)
        x.zero_()  # what it does to its copy is nobody's concern
        return patches.argmax(1)

    @property
    def questions(self) -> int:
        return sum(map(len, self.asked))


def weights(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def quick(**changes: Any) -> dict[str, Any]:
    return {"budget": 100, "rounds": 4, "reservoir": (5, 2), "epochs": 2, "batch_size": 8, "lr": 0.01, **changes}


def row_of_jacobian(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """d z_label / d x, from the whole Jacobian, image by image and class by class."""
    rows = []
    for image, label in zip(x, labels.tolist(), strict=True):
        each = []
        for k in range(4):
            leaf = image[None].clone().requires_grad_()
            model(leaf)[0, k].backward()
            assert leaf.grad is not None
            each.append(leaf.grad[0])
        rows.append(torch.stack(each)[label])
    return torch.stack(rows)


@pytest.mark.parametrize("step", [0.1, -0.1])
def test_step_is_the_sign_of_the_labels_row_of_the_jacobian(step: float) -> None:
    model, x = net(1, torch.float64).eval(), pictures(dtype=torch.float64)
    with torch.no_grad():
        next(model.parameters())[:, 1] = 0  # no gradient in the second channel: sign(0) is 0
    labels = torch.randint(4, (9,), generator=torch.Generator().manual_seed(3))
    signs = row_of_jacobian(model, x, labels).sign()
    got = jacobian_step(model, x, labels, step)
    assert torch.equal(got, (x + step * signs).clamp(0, 1))
    assert torch.equal(got[:, 1], x[:, 1])
    inside = (got > 0) & (got < 1) & (signs != 0)
    assert inside.any()
    torch.testing.assert_close((got - x)[inside].abs(), torch.full_like(x, 0.1)[inside])


def test_step_does_not_depend_on_how_images_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, labels = net(1, torch.float64), pictures(dtype=torch.float64), torch.arange(9) % 4
    whole = jacobian_step(model, x, labels, 0.1)
    monkeypatch.setattr("tsrfast.training.substitute._PIECE", 4)
    assert torch.equal(jacobian_step(model, x, labels, 0.1), whole)


def test_step_changes_its_sign_periodically() -> None:
    assert [periodic_step(0.1, 3, r) for r in range(10)] == [0.1] * 3 + [-0.1] * 3 + [0.1] * 3 + [-0.1]
    assert [periodic_step(0.1, 1, r) for r in range(3)] == [0.1, -0.1, 0.1]
    assert [periodic_step(0.1, None, r) for r in range(9)] == [0.1] * 9


def test_equals_the_algorithm_written_by_hand() -> None:
    """Two rounds in float64 with another loop of training and another Jacobian, the second with the reservoir and the step reversed."""
    x, model, oracle = pictures(dtype=torch.float64), net(1, torch.float64, True), Oracle()
    model.train()
    result = train_substitute(oracle, model, x, **quick(rounds=2, period=1, reservoir=(7, 1), step=0.07, seed=4))
    ask = torch.no_grad()(Oracle())
    points, labels = x.clone(), ask(x.clone())
    for round in range(3):
        other = net(1, torch.float64, True)  # each training starts anew
        solver = torch.optim.Adam(other.parameters(), lr=0.01)
        for epoch in range(2):
            for rows in epoch_order(len(points), 4, epoch).split(8):
                solver.zero_grad()
                F.cross_entropy(other(points[rows]), labels[rows]).backward()
                solver.step()
        other.eval()
        if round < 2:
            kept = torch.arange(9)
            if round == 1:  # the reservoir as it is written: an image at a time
                random = torch.Generator().manual_seed(int(digest(["reservoir", 4, 1])[:15], 16))
                kept = torch.arange(7)
                for i in range(7, 18):
                    place = int(torch.rand(1, generator=random, dtype=torch.float64) * (i + 1))
                    if place < 7:
                        kept[place] = i
            signs = row_of_jacobian(other, points[kept], labels[kept]).sign()
            new = (points[kept] + (0.07 if round == 0 else -0.07) * signs).clamp(0, 1)
            labels = torch.cat([labels, ask(new.clone())])
            points = torch.cat([points, new])
    assert result.queries == (9, 9, 7)
    torch.testing.assert_close(result.x, points, rtol=0, atol=1e-12)
    assert torch.equal(result.labels, labels)
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not model.training
    assert len(result.losses) == 3
    assert [len(a) for a in oracle.asked] == [9, 9, 7]
    assert torch.equal(torch.cat(oracle.asked), result.x)


def test_reservoir_is_uniform() -> None:
    """6000 draws of 12 of 40: each item 1800 times but for chance, any two together as often as any other two."""
    draws, size, count = 6000, 12, 40
    hits = torch.zeros(draws, count)
    for d in range(draws):
        chosen = reservoir_sample(count, size, seed=d % 100, round=d // 100)
        hits[d, chosen] = 1
    assert (hits.sum(1) == size).all()
    p = size / count
    times = hits.sum(0).double()
    chi_square = float(((times - draws * p) ** 2 / (draws * p * (1 - p))).sum()) * (count - 1) / count
    assert 16.3 < chi_square < 72.1  # 39 degrees of freedom: 0.05 % on either side
    assert ((times - draws * p).abs() < 4 * math.sqrt(draws * p * (1 - p))).all()
    pairs = (hits.T @ hits).double()[~torch.eye(count, dtype=torch.bool)]
    together = p * (size - 1) / (count - 1)
    assert ((pairs - draws * together).abs() < 5 * math.sqrt(draws * together * (1 - together))).all()


def test_reservoir_takes_all_where_there_are_no_more() -> None:
    assert reservoir_sample(5, 5, seed=0, round=0).tolist() == [0, 1, 2, 3, 4]
    assert reservoir_sample(5, 9, seed=0, round=0).tolist() == [0, 1, 2, 3, 4]
    assert len({tuple(reservoir_sample(50, 5, seed=s, round=r).tolist()) for s in range(3) for r in range(3)}) == 9


@example_settings(max_examples=25, deadline=None)
@example(4, 4, (5, 1), 11)  # the budget ends in a round of the reservoir
@example(4, 4, (5, 1), 4)  # with a round
@example(4, 4, None, 17)  # in a round that doubles
@given(
    st.integers(1, 5),
    st.integers(0, 4),
    st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(0, 4))),
    st.integers(0, 60),
)
def test_questions_are_counted_and_the_budget_holds(n: int, rounds: int, reservoir: tuple[int, int] | None, spare: int) -> None:
    oracle, budget = Oracle(), n + spare
    result = train_substitute(
        oracle, net(), pictures(n), **quick(budget=budget, rounds=rounds, reservoir=reservoir, epochs=1, batch_size=64)
    )
    want = [n]
    for round in range(rounds):
        new = sum(want) if reservoir is None or round < reservoir[1] else min(reservoir[0], sum(want))
        new = min(new, budget - sum(want))
        want += [new] if new else []
    assert list(result.queries) == want == [len(a) for a in oracle.asked]
    assert len(result.x) == len(result.labels) == sum(want) == oracle.questions <= budget
    assert len(result.losses) == len(want)
    assert torch.equal(result.x[:n], pictures(n))
    assert ((result.x >= 0) & (result.x <= 1)).all()
    if reservoir is not None and n * 2 ** reservoir[1] >= reservoir[0] and rounds >= reservoir[1]:
        assert sum(want) == min(budget, n * 2 ** reservoir[1] + reservoir[0] * (rounds - reservoir[1]))
    if reservoir is None:
        assert sum(want) == min(budget, n * 2**rounds)


def test_depends_on_nothing_but_the_seed() -> None:
    runs = []
    for state, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(state)
        before, model, x = torch.get_rng_state(), net(), pictures()
        runs.append((train_substitute(Oracle(), model, x, **quick(seed=seed)), weights(model)))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(x, pictures())
    (first, w), (again, v), (other, u) = runs
    assert same(w, v)
    assert torch.equal(first.x, again.x)
    assert (first.queries, first.losses) == (again.queries, again.losses)
    assert not same(w, u)
    assert not torch.equal(first.x, other.x)


def test_another_thread_count_changes_roundings_alone() -> None:
    """In float64, where no gradient here is near enough to 0 for its sign to turn."""
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model, x = net(0, torch.float64), pictures(40, dtype=torch.float64)
            runs.append((train_substitute(Oracle(), model, x, **quick(rounds=2, epochs=1, batch_size=64)), weights(model)))
    finally:
        torch.set_num_threads(before)
    (a, w), (b, v) = runs
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)
    assert torch.equal(a.labels, b.labels)
    for s, t in zip(w, v, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_goes_on_without_asking_again(tmp_path: Path, fail_at: int) -> None:
    whole, model = Oracle(), net()
    want = train_substitute(whole, model, pictures(), **quick())
    first = Oracle(fail_at)
    with pytest.raises(KeyboardInterrupt):
        train_substitute(first, net(), pictures(), **quick(folder=tmp_path))
    second, resumed = Oracle(), net()
    got = train_substitute(second, resumed, pictures(), **quick(folder=tmp_path))
    assert first.questions + second.questions == whole.questions
    assert torch.equal(torch.cat(first.asked + second.asked), want.x)
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.labels, want.labels)
    assert (got.queries, got.losses) == (want.queries, want.losses)
    assert same(weights(resumed), weights(model))
    third, finished = Oracle(), net()
    again = train_substitute(third, finished, pictures(), **quick(folder=tmp_path))
    assert third.questions == 0
    assert (again.queries, again.losses) == (want.queries, want.losses)
    assert same(weights(finished), weights(model))


def test_goes_on_in_the_middle_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, model = train_substitute(Oracle(), net(), pictures(), **quick()), net()
    train, left = trainer.train, [2]

    def stopped(*args: Any, **options: Any) -> Any:
        left[0] -= 1

        def stop(done: int, total: int, values: dict[str, float]) -> None:
            if left[0] < 0 and done == total - 1:
                raise KeyboardInterrupt

        return train(*args, **options, on_progress=stop, checkpoint_every=0.0)

    first, second = Oracle(), Oracle()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_substitute(first, net(), pictures(), **quick(folder=tmp_path))
    got = train_substitute(second, model, pictures(), **quick(folder=tmp_path))
    assert [len(a) for a in first.asked + second.asked] == list(want.queries)
    assert torch.equal(got.x, want.x)
    assert got.losses == want.losses


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    train_substitute(Oracle(), net(), pictures(), **quick(folder=tmp_path, rounds=1))
    for change in ({"step": 0.2}, {"period": 2}, {"reservoir": None}, {"budget": 99}, {"rounds": 2}, {"lr": 0.02}, {"seed": 1}):
        oracle, (name,) = Oracle(), change
        with pytest.raises(
            InputError, match=f"folder must be empty or hold a run of the same settings, got .* differs in {name}"
        ):
            train_substitute(oracle, net(), pictures(), **quick(folder=tmp_path, **{"rounds": 1, **change}))
        assert not oracle.asked
    with pytest.raises(InputError, match="differs in substitute, x"):
        train_substitute(Oracle(), net(5), pictures(seed=1), **quick(folder=tmp_path, rounds=1))
    (tmp_path / QUESTIONS).write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        train_substitute(Oracle(), net(), pictures(), **quick(folder=tmp_path, rounds=1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda x: torch.zeros(len(x), 4),
            r"oracle must return int64 labels of shape \(9,\), got torch.float32 of shape \(9, 4\); .*",
        ),
        (
            lambda x: torch.zeros(len(x)),
            r"got torch.float32 of shape \(9,\); to ask a network: lambda x: network\(x\).argmax\(1\)",
        ),
        (lambda x: torch.zeros(len(x), 1, dtype=torch.int64), r"got torch.int64 of shape \(9, 1\)"),
        (lambda x: torch.zeros(len(x), dtype=torch.int32), "got torch.int32"),
        (lambda x: [0] * len(x), "got list"),
        (lambda x: torch.full((len(x),), 4), r"oracle must return labels in 0\.\.3, the substitute's classes, got 4"),
        (lambda x: torch.full((len(x),), -1), "got -1"),
        (net(2), r"got torch.float32 of shape \(9, 4\)"),
    ],
)
def test_refuses_what_is_no_label(answer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_substitute(answer, net(), pictures(), **quick())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 8}, "budget must be an integer >= 9, a question for each of x, got 8"),
        ({"budget": 50.0}, "budget must be an integer"),
        ({"rounds": -1}, "rounds must be an integer >= 0, got -1"),
        ({"period": 0}, "period must be an integer >= 1, got 0"),
        ({"reservoir": (0, 2)}, r"reservoir\[0\] must be an integer >= 1, got 0"),
        ({"reservoir": (4, -1)}, r"reservoir\[1\] must be an integer >= 0"),
        ({"reservoir": 4}, r"reservoir must be \(kappa, sigma\) or None, got 4"),
        ({"step": 0}, "step must be a number > 0, got 0"),
        ({"step": math.nan}, "step must be a number > 0, got nan"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"lr": "cosin:0.1"}, "unknown learning-rate schedule"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm'"),
        ({"x": pictures() * 255}, "x must be pixels in .* divide by 255"),
        ({"x": (pictures() * 255).to(torch.uint8)}, "x must be a floating-point tensor"),
        ({"x": pictures().fill_(math.nan)}, "x must be finite"),
        ({"x": pictures().flatten(1)}, r"x must be images \[N, C, H, W\], at least one, got shape \(9, 98\)"),
        ({"x": pictures(0)}, "at least one"),
        ({"x": pictures().double()}, "x must be as the substitute's weights, torch.float32 on cpu, got torch.float64 on cpu"),
        ({"substitute": len}, "substitute must be an nn.Module, got builtin"),
        ({"substitute": nn.Sequential(nn.Flatten(0))}, r"model must return logits \[1, classes\]"),
    ],
)
def test_bad_arguments_cost_no_question(change: dict[str, Any], message: str) -> None:
    oracle = Oracle()
    given_ = {"substitute": net(), "x": pictures(), **quick(**change)}
    with pytest.raises(InputError, match=message):
        train_substitute(oracle, given_.pop("substitute"), given_.pop("x"), **given_)
    assert not oracle.asked


def test_learns_from_labels_what_transfers() -> None:
    """A small task: 40 images of the attacker's own and 300 questions in all; judged on images of neither's training.

    On six seeds FGSM on the substitute took 67 to 93 % of the images from the oracle, noise of its length at most 7 %.
    """
    r, image = torch.Generator().manual_seed(0), (1, 10, 10)
    templates = torch.rand(5, *image, generator=r)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(5, (count,), generator=r)
        return (templates[y] * 0.4 + 0.3 + 0.12 * torch.randn(count, *image, generator=r)).clamp(0, 1), y

    oracle, (x, y) = ConvReLU((8, 8), image=image, classes=5, seed=0), sample(512)
    solver = torch.optim.Adam(oracle.parameters(), lr=0.01)
    for _ in range(40):
        solver.zero_grad()
        F.cross_entropy(oracle(x), y).backward()
        solver.step()

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad():
            return oracle.eval()(x).argmax(1)

    own, (x, y) = sample(40)[0], sample(400)
    right = ask(x) == y

    def learned(**options: Any) -> tuple[float, float]:
        """Agreement with the oracle, and how many of the images it classifies correctly the substitute's FGSM takes from it."""
        substitute = ConvReLU((6, 6), image=image, classes=5, seed=100)
        done = train_substitute(ask, substitute, own, epochs=20, batch_size=32, lr=0.003, budget=300, **options)
        assert sum(done.queries) <= 300
        agreement = float((substitute(x).argmax(1) == ask(x)).double().mean())
        return agreement, float((ask(FGSM(eps=0.15)(substitute, x, y)) != y)[right].double().mean())

    noise = (x + 0.15 * torch.where(torch.rand(x.shape, generator=r) < 0.5, -1.0, 1.0)).clamp(0, 1)
    by_noise = float((ask(noise) != y)[right].double().mean())
    (before, _), (agreement, transfer) = learned(rounds=0), learned(rounds=6, reservoir=(40, 2))
    assert right.double().mean() > 0.9
    assert agreement > before + 0.08
    assert agreement > 0.9
    assert transfer > by_noise + 0.3
