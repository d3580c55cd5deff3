"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_attack_example(capsys):
    (code,) = (c for c in EXAMPLES if "from tsrfast.attacks" in c)
    x = torch.rand(4, 3, 8, 8)
    names = {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "x": x, "y": torch.zeros(4, dtype=torch.int64)}
    exec(code, names)
    assert (names["x_adv"] - x).abs().max() <= 8 / 255 + 1e-6
    assert re.fullmatch(r"\d+\.\d% fooled\n", capsys.readouterr().out)


def test_examples_of_compiled_networks(capsys):
    attack, drop_in, plan, chain = (c for c in EXAMPLES if "attack" in c or "tsrfast.compile" in c)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 28 * 28, 10)
    )
    x = torch.rand(2, 3, 32, 32)
    names = {"model": model, "x": x, "y": torch.zeros(2, dtype=torch.int64), "v": torch.ones(2, 10)}
    exec(attack, names)
    capsys.readouterr()
    exec(plan, names)
    (shown,) = re.findall(r"plan\(model, x\)\)  # (.*)", plan)
    assert capsys.readouterr().out.strip() == shown
    exec(drop_in, names)
    assert 0 < (names["adv"] - x).abs().max() <= 8 / 255 + 1e-6
    exec(chain, names)
    torch.testing.assert_close(names["logits"], model(x), rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(names["g"], gradient, rtol=1e-3, atol=1e-6)
    assert names["rows"].shape == (2, 10, *names["hidden"][0].shape[1:])


def test_specialization_example(capsys):
    (code,) = (c for c in EXAMPLES if "tsrfast.specialization" in c)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    nn.init.ones_(teacher[0].bias)  # no dead channel
    exec(code, {"student_act": teacher, "teacher_act": teacher, "batches": torch.rand(3, 2, 3, 8, 8)})
    assert "specialized=4" in capsys.readouterr().out


def test_names_every_experiment_and_switch():
    from tsrfast.suite.experiments import EXPERIMENTS

    assert f"[{' '.join(EXPERIMENTS)}]" in README
    cmake = (Path(__file__).parents[1] / "CMakeLists.txt").read_text()
    for switch in re.findall(r"(?:option|set)\((TSRFAST_(?:CUDA|EMU))\b", cmake):
        assert switch in README
