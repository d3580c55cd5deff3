"""The main job, apart from what the experiments compute."""

import json
import math
import re

import pytest
import torch

from tsrfast._machine import choose_device
from tsrfast._progress import Reporter
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU, load_checkpoint, resnet18, save_checkpoint
from tsrfast.suite.experiments import EXPERIMENTS
from tsrfast.suite.experiments._common import number
from tsrfast.suite.plan import plan
from tsrfast.suite.presets import SMOKE, preset
from tsrfast.suite.reproduce import reproduce


def run(names, out, data="synthetic", seed=0):
    return reproduce(names, SMOKE, data, out, torch.device("cpu"), seed, Reporter())


def test_numbers_that_are_not_defined_are_null(tmp_path, monkeypatch):
    """The correlation of constants, say: a long run must not end in an error for it."""

    def experiment(lab):
        cells = [number("row", "column", math.nan, 3, group="group")]
        curves = [{"panel": "p", "name": "c", "x": [0, 1], "y": [math.nan, 1.0]}]
        common = {"title": "t", "summary": "s", "claims": [], "settings": {}, "notes": []}
        return common | {"cells": cells, "curves": curves}

    monkeypatch.setitem(EXPERIMENTS, "fig2", experiment)
    assert run(["fig2"], tmp_path) == tmp_path / "report.html"
    (e,) = json.loads((tmp_path / "results.json").read_text())["experiments"].values()
    assert e["cells"][0]["measured"] is None
    assert e["curves"][0]["y"] == [None, 1.0]


def test_wrong_names_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="unknown experiment 'fig1'; did you mean 'fig"):
        run(["fig2", "fig1"], tmp_path / "out")
    with pytest.raises(InputError, match="--seed: must be 0 or more, each once, got -1"):
        run([], tmp_path / "out", seed=-1)
    assert not (tmp_path / "out").exists()


def test_an_unusable_folder_is_said_before_the_data_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        run([], tmp_path / "file", data="cifar10:/no/such/place")


def test_the_folder_is_free_again_after_a_failure(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match="path must exist"):
            run([], tmp_path, data="cifar10:/no/such/place")


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for name, message in (
        ("tpu", "unknown device 'tpu'"),
        ("cud", "unknown device 'cud'; did you mean 'cuda'"),
        ("", "unknown device ''"),
        ("cuda:x", "--device: must be cpu, cuda or cuda:N, got 'cuda:x'"),
        ("cuda:-1", "--device: must be cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("cpu:", "--device: must be cpu, cuda or cuda:N, got 'cpu:'"),
    ):
        with pytest.raises(InputError, match=message):
            choose_device(name)
    with pytest.raises(EnvironmentFault, match=r"--device cuda:99: there is no such CUDA device here \(\d+ found\)"):
        choose_device("cuda:99")


def test_an_oracle_out_of_a_file(tiny, tmp_path, tiny_settings):
    """The students are those of the run that trained it, and no teacher is; the plan and other processes know of it."""
    file = tiny.lab.oracle.folder / "oracle.safetensors"
    sizes = preset("smoke", [*tiny_settings, f"oracle={file}"])
    job = (["fig8"], sizes, "synthetic", tmp_path / "out", torch.device("cpu"), 0, Reporter())
    assert re.search(r"oracle [0-9-]+ +given ", plan(*job).text())
    reproduce(*job)
    made = {path.name.partition("-")[0] for path in (tmp_path / "out" / "store").iterdir()}
    assert "oracle" in made
    assert "teacher" not in made
    got = json.loads((tmp_path / "out" / "results.json").read_text())["experiments"]["fig8"]
    assert got["cells"] == tiny.results["experiments"]["fig8"]["cells"]
    assert got["curves"] == tiny.results["experiments"]["fig8"]["curves"]
    reproduce(*job[:3], tmp_path / "jobs", *job[4:], jobs=2)
    assert json.loads((tmp_path / "jobs" / "results.json").read_text())["experiments"]["fig8"] == got


def test_an_oracle_with_a_dead_layer(tiny, tmp_path, tiny_settings):
    """No node of its last layer has a correlation: what is not defined is empty, what compares it does not hold, and there is a report."""
    net, _ = load_checkpoint(tiny.lab.oracle.folder / "oracle.safetensors")
    with torch.no_grad():
        net.convs[-1].bias.fill_(-1e4)
    save_checkpoint(tmp_path / "dead", net)
    sizes = preset("smoke", [*tiny_settings, f"oracle={tmp_path / 'dead'}"])
    reproduce(["fig3", "global"], sizes, "synthetic", tmp_path / "out", torch.device("cpu"), 0, Reporter())
    e = json.loads((tmp_path / "out" / "results.json").read_text())["experiments"]["global"]
    assert e["curves"] == []
    (claim,) = e["claims"]
    assert (claim["holds"], claim["left"]) == (False, None)
    rows = {c["row"]: c["measured"] for c in e["cells"] if c["column"] == "Spearman"}
    assert rows["all students"] is rows["all students, MBNC of layer 3"] is None
    assert rows["all students, MBNC of layer 0"] is not None


def test_files_that_are_no_oracle(tmp_path, tiny_settings):
    def attempt(path):
        sizes = preset("smoke", [*tiny_settings, f"oracle={path}"])
        reproduce(["fig8"], sizes, "synthetic", tmp_path / "out", torch.device("cpu"), 0, Reporter())

    with pytest.raises(InputError, match="--set oracle: must be a file, got '/nowhere'"):
        attempt("/nowhere")
    (tmp_path / "text").write_text("no network")
    with pytest.raises(InputError, match="safetensors"):
        attempt(tmp_path / "text")
    for name, net in {"deep": ConvReLU((4,) * 5), "small": ConvReLU((4,) * 4, image=(3, 16, 16)), "res": resnet18()}.items():
        save_checkpoint(tmp_path / name, net)
        with pytest.raises(InputError, match=r"--set oracle: must be a ConvReLU of 4 convolutions for images \[3, 32, 32\]"):
            attempt(tmp_path / name)
