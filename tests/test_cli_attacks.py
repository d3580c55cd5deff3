"""`tsrfast attack` and `tsrfast evaluate`: words to attacks, files, exit codes, going on after Ctrl-C."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from tsrfast._files import lock
from tsrfast.attacks import APGD, PGD, OracleL2, Square
from tsrfast.data import load
from tsrfast.errors import InputError
from tsrfast.evaluation import load_evaluation
from tsrfast.evaluation.options import build, build_several, names, number, settings_of
from tsrfast.nets import ConvReLU, save_checkpoint
from tsrfast.nets.tensor_file import read_tensor_file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network that has seen some generated images, and one with other weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    split = load("synthetic", train=1024, test=1).train
    x, y = split.pixels(), split.labels
    model = ConvReLU((8, 8), image=(3, 32, 32), seed=0, mean=(0.5,) * 3, std=(0.25,) * 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for part in torch.randperm(len(x)).repeat(2).split(32):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    save_checkpoint(folder / "small.safetensors", model)
    save_checkpoint(folder / "teacher.safetensors", ConvReLU((8, 8), image=(3, 32, 32), seed=1))
    return folder / "small.safetensors"


def model_of(path):
    from tsrfast.nets import load_checkpoint

    return load_checkpoint(path)[0]


def refused(result, message, code=2):
    given, said, complaint = result
    assert given == code, complaint
    assert said == ""
    assert "Traceback" not in complaint
    assert re.search(message, complaint.splitlines()[-1]), complaint


# --- words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_attack_is_reachable_by_its_name(name):
    attack = build(name, {})
    assert set(settings_of(name)) == set(attack.__dataclass_fields__)
    assert type(build(name.upper(), {})) is type(attack)


def test_all_public_attacks_have_a_name():
    import tsrfast.attacks as public

    classes = {type(build(name, {})) for name in names()}
    kinds = [getattr(public, n) for n in public.__all__]
    wanted = {
        k for k in kinds if isinstance(k, type) and issubclass(k, public.Attack) and k not in (public.Attack, public.Transfer)
    }
    assert wanted == classes


def test_values():
    attack = build(
        "pgd",
        {"eps": "8/255", "step_size": "0.01", "steps": "3", "random_start": "false", "keep": "best", "loss": "margin"},
    )
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 0.01, 3)
    assert (attack.random_start, attack.keep, attack.loss) == (False, "best", "margin")
    assert build("deepfool", {"candidates": "none"}).candidates is None
    custom = build("autoattack", {"version": "custom", "attacks": "apgd-ce, square"})
    assert custom.attacks == ("apgd-ce", "square")
    assert build("apgd-dlr", {}).loss == "dlr"
    assert build("rand", {}).version == "rand"
    teacher = ConvReLU((2,), image=(3, 8, 8))
    assert isinstance(build("pgd", {"loss": "oracle_l2"}, teacher).loss, OracleL2)
    assert number("--eps", "1/4") == 0.25


def test_settings_of_several():
    attacks = build_several("pgd,Square", [("eps", "0.1"), ("steps", "3"), ("square.queries", "7"), ("seed", "5")])
    pgd, square = attacks["pgd"], attacks["square"]
    assert isinstance(pgd, PGD)
    assert isinstance(square, Square)
    assert (pgd.eps, pgd.steps, pgd.seed, square.eps, square.queries, square.seed) == (0.1, 3, 5, 0.1, 7, 5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pdg", {}, r"unknown attack 'pdg'; did you mean 'pgd'\? \(allowed: "),
        ("apgd_ce", {}, "did you mean 'apgd-ce'"),
        ("transfer", {}, "transfer needs attack and surrogates, which words cannot give; give --surrogate"),
        ("pgd", {"step": "3"}, r"unknown setting of attack 'pgd' 'step'; did you mean 'steps'\?"),
        ("cw", {"eps": "0.1"}, "unknown setting of attack 'cw' 'eps'"),
        ("pgd", {"steps": "many"}, "setting steps must be an integer, got 'many'"),
        ("pgd", {"eps": "8/0"}, r"setting eps must be a number such as 0\.03 or 8/255, got '8/0'"),
        ("pgd", {"eps": "8"}, r"setting eps must be in pixels of \[0, 1\] for linf, got 8; did you mean 8/255\?"),
        ("pgd", {"random_start": "yes"}, "setting random_start must be true or false, got 'yes'"),
        ("pgd", {"on_step": "print"}, "setting on_step must be an object of Python"),
        ("pgd", {"loss": "cros_entropy"}, "unknown loss 'cros_entropy'; did you mean 'cross_entropy'"),
        ("pgd", {"loss": "oracle_l2"}, "oracle_l2 needs --teacher CHECKPOINT"),
        ("pgd", {"norm": "l3"}, "unknown norm 'l3'"),
    ],
)
def test_wrong_words(name, settings, message):
    with pytest.raises(InputError, match=message):
        build(name, settings)


@pytest.mark.parametrize(
    ("attacks", "settings", "message"),
    [
        (" , ", [], "at least one attack, got none"),
        ("pgd,pgd", [], "must name each attack once, got 'pgd' twice"),
        ("pgd,square", [("kappa", "1")], "unknown setting of attacks pgd, square: 'kappa'"),
        ("pgd,square", [("pdg.steps", "1")], "unknown attack in --set 'pdg'; did you mean 'pgd'"),
        ("pgd,square", [("square.steps", "1")], "unknown setting of attack 'square' 'steps'"),
    ],
)
def test_wrong_words_for_several(attacks, settings, message):
    with pytest.raises(InputError, match=message):
        build_several(attacks, settings)


# --- tsrfast attack -------------------------------------------------------------------------------------------------------


def test_attack(call, checkpoint, tmp_path):
    words = ["--limit", 24, "--attack", "pgd", "--norm", "linf", "--eps", "4/255", "--step-size", "1/255", "--steps", 8]
    code, out, err = call("attack", "--model", checkpoint, *words, "--batch-size", 10, "--out", tmp_path)
    assert code == 0, err
    assert out == f"{tmp_path / 'report.html'}\n"
    assert "worst case" in err
    tensors, document = read_tensor_file(tmp_path / "adversarial.safetensors")
    # The images are those of the attack itself, whatever the batches.
    split, model = load("synthetic", train=1, test=24).test, model_of(checkpoint)
    x, y = split.pixels(), split.labels
    attack = PGD(eps=4 / 255, step_size=1 / 255, steps=8)
    assert torch.equal(tensors["x_adv"], attack(model, x, y))
    with torch.no_grad():
        clean, answers = model(x).argmax(1), model(tensors["x_adv"]).argmax(1)
    record = load_evaluation(tmp_path / "evaluation.json")
    assert record == document["evaluation"]
    assert record["clean"]["count"] == int((clean == y).sum()) > 4
    assert record["robust"]["count"] == int(((clean == y) & (answers == y)).sum())
    assert record["attacks"][0]["settings"]["eps"] == 4 / 255
    assert record["data"]["name"] == "synthetic:seed=0, test"
    with open(tmp_path / "images.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [int(r["label"]) for r in rows] == y.tolist()
    assert [int(r["clean_answer"]) for r in rows] == clean.tolist()
    assert [int(r["answer"]) for r in rows] == answers.tolist()
    assert [int(r["fallen"]) for r in rows] == ((clean == y) & (answers != y)).int().tolist()
    assert max(float(r["linf"]) for r in rows) <= 4 / 255 + 1e-6
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"].startswith("tsrfast attack --model")
    assert str(tmp_path) not in (tmp_path / "evaluation.json").read_text()


def test_attack_with_an_oracle(call, checkpoint, tmp_path):
    teacher = checkpoint.with_name("teacher.safetensors")
    words = ["--limit", 12, "--attack", "pgd", "--eps", "4/255", "--loss", "oracle_l2", "--teacher", teacher, "--out", tmp_path]
    code, _, err = call("attack", "--model", checkpoint, *words)
    assert code == 0, err
    x, y = (lambda s: (s.pixels(), s.labels))(load("synthetic", train=1, test=12).test)
    student, oracle = model_of(checkpoint), model_of(teacher)
    got = PGD(eps=4 / 255, loss=OracleL2(oracle)).run(student, x, y)
    tensors, _ = read_tensor_file(tmp_path / "adversarial.safetensors")
    assert torch.equal(tensors["x_adv"], got.x_adv)
    with torch.no_grad():
        agree = student(x).argmax(1) == oracle(x).argmax(1)
    assert torch.equal(tensors["right_when_clean"], agree)
    assert torch.equal(tensors["fallen"], agree & got.success)
    assert "the labels play no part" in (tmp_path / "report.html").read_text()


def test_attack_by_transfer(call, checkpoint, tmp_path):
    surrogate = checkpoint.with_name("teacher.safetensors")
    words = ["--limit", 8, "--attack", "fgsm", "--surrogate", surrogate, "--out", tmp_path]
    code, _, err = call("attack", "--model", checkpoint, *words)
    assert code == 0, err
    assert load_evaluation(tmp_path / "evaluation.json")["attacks"][0]["attack"] == "Transfer"


# --- tsrfast evaluate -----------------------------------------------------------------------------------------------------

EVALUATE = ["--attacks", "apgd-ce,square", "--eps", "2/255", "--set", "steps=5", "--set", "square.queries=30", "--limit", "24"]


def test_evaluate_and_report_again(call, checkpoint, tmp_path):
    words = ["evaluate", "--model", checkpoint, *EVALUATE, "--masking-images", 8, "--out", tmp_path]
    code, out, err = call(*words)
    assert code == 0, err
    assert out == f"{tmp_path / 'report.html'}\n"
    assert "\x1b" not in err
    record = load_evaluation(tmp_path / "evaluation.json")
    assert [a["name"] for a in record["attacks"]] == ["apgd-ce", "square"]
    assert record["threat"] == {"norm": "linf", "eps": 2 / 255}
    split, model = load("synthetic", train=1, test=24).test, model_of(checkpoint)
    x, y = split.pixels(), split.labels
    fallen = APGD(eps=2 / 255, steps=5).run(model, x, y).success | Square(eps=2 / 255, queries=30).run(model, x, y).success
    assert record["robust"]["count"] == int((~fallen).sum())
    before = (tmp_path / "evaluation.json").read_bytes(), (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert call("report", tmp_path)[:2] == (0, f"{tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").read_bytes() == before[1]
    assert call(*words)[0] == 0  # once more: all there
    assert (tmp_path / "evaluation.json").read_bytes() == before[0]


def test_standard_is_autoattack(call, checkpoint, tmp_path):
    words = ["--eps", "2/255", "--limit", 4, "--set", "standard.steps=2", "--set", "queries=5", "--masking-images", 0]
    code, _, err = call("evaluate", "--model", checkpoint, *words, "--out", tmp_path)
    assert code == 0, err
    attacks = load_evaluation(tmp_path / "evaluation.json")["attacks"]
    assert [a["name"] for a in attacks] == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "standart"], "unknown attack 'standart'; did you mean 'standard'"),
        (["--model", "/no/such/file"], "no such file: /no/such/file"),
        (["--data", "cifar:x"], "unknown data set 'cifar'; did you mean 'cifar10'"),
        (["--split", "tset"], "unknown split 'tset'; did you mean 'test'"),
        (["--limit", "0"], "--limit: must be 1 or more, got 0"),
        (["--batch-size", "0"], "--batch-size: must be 1 or more, got 0"),
        (["--masking-images", "-1"], "--masking-images: must be 0 or more, got -1"),
        (["--set", "steps"], "--set: must be key=value, got 'steps'"),
        (["--eps", "8"], "did you mean 8/255"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_mistakes(call, checkpoint, tmp_path, words, message):
    out = tmp_path / "out"
    refused(call("evaluate", "--model", checkpoint, *EVALUATE, "--out", out, *words), message)
    assert not out.exists()


def test_more_mistakes(call, checkpoint, tmp_path):
    attack = ["attack", "--model", checkpoint, "--out", tmp_path / "out", "--limit", 4]
    refused(call(*attack, "--attack", "pdg"), "did you mean 'pgd'")
    refused(call(*attack, "--attack", "cw", "--eps", "0.1"), "unknown setting of attack 'cw' 'eps'")
    refused(call(*attack, "--attack", "pgd", "--set", "targeted=true"), "--set targeted: must be false")
    save_checkpoint(tmp_path / "other.safetensors", ConvReLU((2,), image=(3, 8, 8)))
    refused(
        call("attack", "--model", tmp_path / "other.safetensors", "--attack", "pgd", "--limit", 4, "--out", tmp_path / "out"),
        r"--model: other\.safetensors cannot take images \(3, 32, 32\) of --data synthetic",
    )
    (tmp_path / "pickle.pt").write_bytes(b"PK\x03\x04")
    refused(call("evaluate", "--model", tmp_path / "pickle.pt", "--out", tmp_path / "out"), "looks like a pickle")
    (tmp_path / "file").write_text("precious")
    refused(call("evaluate", "--model", checkpoint, *EVALUATE, "--out", tmp_path / "file"), "cannot (read|write)", code=1)
    assert not (tmp_path / "out").exists()


def test_masking_is_a_warning_in_one_line(call, checkpoint, tmp_path):
    model = model_of(checkpoint)
    with torch.no_grad():
        model.head.weight *= 1e5
        model.head.bias *= 1e5
    save_checkpoint(tmp_path / "masked.safetensors", model)
    words = ["--attacks", "pgd", "--eps", "4/255", "--limit", 32]
    code, _, err = call("evaluate", "--model", tmp_path / "masked.safetensors", *words, "--out", tmp_path / "out")
    assert code == 0, err
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert any("The gradient of cross-entropy is exactly 0" in line for line in warned)
    assert ".py" not in "".join(warned)
    checks = {f["check"] for f in load_evaluation(tmp_path / "out" / "evaluation.json")["masking"]}
    assert "zero_gradient" in checks


def test_an_interrupted_attack_goes_on(call, checkpoint, tmp_path, monkeypatch):
    """Not from the beginning, to the same files; anything else is refused, and so is a second process."""
    words = ["attack", "--model", checkpoint, "--attack", "pgd", "--limit", 9, "--batch-size", 3]
    assert call(*words, "--out", tmp_path / "whole")[0] == 0
    run, seen = PGD.run, []

    def stop(self, model, x, y, index):
        seen.append(index.tolist())
        if seen.count([3, 4, 5]) == 1 and seen[-1] == [3, 4, 5]:
            raise KeyboardInterrupt
        return run(self, model, x, y, index)

    monkeypatch.setattr(PGD, "run", stop)
    words += ["--out", tmp_path / "out"]
    refused(call(*words), "interrupted; the same command goes on from here", code=130)
    refused(call(*words, "--steps", 3), r"call with other attacks \(from 'pgd' on: steps\)")
    with closing(lock(tmp_path / "out")):
        refused(call(*words), "in use by another tsrfast process", code=1)
    assert call(*words)[0] == 0
    assert seen == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7, 8]]
    for name in ("adversarial.safetensors", "images.csv", "evaluation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_and_on(checkpoint, tmp_path):
    words = [sys.executable, "-m", "tsrfast", "evaluate", "--model", str(checkpoint), "--limit", "60", "--batch-size", "20"]
    words += ["--attacks", "pgd,square", "--eps", "1/255", "--set", "square.queries=1500", "--masking-images", "0"]
    with subprocess.Popen(
        [*words, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        for line in running.stderr:
            if line.startswith("pgd: "):
                break  # Square is next
        running.send_signal(signal.SIGINT)
        rest, out = running.stderr.read(), running.stdout.read()
    assert running.returncode == 130, rest
    assert rest.splitlines()[-1] == "tsrfast: interrupted; the same command goes on from here"
    assert "Traceback" not in rest
    assert out == ""
    assert not (tmp_path / "out" / "evaluation.json").exists()
    for where in ("out", "whole"):
        run = subprocess.run([*words, "--out", str(tmp_path / where)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    files = [(tmp_path / where / "evaluation.json").read_bytes() for where in ("out", "whole")]
    assert files[0] == files[1]
