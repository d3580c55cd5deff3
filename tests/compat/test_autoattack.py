"""The drop-in for autoattack: arguments, attributes, log lines, state, and the original's results."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from tsrfast.compat.autoattack import AutoAttack
from tsrfast.compat.autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from tsrfast.compat.autoattack.fab_pt import FABAttack_PT
from tsrfast.compat.autoattack.square import SquareAttack
from tsrfast.compat.autoattack.state import EvaluationState
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE, EPS = (3, 8, 8), 0.02
ALL = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]


def case(n=30):
    model = ConvReLU((8, 6), image=IMAGE, seed=0).eval()
    x = torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(0))
    y = answers(model, x)
    y[:3] = (y[:3] + 1) % 10
    return model, x, y


def answers(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def quick(made):
    """Of either kind."""
    made.apgd.n_restarts, made.fab.n_restarts = 1, 1
    made.fab.n_iter, made.square.n_queries = 10, 30
    return made


def adversary(model, attacks=ALL, n_iter=10, **more):
    made = quick(AutoAttack(model, eps=EPS, seed=0, version="custom", attacks_to_run=attacks, device="cpu", **more))
    made.apgd.n_iter = made.apgd_targeted.n_iter = n_iter
    return made


def lines(out):
    """Without times, and what random numbers decide."""
    return [re.sub(r"\d+\.\d s\)", "s)", line) for line in out.splitlines()]


def test_signatures_are_the_originals():
    """Of fra31/auto-attack at a392200."""
    assert str(inspect.signature(AutoAttack.run_standard_evaluation)).startswith(
        "(self, x_orig: 'Tensor', y_orig: 'Tensor', bs"
    )
    wanted = "model norm eps seed verbose attacks_to_run version is_tf_model device log_path"
    assert list(inspect.signature(AutoAttack).parameters) == wanted.split()
    defaults = {k: p.default for k, p in inspect.signature(AutoAttack).parameters.items()}
    assert (defaults["norm"], defaults["eps"], defaults["verbose"], defaults["device"]) == ("Linf", 0.3, True, "cuda")
    for name, kind in (("autopgd_base", APGDAttack), ("autopgd_base", APGDAttack_targeted), ("fab_pt", FABAttack_PT)):
        original = pytest.importorskip(f"pyautoattack.{name}")
        theirs, ours = (inspect.signature(k).parameters for k in (getattr(original, kind.__name__), kind))
        assert [(k, p.default) for k, p in theirs.items()] == [(k, p.default) for k, p in ours.items()]


def test_versions_set_what_users_read():
    model = case(4)[0]
    standard = AutoAttack(model, eps=EPS, verbose=False)
    assert standard.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (standard.apgd.n_restarts, standard.apgd.n_iter, standard.square.n_queries) == (1, 100, 5000)
    assert (standard.apgd_targeted.n_target_classes, standard.fab.n_target_classes, standard.fab.n_restarts) == (9, 9, 1)
    plus = AutoAttack(model, eps=EPS, version="plus", verbose=False)
    assert (plus.apgd.n_restarts, plus.fab.n_restarts, len(plus.attacks_to_run)) == (5, 5, 6)
    rand = AutoAttack(model, eps=EPS, version="rand", verbose=False)
    assert (rand.apgd.eot_iter, rand.attacks_to_run) == (20, ["apgd-ce", "apgd-dlr"])
    l1 = AutoAttack(model, norm="L1", eps=12, verbose=False)
    assert (l1.apgd.use_largereps, l1.apgd.n_restarts, l1.apgd_targeted.n_target_classes) == (True, 5, 5)
    assert l1.attacks_to_run == standard.attacks_to_run


def test_l1_runs_square():
    model, x, y = case(12)
    made = quick(AutoAttack(model, norm="L1", eps=0.6, seed=0, verbose=False))
    made.apgd.n_iter = made.apgd_targeted.n_iter = 10
    x_adv, labels = made.run_standard_evaluation(x, y, return_labels=True)
    assert torch.equal(labels, answers(model, x_adv))
    assert 0 < int((labels == y).sum()) < 9
    assert float((x_adv - x).abs().flatten(1).sum(1).max()) <= 0.6 + 1e-5
    alone = made.square.perturb(x, y)
    fallen = answers(model, alone) != y
    assert torch.equal((alone != x).flatten(1).any(1)[3:], fallen[3:])
    assert torch.equal(alone, made.square.attack("first", 0)(model, x, y))


def test_log_lines(capsys, tmp_path):
    model, x, y = case()
    made = adversary(model, ["apgd-ce", "square"], log_path=tmp_path / "log.txt")
    state = torch.get_rng_state()
    x_adv, labels = made.run_standard_evaluation(x, y, bs=20, return_labels=True)
    assert torch.equal(torch.get_rng_state(), state)
    printed = lines(capsys.readouterr().out)
    wrong = (answers(model, x_adv) != y).sum()
    assert torch.equal(labels, answers(model, x_adv))
    assert printed[:2] == ["using custom version including apgd-ce, square.", "initial accuracy: 90.00%"]
    assert re.fullmatch(r"apgd-ce - 1/2 - \d+ out of 20 successfully perturbed", printed[2])
    assert re.fullmatch(r"apgd-ce - 2/2 - \d+ out of 7 successfully perturbed", printed[3])
    assert re.fullmatch(r"robust accuracy after APGD-CE: \d+\.\d\d% \(total time s\)", printed[4])
    assert printed[-1] == f"robust accuracy: {1 - wrong.item() / 30:.2%}"
    assert printed[-2].startswith("max Linf perturbation: 0.02000, nan in tensor: 0, max: ")
    assert lines((tmp_path / "log.txt").read_text()) == printed[1:]
    made.verbose = False
    made.run_standard_evaluation(x, y, bs=20)
    assert capsys.readouterr().out == ""


def test_individual_leaves_the_attributes(capsys):
    model, x, y = case()
    made = adversary(model, ["apgd-ce", "apgd-t"])
    found = made.run_standard_evaluation_individual(x, y)
    assert list(found) == made.attacks_to_run == ["apgd-ce", "apgd-t"]
    out = capsys.readouterr().out
    accuracy = (answers(model, found["apgd-t"]) == y).double().mean().item()
    assert f"robust accuracy by APGD-T \t {accuracy:.2%} \t (time attack:" in out
    assert made.clean_accuracy(found["apgd-t"], y) == accuracy
    made.attacks_to_run = ["apgd-dlr"]
    assert list(made.run_standard_evaluation_individual(x, y, return_labels=True)) == ["apgd-dlr"]


def test_resumes_by_its_state(tmp_path):
    model, x, y = case()
    path = tmp_path / "state.json"
    made = adversary(model, ["apgd-ce", "apgd-t"], verbose=False)
    whole = made.run_standard_evaluation(x, y, bs=11)
    made.logger.log = interrupt
    made.verbose = True
    with pytest.raises(KeyboardInterrupt):
        made.run_standard_evaluation(x, y, bs=11, state_path=path)
    again = adversary(model, ["apgd-ce", "apgd-t"], verbose=False)
    assert torch.equal(again.run_standard_evaluation(x, y, bs=11, state_path=path), whole)
    state = EvaluationState.from_disk(path)
    assert state.run_attacks == {"apgd-ce", "apgd-t"}
    assert state.robust_accuracy == (answers(model, whole) == y).double().mean().item()
    assert state.clean_accuracy == 0.9
    with pytest.raises(ValueError, match="different set of attacks"):
        adversary(model, ["apgd-ce"], verbose=False).run_standard_evaluation(x, y, bs=11, state_path=path)
    with pytest.raises(InputError, match=r"checkpoint must .* other batch_size"):
        again.run_standard_evaluation(x, y, bs=12, state_path=path)
    path.write_text("{}")
    with pytest.raises(InputError, match="must be a state file"):
        EvaluationState.from_disk(path)


def interrupt(line):
    if line.startswith("apgd-t - 1"):
        raise KeyboardInterrupt


def test_single_attacks():
    model, x, y = case(12)
    made = adversary(model)
    for one in (made.apgd, made.apgd_targeted, made.fab, made.square):
        adv = one.perturb(x, y)
        assert adv.shape == x.shape
        assert float((adv - x).abs().max()) <= EPS + 1e-6
        assert torch.equal(one.perturb(x[3:]), one.perturb(x[3:], answers(model, x[3:])))
    assert (answers(model, made.apgd.perturb(x, y)) != y).sum() > 3


def test_functions_as_models():
    model, x, y = case(8)
    made = adversary(lambda t: model(t), ["apgd-ce"], verbose=False)
    assert torch.equal(made.run_standard_evaluation(x, y) != x, adversary(model, ["apgd-ce"], verbose=False)
                       .run_standard_evaluation(x, y) != x)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, x, y: AutoAttack(m, is_tf_model=True), "is_tf_model must be False"),
        (lambda m, x, y: AutoAttack(m, norm="linf"), "unknown norm 'linf'"),
        (lambda m, x, y: AutoAttack(m, attacks_to_run=["square"]), "overridden unless you use version='custom'"),
        (lambda m, x, y: AutoAttack(m, version="standart"), "unknown version 'standart'"),
        (lambda m, x, y: adversary(m, ["pgd"]).run_standard_evaluation(x, y), "Attack not supported: 'pgd'"),
        (lambda m, x, y: adversary(m).run_standard_evaluation(x * 255, y), "divide by 255"),
        (lambda m, x, y: adversary(m).run_standard_evaluation(x, y.float()), "y must be int64"),
        (lambda m, x, y: adversary(m).run_standard_evaluation(x, y + 10), "y must be in 0..9"),
        (lambda m, x, y: APGDAttack(m), "eps must be a number, got None"),
        (lambda m, x, y: SquareAttack(m, eps=EPS, targeted=True).perturb(x), "y must be the targets"),
        (lambda m, x, y: APGDAttack(m, eps=EPS, loss="cw").perturb(x, y), "unknown loss 'cw'"),
    ],
)
def test_says_what_is_wrong(call, said):
    with pytest.raises(ValueError, match=said):
        call(*case(4))


def test_apgd_equals_the_original():
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = case()
    model = torch.nn.Sequential(model, torch.nn.Hardtanh(-1e9, 1e9))  # runs in PyTorch on both sides
    for norm, eps in (("Linf", EPS), ("L2", 0.2)):
        for name, kind in (("APGDAttack", APGDAttack), ("APGDAttack_targeted", APGDAttack_targeted)):
            fields = {"n_iter": 10, "norm": norm, "eps": eps, "seed": 5}
            with torch.random.fork_rng():
                theirs = getattr(base, name)(model, **fields).perturb(x.clone(), y)
            ours = kind(model, **fields).perturb(x, y)
            assert torch.equal((ours != x).flatten(1).any(1), (theirs != x).flatten(1).any(1))
            # L2: a start is scaled in another order of operations, and an ascent may part where it meets a tie (of 30 one).
            different = ((ours - theirs).abs() > (0 if norm == "Linf" else 1e-4)).flatten(1).any(1)
            assert different.sum() <= (0 if norm == "Linf" else 1), (norm, name)


def test_evaluation_equals_the_original(capsys, caplog):
    package = pytest.importorskip("pyautoattack")
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = case()
    theirs = quick(package.AutoAttack(model, eps=EPS, seed=0, version="custom", attacks=ALL))
    fields = {"n_iter": 10, "eps": EPS, "seed": 0}
    theirs.apgd, theirs.apgd_targeted = base.APGDAttack(model, **fields), base.APGDAttack_targeted(model, **fields)
    with torch.random.fork_rng(), caplog.at_level("DEBUG", "auto-attack"):
        _, labels = theirs.run_standard_evaluation(x, y, batch_size=20)
    said = [line for line in lines("\n".join(r.getMessage() for r in caplog.records)) if not line.startswith("running ")]
    capsys.readouterr()
    mine, mine_labels = adversary(model).run_standard_evaluation(x, y, bs=20, return_labels=True)
    printed = lines(capsys.readouterr().out)
    # All up to the last of APGD's lines are the same; FAB and Square draw other numbers (and find nothing more here).
    upto = next(i for i, line in enumerate(said) if line.startswith("robust accuracy after APGD-T")) + 1
    assert printed[:upto] == said[:upto]
    assert [line.split(":")[0].split(" out of")[0][:12] for line in printed] == [
        line.split(":")[0].split(" out of")[0][:12] for line in said
    ]
    assert abs(int((mine_labels == y).sum()) - int((labels == y).sum())) <= 1
    assert ((mine - x).abs().flatten(1).amax(1) > 0).sum() == (mine_labels != y)[3:].sum()
