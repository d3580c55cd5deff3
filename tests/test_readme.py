"""The README's examples run as they stand there."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tsrfast.nets import PRETRAINED_ORACLE

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CHANGES = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


def test_attack_example(capsys):
    code = next(c for c in EXAMPLES if "from tsrfast.attacks" in c)
    x = torch.rand(4, 3, 8, 8)
    names = {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "x": x, "y": torch.zeros(4, dtype=torch.int64)}
    exec(code, names)
    assert (names["x_adv"] - x).abs().max() <= 8 / 255 + 1e-6
    assert re.fullmatch(r"\d+\.\d% fooled\n", capsys.readouterr().out)


def test_examples_of_compiled_networks(capsys):
    attack, plan, chain = (c for c in EXAMPLES if ("attack" in c or "tsrfast.compile" in c) and "evaluat" not in c)
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
    exec(chain, names)
    torch.testing.assert_close(names["logits"], model(x), rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
    torch.testing.assert_close(names["g"], gradient, rtol=1e-3, atol=1e-6)
    assert names["rows"].shape == (2, 10, *names["hidden"][0].shape[1:])


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()


@pytest.mark.parametrize("block", CHANGES, ids=lambda block: re.findall(r"compat\.(\w+)", block)[0])
def test_changed_imports(block):
    lines = block.splitlines()
    theirs, ours = ([line[1:] for line in lines if line[:1] in marks] for marks in ("- ", "+ "))
    assert len(theirs) <= 6
    assert len(ours) <= 6
    model, x = small_net(), torch.rand(2, 3, 32, 32)
    names = {"model": model, "x": x, "y": model(x).argmax(1), "nn": nn, "np": np}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join(ours), names)
    adv = torch.as_tensor(names["adv"])
    assert 0 < (adv - x).abs().max() <= 8 / 255 + 1e-6


def test_table_of_drop_ins():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
    start = next(k for k, row in enumerate(rows) if row[0] == "`tsrfast.attacks`")
    modules = (
        "",
        "torchattacks",
        "foolbox.attacks",
        "autoattack",
        "art.attacks.evasion",
        "cleverhans.torch.attacks",
        "advlib.attacks",
    )
    looked_at = 0
    for row in itertools.takewhile(lambda row: len(row) == len(modules), rows[start + 2 :]):
        for module, cell in zip(modules, row, strict=True):
            for name in filter(None, (n.strip(" `") for n in cell.split(","))):
                looked_at += 1
                if not module:
                    found = [importlib.import_module("tsrfast.attacks")]
                elif module.startswith("cleverhans"):
                    found = [importlib.import_module(f"tsrfast.compat.{module}.{name}")]
                elif module == "autoattack":
                    inner = ("", ".autopgd_base", ".fab_pt", ".square")
                    found = [importlib.import_module(f"tsrfast.compat.autoattack{end}") for end in inner]
                else:
                    found = [importlib.import_module(f"tsrfast.compat.{module}")]
                assert any(name in vars(m) for m in found), f"{module}: {name}"
    assert looked_at > 60


def test_evaluation_example(tmp_path, monkeypatch, capsys):
    (code,) = (c for c in EXAMPLES if "tsrfast.evaluation" in c)
    monkeypatch.chdir(tmp_path)
    model, x = small_net(), torch.rand(4, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of four images
        exec(code, {"model": model, "x": x, "y": model(x).argmax(1)})
    assert (tmp_path / "runs/evaluate/report.html").is_file()
    assert "| mine |" in capsys.readouterr().out


def test_specialization_example(capsys):
    (code,) = (c for c in EXAMPLES if "ChannelCorrelation" in c)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    nn.init.ones_(teacher[0].bias)  # no dead channel
    exec(code, {"student_act": teacher, "teacher_act": teacher, "batches": torch.rand(3, 2, 3, 8, 8)})
    assert "specialized=4" in capsys.readouterr().out


def test_states_the_accuracy_of_the_pretrained_oracle():
    record = json.loads(PRETRAINED_ORACLE.with_suffix(".json").read_text())
    assert f"to {record['test_accuracy']['oracle']:.1f} % test" in README.replace("\n", " ")


def test_gradient_rule_example(capsys):
    (code,) = (c for c in EXAMPLES if "GradientRule" in c)
    exec(code, {"student": small_net(), "teacher": small_net(), "batches": torch.rand(3, 2, 3, 32, 32)})
    assert "torch.Size([4, 4])" in capsys.readouterr().out


def test_names_every_experiment_and_switch():
    from tsrfast.suite.experiments import EXPERIMENTS

    assert f"[{' '.join(EXPERIMENTS)}]" in README
    cmake = (Path(__file__).parents[1] / "CMakeLists.txt").read_text()
    for switch in re.findall(r"(?:option|set)\((TSRFAST_(?:CUDA|EMU))\b", cmake):
        assert switch in README
