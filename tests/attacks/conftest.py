"""Every attack in few steps, and small networks, for the tests that run all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast.attacks import (
    APGD,
    CW,
    EAD,
    FAB,
    FGSM,
    MIM,
    PGD,
    APGDTargeted,
    Attack,
    AutoAttack,
    CWLinf,
    DeepFool,
    Diversity,
    FABTargeted,
    Smoothing,
    Square,
    Transfer,
)
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)


@dataclass(frozen=True)
class Case:
    """An attack; a `Transfer` of it, if there are surrogates: so many times the model that is attacked."""

    name: str
    attack: Attack
    surrogates: int = 0

    @property
    def norm(self) -> str | None:
        """Of its ball; None: it looks for the nearest, at any distance."""
        return getattr(self.attack, "norm", "linf") if self.has("eps") else None

    def has(self, field: str) -> bool:
        return field in {f.name for f in dataclasses.fields(self.attack)}

    def on(self, model: nn.Module, **changes: Any) -> Attack:
        attack = dataclasses.replace(self.attack, **changes)
        return Transfer(attack, [model] * self.surrogates) if self.surrogates else attack


EPS = {"linf": 0.03, "l2": 0.4, "l1": 3.0}


def _of(cls: type, norm: str = "linf", **fields: Any) -> Attack:
    return cls(norm=norm, eps=EPS[norm], **fields)


CASES = [
    Case("FGSM", _of(FGSM)),
    *(Case(f"PGD-{n}", _of(PGD, n, step_size=EPS[n] / 3, steps=3)) for n in EPS),
    Case("PGD-restarts", _of(PGD, step_size=0.01, steps=2, restarts=2, keep="best", loss="margin")),
    Case("PGD-early-dlr", _of(PGD, step_size=0.01, steps=3, early_stop=True, loss="dlr")),
    Case("MIM", _of(MIM, step_size=0.01, steps=3)),
    Case("MIM-l2", _of(MIM, "l2", step_size=0.15, steps=3)),
    Case("NI-FGSM", _of(MIM, step_size=0.01, steps=3, nesterov=True)),
    Case("TI-DI-FGSM", _of(MIM, step_size=0.01, steps=3, diversity=Diversity(), smoothing=Smoothing(), engine="eager")),
    *(Case(f"APGD-{n}", _of(APGD, n, steps=4)) for n in EPS),
    Case("APGD-best", _of(APGD, steps=4, keep="best")),
    Case("APGDTargeted", _of(APGDTargeted, steps=3, target_classes=2)),
    *(Case(f"FAB-{n}", _of(FAB, n, steps=3)) for n in EPS),
    Case("FABTargeted", _of(FABTargeted, steps=3, target_classes=2, restarts=2)),
    *(Case(f"Square-{n}", _of(Square, n, queries=6)) for n in ("linf", "l2")),
    Case("CW", CW(c=1.0, steps=5, binary_search_steps=3, lr=0.05)),
    Case("CWLinf", CWLinf(eps=0.03, step_size=0.01, steps=3)),
    Case("EAD", EAD(c=1.0, steps=4, binary_search_steps=2, lr=0.05)),
    Case("DeepFool", DeepFool(steps=4)),
    Case("Transfer", _of(PGD, step_size=0.01, steps=3), surrogates=1),
    Case("Transfer-two", _of(APGD, steps=3), surrogates=2),
    Case("AutoAttack", _of(AutoAttack, steps=2, queries=3)),
    Case("AutoAttack-l2", _of(AutoAttack, "l2", version="custom", attacks=("apgd-dlr", "fab", "square"), steps=2, queries=3)),
]


class Residual(nn.Module):
    """Batch normalisation, dropout, GELU and a branch that is added: PyTorch alone can run it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.4))
        self.linear = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.bn(self.stem(x)))
        return 3 * self.linear(F.avg_pool2d(h + self.branch(h), 2).flatten(1))


class Images:
    """Networks and images."""

    @staticmethod
    def network(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """In eval mode; ``chain`` compiles, ``eager`` does not."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = ConvReLU((6, 8), image=IMAGE, seed=1) if kind == "chain" else Residual()
            if kind == "eager":
                for m in net.modules():
                    if isinstance(m, nn.BatchNorm2d):
                        m.running_mean.normal_(0, 0.1)
                        m.running_var.uniform_(0.5, 1.5)
        return net.eval().to(dtype)

    @staticmethod
    def batch(model: nn.Module, n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Images, some pixels at the ends of the box, and labels, all right but every fourth."""
        r = torch.Generator().manual_seed(seed)
        x = (torch.rand(n, *IMAGE, generator=r) * 1.2 - 0.1).clamp(0, 1).to(dtype)
        with torch.no_grad():
            y = model(x).argmax(1) if n else torch.zeros(0, dtype=torch.int64)
        y[3::4] = (y[3::4] + 1) % 10
        return x, y


@pytest.fixture(scope="session", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each attack."""
    found: Case = request.param
    return found


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    return CASES


@pytest.fixture(scope="session", params=["chain", "eager"])
def kind(request: pytest.FixtureRequest) -> str:
    """Of network."""
    return str(request.param)


@pytest.fixture(scope="session")
def images() -> type[Images]:
    return Images


@pytest.fixture(scope="session")
def excess() -> Callable[..., Tensor]:
    """excess(x0, x, norm, eps): how far images are outside of their balls, ``[N]`` in float64, less what rounding may do to D pixels."""

    def measure(x0: Tensor, x: Tensor, norm: str, eps: float | Tensor) -> Tensor:
        p = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
        d = (x.double() - x0.double()).flatten(1)
        radius = torch.as_tensor(eps, dtype=torch.float64)
        rounding = 4 * torch.finfo(x.dtype).eps * (d.shape[1] ** (1 / p) + radius)
        return torch.linalg.vector_norm(d, p, dim=1) - radius - rounding

    return measure
