"""The cascade: who is attacked, what counts as fallen, and interruption."""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tsrfast.attacks import APGD, CW, FGSM, PGD, OracleL2, Square, Transfer
from tsrfast.attacks.attack import Attack, Terms
from tsrfast.attacks.cascade import CascadeResult, inside, run_cascade
from tsrfast.attacks.loop import Attempt, Best
from tsrfast.attacks.threat import Threat
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)
EPS = 0.02
SUITE = {
    "fgsm": FGSM(eps=EPS / 2),
    "pgd": PGD(eps=EPS, step_size=EPS / 4, steps=8),
    "square": Square(eps=2.5 * EPS, queries=80),
}


def net(seed=0):
    return ConvReLU((8, 6), image=IMAGE, seed=seed).eval()


def batch(n, seed=0):
    return torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(seed))


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def case(n=30, wrong=4):
    """A network, images, and labels of which the first are wrong."""
    model, x = net(), batch(n)
    y = answers(model, x)
    y[:wrong] = (y[:wrong] + 1) % 10
    return model, x, y


class Log:
    """What attacks were asked; private, so no part of what a call is."""

    def __init__(self):
        self._seen = []


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed(Attack):
    """Returns what it is told, and says that it is adversarial."""

    offset: float = 0.0
    eps: float = 0.1
    lo: float = 0.0
    hi: float = 1.0
    log: Log = dataclasses.field(default_factory=Log)

    @property
    def seen(self):
        return self.log._seen

    def _terms(self):
        return Terms(Threat("linf", self.eps, self.lo, self.hi), None, False, 1, "eager")

    def _attack(self, network, x0, y, index, judge):
        self.seen.append(index.tolist())
        one = torch.ones_like(y)
        return Attempt(Best(x0 + self.offset, x0.new_zeros(len(x0)), one.bool()), one * 2, one * 3)


