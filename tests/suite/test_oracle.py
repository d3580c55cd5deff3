"""The oracle alone: `tsrfast oracle`, fine-tuning of what is left after pruning, and the oracle that comes with the package."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from tsrfast._progress import Reporter
from tsrfast.data import load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import PRETRAINED_ORACLE, ConvReLU, apply_masks, fold, load_checkpoint, pretrained_oracle, prune_masks, shrink
from tsrfast.suite.oracle import SETTINGS, write_oracle
from tsrfast.suite.presets import preset
from tsrfast.suite.reproduce import reproduce
from tsrfast.suite.store import Store
from tsrfast.training import TrueLabels, train

CPU = torch.device("cpu")
CIFAR10 = Path(os.environ.get("TSRFAST_DATA", "/nonexistent")) / "cifar10"


def test_the_oracle_is_that_of_a_run(tiny, tmp_path, tiny_settings):
    sizes = preset("smoke", tiny_settings)
    file = write_oracle(sizes, "synthetic", tmp_path, CPU, 0, Reporter())
    assert file == tmp_path / "oracle.safetensors"
    assert file.read_bytes() == (tiny.lab.oracle.folder / "oracle.safetensors").read_bytes()

    record = json.loads((tmp_path / "oracle.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["data"] == tiny.results["data"]
    assert record["settings"] == json.loads(json.dumps({name: getattr(sizes, name) for name in SETTINGS}))
    assert [line["epoch"] for line in record["teacher"]] == list(range(1, sizes.teacher_epochs + 1))
    assert [line["epoch"] for line in record["fine-tuning"]] == list(range(1, sizes.finetune_epochs + 1))
    assert all(line["loss"] > 0 for line in record["teacher"] + record["fine-tuning"])
    test, net = tiny.lab.data.test, load_checkpoint(file)[0]
    right = (net(test.pixels()).argmax(1) == test.labels).double().mean().item()
    assert record["test_accuracy"]["oracle"] == pytest.approx(100 * right)

    stages = record["run"]["stages"]
    assert [stage["name"].split()[0] for stage in stages] == ["teacher", "oracle"]
    assert not any(stage["cached"] for stage in stages)
    before = file.read_bytes()
    write_oracle(sizes, "synthetic", tmp_path, CPU, 0, Reporter())
    assert all(stage["cached"] for stage in json.loads((tmp_path / "oracle.json").read_text())["run"]["stages"])
    assert file.read_bytes() == before


def test_what_an_oracle_depends_on_is_in_its_record():
    """Every setting but these, which speak of students and of attacks."""
    others = {
        "name", "oracle", "student_images", "student_factor", "epochs", "optimizer", "lr", "batch_size", "eps", "train_steps",
        "train_step_size", "rft_steps", "rft_step_size", "steps", "step_size", "l2_eps", "l1_eps", "repetitions", "eval_images",
        "matrix_images", "eval_batch_size", "correlation_images", "patch_images",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(preset("smoke"))} == others | set(SETTINGS)


def test_refusals(tmp_path, tiny_settings):
    def attempt(*more, data="synthetic", seed=0):
        write_oracle(preset("smoke", [*tiny_settings, *more]), data, tmp_path / "out", CPU, seed, Reporter())

    with pytest.raises(InputError, match="--set oracle: must not be given where the oracle is to be trained, got 'f'"):
        attempt("oracle=f")
    with pytest.raises(InputError, match="--seed: must be an integer >= 0, got -1"):
        attempt(seed=-1)
    with pytest.raises(InputError, match="nowhere"):
        attempt(data="cifar10:/nowhere")
    other = Store(tmp_path / "out" / "store")
    with pytest.raises(EnvironmentFault, match="in use"):
        attempt()
    other.close()
    assert not list((tmp_path / "out").glob("oracle*"))


def test_fine_tuning_what_is_left_is_fine_tuning_under_masks():
    """float64, three epochs of Adam with weight decay: what was pruned changes nothing in what is left, but for rounding."""
    torch.manual_seed(0)
    split = load("synthetic", train=64, test=8).train
    whole = ConvReLU((8, 8, 6), batch_norm=True, mean=(0.5,) * 3, std=(0.2,) * 3, seed=1).double()
    masks = prune_masks(whole, (0.3, 0.5, 0.5))
    apply_masks(whole, masks)
    left = shrink(whole, masks)
    settings = {"epochs": 3, "batch_size": 16, "lr": 0.003, "optimizer": "adam", "weight_decay": 0.01}
    train(whole, TrueLabels(), split, **settings, after_step=lambda net: apply_masks(net, masks))
    train(left, TrueLabels(), split, **settings)
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    want, got = fold(shrink(whole.eval(), masks))(x), fold(left.eval())(x)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert (want - fold(shrink(ConvReLU.from_config(whole.config, seed=1).double().eval(), masks))(x)).abs().max() > 0.1


def test_shrunk_before_fine_tuning(tiny, tmp_path, tiny_settings):
    """The same teacher, the same widths, an oracle that is nearly that of masks."""
    file = write_oracle(preset("smoke", [*tiny_settings, "finetune_shrunk=true"]), "synthetic", tmp_path, CPU, 0, Reporter())
    got, want = load_checkpoint(file)[0], tiny.lab.oracle_net
    assert got.widths == want.widths
    x = tiny.lab.data.test.pixels()
    assert (got(x) - want(x)).abs().max() < 0.02 * want(x).abs().max()
    assert file.read_bytes() != (tiny.lab.oracle.folder / "oracle.safetensors").read_bytes()


# --- the one that comes with the package --------------------------------------------------------------------------------


def test_the_pretrained_oracle_is_the_papers_net():
    """Section 5.1: 45-32-32-20 channels; no normalisation is left in it. Small enough for a package."""
    net = pretrained_oracle()
    assert (net.widths, net.image, net.classes, net.batch_norm) == ((45, 32, 32, 20), (3, 32, 32), 10, False)
    assert net.mean is None
    assert not net.training
    assert PRETRAINED_ORACLE.stat().st_size < 1_000_000


def test_the_pretrained_oracle_has_its_record():
    record = json.loads(PRETRAINED_ORACLE.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(PRETRAINED_ORACLE.read_bytes()).hexdigest()
    assert set(record["settings"]) == set(SETTINGS)
    assert record["settings"]["widths"] == [64] * 4
    assert record["data"]["name"] == "cifar10"
    assert record["data"]["sizes"] == {"train": 50000, "test": 10000}
    assert len(record["teacher"]) == record["settings"]["teacher_epochs"]
    assert len(record["fine-tuning"]) == record["settings"]["finetune_epochs"]


@pytest.mark.skipif(not list(CIFAR10.glob("test-*.parquet")), reason="TSRFAST_DATA/cifar10 is not there")
def test_the_pretrained_oracle_has_its_accuracy():
    """On the file of its record to a few images that rounding decides, on another copy of CIFAR-10 within a point."""
    record, data = json.loads(PRETRAINED_ORACLE.with_suffix(".json").read_text()), load(f"cifar10:{CIFAR10}", train=1)
    test, net = data.test, pretrained_oracle()
    with torch.no_grad():
        right = [(net(test.pixels(slice(k, k + 500))).argmax(1) == test.labels[k : k + 500]) for k in range(0, len(test), 500)]
    same = data.record["sources"][-1] == record["data"]["sources"][-1]
    wanted = pytest.approx(record["test_accuracy"]["oracle"], abs=0.05 if same else 1)
    assert 100 * torch.cat(right).double().mean().item() == wanted


def test_students_of_the_pretrained_oracle(tmp_path, tiny_settings):
    sizes = preset("smoke", [*tiny_settings, "oracle=pretrained", "epochs=1,2,3,4,5", "student_images=16"])
    reproduce(["fig8"], sizes, "synthetic", tmp_path, CPU, 0, Reporter())
    (oracle,) = (tmp_path / "store").glob("oracle-*")
    assert load_checkpoint(oracle / "oracle.safetensors")[0].widths == (45, 32, 32, 20)
    for student in (tmp_path / "store").glob("student-*"):
        assert load_checkpoint(student / "epoch_0001.safetensors")[0].widths == (50, 35, 35, 22)
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["oracle"] == "pretrained"  # the same words everywhere, not a path of this machine
