"""The race of bench/race.py: its statistics, what it takes for the same attack, and a tiny run of all of it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import contestants  # noqa: E402
import race  # noqa: E402
import timing  # noqa: E402


@pytest.fixture(scope="module")
def pair() -> contestants.Pair:
    nets = [ConvReLU(widths, image=(3, 8, 8), classes=4, seed=k) for k, widths in enumerate(([5, 5], [4, 4]))]
    return contestants.Pair(*(net.eval().requires_grad_(False) for net in nets))


def test_every_contestant_starts_every_place_once():
    order = [timing.rotated("abc", r) for r in range(3)]
    assert [list(place) for place in zip(*order, strict=True)] == [list("abc"), list("bca"), list("cab")]
    assert timing.rotated("abc", 4) == list("bca")


def test_summary_is_of_medians():
    found = timing.summary([(3.0, 6.0), (1.0, 5.0), (2.0, 40.0)])
    assert found == {"wall_s": 2.0, "cpu_s": 6.0, "spread": 1.0, "all_wall_s": [3.0, 1.0, 2.0]}


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_exponent(k):
    assert race.exponent([1, 4, 64], [3 * n**k for n in (1, 4, 64)]) == pytest.approx(k)


def test_fastest_rival_is_float32_and_not_ours():
    rows = {c.name: {"wall_s": 2.0 + k} for k, c in enumerate(contestants.CONTESTANTS)}
    rows |= {race.TSRFAST.name: {"wall_s": 1.0}, "bf16 autocast, channels_last": {"wall_s": 0.5}, "foolbox": {"absent": "why"}}
    found = race.standings(rows, contestants.CONTESTANTS)
    assert found["fastest_float32_pytorch"] == "eager"
    assert found["ratios"]["eager"] == 3.0
    assert found["ratios"]["bf16 autocast, channels_last"] == 0.5
    assert not found["ratios"].keys() & {"tsrfast", "foolbox"}
    assert race.standings({"eager": {"wall_s": 1.0}}, contestants.CONTESTANTS)["ratios"] == {}


def test_goals():
    ratios = {"fastest_float32_pytorch": "channels_last", "ratios": {"eager": 2.6, "channels_last": 1.7}}
    threads = {"images": {"1": {"tsrfast": {"ratio": 1.0}}, "128": {"tsrfast": {"ratio": 1.9}}}}
    found = race.goals({"race": {"oracle": ratios}, "threads": threads})
    assert [(g["ratio"], g["at_least"], g["holds"]) for g in found] == [(1.7, 1.8, False), (2.6, 2.5, True), (1.9, 1.85, True)]


def test_another_attack_is_not_timed():
    x = torch.zeros(1, 1, 10, 10)
    moved = x.clone()
    moved[..., :2] = 0.01  # 20% of the pixels
    assert race.compare(x + 1e-7, (1.004, 0.5), x, (1.0, 0.5), "float32") == {
        "pixels_differ": 0.0, "mean_loss": 1.004, "success": 0.5,
    }  # fmt: skip
    assert race.compare(moved, (1.0, 0.5), x, (1.0, 0.5), "bfloat16")["pixels_differ"] == 0.2
    for made, loss in ((moved, 1.0), (x, 0.99), (x, math.nan)):
        with pytest.raises(ArithmeticError, match="not the same attack"):
            race.compare(made, (loss, 0.5), x, (1.0, 0.5), "float32")


def test_errors_keep_no_paths():
    assert timing.one_line(OSError("no /home/me/x.py, but a/b\nat line 3")) == "OSError: no PATH, but a/b"


def test_only_takes_parts_of_names():
    assert [c.name for c in race.choose(["pieces"], smoke=False)] == ["eager", "channels_last, pieces of 32"]
    with pytest.raises(InputError, match="torchattack5"):
        race.choose(["torchattack5"], smoke=False)


def test_flop_of_known_layers():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4))
    assert contestants.flop(net, (3, 8, 8)) == 4 * (5 * 36 * 27 + 180 * 4)


@pytest.mark.parametrize("loss", contestants.LOSSES)
@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"channels_last": True, "piece": 3}], ids=str)
def test_loop_against_float64(pair, loss, options):
    """The float32 loop takes the steps that the float64 gradient, written out here, takes."""
    x0 = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(5) % 4
    made = contestants.pytorch(**options)(pair, loss, 3)(x0, y)
    nets = [ConvReLU.from_config(net.config).double() for net in (pair.student, pair.teacher)]
    for net, source in zip(nets, (pair.student, pair.teacher), strict=True):
        net.load_state_dict(source.state_dict())
    x = clean = x0.double()
    for _ in range(3):
        leaf = x.detach().requires_grad_()
        s, t = (net(leaf) for net in nets)
        value = (s - t).square().sum() if loss == "oracle" else -s.log_softmax(1)[torch.arange(5), y].sum()
        (g,) = torch.autograd.grad(value, leaf)
        x = clean + (x + 0.01 * g.sign() - clean).clamp(-10 / 255, 10 / 255)
        x = x.clamp(0, 1)
    assert ((made - x).abs() > 1e-6).float().mean() <= 0.01
    assert (made - x0).abs().max() > 0.02


def test_distance_dressed_as_cross_entropy_has_its_gradient_signs(pair):
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dressed = nn.functional.cross_entropy(contestants.Distance(pair)(x), torch.zeros(4, dtype=torch.int64))
    plain = (pair.student(x) - pair.teacher(x)).square().sum()
    signs = [torch.autograd.grad(value, x)[0].sign() for value in (dressed, plain)]
    assert (signs[0] == signs[1]).float().mean() > 0.999


def test_pair_is_reused_and_only_for_its_recipe(tmp_path):
    data = race.load("synthetic:train=8,test=4")
    recipe = contestants.Recipe([2], [3], images=8, teacher_epochs=1, student_epochs=1)
    first = contestants.trained_pair(recipe, data, tmp_path)
    again = contestants.trained_pair(recipe, data, tmp_path)
    assert first.student.widths == (3,)
    assert first.teacher.widths == (2,)
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), again.student.parameters(), strict=True))
    with pytest.raises(InputError, match="was trained with"):
        contestants.trained_pair(contestants.Recipe([2], [3], 8, 1, 2), data, tmp_path)


def test_smoke(tmp_path):
    options = ["--smoke", "--data", "synthetic:train=64,test=64", "--out", str(tmp_path), "--threads", "1"]
    command = [sys.executable, str(BENCH / "race.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    text = (tmp_path / "race.json").read_text()
    record = json.loads(text)
    for loss in contestants.LOSSES:
        rows = record["race"][loss]["rows"]
        for name in ("tsrfast", "eager", "channels_last"):
            assert rows[name]["pixels_differ"] <= 0.1
            assert len(rows[name]["all_wall_s"]) == record["settings"]["rounds"]
            assert f"\n  {name} " in run.stdout
    assert "bf16 autocast, channels_last" not in record["race"]["oracle"]["rows"]
    assert record["scaling"]["images"]["at"] == [1, 2, 4]
    assert record["threads"]["images"].keys() == {"1", "4"}
    assert record["memory"]["MiB"]["tsrfast"]["4"]["images"] == pytest.approx(4 * 3 * 32 * 32 * 4 / 2**20, rel=1e-3)
    assert len(record["goals"]) == 5
    assert str(tmp_path) not in text
    assert platform.node() not in text
    assert (tmp_path / "race.png").stat().st_size > 10_000
