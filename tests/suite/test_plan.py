"""``--plan``: the stages of the run that would follow, what they cost, what is there already; and nothing is run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tsrfast._progress import Reporter
from tsrfast.data import load
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.suite.experiments import EXPERIMENTS
from tsrfast.suite.modes import MODES
from tsrfast.suite.plan import ATTACKS, Plan, Rate, describe, forward_macs, plan
from tsrfast.suite.presets import PAPER

CPU = torch.device("cpu")
# The nets of the specification's budget (section 8), in M multiply-accumulates of a forward pass.
ORACLE, STUDENT, TEACHER = (ConvReLU(w) for w in ((45, 32, 32, 20), (50, 35, 35, 22), (64, 64, 64, 64)))


def planned(tiny, out, names=()):
    return plan(list(names), tiny.lab.preset, "synthetic", out, CPU, 0, Reporter())


def logged(tiny):
    return json.loads((tiny.out / "run.json").read_text())["stages"]


def test_names_exactly_the_stages_that_the_run_then_executes(tiny, tmp_path):
    found = planned(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [s.name for s in found.stages] == list(dict.fromkeys(s["name"] for s in logged(tiny)))
    assert {s.name for s in found.stages} == {s["name"] for s in logged(tiny) if not s["cached"]}
    assert not any(s.cached for s in found.stages)
    # Every stage of the plan is in the store, in which other tests may have put more.
    kept = {p.name for p in (tiny.out / "store").iterdir() if p.is_dir()}
    assert kept >= {f"{s.stage}-{s.key[:16]}" for s in found.stages}
    assert set(found.rates) == {s.kind for s in found.stages}
    assert all(rate.flop > 0 and rate.source == "measured" for rate in found.rates.values())
    assert found.seconds(found.stages) == pytest.approx(sum(s.flop / found.rates[s.kind].flop for s in found.stages))


def test_after_the_run_everything_is_cached(tiny):
    before = sorted(p.stat().st_mtime_ns for p in tiny.out.rglob("*"))
    found = planned(tiny, tiny.out)
    assert all(s.cached for s in found.stages)
    assert found.rates == {}
    last = found.text().splitlines()[-1]
    assert last == f"cached: {len(found.stages)}; to run: 0, 0 PFLOP, about 0.0 s in one process on this device"
    assert sorted(p.stat().st_mtime_ns for p in tiny.out.rglob("*")) == before


def test_what_is_missing_is_planned_at_the_rates_of_the_last_run(tiny, tmp_path):
    shutil.copytree(tiny.out / "store", tmp_path / "store", ignore=shutil.ignore_patterns("attack-*"))
    shutil.copy(tiny.out / "run.json", tmp_path)
    found = planned(tiny, tmp_path, ["table3"])
    assert {s.stage for s in found.stages if not s.cached} == {"attack"}
    assert {s.stage for s in found.stages if s.cached} == {"teacher", "oracle", "student"}
    took = {s["name"]: s["seconds"] for s in logged(tiny) if not s["cached"]}
    attacks = [s for s in found.stages if s.stage == "attack"]
    rate = sum(s.flop for s in attacks) / sum(took[s.name] for s in attacks)
    assert found.rates == {"attack": Rate(pytest.approx(rate), "recorded")}
    assert found.seconds(found.stages) == pytest.approx(sum(took[s.name] for s in attacks))


def test_the_cost_of_a_run_by_hand(tiny):
    """Adversarial training of the tiny preset: oracle 6-4-4-3 of 8-8-8-8, student 7-4-4-3."""
    (stage,) = (s for s in planned(tiny, tiny.out, ["fig3"]).stages if s.stage == "student" and "AT" in s.title)
    t = 900 * 27 * 6 + 784 * 9 * 6 * 4 + 676 * 9 * 4 * 4 + 576 * 9 * 4 * 3 + 576 * 3 * 10
    s = 900 * 27 * 7 + 784 * 9 * 7 * 4 + 676 * 9 * 4 * 4 + 576 * 9 * 4 * 3 + 576 * 3 * 10
    attack = 1 * 2 * (s + t)  # one step: forwards, and gradients in the image through both
    step = 3 * s + t  # forward, gradients in activations and weights; the oracle's answer
    assert stage.flop == 2 * (attack + step) * 6 * 128  # 2 a multiply-accumulate; 6 epochs of 128 images
    assert stage.title == "student AT 7-4-4-3"
    assert stage.size == "6 epochs of 128 images, PGD-1"


@pytest.mark.parametrize("net", [ORACLE, STUDENT, ConvReLU((5, 3), image=(2, 9, 8), classes=4)])
def test_macs_are_pytorchs(net):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(3, *net.image))
    assert counter.get_total_flops() == 3 * 2 * forward_macs(net)


def test_the_papers_budget():
    """Specification, section 8: M multiply-accumulates of the nets, and PFLOP of the runs."""
    assert [round(forward_macs(net) / 1e6, 3) for net in (ORACLE, STUDENT, TEACHER)] == [20.917, 25.134, 76.979]
    few = load("synthetic", train=8, test=8)
    paper = dataclasses.replace(few, train=Sized(50000, few.train.images), test=Sized(10000, few.test.images))

    def pflop(stage, *nets, **config):
        return describe(stage, config, nets, paper, PAPER)[2] / 1e15

    def student(mode, last):
        return pflop("student", STUDENT, ORACLE, mode=mode, run=0, epochs=[50, last])

    assert student("st_logit", 300) == pytest.approx(2.89, abs=0.01)
    assert student("at_oracle", 300) == pytest.approx(113.4, abs=0.1)
    assert student("at_in", 150) + student("at_out", 150) == pytest.approx(223.9, abs=0.2)
    assert 3 * student("ccat10", 150) == pytest.approx(87.2, abs=0.3)
    assert student("rft", 150) == pytest.approx(1.4, abs=0.05)
    assert pflop("teacher", TEACHER, widths=(64,) * 4) == pytest.approx(200 * 23.1e-3, rel=0.01)
    assert pflop("robust_images", STUDENT, ORACLE) == pytest.approx(9.2, abs=0.05)
    spec = {"norm": "linf", "eps": 10 / 255, "step_size": 0.01, "steps": 40, "objective": "oracle_l2"}
    evaluation = pflop("attack", STUDENT, ORACLE, STUDENT, attack=spec, images=10000)
    assert evaluation == pytest.approx(0.074, rel=0.05)  # and a few forward passes, which the specification leaves out
    assert pflop("attack", STUDENT, ORACLE, STUDENT, attack=spec | {"side": "in"}, images=10000) > 1.9 * evaluation
    assert (
        pflop("attack", STUDENT, ORACLE, STUDENT, attack=spec | {"objective": "cross_entropy"}, images=10000) < 0.6 * evaluation
    )


@dataclasses.dataclass(frozen=True)
class Sized:
    """A split that says that it has more images."""

    n: int
    images: torch.Tensor
    labels: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    def __len__(self):
        return self.n


def test_every_mode_with_an_attack_has_its_cost():
    assert set(ATTACKS) == {name for name, mode in MODES.items() if "train_steps" in mode.settings}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_alone(tiny, name):
    found = planned(tiny, tiny.out, [name])
    assert found.experiments == (name,)
    assert {s.experiment for s in found.stages} == {name}
    assert len(found.stages) == len({s.key for s in found.stages})


def test_the_text(tiny, tmp_path):
    found = planned(tiny, tmp_path / "none", ["fig3", "fig4"])
    halves = [dataclasses.replace(s, cached=s.stage != "correlation" or i % 2 == 0) for i, s in enumerate(found.stages)]
    mixed = Plan(found.heading, ("fig3", "fig4"), tuple(halves), {"correlation": Rate(1e6, "recorded")})
    text = mixed.text()
    assert "preset smoke, synthetic:seed=0 (512 + 160 images), seed 0, on cpu" in text
    assert re.search(r"^  student AT 7-4-4-3 +6 epochs of 128 images, PGD-1 +[\d.]+ GFLOP  cached$", text, re.MULTILINE)
    assert re.search(r"^  correlation +7 x 40 images +[\d.]+ GFLOP  about [\d.]+ (s|min), [34] cached$", text, re.MULTILINE)
    assert re.search(r"^total: \d+ stages, [\d.e-]+ PFLOP$", text, re.MULTILINE)
    assert text.endswith("rates in GFLOP/s: correlation 0.001 (recorded)")


def test_wrong_words(tiny, tmp_path):
    with pytest.raises(InputError, match="unknown experiment 'fig1'"):
        planned(tiny, tmp_path, ["fig1"])


def test_command_line(call, tiny, tmp_path, tiny_settings):
    sets = [word for setting in tiny_settings for word in ("--set", setting)]
    code, out, _ = call("reproduce", "table5", "--preset", "smoke", *sets, "--out", tiny.out, "--plan")
    assert code == 0
    assert out.startswith("Plan: table5, preset smoke")
    assert re.search(r"^cached: \d+; to run: 0, ", out, re.MULTILINE)
