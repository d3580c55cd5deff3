from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast import ops, reference
from tsrfast.errors import InputError

SHAPES = [(1, 1), (3, 31), (2, 32), (2, 33), (4, 3, 5, 7), (2, 16, 8, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def activations(shape, device, dtype=torch.float32, seed=0):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    z[z.abs() < 0.1] = 0.0
    return z.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference(shape, dtype, device):
    z, v = activations(shape, device, dtype), activations(shape, device, dtype, seed=1)
    (a, gate), (ra, rgate) = ops.relu_gate(z), reference.relu_gate(z)
    assert torch.equal(a, ra)
    assert torch.equal(gate, rgate)
    assert torch.equal(ops.relu_gate_backward(v, gate), reference.relu_gate_backward(v, rgate))


def test_every_instruction_set(isa):
    for dtype in DTYPES:
        z = activations((5, 3, 9, 9), "cpu", dtype)
        (a, gate), (ra, rgate) = ops.relu_gate(z), reference.relu_gate(z)
        assert torch.equal(a, ra)
        assert torch.equal(gate, rgate)
        assert torch.equal(ops.relu_gate_backward(z, gate), torch.where(z > 0, z, torch.zeros_like(z)))


def test_layout_is_as_documented(device):
    z = -torch.ones(2, 70, device=device)
    z[1, 0] = z[1, 33] = z[1, 69] = 1.0
    _, gate = ops.relu_gate(z)
    assert gate.tolist() == [[0, 0, 0], [1, 1 << 1, 1 << 5]]
    z[1, 31] = 1.0
    assert ops.relu_gate(z)[1][1, 0].item() == 1 - 2**31  # bit 31 is the sign of an int32


def test_zero_and_nan_are_closed(device):
    z = torch.tensor([[0.0, -0.0, float("nan"), float("inf"), -float("inf")]], device=device)
    a, gate = ops.relu_gate(z)
    assert gate.item() == 0b01000
    assert a[0, 2].isnan()
    assert a[0, [0, 1, 3, 4]].tolist() == [0, 0, float("inf"), 0]
    v = torch.full((1, 5), float("nan"), device=device)
    assert ops.relu_gate_backward(v, gate)[0, [0, 1, 2, 4]].tolist() == [0, 0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 5), d=st.integers(1, 200), seed=st.integers(0, 10**6))
def test_popcount_is_the_number_of_open_units(n, d, seed):
    z = activations((n, d), "cpu", seed=seed)
    _, gate = ops.relu_gate(z)
    assert gate.shape == (n, (d + 31) // 32)
    assert sum(bin(w & 0xFFFFFFFF).count("1") for w in gate.flatten().tolist()) == int((z > 0).sum())


def test_gradient_is_autograds(device):
    z = activations((2, 3, 6, 6), device, torch.float64).requires_grad_()
    v = activations((2, 3, 6, 6), device, torch.float64, seed=1)
    (got,) = torch.autograd.grad(ops.gated_relu(z), z, v)
    (want,) = torch.autograd.grad(z.relu(), z, v)
    assert torch.equal(got, want)


def test_second_derivative_through_a_net():
    """d/dv of v * gate: gated_relu inside a double backward agrees with torch.relu."""
    w = activations((4, 8), "cpu", torch.float64)
    results = []
    for relu in (ops.gated_relu, torch.relu):
        x = activations((3, 8), "cpu", torch.float64, seed=2).requires_grad_()
        (g,) = torch.autograd.grad((relu(x @ w.t()).square()).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_threads_do_not_change_the_result():
    z = activations((7, 3, 100, 33), "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.relu_gate(z)
        torch.set_num_threads(3)
        three = ops.relu_gate(z)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_empty_batch(device):
    a, gate = ops.relu_gate(torch.empty(0, 40, device=device))
    assert a.shape == (0, 40)
    assert gate.shape == (0, 2)
    assert ops.relu_gate_backward(a, gate).shape == (0, 40)


def test_says_what_is_wrong():
    z = activations((2, 3, 4, 4), "cpu")
    a, gate = ops.relu_gate(z)
    for call, message in [
        (lambda: ops.relu_gate(z.int()), "z must be float32.*got torch.int32"),
        (lambda: ops.relu_gate(z[0, 0, 0]), r"z must be \[N, n\]"),
        (lambda: ops.relu_gate(z.contiguous(memory_format=torch.channels_last)), "z must be contiguous"),
        (lambda: ops.relu_gate_backward(a, gate.float()), "gate must be contiguous int32"),
        (lambda: ops.relu_gate_backward(a[:1], gate), r"gate must have shape \(1, 2\)"),
        (lambda: ops.relu_gate_backward(a, gate[:, :1].contiguous()), r"gate must have shape \(2, 2\).*got \(2, 1\)"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.relu_gate(z.requires_grad_())


def test_opcheck(device):
    z = activations((2, 3, 5, 5), device)
    torch.library.opcheck(torch.ops.tsrfast.relu_gate.default, (z,))
    torch.library.opcheck(torch.ops.tsrfast.relu_gate_backward.default, (z, ops.relu_gate(z)[1]))


def test_compiles_without_a_graph_break(device):
    z = activations((2, 40), device)
    compiled = torch.compile(lambda t: ops.relu_gate_backward(*ops.relu_gate(t)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z), z.relu())
    compiled = torch.compile(lambda t: ops.gated_relu(t).square().sum(), fullgraph=True, backend="aot_eager")
    leaf = z.clone().requires_grad_()
    compiled(leaf).backward()
    assert torch.equal(leaf.grad, 2 * z.relu())
