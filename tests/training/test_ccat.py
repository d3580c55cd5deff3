"""CCAT and its attack against a loop over single images in float64, written out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tsrfast.attacks import PGD, OracleMaxDifference
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.training import CCAT, Backtracking
from tsrfast.training.objectives.ccat import soft_labels

EPS = 0.1


def net(seed: int, **more) -> ConvReLU:
    return ConvReLU((3, 2), image=(1, 6, 6), classes=4, seed=seed, **more).double()


def batch(count: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 6, 6, generator=g).double()
    return x, torch.randint(4, (count,), generator=g), torch.randperm(100, generator=g)[:count]


def objective(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    """max_k |s_k - t_k| of one image."""
    with torch.no_grad():
        return max(abs(a - b) for a, b in zip(student(x[None])[0].tolist(), teacher(x[None])[0].tolist(), strict=True))


def slope(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    difference = student(leaf[None])[0] - teacher(leaf[None])[0]
    k = max(range(len(difference)), key=lambda k: abs(difference[k].item()))
    return torch.autograd.grad(difference[k] * (1 if difference[k] > 0 else -1), leaf)[0]


def by_hand(student, teacher, x0, x, eps, step_size, steps, momentum, factor) -> tuple[Tensor, list[bool]]:
    """One image, pixel by pixel; also which steps were taken."""
    velocity, step, taken = torch.zeros_like(x), step_size, []
    for _ in range(steps):
        g = slope(student, teacher, x)
        moved = x.clone()
        for place in torch.cartesian_prod(*(torch.arange(s) for s in x.shape)).tolist():
            p = tuple(place)
            velocity[p] = momentum * velocity[p] + (1 - momentum) * ((g[p] > 0).double() - (g[p] < 0).double())
            there = min(max(x[p] + step * velocity[p], x0[p] - eps), x0[p] + eps)
            moved[p] = min(max(there, 0.0), 1.0)
        taken.append(objective(student, teacher, moved) >= objective(student, teacher, x))
        if taken[-1]:
            x = moved
        else:
            step /= factor
    return x, taken


@pytest.mark.parametrize(("momentum", "step_size"), [(0.9, 0.05), (0.0, 0.5)])
def test_the_attack_is_the_loop_by_hand(momentum: float, step_size: float) -> None:
    student, teacher, (x, _, index) = net(0), net(1), batch()
    attack = Backtracking(OracleMaxDifference(teacher), eps=EPS, step_size=step_size, steps=12, momentum=momentum, seed=4)
    got = attack.run(student, x, index=index)
    start, seen = attack.start(x, index), []
    for i in range(len(x)):
        wanted, taken = by_hand(student, teacher, x[i], start[i], EPS, step_size, 12, momentum, 1.5)
        torch.testing.assert_close(got.x_adv[i], wanted, rtol=0, atol=1e-12)
        assert got.loss[i].item() == pytest.approx(objective(student, teacher, wanted), rel=1e-10)
        seen += taken
    assert got.queries.tolist() == [13] * 7
    assert True in seen
    assert False in seen  # both branches were walked


def test_a_step_that_changes_nothing_is_taken() -> None:
    """Beyond the cap the loss is flat, and momentum goes on."""

    class Capped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4].clamp(max=0.55)

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :4]

    student, teacher, index = Capped(), Zero(), torch.arange(5)
    x = torch.full((5, 1, 2, 3), 0.5, dtype=torch.float64)
    attack = Backtracking(OracleMaxDifference(teacher), eps=EPS, step_size=0.05, steps=10)
    got, start = attack(student, x, index=index), attack.start(x, index)
    for i in range(5):
        wanted, taken = by_hand(student, teacher, x[i], start[i], EPS, 0.05, 10, 0.9, 1.5)
        torch.testing.assert_close(got[i], wanted, rtol=0, atol=1e-12)
        assert all(taken)
    assert (got.flatten(1)[:, :4].amax(1) > 0.56).any()


def test_the_loss_never_falls_and_the_image_stays_in_ball_and_box() -> None:
    student, teacher, (x, _, index) = net(0), net(1), batch(30)
    values = []
    for steps in range(8):
        got = Backtracking(OracleMaxDifference(teacher), eps=EPS, step_size=0.3, steps=steps).run(student, x, index=index)
        values.append(got.loss)
        assert (got.x_adv - x).abs().max() <= EPS + 1e-15
        assert got.x_adv.min() >= 0
        assert got.x_adv.max() <= 1
    assert all((b >= a).all() for a, b in itertools.pairwise(values))


def test_starts_lie_at_every_distance_and_depend_on_seed_and_number_alone() -> None:
    x = torch.full((4000, 1, 4, 4), 0.5, dtype=torch.float64)
    index = torch.arange(4000)
    attack = Backtracking("cross_entropy", eps=EPS, seed=3)
    distance = (attack.start(x, index) - x).abs().flatten(1).amax(1) / EPS
    assert distance.max() <= 1
    # Kolmogorov-Smirnov against the uniform distribution; 1.95 / sqrt(n) is the bound at p = 0.001.
    assert (distance.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.95 / math.sqrt(4000)
    directions = attack.start(x, index) - x
    assert directions.mean(0).abs().max() < 5 * EPS / math.sqrt(4000)
    shuffled = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attack.start(x[shuffled], index[shuffled]), attack.start(x, index)[shuffled])
    assert not torch.equal(Backtracking("cross_entropy", eps=EPS, seed=4).start(x, index), attack.start(x, index))


def test_batch_cuts_do_not_change_it_and_nothing_else_is_touched() -> None:
    student, teacher, (x, y, index) = net(0).train(), net(1).train(), batch()
    attack = Backtracking(OracleMaxDifference(teacher), eps=EPS, steps=5)
    copy, random = x.clone(), torch.get_rng_state()
    whole = attack(student, x, y, index)
    for i in range(len(x)):
        torch.testing.assert_close(attack(student, x[i : i + 1], None, index[i : i + 1]), whole[i : i + 1])
    assert torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), random)
    assert student.training
    assert teacher.training
    assert all(p.grad is None for n in (student, teacher) for p in n.parameters())
    assert attack(student, x[:0], None, index[:0]).shape == (0, 1, 6, 6)


def test_native_networks_take_the_same_steps() -> None:
    student, teacher, (x, _, index) = net(0).float().eval(), net(1).float().eval(), batch()
    runs = [
        Backtracking(OracleMaxDifference(teacher), eps=EPS, steps=6, engine=engine).run(student, x.float(), index=index)
        for engine in ("chain", "eager")
    ]
    assert [r.path for r in runs] == ["chain", "eager"]
    torch.testing.assert_close(runs[0].x_adv, runs[1].x_adv, rtol=0, atol=1e-6)


def test_a_network_without_direction_gives_no_nan() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) - x.flatten(1)).sqrt()[:, :4]  # the slope at 0 is infinite, and 0 * inf is NaN

    x, _, index = batch()
    got = Backtracking(OracleMaxDifference(net(1)), eps=EPS, steps=3).run(Broken(), x, index=index)
    assert got.x_adv.isfinite().all()
    assert (got.bad_gradients > 0).all()


# --- soft labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [5, 10, 20])
def test_soft_labels(rho: float) -> None:
    distance = torch.tensor([0.0, 0.25, 1.0, 1.0 + 1e-9, 3.0], dtype=torch.float64)
    labels = torch.tensor([3, 1, 0, 2, 2])
    got = soft_labels(labels, distance, rho, 4)
    assert got[0].tolist() == [0, 0, 0, 1]  # lambda(0) = 1
    share = 0.75**rho
    assert got[1].tolist() == pytest.approx([(1 - share) / 4, share + (1 - share) / 4, (1 - share) / 4, (1 - share) / 4])
    for row in got[2:]:  # lambda(eps) = 0, and beyond
        assert row.tolist() == [0.25] * 4
    torch.testing.assert_close(got.sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_loss_by_hand(count: int) -> None:
    """Half a batch clean with whole labels, the rest attacked in eval mode with labels by the distance that was reached."""
    student, teacher, (x, y, index) = net(0), net(1), batch(count)
    attack = Backtracking(OracleMaxDifference(teacher), eps=EPS, steps=2, seed=10)
    loss = CCAT(teacher, attack, rho=5, eps=EPS)(student, x, y, index, 3)
    total = 0.0
    for i in range(count):
        target = max(range(4), key=teacher(x[i : i + 1])[0].tolist().__getitem__)
        moved, share = x[i : i + 1], 1.0
        if i >= count // 2:
            moved = Backtracking(OracleMaxDifference(teacher), eps=EPS, steps=2, seed=13)(
                student, moved, None, index[i : i + 1]
            )
            share = (1 - min(1.0, (moved - x[i]).abs().max().item() / EPS)) ** 5
        z = student(moved)[0].tolist()
        log_sum = math.log(sum(math.exp(v) for v in z))
        total -= sum((share * (k == target) + (1 - share) / 4) * (z[k] - log_sum) for k in range(4))
    assert loss.item() == pytest.approx(total / count, rel=1e-10)


def test_the_students_modes_and_graph() -> None:
    student, teacher, (x, y, index) = net(0, batch_norm=True).train(), net(1), batch()
    modes = []

    def attack(model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        modes.append(model.training)
        return x + 0.01 * model(x).mean()  # a graph that leads back into the student

    student.eval()
    fixed = attack(student, x[3:], y, index).detach()  # before training moves the running statistics
    student.train()
    modes.clear()
    loss = CCAT(teacher, attack, rho=5, eps=EPS)
    got = torch.autograd.grad(loss(student, x, y, index, 0), list(student.parameters()))
    assert modes == [False]
    assert student.training
    wanted = CCAT(teacher, lambda *_, **__: fixed, rho=5, eps=EPS)(student, x, y, index, 0)
    for a, b in zip(got, torch.autograd.grad(wanted, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_the_degenerate_variant_knows_neither_rho_nor_labels() -> None:
    """Every image at the rim: a uniform label for all of them, whatever rho; the best student says nothing."""
    student, teacher, (x, y, index) = net(0), net(1), batch()
    rim = PGD(eps=EPS, step_size=EPS, steps=8, loss=OracleMaxDifference(teacher))
    losses = [CCAT(teacher, rim, rho=r, eps=EPS, clean_share=0)(student, x, y, index, 0).item() for r in (5, 10, 20)]
    assert losses[0] == losses[1] == losses[2]
    moved = rim(student, x, y, index)
    wanted = -student(moved).log_softmax(1).mean()  # all classes weigh the same
    assert losses[0] == pytest.approx(wanted.item(), rel=1e-10)
    backtracking = Backtracking(OracleMaxDifference(teacher), eps=EPS, steps=8)
    others = [CCAT(teacher, backtracking, rho=r, eps=EPS)(student, x, y, index, 0).item() for r in (5, 10, 20)]
    assert len(set(others)) == 3


@pytest.mark.parametrize(
    "field", [{"rho": 0}, {"rho": math.inf}, {"eps": 0}, {"eps": math.nan}, {"clean_share": 1}, {"clean_share": -0.1}]
)
def test_bad_settings(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"CCAT: {next(iter(field))} must be"):
        CCAT(net(1), lambda *_: None, **{"rho": 5, "eps": EPS} | field)


@pytest.mark.parametrize(
    "field",
    [{"steps": -1}, {"eps": 0}, {"eps": math.inf}, {"step_size": 0}, {"step_size": math.nan}, {"momentum": 1}, {"momentum": -0.1},
     {"factor": 1}, {"factor": math.nan}],
)  # fmt: skip
def test_bad_settings_of_the_attack(field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(field))} must be"):
        Backtracking("cross_entropy", **field)


def test_bad_engine_and_loss() -> None:
    with pytest.raises(InputError, match="engine"):
        Backtracking("cross_entropy", engine="cuda")
    with pytest.raises(InputError, match="loss"):
        Backtracking("cross_entrpy")
