"""Table 2, figures 5 to 10 and 14, and `global` of the tiny run, derived again; and their claims, fed cases where they must say false."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tsrfast.attacks import PGD
from tsrfast.nets import fold, load_checkpoint
from tsrfast.specialization import specialized_counts
from tsrfast.suite.experiments import fig4, fig5, fig6, fig7, fig8, fig9, fig10, fig14, global_, table2
from tsrfast.suite.experiments._common import AT, ST, ST300, ST_LABEL, UNTRAINED, linf_pgd
from tsrfast.suite.lab import NETS, Student
from tsrfast.suite.modes import MODES

EPOCHS = (50, 100, 150, 200, 300)
MBNC = "MBNC: mean of BNC over teacher nodes"


def experiment(tiny, name):
    return tiny.results["experiments"][name]


def table(tiny, name, group):
    """{(row, column): measured} of a group."""
    return {(c["row"], c["column"]): c["measured"] for c in experiment(tiny, name)["cells"] if c["group"] == group}


def curves(tiny, name):
    return {(c["panel"], c["name"]): c["y"] for c in experiment(tiny, name)["curves"]}


def head(student):
    return "untrained" if student.epoch == 0 else student.name


def holds(claims):
    """{text: holds}"""
    assert all(c["source"] and (c["analysis"] is None) is c["holds"] for c in claims)
    return {c["text"]: c["holds"] for c in claims}


def columns(*names):
    return [f"{name}({t})" for name in names for t in EPOCHS]


# --- training modes -----------------------------------------------------------------------------------------------------


def test_every_mode_has_its_epochs_and_starts_where_it_should(tiny):
    start = load_checkpoint(tiny.lab.checkpoint(UNTRAINED))[0].state_dict()
    for mode in MODES:
        if mode in ("at_oracle_label", "at_data"):
            continue  # in no table or figure
        run = tiny.lab.run_of(Student(mode, 0))
        last = 3 if mode in ("at_in", "at_out", "rft") or mode.startswith("ccat") else 6
        found = sorted(p.name for p in run.folder.glob("epoch_*"))
        assert found == [f"epoch_{e:04d}.safetensors" for e in (0, 1, 2, 3, 4, 6) if e <= last]
        got = load_checkpoint(run.folder / "epoch_0000.safetensors")[0].state_dict()
        if mode != "rft":
            assert all(torch.equal(got[k], start[k]) for k in start), mode


def test_modes_end_in_different_places(tiny):
    ends = {}
    for mode in set(MODES) - {"at_oracle_label", "at_data"}:
        net, _ = load_checkpoint(tiny.lab.checkpoint(Student(mode, 150)))
        ends[mode] = net.state_dict()["convs.0.weight"]
    for a, b in itertools.combinations(ends, 2):
        assert not torch.equal(ends[a], ends[b]), (a, b)


@pytest.mark.parametrize("mode", ["at_oracle_label", "at_data"])
def test_modes_without_a_figure_can_be_trained(tiny, mode):
    first, last = (load_checkpoint(tiny.lab.checkpoint(Student(mode, t)))[0].state_dict() for t in (0, 300))
    assert not torch.equal(first["convs.0.weight"], last["convs.0.weight"])
    assert all(v.isfinite().all() for v in last.values())


def test_store_identities_of_four_layers_have_no_new_keys():
    """So that what was computed before is found again."""
    assert Student("st_logit", 300).identity == {"mode": "st_logit", "epoch": 300, "run": 0}
    assert Student("st_logit", 300, nets=NETS[1]).identity["nets"] == "5 layers"
    assert Student("st_logit", 300, 2, NETS[1]).title == "ST(300) run 2 5 layers"


def test_five_layers_have_an_oracle_of_their_own(tiny):
    p = tiny.lab.preset
    oracle = tiny.lab.oracle_net_of(NETS[1])
    assert len(oracle.widths) == 5
    assert oracle.widths == tuple(w - int(w * r) for w, r in zip((8,) * 5, (0.3, 0.5, 0.5, 0.5, 0.7), strict=True))
    assert p.prune_ratios == (0.3, 0.5, 0.5, 0.7)
    student = tiny.lab.load(tiny.lab.checkpoint(fig5.ST5))
    assert student.widths == tuple(math.floor(1.1 * w + 0.5) for w in oracle.widths)


# --- table 2 ------------------------------------------------------------------------------------------------------------


def test_table2_has_the_published_cells(tiny):
    cells = {(c["row"], c["column"]): c for c in experiment(tiny, "table2")["cells"]}
    rows = ("AT (In-plane)", "AT (Out-plane)", "AT (Standard)")
    assert set(cells) == set(itertools.product(rows, ("In-plane", "Out-plane", "Standard")))
    published = [[cells[r, c]["published"] for c in ("In-plane", "Out-plane", "Standard")] for r in rows]
    assert published == [[88.86, 89.18, 89.28], [83.11, 83.54, 83.60], [86.87, 87.28, 87.18]]
    for (row, column), c in cells.items():
        student = {"AT (In-plane)": "at_in", "AT (Out-plane)": "at_out", "AT (Standard)": "at_oracle"}[row]
        values = []
        for r in range(2):
            attack = linf_pgd(tiny.lab, side={"In-plane": "in", "Out-plane": "out", "Standard": None}[column])
            p = tiny.lab.predictions((Student(student, 150),), attack, 24, r, None)
            given, wanted = (p[f"adversarial/{MODES[student].title}(150)"].tolist(), p["teacher_adversarial"].tolist())
            values.append(100 * sum(a == b for a, b in zip(given, wanted, strict=True)) / 24)
        assert c["measured"] == pytest.approx(sum(values) / 2)
        assert c["n"] == 48


@pytest.mark.parametrize("side", ["in", "out"])
def test_table2s_attack_chooses_by_the_distance_of_patches(tiny, side):
    """Both candidates again, their distances in NumPy; answers agree on every image but one at most (rounding)."""
    lab, p, student = tiny.lab, tiny.lab.preset, Student("at_in", 150)
    found = lab.predictions((student,), linf_pgd(lab, side=side), 24, 0, None)
    x = lab.data.test.pixels(found["index"]).contiguous(memory_format=torch.channels_last)
    net, seed = lab.load(lab.checkpoint(student)), lab.derive("attack", 0)
    attacks = [
        PGD(eps=p.eps, step_size=p.step_size, steps=p.steps, loss=lab.oracle_loss("oracle_l2"), seed=s)
        for s in (seed, seed + 2**40)
    ]
    candidates = [attack(net, x, index=found["index"]) for attack in attacks]
    assert not torch.equal(*candidates)
    u = lab.basis.vectors.numpy()[:, :17]
    distances = []
    for c in candidates:
        patches = F.unfold(c.double(), 3).permute(0, 2, 1).numpy() - lab.basis.mean.numpy()
        distances.append(((patches - patches @ u @ u.T) ** 2).sum((1, 2)))
    second = distances[0] > distances[1] if side == "in" else distances[0] <= distances[1]
    chosen = torch.where(torch.tensor(second)[:, None, None, None], candidates[1], candidates[0])
    with torch.no_grad():
        assert (found["adversarial/AT-in(150)"] != net(chosen).argmax(1)).sum() <= 1
        assert (found["teacher_adversarial"] != lab.oracle_net(chosen).argmax(1)).sum() <= 1


def test_table2_claims():
    texts = holds(table2.claims(table2.PUBLISHED))
    assert len(texts) == 8
    assert all(texts.values())  # the paper's own numbers
    rows = dict(table2.PUBLISHED)
    rows["AT (In-plane)"], rows["AT (Out-plane)"] = rows["AT (Out-plane)"], rows["AT (In-plane)"]
    texts = holds(table2.claims(rows))
    assert not texts["in-plane training is more robust than standard (mean of the row)"]
    assert not texts["standard training is more robust than out-plane (mean of the row)"]
    backwards = holds(table2.claims({row: [3.0, 2.0, 1.0] for row in rows}))
    assert not any(held for text, held in backwards.items() if "hurts" in text)
    assert not any(holds(table2.claims({row: [80.0] * 3 for row in rows})).values())  # ties hold nothing


# --- filters: figures 5, 7, 9, 10 ---------------------------------------------------------------------------------------


def activations(lab, student, layer):
    """Of the student and of its oracle, float64 [channels, images * positions]."""
    x = lab.data.test.pixels(slice(lab.preset.correlation_images)).double()
    paths = (lab.checkpoint(student), lab.oracle_of(student.nets).folder / "oracle.safetensors")
    with torch.no_grad():
        maps = [load_checkpoint(path)[0].double().eval().activations(x)[layer] for path in paths]
    return [m.permute(1, 0, 2, 3).flatten(1).numpy() for m in maps]


def correlations(lab, student, layer):
    """(rho of student nodes and live teacher nodes, which teacher nodes live)."""
    s, t = activations(lab, student, layer)
    alive = t.std(1) > 0
    with np.errstate(all="ignore"):
        rho = np.nan_to_num(np.corrcoef(s, t)[: len(s), len(s) :])
    return rho, alive


def distances(lab, student):
    rho, alive = correlations(lab, student, 0)
    s, t = (
        F.normalize(fold(net).state_dict()["convs.0.weight"].double().flatten(1), dim=1).numpy()
        for net in (load_checkpoint(lab.checkpoint(student))[0], lab.oracle_net_of(student.nets))
    )
    u = lab.basis.vectors.numpy()[:, :17]
    d = s[rho.argmax(0)] - t
    inside = np.linalg.norm(d @ u, axis=1)[alive]
    outside = np.linalg.norm(d - d @ u @ u.T, axis=1)[alive]
    return {"eps_in": sorted(inside), "eps_out": sorted(outside)}


FILTERS = {
    "fig5": (fig5.UNTRAINED5, *fig5.AT5, fig5.ST5),
    "fig7": (UNTRAINED, fig7.IN, fig7.OUT, fig7.STANDARD),
    "fig9": (UNTRAINED, *ST, *ST_LABEL),
    "fig10": (UNTRAINED, *ST, *fig10.ST_GAUSS),
}


@pytest.mark.parametrize("name", FILTERS)
def test_distances_of_filters_are_numpys(tiny, name):
    found, drawn = table(tiny, name, "Mean over oracle nodes"), curves(tiny, name)
    assert set(found) == set(itertools.product(("mean eps_in", "mean eps_out"), map(head, FILTERS[name])))
    for student in FILTERS[name][:: 1 if name == "fig7" else 5]:  # the first, and some later ones
        for which, wanted in distances(tiny.lab, student).items():
            assert found[f"mean {which}", head(student)] == pytest.approx(np.mean(wanted), abs=1e-4)
            if student.epoch:
                assert drawn[which, student.name] == pytest.approx(wanted, abs=1e-4)
    assert ("eps_in", "untrained") not in drawn
    assert all(0 <= v <= 2 for v in found.values())


def means(**values):
    """{"eps_in": {student: value}, ...} from two lists in the order of `students`."""
    students = values.pop("students")
    return {name: dict(zip(students, v, strict=True)) for name, v in values.items()}


def test_fig7_claims():
    students = (fig7.IN, fig7.OUT, fig7.STANDARD)
    good = holds(fig7.claims(means(students=students, eps_in=[0.1, 0.3, 0.2], eps_out=[0.1, 0.2, 0.3])))
    assert len(good) == 4
    assert all(good.values())
    assert not any(holds(fig7.claims(means(students=students, eps_in=[0.3, 0.2, 0.1], eps_out=[0.2, 0.2, 0.2]))).values())


def test_fig9_claims():
    students = (*ST, *ST_LABEL)
    falling = [0.9, 0.8, 0.7, 0.6, 0.5]
    good = holds(fig9.claims(means(students=students, eps_in=[*falling, *[0.9] * 5], eps_out=[*falling, *falling])))
    assert len(good) == 5
    assert all(good.values())
    rising = falling[::-1]
    bad = holds(fig9.claims(means(students=students, eps_in=[*rising, *falling], eps_out=[*rising, *rising])))
    assert not any(bad.values())


def test_fig10_claims():
    students = (*ST, *fig10.ST_GAUSS)
    good = fig10.claims(means(students=students, eps_in=[*[0.9] * 5, *[0.8] * 5], eps_out=[*[0.9] * 5, *[0.5] * 5]))
    assert [c["strong"] for c in good] == [True, False, False, False]
    assert all(holds(good).values())
    bad = fig10.claims(means(students=students, eps_in=[*[0.9] * 5, *[0.9] * 5], eps_out=[*[0.5] * 5, *[0.9] * 5]))
    assert not any(holds(bad).values())


def test_fig4_and_fig5_claims():
    """Figure 5 makes those of figures 3 and 4."""
    students = (UNTRAINED, *AT, ST300)
    good = fig4.distance_claims(
        means(students=students, eps_in=[1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.6], eps_out=[1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.6]),
        AT, ST300, UNTRAINED, "s",
    )  # fmt: skip
    assert len(good) == 6
    assert all(holds(good).values())
    bad = fig4.distance_claims(
        means(students=students, eps_in=[1, 0.9, 0.4, 0.5, 0.2, 0.1, 0.1], eps_out=[0, 1, 1, 1, 1, 1, 0.5]),
        AT, ST300, UNTRAINED, "s",
    )  # fmt: skip
    assert not any(holds(bad).values())
    layers = [fig5.layer_claims(layer, [1, 2, 3, 4, 5], 0, "s") for layer in fig5.LAYERS]
    assert all(held for claims in layers for held in holds(claims).values())
    assert not any(holds(fig5.layer_claims(0, [1, 2, 3, 5, 4], 4, "s")).values())


# --- specialization: figures 5, 6, 8, 14 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "student", "layers"),
    [
        ("fig5", fig5.ST5, (0, 2, 4)),
        ("fig5", fig5.AT5[0], (2,)),
        ("fig8", ST_LABEL[2], range(4)),
        ("fig6", fig6.AT_AUG, range(4)),
    ],
)
def test_mbnc_is_numpys(tiny, name, student, layers):
    for layer in layers:
        rho, alive = correlations(tiny.lab, student, layer)
        best = rho.max(0)[alive]
        assert table(tiny, name, MBNC)[f"layer {layer}", student.name] == pytest.approx(best.mean(), abs=1e-4)
        if name != "fig6":
            assert curves(tiny, name)[f"layer {layer}", student.name] == pytest.approx(sorted(best), abs=1e-4)


def test_figures_have_their_panels(tiny):
    layers = [f"layer {layer}" for layer in range(4)]
    assert set(curves(tiny, "fig8")) == set(itertools.product(layers, columns("ST", "ST-label")))
    five = {("layer 0", "layer 2", "layer 4", "eps_in", "eps_out")[k] for k in range(5)}
    assert set(curves(tiny, "fig5")) == set(itertools.product(five, [*columns("AT"), "ST(300)"]))
    assert set(curves(tiny, "fig7")) == set(itertools.product(("eps_in", "eps_out"), ("AT-in(150)", "AT-out(150)", "AT(150)")))
    assert set(curves(tiny, "fig10")) == set(itertools.product(("eps_in", "eps_out"), columns("ST", "ST-gauss")))
    dashed = {c["name"] for c in experiment(tiny, "fig10")["curves"] if c["style"]["dash"]}
    assert dashed == set(columns("ST-gauss"))
    panels = [f"seed {seed}, layer {layer}" for seed in range(3) for layer in range(4)]
    assert set(curves(tiny, "fig14")) == set(itertools.product(panels, ("ST(300)", "AT(300)")))
    for c in experiment(tiny, "fig6")["curves"]:
        assert c["x"] == [0, 1, 2, 3]
        assert c["style"]["dash"] is ("aug" in c["name"])


def test_fig8_claims():
    texts = holds(fig8.layer_claims(0, [2, 3, 4, 5, 6], [1, 2, 3, 4, 5]))
    assert len(texts) == 3
    assert all(texts.values())
    assert not any(holds(fig8.layer_claims(0, [2, 3, 4, 5, 4], [1, 2, 3, 3, 5])).values())


def test_fig6_ratios_are_counts(tiny):
    for student in fig6.STUDENTS:
        for layer in range(4):
            counts = specialized_counts(tiny.lab.correlation(student)[layer])
            row = f"layer {layer}", student.name
            assert table(tiny, "fig6", "Student nodes with NC > 0.9 (specialized)")[row] == counts.specialized
            assert table(tiny, "fig6", "Student nodes with NC < 0.8 (unspecialized)")[row] == counts.unspecialized
            wanted = counts.unspecialized / counts.specialized if counts.specialized else 2 * counts.unspecialized
            assert table(tiny, "fig6", fig6.RATIO)[row] == wanted


def test_fig6_claims():
    score = dict(zip((fig6.AT300, fig6.AT_AUG, ST300, fig6.ST_AUG), (0.8, 0.9, 0.6, 0.7), strict=True))
    ratios = {s: 1 - v for s, v in score.items()}
    texts = holds(fig6.claims(0, score, ratios))
    assert len(texts) == 4
    assert all(texts.values())
    assert not any(holds(fig6.claims(0, ratios, score)).values())
    one_pair = score | {fig6.ST_AUG: 0.5}  # augmentation helps AT alone: not enough
    texts = holds(fig6.claims(0, one_pair, {s: 1 - v for s, v in one_pair.items()}))
    assert [held for text, held in texts.items() if "AT against ST" in text] == [True, True]
    assert [held for text, held in texts.items() if "augmentation" in text] == [False, False]


def test_fig14_counts_are_numpys(tiny):
    for mode, run, layer in (("st_logit", 0, 0), ("at_oracle", 1, 1), ("st_logit", 2, 3)):
        student = Student(mode, 300, run)
        rho, alive = correlations(tiny.lab, student, layer)
        wanted = ((rho > 0.9) & alive).sum(0)
        assert curves(tiny, "fig14")[f"seed {run}, layer {layer}", student.name] == wanted.tolist()
        column = f"{student.name} seed {run}"
        reached = table(tiny, "fig14", "Teacher nodes with at least one")[f"layer {layer}", column]
        assert reached == pytest.approx(100 * (wanted > 0).mean())
    first, second = (load_checkpoint(tiny.lab.checkpoint(Student("at_oracle", 0, run)))[0].state_dict() for run in (0, 2))
    assert not torch.equal(first["convs.0.weight"], second["convs.0.weight"])


def test_fig14_claims():
    students = [s for group in fig14.STUDENTS.values() for s in group]
    even = torch.ones(6, dtype=torch.int64)
    texts = holds(fig14.claims({s: [even, even] for s in students}))
    assert len(texts) == 4
    assert all(texts.values())
    crowd = torch.tensor([6, 0, 0, 0, 0, 0])
    nobody = torch.zeros(6, dtype=torch.int64)
    for other in (crowd, nobody):  # one seed of each mode is another picture
        frequency = {s: [other, other] if s.run == 1 else [even, even] for s in students}
        assert not any(holds(fig14.claims(frequency)).values())
    assert fig14.dispersion(crowd) == pytest.approx(5.0)
    assert math.isnan(fig14.dispersion(nobody))


# --- all students -------------------------------------------------------------------------------------------------------


def test_global_is_spearmans_over_every_checkpoint(tiny):
    rows = {}
    for c in experiment(tiny, "global")["cells"]:
        if c["group"] == "Students":
            rows.setdefault(c["row"], {})[c["column"]] = c["measured"]
    for mode, run in (("at_oracle", 0), ("at_oracle", 2), ("st_logit", 1), ("st_aug", 0), ("rft", 0)):
        assert {Student(mode, t, run).title for t in tiny.lab.epochs(mode)} <= set(rows)
    assert "AT-in(150)" in rows
    assert "AT-in(300)" not in rows
    assert not any("5 layers" in row or "as written" in row for row in rows)
    assert rows["ST-gauss(200)"]["MBNC, mean over layers"] == pytest.approx(
        np.mean([rho.max(0)[alive].mean() for rho, alive in (correlations(tiny.lab, Student("st_gauss", 200), k) for k in range(4))]),
        abs=1e-4,
    )  # fmt: skip
    score, accuracy = (np.array([r[name] for r in rows.values()]) for name in ("MBNC, mean over layers", "robust accuracy"))
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (score, accuracy)]
    wanted = np.corrcoef(*ranks)[0, 1]
    assert table(tiny, "global", "Rank correlation of MBNC and robust accuracy")["all students", "Spearman"] == pytest.approx(
        wanted
    )
    (claim,) = experiment(tiny, "global")["claims"]
    assert claim["strong"]
    assert claim["left"] == pytest.approx(wanted)
    assert sum(len(c["x"]) for c in experiment(tiny, "global")["curves"]) == len(rows)


def test_global_claim():
    for r, held in ((0.61, True), (0.6, False), (-0.9, False), (math.nan, False)):
        assert list(holds(global_.claims(global_.Pearson(r, 50, 0.0))).values()) == [held]
