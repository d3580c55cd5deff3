"""The operations on compiled networks, on the paper's student and teacher: plain PyTorch on the modules, and ours.

Whole attacks against other packages, and how they scale, are in race.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tsrfast
from tsrfast import ops
from tsrfast.nets import ConvReLU
from tsrfast.reference import chain_pgd

IMPLS = pytest.mark.parametrize("impl", ["torch", "tsrfast"])
SIZES = pytest.mark.parametrize("n", [1, 16, 128])


@pytest.fixture(scope="module")
def nets() -> tuple[ConvReLU, ConvReLU]:
    student, teacher = ConvReLU((50, 35, 35, 22), seed=1), ConvReLU((45, 32, 32, 20), seed=2)
    return student.eval().requires_grad_(False), teacher.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _cpu_only(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("chains run on the CPU so far")


def images(n: int) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def flops(net: ConvReLU) -> int:
    return (
        2 * sum(m.weight.numel() * s * s for m, s in zip(net.convs, (30, 28, 26, 24), strict=True))
        + 2 * net.head.weight.numel()
    )


def rate(benchmark: object, work: int) -> None:
    if benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = round(1e-9 * work / benchmark.stats["min"], 1)


def near(got: Tensor, want: Tensor) -> None:
    """Of half of the images at least: in some, a unit is so near 0 that rounding decides whether its gate is open."""
    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert error.median() <= 1e-5


@SIZES
@IMPLS
def test_chain_forward(measure, benchmark, nets, impl, n):
    student, x = nets[0], images(n)
    chain = tsrfast.compile(student)
    near(chain(x), student(x))
    run: Callable[[], Tensor] = {"torch": lambda: student(x), "tsrfast": lambda: chain(x)}[impl]
    measure(f"chain_forward cpu {n}x3x32x32", run)
    rate(benchmark, n * flops(student))


@SIZES
@IMPLS
def test_chain_gradient(measure, benchmark, nets, impl, n):
    student, x = nets[0], images(n)
    chain, cotangent = tsrfast.compile(student), torch.ones(n, 10)

    def torch_gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(student(leaf), leaf, cotangent)[0]

    near(chain.input_gradient(x, cotangent), torch_gradient())
    measure(
        f"chain_gradient cpu {n}x3x32x32",
        {"torch": torch_gradient, "tsrfast": lambda: chain.input_gradient(x, cotangent)}[impl],
    )
    rate(benchmark, 2 * n * flops(student))


@pytest.mark.parametrize("loss", ["cross_entropy", "oracle_l2"])
@SIZES
@IMPLS
def test_chain_pgd(measure, benchmark, nets, impl, loss, n):
    x, y = images(n), torch.arange(n) % 10
    student, teacher = map(tsrfast.compile, nets)
    kw = {"loss": loss, "eps": 10 / 255, "step_size": 0.01, "steps": 2, "judge": False}

    def run(impl: str) -> Tensor:
        if impl == "torch":
            pair = ((c.plan, c.weights) for c in (student, teacher))
            return chain_pgd(x, x, next(pair), next(pair) if loss == "oracle_l2" else None, y, **kw).x
        pair = ((c.plan, c.packed) for c in (student, teacher))
        return ops.chain_pgd(x, x, next(pair), next(pair) if loss == "oracle_l2" else None, y, **kw).x

    # A pixel whose gradient is rounding noise may step the other way.
    assert ((run("torch") - run("tsrfast")).abs() > 1e-6).float().mean() <= 1e-3
    measure(f"chain_pgd cpu {loss} 2 steps {n}x3x32x32", lambda: run(impl))
    rate(benchmark, 4 * n * (flops(nets[0]) + (flops(nets[1]) if loss == "oracle_l2" else 0)))


@IMPLS
def test_chain_pack(measure, nets, impl):
    """Bringing a chain up to date with its module, as adversarial training does every step; PyTorch's row copies the parameters."""
    student = nets[0]
    chain = tsrfast.compile(student)
    run = {"torch": lambda: torch.cat([p.flatten() for p in student.parameters()]), "tsrfast": chain.refresh}[impl]
    measure("chain_pack cpu refresh", run)
