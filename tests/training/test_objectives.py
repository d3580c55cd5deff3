from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from tsrfast.nets import ConvReLU
from tsrfast.training import OracleAdversarial, TeacherLabels, TeacherLogits, TrueLabels


def net(seed: int, batch_norm: bool = False) -> ConvReLU:
    return ConvReLU((3, 2), image=(1, 6, 6), classes=4, batch_norm=batch_norm, seed=seed).double()


def batch(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 6, 6, generator=g).double()
    return x, torch.randint(4, (count,), generator=g), torch.randint(100, (count,), generator=g)


@dataclass(frozen=True)
class SignStep:
    """A stand-in for an attack: a random start keyed by seed and index, then one sign step on the squared distance."""

    teacher: nn.Module
    eps: float = 0.1
    seed: int = 10
    calls: list = field(default_factory=list, compare=False)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
        self.calls.append((self.seed, model.training, y, index))
        generators = [torch.Generator().manual_seed(1000 * self.seed + int(i)) for i in index]
        noise = [torch.rand(x.shape[1:], generator=g) for g in generators]
        start = (x + self.eps * (2 * torch.stack(noise) - 1)).requires_grad_()
        loss = (model(start) - self.teacher(start)).square().sum()
        loss.backward()  # leaves gradients in the model's parameters, as a careless attack would
        return start + self.eps * start.grad.sign()


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(1, keepdim=True).log()


def test_cross_entropy_by_hand() -> None:
    student, (x, y, index) = net(0), batch()
    wanted = -sum(log_softmax(student(x))[i, y[i]].item() for i in range(5)) / 5
    assert TrueLabels()(student, x, y, index, 0).item() == pytest.approx(wanted, rel=1e-12)


def test_st_logit_by_hand() -> None:
    student, teacher, (x, y, index) = net(0), net(1), batch()
    wanted = sum((student(x)[i, k] - teacher(x)[i, k]).item() ** 2 for i in range(5) for k in range(4)) / 20
    assert TeacherLogits(teacher)(student, x, y, index, 0).item() == pytest.approx(wanted, rel=1e-12)


def test_st_label_uses_the_teacher_not_the_data_set() -> None:
    student, teacher, (x, y, index) = net(0), net(1), batch()
    target = [max(range(4), key=lambda k, row=row: row[k]) for row in teacher(x).tolist()]
    assert target != y.tolist()
    wanted = -sum(log_softmax(student(x))[i, target[i]].item() for i in range(5)) / 5
    assert TeacherLabels(teacher)(student, x, y, index, 0).item() == pytest.approx(wanted, rel=1e-12)


def test_at_trains_on_the_attacked_images_with_the_teachers_answer_there() -> None:
    student, teacher, (x, y, index) = net(0), net(1), batch()
    attack = SignStep(teacher)
    loss = OracleAdversarial(teacher, attack)(student, x, y, index, 3)
    seed, training, labels, given = attack.calls[-1]
    assert (seed, training) == (13, False)
    assert labels is y
    assert given is index
    adversarial = SignStep(teacher, seed=13)(student, x, y, index).detach()
    wanted = (student(adversarial) - teacher(adversarial)).square().sum() / 20
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert loss.item() > TeacherLogits(teacher)(student, x, y, index, 3).item()


def test_at_does_not_differentiate_through_the_attack() -> None:
    student, teacher, (x, y, index) = net(0), net(1), batch()

    def attack(model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return x + 0.1 * model(x).mean()  # a graph that leads back into the student

    got = torch.autograd.grad(OracleAdversarial(teacher, attack)(student, x, y, index, 0), list(student.parameters()))
    fixed = attack(student, x, y, index).detach()
    wanted = torch.autograd.grad((student(fixed) - teacher(fixed)).square().mean(), list(student.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_at_accepts_an_attack_without_a_seed() -> None:
    student, teacher, (x, y, index) = net(0), net(1), batch()
    loss = OracleAdversarial(teacher, lambda model, x, y, index: x + 0.1)(student, x, y, index, 2)
    assert loss.item() == pytest.approx((student(x + 0.1) - teacher(x + 0.1)).square().mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [TeacherLogits, TeacherLabels, lambda t: OracleAdversarial(t, SignStep(net(1)))],
    ids=["st_logit", "st_label", "at_oracle"],
)
def test_teacher_is_asked_in_eval_mode_and_left_alone(make: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    student, (x, y, index) = net(0, batch_norm=True), batch()
    teacher = net(1, batch_norm=True).train()
    teacher.norms[0].eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    loss = make(teacher)(student.train(), x, y, index, 0)
    assert student.training
    assert student.norms[0].training
    assert teacher.training
    assert not teacher.norms[0].training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_names() -> None:
    t = net(0)
    names = [o.name for o in (TrueLabels(), TeacherLogits(t), TeacherLabels(t), OracleAdversarial(t, SignStep(t)))]
    assert names == ["cross_entropy", "st_logit", "st_label", "at_oracle"]
