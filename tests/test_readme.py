"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_attack_example(capsys):
    (code,) = (c for c in EXAMPLES if "tsrfast.attacks" in c)
    x = torch.rand(4, 3, 8, 8)
    names = {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "x": x, "y": torch.zeros(4, dtype=torch.int64)}
    exec(code, names)
    assert (names["x_adv"] - x).abs().max() <= 8 / 255 + 1e-6
    assert re.fullmatch(r"\d+\.\d% fooled\n", capsys.readouterr().out)


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
