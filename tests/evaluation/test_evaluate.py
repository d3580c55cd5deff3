"""Accuracies against what is counted by hand, what data may be, resuming, and what is written."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tsrfast._files import lock
from tsrfast.attacks import APGD, CW, FGSM, PGD, AutoAttack, Square
from tsrfast.data import Split, load
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.evaluation import GradientMaskingWarning, evaluate, load_evaluation, render, summary_row
from tsrfast.nets import ConvReLU

EPS = 0.02


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above 1/2, by a margin of so many times the distance."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        above = self.scale * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-above, above], 1)


def gray(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


# A linf ball of radius e moves a mean by e: those within 0.1 of 1/2 fall at eps = 0.1, those within 0.02 at eps = 0.02.
MEANS = (0.1, 0.41, 0.45, 0.49, 0.51, 0.55, 0.59, 0.61, 0.9, 0.8)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])  # the last is wrong


def small(**more):
    options = {"masking_images": 0, "progress": False} | more
    return evaluate(Brightness(), (gray(*MEANS), LABELS), {"pgd": PGD(eps=0.1, step_size=0.05)}, **options)


def net(seed=0):
    return ConvReLU((8, 6), image=(3, 8, 8), seed=seed).eval()


def case(n=40):
    """A network, images, and labels of which the first four are wrong."""
    model, x = net(), torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % 10
    return model, x, y


SUITE = {"fgsm": FGSM(eps=EPS), "pgd": PGD(eps=EPS, step_size=EPS / 4, steps=8), "square": Square(eps=EPS, queries=40)}


def test_by_hand():
    """10 images: 9 right; 0.1, 0.61 and 0.9 are further than 0.1 from 1/2, and 0.8 is wrong as it is."""
    e = small()
    assert (e.clean.count, e.clean.of) == (9, 10)
    assert (e.robust.count, e.robust.of) == (3, 10)
    assert e.attacks["pgd"] == e.robust
    record = e.record["attacks"][0]
    assert (record["attacked"], record["fallen"]) == (9, 6)
    assert record["median_distance"] == pytest.approx(0.1, rel=1e-5)
    assert e.result.robust.tolist() == [True, False, False, False, False, False, False, True, True, False]
    assert e.findings is None
    assert str(e).splitlines() == [
        "clean       90.00 % (59.58 to 98.21)",
        "pgd         30.00 % (10.78 to 60.32)",
        "worst case  30.00 % (10.78 to 60.32)",
    ]


def test_in_order_and_individually():
    attacks = {"small": FGSM(eps=0.02), "large": FGSM(eps=0.1)}
    data = (gray(*MEANS), LABELS)
    e = evaluate(Brightness(), data, attacks, masking_images=0, progress=False)
    assert {k: v.count for k, v in e.attacks.items()} == {"small": 7, "large": 3}
    assert [a["attacked"] for a in e.record["attacks"]] == [9, 7]
    assert any("different threats" in note for note in e.record["notes"])
    assert e.record["threat"] is None
    backwards = evaluate(
        Brightness(), data, dict(reversed(attacks.items())), masking_images=0, progress=False, individually=True
    )
    assert {k: v.count for k, v in backwards.attacks.items()} == {"small": 7, "large": 3}
    assert [a["attacked"] for a in backwards.record["attacks"]] == [9, 9]
    assert backwards.robust == e.robust


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(SUITE)), st.booleans(), st.integers(1, 50))
def test_the_worst_case_is_below_every_attack_and_below_clean(order, individually, batch_size):
    model, x, y = case()
    attacks = {name: SUITE[name] for name in order}
    e = evaluate(model, (x, y), attacks, individually=individually, batch_size=batch_size, masking_images=0, progress=False)
    assert e.clean.count == 36
    for share in e.attacks.values():
        assert e.robust.count <= share.count <= e.clean.count
    for name, attack in attacks.items():  # alone
        alone = ~attack.run(model, x, y).success
        assert e.robust.count <= int(alone.sum())
        if individually:
            assert e.attacks[name].count == int(alone.sum())
    whole = evaluate(model, (x, y), attacks, individually=individually, masking_images=0, progress=False)
    assert whole.record == e.record


def test_what_data_may_be():
    model, x, y = case()
    bytes_ = (x * 255).round().byte()
    split = Split(bytes_, y)
    pairs = TensorDataset(split.pixels(), y)
    given = [split, (split.pixels(), y), [split.pixels(), y], DataLoader(pairs, 7), list(DataLoader(pairs, 9))]
    records = [
        evaluate(model, data, SUITE, masking_images=0, progress=False, limit=30, data_name="same").record for data in given
    ]
    assert all(record == records[0] for record in records)
    assert records[0]["clean"]["of"] == 30
    assert evaluate(model, split, [FGSM(eps=EPS)], masking_images=0, progress=False).record["data"]["name"] == "Split"


def test_no_more_batches_are_asked_for_than_the_limit_needs():
    model, x, y = case()

    def batches():
        yield x[:10], y[:10]
        yield x[10:20], y[10:20]
        pytest.fail("a third batch was asked for")

    assert evaluate(model, batches(), [FGSM()], limit=15, masking_images=0, progress=False).clean.of == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": load("synthetic", train=1, test=1)}, r"one split, data\.test or data\.train, got a whole Dataset"),
        ({"data": torch.rand(3, 3, 4, 4)}, "must be a Split, .*got Tensor"),
        ({"data": "cifar10"}, "must be a Split, .*got str"),
        ({"data": []}, "at least one image, got none"),
        ({"data": (torch.rand(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64))}, "at least one image, got none"),
        ({"data": [torch.rand(2, 3, 4, 4)]}, r"a batch must be \(x, y\), .*got Tensor"),
        ({"data": (torch.rand(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64))}, "one label an image"),
        ({"data": (gray(0.1, 0.2), torch.zeros(2))}, "y must be int64 .* got torch.float32"),
        ({"data": (255 * gray(0.1, 0.2), torch.zeros(2, dtype=torch.int64))}, r"0\.\.255\? divide by 255"),
        ({"data": (gray(0.1, 0.2), torch.full((2,), 2))}, r"y must be in 0\.\.1"),
        ({"attacks": {}}, "at least one attack, got none"),
        ({"attacks": "pgd"}, "attacks by name, or a list, got str"),
        ({"attacks": [PGD]}, "must be Attack objects, got type"),
        ({"attacks": [PGD(targeted=True)]}, "must not be targeted, got 'pgd'"),
        ({"limit": 0}, "limit must be an integer >= 1 or None, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"masking_images": -1}, "masking_images must be an integer >= 0, got -1"),
        ({"model": lambda x: x}, r"model must be a torch\.nn\.Module, got function"),
    ],
)
def test_bad_input(change, message, tmp_path):
    given = {"model": Brightness(), "data": (gray(*MEANS), LABELS), "attacks": [PGD()]} | change
    with pytest.raises(InputError, match=message):
        evaluate(given.pop("model"), given.pop("data"), given.pop("attacks"), out=tmp_path / "out", progress=False, **given)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_names_of_a_list_and_members_of_autoattack():
    model, x, y = case()
    quick = AutoAttack(eps=EPS, version="custom", attacks=("apgd-ce", "square"), steps=3, queries=10)
    e = evaluate(model, (x, y), [FGSM(eps=EPS), FGSM(eps=EPS / 2)], masking_images=0, progress=False)
    assert list(e.attacks) == ["fgsm", "fgsm-2"]
    e = evaluate(model, (x, y), {"square": SUITE["square"], "mine": quick}, masking_images=0, progress=False)
    assert list(e.attacks) == ["square", "apgd-ce", "mine/square"]
    assert e.record["attacks"][1]["settings"]["steps"] == 3


def test_an_attack_without_a_radius():
    e = evaluate(Brightness(), (gray(*MEANS), LABELS), {"cw": CW(steps=200, lr=0.05)}, masking_images=8, progress=False)
    assert e.robust.count == 0
    assert e.record["threat"] == {"norm": "l2", "eps": None}
    assert 0 < e.record["attacks"][0]["median_distance"] < 0.2 * 48**0.5
    assert e.findings is None
    assert any("do not have one finite radius" in note for note in e.record["notes"])
    assert any("it looks for the nearest wrong image and has no radius" in note for note in e.record["notes"])
    assert "| l2, any distance |" in summary_row(e).markdown()


def test_the_median_distance_is_that_of_all_whom_the_attack_felled():
    """Also of those that an attack before it had felled, if each attack gets all images."""
    attacks = {"large": FGSM(eps=0.1), "small": FGSM(eps=0.02)}
    e = evaluate(Brightness(), (gray(*MEANS), LABELS), attacks, masking_images=0, progress=False, individually=True)
    assert [a["fallen"] for a in e.record["attacks"]] == [6, 2]
    assert [a["median_distance"] for a in e.record["attacks"]] == [pytest.approx(0.1, rel=1e-5), pytest.approx(0.02, rel=1e-5)]
    assert e.result.stages[1].distance.isnan().sum() == 8


def test_a_network_without_gradient_is_looked_at_as_far_as_that_goes():
    class Detached(Brightness):
        def forward(self, x):
            return super().forward(x).detach()

    data = (gray(*MEANS), LABELS)
    with pytest.warns(GradientMaskingWarning, match="exactly 0 for 9 of 9"):
        e = evaluate(Detached(), data, [Square(eps=0.1, queries=50)], progress=False)
    assert [f.check for f in e.findings] == ["zero_gradient"]


def test_one_process_at_a_time(tmp_path):
    with closing(lock(tmp_path / "out")), pytest.raises(EnvironmentFault, match="out is in use by another tsrfast process"):
        small(out=tmp_path / "out")
    assert small(out=tmp_path / "out").robust.count == 3


def test_when_nothing_is_left_to_look_at_or_to_run():
    wrong = 1 - Brightness()(gray(0.2, 0.9)).argmax(1)
    e = evaluate(Brightness(), (gray(0.2, 0.9), wrong), [FGSM()], progress=False)
    assert (e.clean.count, e.robust.count, e.findings) == (0, 0, None)
    assert any("no image is right when clean" in note for note in e.record["notes"])
    towards = AutoAttack(version="custom", attacks=("apgd-t",))
    with (
        pytest.warns(UserWarning, match="needs 4 classes, the model has 2"),
        pytest.raises(InputError, match="that the model has enough classes for, got none"),
    ):
        evaluate(Brightness(), (gray(*MEANS), LABELS), [towards], progress=False)


def test_findings_are_warned_of_and_written(tmp_path):
    """Logits that do not depend on the image but for a step that has no gradient."""

    class Masked(Brightness):
        def forward(self, x):
            return super().forward((x * 20).round() / 20)

    data = (gray(*[0.2 + 0.6 * i / 31 for i in range(32)]), torch.tensor([0] * 16 + [1] * 16))
    with pytest.warns(GradientMaskingWarning) as caught:
        e = evaluate(Masked(), data, [PGD(eps=0.1)], out=tmp_path, progress=False)
    assert caught[0].filename == __file__
    assert any("exactly 0 for" in str(w.message) for w in caught)
    assert len(caught) == len(e.findings) == len(e.record["masking"])
    zero = next(f for f in e.record["masking"] if f["check"] == "zero_gradient")
    assert zero["numbers"]["zero"] == zero["numbers"]["images"] == e.clean.count
    page = (tmp_path / "report.html").read_text()
    assert "Do not trust the robust accuracy" in page
    assert "shattered and vanishing gradients" in page
    assert load_evaluation(tmp_path / "evaluation.json") == e.record


def test_a_note_where_square_finds_what_gradients_did_not():
    class Flat(Brightness):
        def forward(self, x):
            return super().forward(x + (1e3 * x).round() / 1e3 - x.detach() - (x - x.detach()))

    attacks = {"pgd": PGD(eps=0.1, random_start=False), "square": Square(eps=0.1, queries=100)}
    for order, said in ((("pgd", "square"), True), (("square", "pgd"), False)):
        e = evaluate(Flat(), (gray(*MEANS), LABELS), {k: attacks[k] for k in order}, masking_images=0, progress=False)
        fallen = next(a["fallen"] for a in e.record["attacks"] if a["name"] == "square")
        assert fallen > 0
        assert any(f"square: {fallen} images that no attack before it" in note for note in e.record["notes"]) is said


def test_what_is_written(tmp_path):
    e = small(out=tmp_path, name="a|b", data_name="gray")
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "checkpoint", "evaluation.json", "report.html", "run.json"}
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record == e.record
    assert record["schema"] == 1
    assert record["clean"] == {"count": 9, "of": 10, "value": 0.9, "low": e.clean.low, "high": e.clean.high}
    assert str(tmp_path) not in json.dumps(record)
    assert not re.search(r"second|time", json.dumps(record))
    run = json.loads((tmp_path / "run.json").read_text())
    assert [stage["name"] for stage in run["stages"]] == ["pgd"]
    page = (tmp_path / "report.html").read_text()
    for text in ("a|b", "Brightness", "gray", "90.00 % (59.58 to 98.21)", "30.00 % (10.78 to 60.32)", "linf, 0.1"):
        assert text in page
    # From the JSON alone: the same bytes, but for the section about the run.
    before = render(e.record, tmp_path / "a").read_bytes()
    assert render(load_evaluation(tmp_path / "evaluation.json"), tmp_path / "b").read_bytes() == before
    row = summary_row(e)
    assert row == summary_row(record)
    assert (row.clean_accuracy, row.robust_accuracy, row.norm, row.eps, row.images) == (0.9, 0.3, "linf", 0.1, 10)
    assert row.markdown() == "| a\\|b | Brightness | 90.00 % | 30.00 % | linf, 0.1 | 10 | pgd |"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 2, "schema must be 1, got 2"),
        (("clean", "value"), None, "clean.value must be a number"),
        (("clean", "value"), True, "clean.value must be a number"),
        (("attacks", 0, "robust"), {}, r"attacks\[0\]\.robust must have 'count'"),
        (("attacks", 0, "threat", "eps"), "8/255", "eps must be a number"),
        (("masking",), 3, "masking must be a list"),
        (("notes",), [3], r"notes\[0\] must be text"),
    ],
)
def test_a_damaged_evaluation(tmp_path, path, value, message):
    small(out=tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    at = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        load_evaluation(tmp_path / "evaluation.json")
    with pytest.raises(InputError, match=message):
        render(record, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_disturbed():
    model, x, y = case()
    model.train()
    state, copies = torch.get_rng_state(), (x.clone(), y.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMaskingWarning)
        evaluate(model, (x, y), SUITE, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_progress_is_plain_lines_without_a_terminal(capfd, monkeypatch):
    monkeypatch.setattr("tsrfast._progress.EVERY", 0.0)
    model, x, y = case()
    evaluate(model, (x, y), SUITE, batch_size=10, masking_images=0)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert re.search(r"^  fgsm: 10/36, \d+\.\d/s, \d+ s left \d+ standing$", err, re.MULTILINE)
    assert re.search(r"^pgd: \d+\.\d s$", err, re.MULTILINE)


# Evaluates what `case` gives, and kills itself just before the n-th chunk appears.
DRIVER = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_evaluate import SUITE, case
from tsrfast.evaluation import evaluate

out, nth = sys.argv[2], int(sys.argv[3])
rename, seen = os.replace, 0

def rename_or_die(source, target):
    global seen
    seen += "checkpoint" in str(target)
    if seen == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = rename_or_die
model, x, y = case()
evaluate(model, (x, y), SUITE, out=out, batch_size=10, masking_images=16)
"""