class Bright(nn.Module):
    """Class 1 where the mean pixel is over a half, else 0."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def equal(a: CascadeResult, b: CascadeResult) -> None:
    for field in ("x_adv", "clean", "robust", "fallen_to", "queries", "bad_gradients"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    for one, other in zip(a.stages, b.stages, strict=True):
        assert torch.equal(one.success, other.success)
        assert torch.equal(one.distance.nan_to_num(-1), other.distance.nan_to_num(-1))
        plain = ({k: v for k, v in vars(s).items() if k not in ("success", "distance", "seconds")} for s in (one, other))
        assert next(plain) == next(plain)


def test_each_attack_gets_what_stands():
    """Against the same attacks by hand."""
    model, x, y = case()
    got = run_cascade(model, x, y, SUITE, batch_size=7)
    assert got.clean.tolist() == [False] * 4 + [True] * 26
    standing, queries = got.clean.clone(), torch.zeros(30, dtype=torch.int64)
    fallen_to = torch.where(got.clean, -1, -2)
    for position, (stage, attack) in enumerate(zip(got.stages, SUITE.values(), strict=True)):
        rows = standing.nonzero().squeeze(1)
        alone = attack.run(model, x[rows], y[rows], rows)
        assert stage.attacked == len(rows)
        fallen = rows[alone.success]
        assert stage.success.nonzero().squeeze(1).tolist() == fallen.tolist()
        assert stage.fallen == len(fallen) > 0
        torch.testing.assert_close(got.x_adv[fallen], alone.x_adv[alone.success], rtol=0, atol=0)
        standing[fallen], fallen_to[fallen] = False, position
        queries[rows] += alone.queries
        assert stage.queries == int(alone.queries.sum())
        assert stage.robust_accuracy == pytest.approx(float(standing.double().mean()))
        assert (stage.refuted, stage.path) == (0, "chain")
    assert torch.equal(got.fallen_to, fallen_to)
    assert torch.equal(got.robust, standing)
    assert torch.equal(got.queries, queries)
    assert 0 < standing.sum() < 26
    assert torch.equal(got.x_adv[standing | ~got.clean], x[standing | ~got.clean])
    assert (answers(model, got.x_adv[got.fallen_to >= 0]) != y[got.fallen_to >= 0]).all()
    assert (got.clean_accuracy, got.robust_accuracy) == (pytest.approx(26 / 30), got.stages[-1].robust_accuracy)


def test_individually():
    model, x, y = case()
    together, alone = (run_cascade(model, x, y, SUITE, individually=i) for i in (False, True))
    assert [s.attacked for s in alone.stages] == [26] * 3
    for name, stage in zip(SUITE, alone.stages, strict=True):
        one = run_cascade(model, x, y, {name: SUITE[name]})
        assert torch.equal(one.stages[0].success, stage.success)
        assert one.robust_accuracy == stage.robust_accuracy
    assert torch.equal(together.robust, alone.robust)
    assert torch.equal(together.fallen_to, alone.fallen_to)
    assert torch.equal(together.x_adv, alone.x_adv)


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 40), n=st.integers(1, 30), seed=st.integers(0, 3))
def test_batches_do_not_matter(size, n, seed):
    model, x = net(seed), batch(n, seed)
    y = answers(model, x)
    attacks = {"apgd": APGD(eps=torch.linspace(0, EPS, n), steps=5), **SUITE}
    index = torch.arange(n) * 3 + 1
    kept, state = x.clone(), torch.get_rng_state()
    equal(
        run_cascade(model, x, y, attacks, index=index, batch_size=size),
        run_cascade(model, x, y, attacks, index=index, batch_size=1000),
    )
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_full():
    x, y = torch.full((10, 1, 2, 2), 0.45), torch.zeros(10, dtype=torch.int64)
    y[3], x[5] = 1, 0.2
    x[6] = 0.2
    first, second = Fixed(0.1), Fixed(0.0)
    got = run_cascade(Bright(), x, y, {"a": first, "b": second}, batch_size=4)
    assert first.seen == [[0, 1, 2, 4], [5, 6, 7, 8], [9]]
    assert second.seen == [[5, 6]]
    assert got.fallen_to.tolist() == [0, 0, 0, -2, 0, -1, -1, 0, 0, 0]
    assert [s.refuted for s in got.stages] == [2, 2]
    assert got.stages[0].bad_gradients == 2 * 9
    assert got.bad_gradients.tolist() == [2, 2, 2, 0, 2, 4, 4, 2, 2, 2]
    third = Fixed(0.0)
    run_cascade(Bright(), x[:1], y[:1], {"a": first, "b": third})
    assert third.seen == []  # nobody is left


@pytest.mark.parametrize(
    ("attack", "holds"),
    [
        (Fixed(0.1, eps=0.1), True),
        (Fixed(0.1, eps=0.0999), False),  # outside of the ball
        (Fixed(0.7, eps=1.0), False),  # outside of the box
        (Fixed(0.7, eps=1.0, hi=2.0), True),
        (Fixed(0.0), False),  # not adversarial
        (Fixed(math.nan), False),
    ],
)
def test_claims_are_checked(attack, holds):
    x, y = torch.full((3, 1, 2, 2), 0.45), torch.zeros(3, dtype=torch.int64)
    got = run_cascade(Bright(), x, y, {"fixed": attack})
    assert got.robust.tolist() == [not holds] * 3
    assert got.stages[0].refuted == (0 if holds else 3)
    assert torch.equal(got.x_adv == x, torch.full_like(x, not holds, dtype=torch.bool))


def test_rounding_is_inside_and_a_percent_is_not():
    x, r = batch(40), torch.Generator().manual_seed(5)
    for norm, p in (("linf", math.inf), ("l2", 2.0), ("l1", 1.0)):
        for dtype in (torch.float32, torch.float64):
            base = x.to(dtype)
            d = torch.randn(x.shape, generator=r).double() * 0.01
            d = d / torch.linalg.vector_norm(d.flatten(1), p, dim=1)[:, None, None, None] * 0.2
            d = torch.where((x + d > 1) | (x + d < 0), -d, d)
            d = torch.where((x + d > 1) | (x + d < 0), 0 * d, d)
            assert inside(base, (base.double() + d).to(dtype), Threat(norm, 0.2)).all()
            assert (inside(base, (base.double() + d).to(dtype), Threat(norm, 0.19)).double().mean()) < 0.5
    assert inside(x, x, Threat("l2", torch.zeros(40))).all()


class Stop(Exception):
    pass


@pytest.mark.parametrize("individually", [False, True])
@pytest.mark.parametrize("after", [1, 4, 7])
def test_resumes_exactly(tmp_path, after, individually):
    model, x, y = case()
    whole, told = run_cascade(model, x, y, SUITE, batch_size=7, individually=individually), []

    def stop(progress):
        told.append(progress)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cascade(model, x, y, SUITE, batch_size=7, individually=individually, checkpoint=tmp_path / "a", progress=stop)
    (tmp_path / "a" / ".00-00000.safetensors.x.part").write_bytes(b"of a kill")
    again = []
    resumed = run_cascade(
        model, x, y, SUITE, batch_size=7, individually=individually, checkpoint=tmp_path / "a", progress=again.append
    )
    equal(resumed, whole)
    assert not list((tmp_path / "a").glob(".*.part"))
    assert all(math.isnan(p.rate) for p in again[: 1 if after < 4 else 4])
    assert again[-1].rate > 0
    last = again[-1]
    assert (last.stage, last.position, last.stages, last.done) == ("square", 2, 3, last.images)
    assert last.standing == int(resumed.robust.sum())
    for p, q in zip(told, again, strict=False):  # what is read back is told as it was
        assert dataclasses.replace(p, rate=0) == dataclasses.replace(q, rate=0)
    done = run_cascade(model, x, y, SUITE, batch_size=7, individually=individually, checkpoint=tmp_path / "a")
    equal(done, whole)
    assert [s.seconds for s in done.stages] == [s.seconds for s in resumed.stages]


@dataclasses.dataclass(frozen=True, eq=False)
class FailsOnce(Fixed):
    def _attack(self, network, x0, y, index, judge):
        if not self.seen:
            self.seen.append("failed")
            raise Stop
        return super()._attack(network, x0, y, index, judge)


def test_an_attack_that_fails_leaves_what_resumes(tmp_path):
    x, y = torch.full((6, 1, 2, 2), 0.45), torch.zeros(6, dtype=torch.int64)
    first, second = Fixed(0.0), FailsOnce(0.1)
    call = functools.partial(run_cascade, Bright(), x, y, {"a": first, "b": second}, batch_size=4, checkpoint=tmp_path)
    with pytest.raises(Stop):
        call()
    assert not call().robust.any()
    assert first.seen == [[0, 1, 2, 3], [4, 5]]  # once
    assert second.seen == ["failed", [0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": batch(30, 1).clamp(0, 1)}, "images"),
        ({"y": torch.zeros(30, dtype=torch.int64)}, "labels"),
        ({"model": net(1)}, "model"),
        ({"batch_size": 8}, r"batch_size \(7 then, 8 now\)"),
        ({"index": torch.arange(30) + 1}, "index"),
        ({"individually": True}, r"individually \(False then, True now\)"),
        ({"attacks": {"fgsm": FGSM(eps=0.011)}}, r"attacks \(from 'fgsm' on: eps\)"),
        ({"attacks": {"fgsm": FGSM(eps=torch.full((30,), EPS))}}, r"attacks \(from 'fgsm' on: eps\)"),
        ({"attacks": {"fgsm": FGSM(eps=EPS), "pgd": PGD()}}, r"attacks \(from 'pgd' on\)"),
        ({"attacks": {"other": FGSM(eps=EPS)}}, r"attacks \(from 'other' on\)"),
    ],
)
def test_another_call_is_refused(tmp_path, change, said):
    model, x, y = case()
    call = {"model": model, "x": x, "y": y, "attacks": {"fgsm": FGSM(eps=EPS)}, "batch_size": 7, "checkpoint": tmp_path}
    run_cascade(**call)
    files = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=f"checkpoint must .* with other {said}$"):
        run_cascade(**{**call, **change})
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    run_cascade(**call)


def test_buffers_and_structure_make_another_model(tmp_path):
    x, y = batch(4), torch.zeros(4, dtype=torch.int64)

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", torch.tensor(scale), persistent=False)
            self.pool = nn.AvgPool2d(8)

        def forward(self, x):
            return self.pool(x).flatten(1) * self.scale

    run_cascade(Scaled(1.0), x, y, {}, checkpoint=tmp_path)
    run_cascade(Scaled(1.0), x, y, {}, checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"other model$"):
        run_cascade(Scaled(2.0), x, y, {}, checkpoint=tmp_path)
    other = Scaled(1.0)
    other.pool = nn.AvgPool2d(8, padding=1)
    with pytest.raises(InputError, match=r"other model$"):
        run_cascade(other, x, y, {}, checkpoint=tmp_path)


def test_plain_attributes_make_another_model_and_another_teacher(tmp_path):
    """A mean that is no buffer is in no state_dict."""

    class Normalized(nn.Module):
        def __init__(self, mean):
            super().__init__()
            self.net, self._mean = net(), torch.tensor(mean)

        def forward(self, x):
            return self.net(x - self._mean)

    model, x, y = case(4, 0)
    for name, call in (
        ("model", lambda mean: run_cascade(Normalized(mean), x, y, {}, checkpoint=tmp_path / "model")),
        ("attacks", lambda mean: run_cascade(
            model, x, y, {"a": PGD(loss=OracleL2(Normalized(mean)), steps=1)}, checkpoint=tmp_path / "attacks")),
    ):  # fmt: skip
        call(0.1)
        call(0.1)
        with pytest.raises(InputError, match=f"other {name}"):
            call(0.2)


def test_another_version_is_refused(tmp_path, monkeypatch):
    model, x, y = case(4, 0)
    run_cascade(model, x, y, {}, checkpoint=tmp_path)
    monkeypatch.setattr("tsrfast.__version__", "99")
    with pytest.raises(InputError, match=r"other tsrfast \(.* then, 99 now\)$"):
        run_cascade(model, x, y, {}, checkpoint=tmp_path)


def test_one_process_at_a_time(tmp_path):
    model, x, y = case(6, 0)

    def again(progress):
        with pytest.raises(EnvironmentFault, match="in use by another"):
            run_cascade(model, x, y, SUITE, checkpoint=tmp_path / "a")

    run_cascade(model, x, y, SUITE, checkpoint=tmp_path / "a", progress=again)
    run_cascade(model, x, y, SUITE, checkpoint=tmp_path / "a")


FULL = """
import resource, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_cascade import PGD, case, run_cascade
from tsrfast.errors import EnvironmentFault

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    run_cascade(*case(), {"pgd": PGD(eps=0.3)}, checkpoint=Path(sys.argv[2]))
except EnvironmentFault as e:
    print(e)
