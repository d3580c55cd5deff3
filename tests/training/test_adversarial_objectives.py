"""Label-target and data-adversarial training, and the choice between two starts, against plain PyTorch in float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from tsrfast.attacks import PGD, CrossEntropy, OracleL2
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.specialization import PatchBasis, distance_to_patches, patch_basis
from tsrfast.training import AdversarialLabels, OracleAdversarial, TwoStarts


def net(seed: int) -> ConvReLU:
    return ConvReLU((3, 2), image=(1, 6, 6), classes=4, seed=seed).double()


def batch(count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 6, 6, generator=g).double()
    return x, torch.randint(4, (count,), generator=g), torch.randint(100, (count,), generator=g)


def distance(x: Tensor) -> partial[Tensor]:
    return partial(distance_to_patches, basis=patch_basis(x, components=4))


def cross_entropy(logits: Tensor, y: Tensor) -> float:
    log_softmax = logits - logits.exp().sum(1, keepdim=True).log()
    return -sum(log_softmax[i, k].item() for i, k in enumerate(y.tolist())) / len(y)


@pytest.mark.parametrize("mode", ["at_oracle_label", "at_data"])
@pytest.mark.parametrize("label_source", ["teacher", "dataset"])
def test_adversarial_labels_by_hand(mode: str, label_source: str) -> None:
    """One signed step without a random start, written out: the oracle attack moves both networks' logits apart, the other the loss of s."""
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    y = teacher(x).argmax(1) if label_source == "teacher" else labels
    assert not torch.equal(teacher(x).argmax(1), labels)
    moved = x.clone().requires_grad_()
    if mode == "at_oracle_label":
        aim, loss = (student(moved) - teacher(moved)).square().sum(), OracleL2(teacher)
    else:
        aim, loss = torch.nn.functional.cross_entropy(student(moved), y, reduction="sum"), CrossEntropy()
    (gradient,) = torch.autograd.grad(aim, moved)
    wanted = cross_entropy(student((x + 0.03 * gradient.sign()).clamp(0, 1)), y)
    attack = PGD(eps=0.03, step_size=0.03, steps=1, loss=loss, random_start=False)
    objective = AdversarialLabels(teacher, attack, mode, label_source)
    assert objective.name == mode
    assert objective(student, x, labels, index, 0).item() == pytest.approx(wanted, rel=1e-9)
    assert wanted != pytest.approx(cross_entropy(student(x), y), rel=1e-6)


def test_adversarial_labels_do_not_differentiate_through_the_attack() -> None:
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    objective = AdversarialLabels(teacher, lambda model, x, y, index: x + 0.1 * model(x).mean())
    got = torch.autograd.grad(objective(student, x, labels, index, 0), list(student.parameters()))
    fixed = (x + 0.1 * student(x).mean()).detach()
    loss = torch.nn.functional.cross_entropy(student(fixed), teacher(x).argmax(1))
    for a, b in zip(got, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_starts_move_with_the_epoch() -> None:
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    attack = PGD(eps=0.1, step_size=0.01, steps=1, loss=OracleL2(teacher), seed=5)
    basis = patch_basis(x, components=4)
    for objective in (
        AdversarialLabels(teacher, attack),
        OracleAdversarial(teacher, TwoStarts(attack, partial(distance_to_patches, basis=basis), "in", seed=5)),
    ):
        values = [objective(student, x, labels, index, epoch).item() for epoch in (0, 1, 0)]
        assert values[0] == values[2] != values[1]


def by_hand(x: Tensor, basis: PatchBasis) -> list[float]:
    """The sum over all patches of the squared part outside of the leading vectors, patch by patch."""
    u = basis.vectors[:, : basis.components]
    found = []
    for image in x:
        total = 0.0
        for i, j in itertools.product(range(4), range(4)):
            p = image[:, i : i + 3, j : j + 3].flatten() - basis.mean
            total += (p - u @ (u.T @ p)).square().sum().item()
        found.append(total)
    return found


def test_two_starts_takes_the_closer_and_the_farther_candidate() -> None:
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    basis = patch_basis(x, components=4)
    attack = PGD(eps=0.1, step_size=0.02, steps=2, loss=OracleL2(teacher))
    inside, outside = (TwoStarts(attack, partial(distance_to_patches, basis=basis), side, seed=3) for side in ("in", "out"))
    a, b = inside.candidates(student, x, labels, index)
    assert not torch.equal(a, b)
    assert torch.equal(a, PGD(eps=0.1, step_size=0.02, steps=2, loss=OracleL2(teacher), seed=3)(student, x, labels, index))
    closer = torch.tensor([p < q for p, q in zip(by_hand(a, basis), by_hand(b, basis), strict=True)])
    assert 0 < closer.sum() < len(x)  # both candidates are chosen somewhere
    got_in, got_out = inside(student, x, labels, index), outside(student, x, labels, index)
    for n in range(len(x)):
        assert torch.equal(got_in[n], (a if closer[n] else b)[n])
        assert torch.equal(got_out[n], (b if closer[n] else a)[n])
    assert ((got_in - x).abs() <= 0.1 + 1e-12).all()
    assert sum(by_hand(got_in, basis)) < sum(by_hand(got_out, basis))


def test_two_starts_of_equal_distance_take_the_first_inside() -> None:
    """All vectors lie inside: every distance is 0."""
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    basis = patch_basis(x, components=9)
    attack = PGD(eps=0.1, step_size=0.02, steps=2, loss=OracleL2(teacher))
    a, b = TwoStarts(attack, partial(distance_to_patches, basis=basis), "in").candidates(student, x, labels, index)
    assert torch.equal(TwoStarts(attack, partial(distance_to_patches, basis=basis), "in")(student, x, labels, index), a)
    assert torch.equal(TwoStarts(attack, partial(distance_to_patches, basis=basis), "out")(student, x, labels, index), b)


def test_two_starts_do_not_depend_on_the_batch() -> None:
    student, teacher, (x, labels, index) = net(0), net(1), batch()
    attack = TwoStarts(PGD(eps=0.1, step_size=0.02, steps=2, loss=OracleL2(teacher)), distance(x), "in")
    whole = attack(student, x, labels, index)
    parts = [attack(student, x[i : i + 5], labels[i : i + 5], index[i : i + 5]) for i in (0, 5, 10)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert attack(student, x[:0], labels[:0], index[:0]).shape == (0, 1, 6, 6)


def test_says_what_is_wrong() -> None:
    teacher, (x, _, _) = net(1), batch()
    with pytest.raises(InputError, match="unknown side 'inn'; did you mean 'in'"):
        TwoStarts(PGD(), distance(x), "inn")
    with pytest.raises(InputError, match="attack must have random_start"):
        TwoStarts(PGD(random_start=False), distance(x), "in")
    with pytest.raises(InputError, match="unknown label_source 'data'; did you mean 'dataset'"):
        AdversarialLabels(teacher, PGD(), label_source="data")
