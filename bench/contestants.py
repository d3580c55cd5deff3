"""Who takes part in `race.py`: the trained teacher-student pair, and every way to run linf PGD on it.

The attack is the paper's (Yang et al., AISTATS 2021, section 5.1): eps = 10/255, steps of 0.01, from the clean image. Its losses
are ``oracle``, |s(x') - t(x')|^2 with the gradient through both networks, and ``cross_entropy``, of the student and given labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.attacks import PGD, OracleL2
from tsrfast.data import Dataset
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU, fold, load_checkpoint, save_checkpoint
from tsrfast.training import TeacherLogits, TrueLabels, train

EPS, STEP_SIZE = 10 / 255, 0.01
LOSSES = ("oracle", "cross_entropy")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the authors' input normalisation, folded into the first layer

Run = Callable[[Tensor, Tensor], Tensor]
"""(images [N, C, H, W], labels int64 [N]) -> adversarial images."""


# --- the pair -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the pair is trained; lists, as JSON has them."""

    teacher: list[int]
    student: list[int]
    images: int
    teacher_epochs: int
    student_epochs: int


@dataclass(frozen=True)
class Pair:
    """Both networks in eval mode, without normalisation layers, parameters frozen."""

    student: ConvReLU
    teacher: ConvReLU


def trained_pair(recipe: Recipe, data: Dataset, folder: Path) -> Pair:
    """The pair in `folder`; trained and saved there first where it is missing: the teacher on labels, the student on its logits.

    Raises:
        InputError: the folder holds a pair of another recipe or of other data.
    """
    made = {"recipe": asdict(recipe), "data": data.fingerprint}
    paths = [folder / f"{name}.safetensors" for name in ("student", "teacher")]
    if not all(path.is_file() for path in paths):
        for path, net in zip(paths, _train(recipe, data), strict=True):
            save_checkpoint(path, net, made=made)
    nets = []
    for path in paths:
        net, metadata = load_checkpoint(path)
        if metadata.get("made") != made:
            raise InputError(f"{path}: was trained with {metadata.get('made')}, not {made}; remove it or name another folder")
        nets.append(net.requires_grad_(False))
    return Pair(*nets)


def _train(recipe: Recipe, data: Dataset) -> tuple[ConvReLU, ConvReLU]:
    image, classes = tuple(data.train.images.shape[1:]), len(data.classes)
    # Strong weight decay makes a smooth teacher out of a short training, which a student can follow off the data (as in the suite).
    teacher = ConvReLU(recipe.teacher, batch_norm=True, image=image, classes=classes, mean=MEAN, std=STD, seed=0)
    train(
        teacher, TrueLabels(), data.train, epochs=recipe.teacher_epochs, batch_size=64, lr="cosine:0.02", momentum=0.9,
        weight_decay=0.005,
    )  # fmt: skip
    teacher = fold(teacher.eval())
    student = ConvReLU(recipe.student, image=image, classes=classes, mean=MEAN, std=STD, seed=1)
    train(
        student, TeacherLogits(teacher), data.train, epochs=recipe.student_epochs, batch_size=32, lr="cosine:0.001",
        optimizer="adam", seed=1,
    )  # fmt: skip
    return fold(student.eval()), teacher


@torch.no_grad()
def quality(pair: Pair, x: Tensor, y: Tensor) -> dict[str, float]:
    """What kind of pair it is, on clean test images: accuracies, how often the two agree, and how far apart their logits are."""
    s, t = pair.student(x), pair.teacher(x)
    return {
        "teacher_accuracy": (t.argmax(1) == y).float().mean().item(),
        "student_accuracy": (s.argmax(1) == y).float().mean().item(),
        "agreement": (s.argmax(1) == t.argmax(1)).float().mean().item(),
        "logit_distance": ((s - t).norm() / t.norm()).item(),  # |f_S - f_T| / |f_T|
    }