"""


def test_a_full_disk_and_a_damaged_file(tmp_path):
    folder = tmp_path / "a"
    words = [sys.executable, "-c", FULL, str(Path(__file__).parent), str(folder)]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    assert run.stdout == f"cannot write {folder / '00-00000.safetensors'}: File too large\n"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "cascade.json", "clean.safetensors"]
    (folder / "clean.safetensors").write_bytes(b"damaged")
    with pytest.raises(EnvironmentFault, match=r"cannot read .*clean\.safetensors: it is damaged"):
        run_cascade(*case(), {"pgd": PGD(eps=0.3)}, checkpoint=folder)
    (folder / "clean.safetensors").unlink()
    equal(run_cascade(*case(), {"pgd": PGD(eps=0.3)}, checkpoint=folder), run_cascade(*case(), {"pgd": PGD(eps=0.3)}))


def test_folders_of_others_are_refused(tmp_path):
    model, x, y = case(4, 0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="with other files"):
        run_cascade(model, x, y, {}, checkpoint=tmp_path)
    (tmp_path / "cascade.json").write_text("no json")
    with pytest.raises(InputError, match=r"another cascade\.json"):
        run_cascade(model, x, y, {}, checkpoint=tmp_path)


def test_losses_and_sizes_of_an_image():
    """Radii, step sizes, and a teacher's opinion, which does not decide."""
    model, x, y = case(12, 0)
    eps, step = torch.linspace(0, EPS, 12), torch.linspace(0, EPS / 3, 12)
    attack = PGD(eps=eps, step_size=step, steps=6)
    got = run_cascade(model, x, y, {"pgd": attack}, batch_size=5)
    alone = attack.run(model, x, y)
    assert torch.equal(got.stages[0].success, alone.success)
    assert 0 < alone.success.sum() < 12
    moved = (got.x_adv.double() - x.double()).flatten(1).abs().amax(1)
    assert torch.equal(got.stages[0].distance[alone.success], moved[alone.success])
    assert got.stages[0].distance[~alone.success].isnan().all()
    transfer = Transfer(PGD(eps=40 * eps, step_size=10 * eps, steps=6), [net(1)])  # one attack within another
    by_transfer = run_cascade(model, x, y, {"transfer": transfer}, batch_size=5)
    assert torch.equal(by_transfer.stages[0].success, transfer.run(model, x, y).success)
    assert 0 < by_transfer.stages[0].fallen < 12
    oracle = run_cascade(model, x, y, {"oracle": PGD(loss=OracleL2(net(3)), eps=0.1, steps=5)}, batch_size=5)
    assert torch.equal(oracle.robust, answers(model, oracle.x_adv) == y)
    assert oracle.stages[0].refuted > 0


