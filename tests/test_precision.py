"""bench/precision.py: its comparison of two attacks, its loop against the chain's, and a tiny run of all of it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsrfast.nets import ConvReLU

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import contestants  # noqa: E402
import precision  # noqa: E402

IMAGE = (3, 12, 12)


@pytest.fixture(scope="module")
def nets() -> precision.Nets:
    pair = [ConvReLU(widths, image=IMAGE, classes=4, seed=k) for k, widths in enumerate(([8, 8], [6, 6]))]
    return precision.Nets(contestants.Pair(*(net.eval().requires_grad_(False) for net in pair)))


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, *IMAGE, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4


def test_compare_by_hand():
    x, ones = torch.zeros(4, 1, 1, 5), torch.ones(4, dtype=torch.float64)
    eager = (x, ones, torch.tensor([True, True, False, False]))
    moved = x.clone()
    moved[0, ..., 0], moved[1] = 0.01, 1e-7  # of 20 pixels one differs, five are rounded
    mine = (moved, torch.tensor([0.9, 1.1, 0.9, 1.1], dtype=torch.float64), torch.tensor([True, False, True, True]))
    found = precision.compare(mine, eager)
    low, high = math.log(0.9), math.log(1.1)
    mean, deviation = (low + high) / 2, (high - low) / 2 * math.sqrt(4 / 3)
    assert found["log_ratio"] == pytest.approx(mean, rel=1e-3)
    assert found["interval"] == pytest.approx([mean - 1.96 * deviation / 2, mean + 1.96 * deviation / 2], rel=1e-3)
    assert (found["robust_accuracy"], found["points"], found["pixels_differ"]) == (0.75, 25.0, 0.05)
    assert (found["only_here_robust"], found["only_eager_robust"]) == (2, 1)
    assert not found["within_points"]
    assert not found["holds"]


@pytest.mark.parametrize(("ratio", "holds"), [(1.0, True), (0.995, True), (0.98, False), (1.5, True), (math.nan, False)])
def test_only_a_weaker_attack_misses(ratio, holds):
    x, loss, robust = torch.zeros(3, 1, 2, 2), torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    assert precision.compare((x, ratio * loss, robust), (x, loss, robust))["holds"] is holds


@pytest.mark.parametrize("loss", contestants.LOSSES)
def test_directions_are_those_of_the_float64_gradient(nets, images, loss):
    g = precision.gradient(nets.float64, loss, images[0].double(), images[1])
    assert (g != 0).double().mean() > 0.9
    for method in ("eager", *precision.CHAINS):
        sign = precision.direction(nets, method, loss, *images)
        assert (sign == g.sign()).double().mean() > 0.995, method


def test_eager_attack_is_the_race_s_and_chaos_begins_elsewhere(nets, images):
    for loss in contestants.LOSSES:
        made = precision.attack(nets, "eager", loss, *images, 3)
        race = contestants.pytorch()(nets.float32, loss, 3)(*images)
        assert ((made - race).abs() > 1e-6).double().mean() < 0.01
    apart = (precision.attack(nets, "chaos", "oracle", *images, 0) - images[0]).abs()
    assert 0 < apart.max() < 2e-6


def test_judge_is_float64_on_its_own(nets, images):
    x, y = images
    s, t = nets.float64.student(x.double()), nets.float64.teacher(x.double())
    value, robust = precision.judged(nets.float64, "oracle", x, y)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, ((s - t) ** 2).sum(1), rtol=1e-12, atol=0)
    assert torch.equal(robust, s.argmax(1) == t.argmax(1))
    value, robust = precision.judged(nets.float64, "cross_entropy", x, y)
    torch.testing.assert_close(value, -s.log_softmax(1)[torch.arange(len(y)), y], rtol=1e-12, atol=0)
    assert torch.equal(robust, s.argmax(1) == y)


def test_verdict_names_who_misses_and_a_blind_measure():
    def pair(**missed):
        holds = {m: {"holds": m not in missed} for m in ("winograd", "direct", "bf16")}
        return {"ascent": holds, "attacks": {"oracle": {"methods": holds}}}

    good, bad = pair(bf16=1), pair(bf16=1, winograd=1)
    assert precision.verdict({"a": good, "b": good}) == {"winograd": True, "direct": True, "bf16, nearest pair": False}
    assert precision.verdict({"a": bad, "b": pair()}) == {"winograd": False, "direct": True, "bf16, nearest pair": True}


def test_smoke(tmp_path):
    out = tmp_path / "precision.json"
    options = ["--smoke", "--data", "synthetic:train=64,test=64", "--out", str(out), "--threads", "1"]
    command = [sys.executable, str(BENCH / "precision.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(out.read_text())
    assert record["pairs"].keys() == {"trained", "near 0.01"}
    near = record["pairs"]["near 0.01"]
    assert near["logit_distance"] == pytest.approx(0.01, rel=0.03)
    assert near["winograd_layers"] == {"winograd": 4, "direct": 0}
    attacks = near["attacks"]["oracle"]["methods"]
    for method in precision.CHAINS:
        assert near["ascent"][method]["efficiency"] > 0.99
        assert attacks[method]["holds"]
        assert near["errors"][method]["logits"] < 1e-5
    assert near["ascent"]["bf16"]["efficiency"] < 0.8
    assert attacks["bf16"]["interval"][1] < -0.05
    assert record["verdict"] == {"winograd": True, "direct": True, "bf16, nearest pair": False}
    for method in ("eager", "winograd", "direct", "bf16", "chaos"):
        assert f"\n  {method} " in run.stdout
    assert str(tmp_path) not in out.read_text()
    assert platform.node() not in out.read_text()