def flop(net: nn.Module, image: Sequence[int]) -> int:
    """Floating-point operations of forward and input gradient for one image: 2 * 2 * multiply-adds of convolutions and linear layers."""
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        macs += out.numel() * module.weight[0].numel()  # each output value is a dot product with one filter

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    net(torch.zeros(1, *image))
    for hook in hooks:
        hook.remove()
    return 2 * 2 * macs


def judge(pair: Pair, loss: str, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(mean loss, success rate) of images by a float32 eager forward pass, whoever made them."""
    with torch.no_grad():
        s, t = pair.student(x), pair.teacher(x)
        if loss == "oracle":
            return (s - t).square().sum(1).mean().item(), (s.argmax(1) != t.argmax(1)).float().mean().item()
        return F.cross_entropy(s, y).item(), (s.argmax(1) != y).float().mean().item()


# --- the contestants ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A way to run the attack.

    Attributes:
        name: in tables; `race.py --only` takes a part of it.
        build: (pair, loss, steps) -> what runs it. Raises ImportError where the library is missing.
        family: ``tsrfast``, ``pytorch`` or ``library``.
        dtype: what the networks compute in.
        losses: those it can express.
        package: whose version is recorded.
    """

    name: str
    build: Callable[[Pair, str, int], Run]
    family: str = "pytorch"
    dtype: str = "float32"
    losses: tuple[str, ...] = LOSSES
    package: str | None = None


def pytorch(
    *, channels_last: bool = False, piece: int | None = None, compiled: bool = False, bf16: bool = False
) -> Callable[[Pair, str, int], Run]:
    """The loop that a careful PyTorch user writes: the gradient of the input alone, box and ball in one clamp.

    Args:
        channels_last: memory format of images and networks.
        piece: attack so many images at a time.
        compiled: `torch.compile` of the loss, which compiles its gradient too.
        bf16: networks under bfloat16 autocast.
    """

    def build(pair: Pair, loss: str, steps: int) -> Run:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        student, teacher = (copy.deepcopy(net).to(memory_format=layout) for net in (pair.student, pair.teacher))  # type: ignore[call-overload]

        def value(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                if loss == "oracle":
                    return (student(x) - teacher(x)).square().sum()
                return F.cross_entropy(student(x), y, reduction="sum")

        evaluate = torch.compile(value) if compiled else value

        def attack(x0: Tensor, y: Tensor) -> Tensor:
            x, low, high = x0, (x0 - EPS).clamp_(min=0), (x0 + EPS).clamp_(max=1)
            for _ in range(steps):
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(evaluate(leaf, y), leaf)
                x = torch.clamp(x + STEP_SIZE * gradient.sign(), low, high)
            return x

        def run(x: Tensor, y: Tensor) -> Tensor:
            x = x.contiguous(memory_format=layout)
            if piece is None:
                return attack(x, y)
            return torch.cat([attack(a, b) for a, b in zip(x.split(piece), y.split(piece), strict=True)])

        return run

    return build


def tsrfast(engine: str) -> Callable[[Pair, str, int], Run]:
    """`tsrfast.attacks.PGD` with that engine."""

    def build(pair: Pair, loss: str, steps: int) -> Run:
        chosen: Any = OracleL2(pair.teacher) if loss == "oracle" else loss
        attack = PGD(norm="linf", eps=EPS, step_size=STEP_SIZE, steps=steps, loss=chosen, random_start=False, engine=engine)
        return lambda x, y: attack(pair.student, x, y)

    return build


class Difference(nn.Module):
    """s(x) - t(x), for libraries that attack one network."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.student, self.teacher = pair.student, pair.teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) - self.teacher(x)


class Distance(Difference):
    """Two logits (-d, 0), d = |s(x) - t(x)|^2: their cross-entropy with label 0, log(1 + e^d), has the sign of d's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        d = super().forward(x).square().sum(1)
        return torch.stack([-d, torch.zeros_like(d)], 1)


def torchattacks(pair: Pair, loss: str, steps: int) -> Run:
    """torchattacks.PGD has cross-entropy built in; the oracle loss has to be dressed as one."""
    import torchattacks as library

    net = Distance(pair) if loss == "oracle" else pair.student
    attack = library.PGD(net.eval(), eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=False)
    return lambda x, y: attack(x, torch.zeros_like(y) if loss == "oracle" else y)


def foolbox(*, frozen: bool) -> Callable[[Pair, str, int], Run]:
    """foolbox.attacks.LinfPGD, with a loss of one's own by overriding `get_loss_fn`.

    Args:
        frozen: the user has set requires_grad to False; else foolbox computes the gradients of all weights too.
    """

    def build(pair: Pair, loss: str, steps: int) -> Run:
        import foolbox as library

        class OraclePGD(library.attacks.LinfPGD):  # type: ignore[misc,name-defined]
            def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
                return lambda x: model(x).square().sum()

        pair = copy.deepcopy(pair)
        net = (Difference(pair) if loss == "oracle" else pair.student).eval().requires_grad_(not frozen)
        kind = OraclePGD if loss == "oracle" else library.attacks.LinfPGD
        attack = kind(abs_stepsize=STEP_SIZE, steps=steps, random_start=False)
        model = library.PyTorchModel(net, bounds=(0, 1), device="cpu")
        return lambda x, y: attack(model, x, y, epsilons=EPS)[1]

    return build


def cleverhans(pair: Pair, loss: str, steps: int) -> Run:
    """cleverhans' PGD has cross-entropy built in, as torchattacks'."""
    import numpy as np
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    net = Distance(pair) if loss == "oracle" else pair.student

    def run(x: Tensor, y: Tensor) -> Tensor:
        label = torch.zeros_like(y) if loss == "oracle" else y
        made: Tensor = projected_gradient_descent(
            net, x, EPS, STEP_SIZE, steps, np.inf, clip_min=0, clip_max=1, y=label, rand_init=False
        )
        return made.detach()

    return run


def art(pair: Pair, loss: str, steps: int) -> Run:
    """ART takes any loss: here |s(x) - t(x)|^2 of the difference net."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    oracle = loss == "oracle"
    net = Difference(pair) if oracle else pair.student
    value: Any = (lambda logits, y: logits.square().sum(1).mean()) if oracle else nn.CrossEntropyLoss()

    def run(x: Tensor, y: Tensor) -> Tensor:
        classifier = PyTorchClassifier(
            net, loss=value, input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        attack = ProjectedGradientDescent(
            classifier, eps=EPS, eps_step=STEP_SIZE, max_iter=steps, batch_size=len(x), verbose=False
        )
        return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

    return run


EAGER = Contestant("eager", pytorch())
TSRFAST = Contestant("tsrfast", tsrfast("chain"), "tsrfast")
CONTESTANTS = (
    TSRFAST,
    EAGER,
    Contestant("channels_last", pytorch(channels_last=True)),
    Contestant("channels_last, pieces of 32", pytorch(channels_last=True, piece=32)),
    Contestant("torch.compile", pytorch(compiled=True)),
    Contestant("torch.compile, channels_last", pytorch(compiled=True, channels_last=True)),
    # Not for the oracle loss: the difference of two nearly equal logits does not survive bfloat16.
    Contestant(
        "bf16 autocast, channels_last", pytorch(bf16=True, channels_last=True), dtype="bfloat16", losses=("cross_entropy",)
    ),
    Contestant("torchattacks", torchattacks, "library", package="torchattacks"),
    Contestant("foolbox", foolbox(frozen=False), "library", package="foolbox"),
    Contestant("foolbox, parameters frozen", foolbox(frozen=True), "library", package="foolbox"),
    Contestant("cleverhans", cleverhans, "library", package="cleverhans"),
    Contestant("ART", art, "library", package="adversarial-robustness-toolbox"),
)