def test_modes_and_gradients_are_left():
    model, x, y = case(6, 0)
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    x.requires_grad_()
    with torch.inference_mode():
        got = run_cascade(model, x, y, SUITE)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert x.grad is None
    assert not got.x_adv.requires_grad


def test_half_precision_and_float64():
    for dtype in (torch.bfloat16, torch.float64):
        model, x = net().to(dtype), batch(8).to(dtype)
        got = run_cascade(model, x, answers(model, x), {"pgd": PGD(eps=0.1, step_size=0.03, steps=8)})
        assert got.x_adv.dtype == dtype
        assert got.stages[0].fallen > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": batch(4) * 255}, "0..255"),
        ({"x": (batch(4) * 255).byte()}, "floating-point"),
        ({"x": batch(4) * math.nan}, "finite"),
        ({"y": None}, "y is needed"),
        ({"y": torch.zeros(4)}, "y must be int64"),
        ({"y": torch.zeros(4, 10)}, "y must be int64"),
        ({"y": torch.full((4,), 10)}, r"y must be in 0..9, the model's classes, got 10"),
        ({"attacks": [FGSM()]}, "attacks must be attacks by name, got list"),
        ({"attacks": {"a": "fgsm"}}, "attacks must be Attack objects, got str for 'a'"),
        ({"attacks": {"a": PGD(targeted=True)}}, "attacks must not be targeted, got 'a'"),
        ({"attacks": {"a": FGSM(eps=torch.ones(3))}}, r"eps must be a number or of shape \(4,\)"),
        ({"attacks": {"a": CW(c=torch.ones(3))}}, r"c must be a number or of shape \(4,\)"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, "index must be int64"),
    ],
)
def test_bad_input(tmp_path, change, said):
    call = {"model": net(), "x": batch(4), "y": torch.zeros(4, dtype=torch.int64), "attacks": {"fgsm": FGSM()}}
    with pytest.raises(InputError, match=said):
        run_cascade(**{**call, **change})


def test_bad_logits():
    class Odd(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(x)

    x, y = batch(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match="must return logits"):
        run_cascade(Odd(lambda x: (x.flatten(1), x)), x, y, {})
    with pytest.raises(InputError, match="no NaN, got NaN for 1 of 4"):
        run_cascade(Odd(lambda x: x.flatten(1).where(x[:, :1, 0, 0] != x[1, 0, 0, 0], torch.nan)), x, y, {})


def test_nobody():
    got = run_cascade(net(), batch(0), torch.zeros(0, dtype=torch.int64), SUITE)
    assert got.x_adv.shape == (0, *IMAGE)
    assert math.isnan(got.robust_accuracy)
    assert [s.attacked for s in got.stages] == [0, 0, 0]