def test_killed_and_gone_on_with(tmp_path):
    """Killed in one attack and then in another, the same call ends with the same bytes, and does no work twice."""
    model, x, y = case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMaskingWarning)
        evaluate(model, (x, y), SUITE, out=tmp_path / "whole", batch_size=10, masking_images=16, progress=False)
    here = __file__.rpartition("/")[0]
    for nth in (4, 5):  # counted anew in each process
        run = subprocess.run(
            [sys.executable, "-c", DRIVER, here, str(tmp_path / "killed"), str(nth)], capture_output=True, check=False
        )
        assert run.returncode == -signal.SIGKILL, run.stderr.decode()
        assert not (tmp_path / "killed" / "evaluation.json").exists()
    left = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "checkpoint").glob("0*.safetensors")}
    assert len(left) > 3
    subprocess.run([sys.executable, "-c", DRIVER, here, str(tmp_path / "killed"), "-1"], check=True, capture_output=True)
    for name, when in left.items():
        assert (tmp_path / "killed" / "checkpoint" / name).stat().st_mtime_ns == when
    files = [(tmp_path / which / "evaluation.json").read_bytes() for which in ("whole", "killed")]
    assert files[0] == files[1]


def test_another_call_in_the_same_folder_is_refused(tmp_path):
    model, x, y = case()
    more = {"out": tmp_path, "masking_images": 0, "progress": False}
    evaluate(model, (x, y), [FGSM(eps=EPS)], **more)
    before = (tmp_path / "evaluation.json").read_bytes()
    for other in ((net(1), x, y, EPS), (model, 1 - x, y, EPS), (model, x, y, 2 * EPS)):
        with pytest.raises(InputError, match="checkpoint must be a new folder, or one of the same call"):
            evaluate(other[0], other[1:3], [FGSM(eps=other[3])], **more)
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_apgd_on_a_model_of_two_classes_in_the_row():
    e = evaluate(
        Brightness(), (gray(*MEANS), LABELS), {"apgd-ce": APGD(eps=8 / 255)}, masking_images=0, progress=False, name="b"
    )
    assert summary_row(e).markdown() == "| b | Brightness | 90.00 % | 70.00 % | linf, 8/255 | 10 | apgd-ce |"
