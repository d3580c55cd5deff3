"""Tables 4 and 5 and figures 11, 12, 15 and 16 of the tiny run; and every claim of theirs, fed cases where it must say false."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from tsrfast.nets import load_checkpoint
from tsrfast.suite.experiments import fig11, fig12, fig15, fig16, table4, table5
from tsrfast.suite.experiments._common import AT150, CCAT, RFT150, ST150, ST300, linf_pgd
from tsrfast.suite.lab import Student
from tsrfast.suite.stages import student_split
from tsrfast.training.robust_features import start_of

CCAT_COLUMNS = ["CCAT-5(150)", "CCAT-10(150)", "CCAT-20(150)", "AT(150)"]
RFT_COLUMNS = ["RFT(150)", "ST(150)", "ST(300)", "AT(150)"]
TABLE4 = {
    "CCAT (rho = 5)": ("ccat5", 47.25), "CCAT (rho = 10)": ("ccat10", 52.04), "CCAT (rho = 20)": ("ccat20", 49.33),
    "AT": ("at_oracle", 84.07), "CCAT as written": ("ccat_as_written", None),
}  # fmt: skip
TABLE5 = {
    "AT(150)": ("at_oracle", 150, 83.27), "ST(150)": ("st_logit", 150, 35.88), "ST(300)": ("st_logit", 300, 61.73),
    "RFT(150)": ("rft", 150, 45.39),
}  # fmt: skip


def experiment(tiny, name):
    return tiny.results["experiments"][name]


def measured(tiny, name, group):
    """{row: {column: value}} of a group."""
    table = {}
    for c in experiment(tiny, name)["cells"]:
        if c["group"] == group:
            table.setdefault(c["row"], {})[c["column"]] = c["measured"]
    return table


def agreement(lab, student, label):
    """In %, over repetitions, by counting the stored predictions."""
    values = []
    for r in range(lab.preset.repetitions):
        p = lab.predictions((student,), linf_pgd(lab), lab.preset.eval_images, r, None)
        given = p[f"{'clean' if label == 'clean' else 'adversarial'}/{student.name}"]
        wanted = p["teacher_adversarial" if label == "t(x')" else "teacher_clean"]
        values.append(100 * sum(a == b for a, b in zip(given.tolist(), wanted.tolist(), strict=True)) / len(given))
    return sum(values) / len(values)


def check_accuracies(tiny, name, students):
    for group, row, label in (
        ("Robust accuracy", "l_inf PGD", "t(x')"),
        ("Other labels", "l_inf PGD, agrees with t(x)", "t(x)"),
        ("Other labels", "clean images: s(x) = t(x)", "clean"),
    ):
        got = measured(tiny, name, group)[row]
        assert got == pytest.approx({column: agreement(tiny.lab, s, label) for column, s in students.items()})
        assert all(0 <= v <= 100 for v in got.values())


def numbers(tiny, name):
    return {c["text"]: (c["left"], c["right"]) for c in experiment(tiny, name)["claims"]}


def verdicts(claims):
    return [c["holds"] for c in claims]


# --- table 4 ------------------------------------------------------------------------------------------------------------


def test_table4_cells(tiny):
    check_accuracies(tiny, "table4", {column: Student(mode, 150) for column, (mode, _) in TABLE4.items()})
    cells = [c for c in experiment(tiny, "table4")["cells"] if c["group"] == "Robust accuracy"]
    assert {c["column"]: c["published"] for c in cells} == {column: p for column, (_, p) in TABLE4.items()}
    assert all(c["n"] == 2 * 24 and c["std"] >= 0 for c in cells)


def test_table4_says_how_far_the_attacks_go(tiny):
    cells = measured(tiny, "table4", "Attacked training images")
    curves = {c["name"]: c["y"] for c in experiment(tiny, "table4")["curves"]}
    assert set(curves) == {"CCAT's attack", "PGD, as written"}
    for name, distance in curves.items():
        assert len(distance) == 24
        assert distance == sorted(distance)
        assert 0 <= distance[0] <= distance[-1] <= 1
        assert cells["mean distance, in eps"][name] == pytest.approx(sum(distance) / 24)
        for rho in (5, 10, 20):
            wanted = sum((1 - d) ** rho for d in distance) / 24
            assert cells[f"mean confidence lambda, rho = {rho}"][name] == pytest.approx(wanted, abs=1e-12)
        rim = 100 * sum(d > 1 - 1e-5 for d in distance) / 24
        assert cells["at the rim, where the label is uniform whatever rho"][name] == pytest.approx(rim)
    assert len(set(curves["CCAT's attack"])) > 12  # from all over the ball


def test_table4_claims(tiny):
    five, ten, twenty, at = (measured(tiny, "table4", "Robust accuracy")["l_inf PGD"][c] for c in list(TABLE4)[:4])
    best = max(five, ten, twenty)
    assert numbers(tiny, "table4") == {
        "rho = 10 is more robust than rho = 20": (ten, twenty),
        "rho = 20 is more robust than rho = 5": (twenty, five),
        "AT is more robust than every CCAT": (at, best),
        "far more: by at least 10 points": (at - best, 10.0),
    }
    assert verdicts(table4.claims(47.25, 52.04, 49.33, 84.07)) == [True] * 4  # the paper's
    assert verdicts(table4.claims(47.25, 49.33, 52.04, 84.07)) == [False, True, True, True]
    assert verdicts(table4.claims(49.33, 52.04, 47.25, 84.07)) == [True, False, True, True]
    assert verdicts(table4.claims(5, 7, 6, 16)) == [True, True, True, False]
    assert verdicts(table4.claims(5, 7, 6, 7)) == [True, True, False, False]
    assert verdicts(table4.claims(6, 6, 6, math.nan)) == [False] * 4


# --- figures 11 and 15: BNC ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "columns"), [("fig11", CCAT_COLUMNS), ("fig15", RFT_COLUMNS)])
def test_bnc_panels(tiny, name, columns):
    means = measured(tiny, name, "MBNC: mean of BNC over teacher nodes")
    curves = experiment(tiny, name)["curves"]
    assert {(c["panel"], c["name"]) for c in curves} == set(itertools.product([f"layer {k}" for k in range(4)], columns))
    for c in curves:
        assert c["y"] == sorted(c["y"])
        assert all(-1 <= v <= 1 for v in c["y"])
        assert sum(c["y"]) / len(c["y"]) == pytest.approx(means[c["panel"]][c["name"]], abs=1e-6)


def test_fig11_claims(tiny):
    wanted = {}
    for layer in range(4):
        means = measured(tiny, "fig11", "MBNC: mean of BNC over teacher nodes")[f"layer {layer}"]
        five, ten, twenty, at = (means[c] for c in CCAT_COLUMNS)
        wanted[f"layer {layer}: MBNC of CCAT with rho = 10 is above that with rho = 20"] = (ten, twenty)
        wanted[f"layer {layer}: MBNC of CCAT with rho = 20 is above that with rho = 5"] = (twenty, five)
        wanted[f"layer {layer}: MBNC of AT is above that of every CCAT"] = (at, max(five, ten, twenty))
    assert numbers(tiny, "fig11") == wanted
    assert verdicts(fig11.layer_claims(0, 0.5, 0.7, 0.6, 0.8)) == [True, True, True]
    assert verdicts(fig11.layer_claims(0, 0.5, 0.6, 0.7, 0.8)) == [False, True, True]
    assert verdicts(fig11.layer_claims(0, 0.6, 0.7, 0.5, 0.8)) == [True, False, True]
    assert verdicts(fig11.layer_claims(0, 0.5, 0.7, 0.6, 0.7)) == [True, True, False]


def test_fig15_claims(tiny):
    wanted = {}
    for layer in range(4):
        means = measured(tiny, "fig15", "MBNC: mean of BNC over teacher nodes")[f"layer {layer}"]
        rft, st150, st300, at = (means[c] for c in RFT_COLUMNS)
        wanted[f"layer {layer}: MBNC of AT(150) is above all others"] = (at, max(rft, st150, st300))
        wanted[f"layer {layer}: MBNC of RFT(150) is above that of ST(150)"] = (rft, st150)
        closer = f"layer {layer}: MBNC of RFT(150) is closer to ST(300) than to ST(150)"
        wanted[closer] = (abs(rft - st300), abs(rft - st150))
    assert numbers(tiny, "fig15") == wanted
    assert verdicts(fig15.layer_claims(0, rft=0.68, st150=0.5, st300=0.7, at=0.9)) == [True, True, True]
    assert verdicts(fig15.layer_claims(0, rft=0.68, st150=0.5, st300=0.7, at=0.69)) == [False, True, True]
    assert verdicts(fig15.layer_claims(0, rft=0.4, st150=0.5, st300=0.35, at=0.9)) == [True, False, True]
    assert verdicts(fig15.layer_claims(0, rft=0.55, st150=0.5, st300=0.7, at=0.9)) == [True, True, False]


# --- figures 12 and 16: filters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "columns"), [("fig12", CCAT_COLUMNS), ("fig16", RFT_COLUMNS)])
def test_eps_panels(tiny, name, columns):
    means = measured(tiny, name, "Mean over oracle nodes")
    curves = experiment(tiny, name)["curves"]
    assert {(c["panel"], c["name"]) for c in curves} == set(itertools.product(("eps_in", "eps_out"), columns))
    for c in curves:
        assert c["y"] == sorted(c["y"])
        assert all(0 <= v <= 2 for v in c["y"])
        assert sum(c["y"]) / len(c["y"]) == pytest.approx(means[f"mean {c['panel']}"][c["name"]], abs=1e-6)


def test_fig12_claims(tiny):
    cells, wanted = measured(tiny, "fig12", "Mean over oracle nodes"), {}
    for name in ("eps_in", "eps_out"):
        *ccat, at = (cells[f"mean {name}"][c] for c in CCAT_COLUMNS)
        wanted[f"mean {name} of AT is below that of every CCAT"] = (at, min(ccat))
    assert numbers(tiny, "fig12") == wanted

    def means(at, five, ten, twenty):
        return {AT150: at, CCAT[5]: five, CCAT[10]: ten, CCAT[20]: twenty}

    low, high = means(0.5, 0.6, 0.7, 0.8), means(0.7, 0.9, 0.8, 0.6)
    assert verdicts(fig12.claims({"eps_in": low, "eps_out": low})) == [True, True]
    assert verdicts(fig12.claims({"eps_in": high, "eps_out": low})) == [False, True]
    assert verdicts(fig12.claims({"eps_in": low, "eps_out": high})) == [True, False]


def test_fig16_claims(tiny):
    cells = measured(tiny, "fig16", "Mean over oracle nodes")
    (rft, st150, st300, _), (outside, _, outside300, _) = (
        [cells[f"mean {n}"][c] for c in RFT_COLUMNS] for n in ("eps_in", "eps_out")
    )
    assert numbers(tiny, "fig16") == {
        "mean eps_in of RFT(150) is closer to ST(300) than to ST(150)": (abs(rft - st300), abs(rft - st150)),
        "mean eps_out of RFT(150) is below that of ST(300)": (outside, outside300),
    }

    def means(rft, st150, st300):
        return {RFT150: rft, ST150: st150, ST300: st300}

    good, bad = means(0.5, 0.7, 0.51), means(0.68, 0.7, 0.5)
    assert verdicts(fig16.claims({"eps_in": good, "eps_out": good})) == [True, True]
    assert verdicts(fig16.claims({"eps_in": bad, "eps_out": good})) == [False, True]
    assert verdicts(fig16.claims({"eps_in": good, "eps_out": bad})) == [True, False]


# --- table 5 ------------------------------------------------------------------------------------------------------------


def test_table5_cells(tiny):
    check_accuracies(tiny, "table5", {column: Student(mode, epoch) for column, (mode, epoch, _) in TABLE5.items()})
    cells = [c for c in experiment(tiny, "table5")["cells"] if c["group"] == "Robust accuracy"]
    assert {c["column"]: c["published"] for c in cells} == {column: p for column, (_, _, p) in TABLE5.items()}


def test_table5_claims(tiny):
    row = measured(tiny, "table5", "Robust accuracy")["l_inf PGD"]
    assert numbers(tiny, "table5") == {
        "AT(150) is more robust than ST(300)": (row["AT(150)"], row["ST(300)"]),
        "ST(300) is more robust than RFT(150)": (row["ST(300)"], row["RFT(150)"]),
        "RFT(150) is more robust than ST(150)": (row["RFT(150)"], row["ST(150)"]),
    }
    assert verdicts(table5.claims(at=83.27, st150=35.88, st300=61.73, rft=45.39)) == [True] * 3  # the paper's
    assert verdicts(table5.claims(at=61.73, st150=35.88, st300=61.73, rft=45.39)) == [False, True, True]
    assert verdicts(table5.claims(at=83.27, st150=35.88, st300=45.39, rft=61.73)) == [True, False, True]
    assert verdicts(table5.claims(at=83.27, st150=45.39, st300=61.73, rft=35.88)) == [True, True, False]


def test_rft_starts_at_st150_and_sees_other_images(tiny):
    lab = tiny.lab
    first, half = (load_file(lab.checkpoint(s)) for s in (Student("rft", 0), ST150))
    assert first.keys() == half.keys()
    assert all(torch.equal(first[k], half[k]) for k in first if k != "training")
    training = load_checkpoint(lab.checkpoint(RFT150))[1]["training"]
    assert (training["objective"], training["epoch"]) == ("st_logit", lab.epochs("rft")[150])
    data, made = student_split(lab), lab.robust_split(AT150)
    assert torch.equal(made.labels, data.labels)
    assert made.images.shape == data.images.shape
    assert (made.images != data.images).any()


def test_table5_says_how_close_the_images_come(tiny):
    """Again for the first 24 images, in float64 and with the networks' own layers."""
    lab, found = tiny.lab, measured(tiny, "table5", "Robust-feature images x_r of images x")
    data, made = student_split(lab), lab.robust_split(AT150)
    f, t = (load_checkpoint(p)[0].double().eval() for p in (lab.checkpoint(AT150), lab.oracle.folder / "oracle.safetensors"))
    index = torch.arange(24)
    start = start_of(data, index, lab.derive("robust features", 0))
    with torch.no_grad():
        x = data.pixels(index).double()
        for column, images in (("at the start", data.pixels(start)), ("x_r", made.pixels(index))):
            y = images.double()
            away = (f.activations(y)[-1] - f.activations(x)[-1]).flatten(1).norm(dim=1).mean().item()
            assert found["mean |f_M(.) - f_M(x)|"][column] == pytest.approx(away, rel=1e-4)
            assert found["mean |t(.) - t(x)|"][column] == pytest.approx((t(y) - t(x)).norm(dim=1).mean().item(), rel=1e-4)
            same = 100 * (t(y).argmax(1) == t(x).argmax(1)).double().mean().item()
            assert found["the oracle's answer is that on x"][column] == pytest.approx(same)
    sums = {c: 0.5 * found["mean |t(.) - t(x)|"][c] + found["mean |f_M(.) - f_M(x)|"][c] for c in ("at the start", "x_r")}
    assert sums["x_r"] < sums["at the start"]
