"""The CUDA sources under the emulator, through Python, with threads in every order."""

from __future__ import annotations

import pytest
import torch

from tsrfast import _native, ops

try:
    from tsrfast import _emu
except ImportError:
    _emu = None

ORDERS = ["forward", "reverse", "random"]


@pytest.fixture(params=ORDERS)
def emulated(request, monkeypatch):
    """Runs a function on the CPU twins, then on the emulated kernels; gives both results, as tuples of tensors."""
    if _emu is None:
        pytest.skip("tsrfast._emu is not built (-C cmake.define.TSRFAST_EMU=ON)")
    monkeypatch.setenv("EMU_ORDER", request.param)

    def both(f):
        cpu = f()
        with monkeypatch.context() as m:
            m.setattr(_native, "emulator", _emu)
            return f(), cpu

    return both


def maps(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 0.03, 0.02), ("l2", 0.5, 0.3), ("l1", 1.5, 1.0)])
def test_pgd_step_in_any_order(emulated, norm, eps, step):
    x0 = (maps(3, 300) / 4 + 0.5).clamp(0, 1)
    x, g = (x0 + maps(3, 300, seed=1) / 50).clamp(0, 1), maps(3, 300, seed=2)
    g[1, 7] = torch.nan
    (got, bad), (want, want_bad) = emulated(lambda: ops.pgd_step(x, x0, g, norm=norm, eps=eps, step_size=step))
    torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == "linf" else 1e-7)  # one rounding: sums run in other orders
    assert bad.tolist() == want_bad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_hyperplane_projection_in_any_order(emulated, norm):
    t, w = (maps(3, 300) / 4 + 0.5).clamp(0, 1), maps(3, 300, seed=1)
    b = (w * t).sum(1) + torch.tensor([1.0, -30.0, 1000.0])  # the last is out of reach
    got, want = emulated(lambda: ops.hyperplane_projection(t, w, b, norm=norm))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)  # one rounding: sums run in other orders


def test_relu_gate_in_any_order(emulated):
    z, v = maps(3, 5, 7, 9), maps(3, 5, 7, 9, seed=1)
    (a, gate), (want, want_gate) = emulated(lambda: ops.relu_gate(z))
    assert torch.equal(a, want)
    assert torch.equal(gate, want_gate)
    got, want = emulated(lambda: ops.relu_gate_backward(v, gate))
    assert torch.equal(got, want)


def test_philox_uniform_in_any_order(emulated):
    got, want = emulated(lambda: ops.philox_uniform(5, torch.arange(3) + 7, 1030, draw=2))
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(9, 34), (2, 17, 9, 11)], ids=str)
def test_channel_correlation_in_any_order(emulated, shape):
    student, teacher = maps(*shape) + 2, maps(shape[0], 33, *shape[2:], seed=1)
    got, want = emulated(lambda: ops.channel_correlation(student, teacher))
    samples = float(want.n)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6 * samples)  # float32 products in tiles of different length
