from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast import _native, ops, reference
from tsrfast.errors import InputError

SHAPES = [(1, 1), (3, 31), (2, 257), (5, 3, 8, 8), (1, 1025)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BALLS = {"linf": (0.03, 0.02), "l2": (0.5, 0.3), "l1": (1.5, 1.0)}  # eps, step: some images project, some do not


def inputs(shape, device, dtype=torch.float32, seed=0):
    r = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=r)
    x = (x0 + 0.02 * torch.randn(shape, generator=r)).clamp(0, 1)
    g = torch.randn(shape, generator=r) * 10 ** (4 * torch.rand((len(x), *[1] * (x.ndim - 1)), generator=r) - 2)
    return [t.to(device, dtype) for t in (x, x0, g)]


def step(*args, **kw):
    return ops.pgd_step(*args, **kw)[0]


def plain(*args, **kw):
    return reference.pgd_step(*args, **kw)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("targeted", [False, True], ids=["up", "down"])
def test_is_the_reference(shape, norm, targeted, device, assert_as_exact):
    eps, size = BALLS[norm]
    assert_as_exact(step(*inputs(shape, device), norm=norm, eps=eps, step_size=size, targeted=targeted), plain,
                    *inputs(shape, device), norm=norm, eps=eps, step_size=size, targeted=targeted)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", BALLS)
def test_dtypes(dtype, norm, device, assert_as_exact):
    eps, size = BALLS[norm]
    args = inputs((4, 3, 9, 7), device, dtype)
    assert_as_exact(step(*args, norm=norm, eps=eps, step_size=size), plain, *args, norm=norm, eps=eps, step_size=size)


@pytest.mark.parametrize("norm", BALLS)
def test_every_instruction_set_gives_the_same_bits(norm, isa):
    eps, size = BALLS[norm]
    for dtype in DTYPES:
        for targeted in (False, True):
            x, x0, g = inputs((3, 1027), "cpu", dtype)
            g[1, ::50] = float("nan")
            kw = {"norm": norm, "eps": eps, "step_size": size, "targeted": targeted}
            _native.set_isa(isa)
            got, bad = ops.pgd_step(x, x0, g, **kw)
            _native.set_isa("portable")
            want, want_bad = ops.pgd_step(x, x0, g, **kw)
            assert torch.equal(got, want)
            assert bad.tolist() == want_bad.tolist() == [0, 21, 0]


def test_linf_float32_is_bitwise_the_reference(device):
    args = inputs((4, 3, 11, 13), device)
    assert torch.equal(step(*args, eps=8 / 255, step_size=2 / 255), plain(*args, eps=8 / 255, step_size=2 / 255))


@pytest.mark.parametrize("norm", BALLS)
def test_per_image_eps_and_step(norm, device):
    eps, size = BALLS[norm]
    args = inputs((3, 40), device)
    scale = torch.tensor([0.0, 0.5, 2.0], device=device)
    got = step(*args, norm=norm, eps=eps * scale, step_size=size * scale)
    for i, s in enumerate(scale.tolist()):
        one = step(
            *(t[i : i + 1] for t in args), norm=norm, eps=float(np.float32(eps * s)), step_size=float(np.float32(size * s))
        )
        torch.testing.assert_close(got[i : i + 1], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", BALLS)
def test_channels_last_and_in_place(norm, device):
    eps, size = BALLS[norm]
    x, x0, g = inputs((2, 3, 8, 8), device)
    want = step(x, x0, g, norm=norm, eps=eps, step_size=size)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, x0, g)]
    got = step(*last, norm=norm, eps=eps, step_size=size)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # sums run in another order
    bad = ops.pgd_step_(x, x0, g, norm=norm, eps=eps, step_size=size)
    assert torch.equal(x, want)
    assert bad.tolist() == [0, 0]


def test_sign_of_zero_is_zero(device):
    x, x0, g = inputs((2, 64), device)
    assert torch.equal(step(x, x0, 0 * g, eps=1.0, step_size=0.1), x)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_zero_gradient_leaves_the_image(norm, device):
    x, x0, g = inputs((2, 64), device)
    torch.testing.assert_close(step(x, x0, 0 * g, norm=norm, eps=100.0, step_size=0.3), x, rtol=0, atol=1e-7)


def test_tiny_gradients_still_have_a_direction(device):
    """Squares of 1e-30 vanish in float32; the length must not."""
    x, x0, g = inputs((2, 64), device)
    x = x0.clone()
    unit = g / g.flatten(1).norm(dim=1, keepdim=True)
    moved = step(x, x0, unit * 1e-30, norm="l2", eps=10.0, step_size=0.01, lo=-10, hi=10) - x0
    torch.testing.assert_close(moved, unit * 0.01, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", BALLS)
def test_nan_gradient_leaves_its_pixel_and_is_counted(norm, device):
    x, x0, g = inputs((3, 100), device)
    x = x0.clone()
    g[1, 7] = g[1, 50] = g[2, 99] = float("nan")
    out, bad = ops.pgd_step(x, x0, g, norm=norm, eps=0.01, step_size=0.02, sparsity=1.0)
    assert bad.tolist() == [0, 2, 1]
    assert out.isfinite().all()
    assert out[1, 7] == x[1, 7]
    assert out[1, 50] == x[1, 50]
    assert out[2, 99] == x[2, 99]
    assert (out[2, :99] != x[2, :99]).any()


def test_infinite_gradients(device):
    x, x0, g = inputs((1, 10), device)
    x = x0.clone()
    g[0, 3] = float("inf")
    out, bad = ops.pgd_step(x, x0, g, eps=0.1, step_size=0.1)
    assert bad.item() == 0
    assert out[0, 3] == min(1.0, x0[0, 3] + torch.tensor(0.1).item())
    for norm in ("l2", "l1"):
        out, bad = ops.pgd_step(x, x0, g, norm=norm, eps=0.1, step_size=0.1)
        assert bad.item() == 1
        assert out.isfinite().all()
        assert out[0, 3] == x[0, 3]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4), d=st.integers(1, 70), norm=st.sampled_from(list(BALLS)), eps=st.floats(0, 3), size=st.floats(0, 5),
    seed=st.integers(0, 10**6), sparsity=st.floats(0.01, 1),
)  # fmt: skip
def test_stays_in_ball_and_box(n, d, norm, eps, size, seed, sparsity):
    x, x0, g = inputs((n, d), "cpu", torch.float64, seed)
    out = step(x, x0, g, norm=norm, eps=eps, step_size=size, sparsity=sparsity)
    p = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    assert ((out - x0).norm(p=p, dim=1) <= eps * (1 + 1e-12) + 1e-12).all()
    assert out.min() >= 0
    assert out.max() <= 1


@settings(max_examples=60, deadline=None)
@given(d=st.integers(1, 40), eps=st.floats(0, 4), seed=st.integers(0, 10**6), spread=st.sampled_from([0.01, 0.3, 3.0]))
def test_l1_projection_is_the_nearest_point(d, eps, seed, spread):
    """Optimality of z: no point of the set lies beyond the hyperplane through z with normal y - z.

    The linear function (y - z) . w over {|w - x0|_1 <= eps} and the box is largest at a greedy vertex: fill coordinates by
    decreasing gain until eps is spent. Its maximum must be reached at z itself.
    """
    r = np.random.default_rng(seed)
    x0, y = r.random(d), None
    y = x0 + spread * r.normal(size=d)
    z = step(
        torch.tensor(y)[None], torch.tensor(x0)[None], torch.zeros(1, d, dtype=torch.float64), norm="l1", eps=eps, step_size=0.0
    )[0].numpy()
    normal = y - z
    room = np.where(normal > 0, 1 - x0, x0)
    budget, best = eps, float(normal @ x0)
    for i in np.argsort(-np.abs(normal)):
        use = min(budget, room[i])
        best += abs(normal[i]) * use
        budget -= use
    assert normal @ z >= best - 1e-9 * (1 + abs(best))


def test_l1_moves_the_largest_coordinates_the_box_admits(device):
    x0 = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.0]], device=device)
    g = torch.tensor([[1.0, 9.0, -3.0, 2.0, -8.0]], device=device)  # the two largest push out of the box
    out = step(x0.clone(), x0, g, norm="l1", eps=10.0, step_size=0.2, sparsity=0.4)
    torch.testing.assert_close(out, torch.tensor([[0.5, 1.0, 0.4, 0.6, 0.0]], device=device))


def test_threads_do_not_change_the_result():
    args = inputs((64, 300), "cpu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([step(*args, norm=n, eps=e, step_size=s) for n, (e, s) in BALLS.items()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("norm", BALLS)
def test_empty_batch(norm, device):
    out, bad = ops.pgd_step(*inputs((0, 8), device), norm=norm, eps=0.5, step_size=0.1)
    assert out.shape == (0, 8)
    assert bad.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": lambda t: t[:1]}, r"x0 must have x's shape \(2, 8\), got \(1, 8\)"),
        ({"g": lambda t: t.double()}, "g must be torch.float32 as x is, got torch.float64"),
        (
            {"x": lambda t: t.int(), "x0": lambda t: t.int(), "g": lambda t: t.int()},
            "x must be float32, bfloat16.*got torch.int32",
        ),
        ({"g": lambda t: t.t().contiguous().t()}, r"g must have x's strides \(8, 1\), got \(1, 2\)"),
        ({"x": lambda t: t[:, :1].expand(2, 8)}, "x must be dense"),
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"eps": float("nan")}, "eps must be >= 0, got nan"),
        ({"eps": torch.tensor([0.1, -0.1])}, r"eps must be >= 0, got -0.1"),
        ({"eps": torch.zeros(3)}, r"eps must be a number or of shape \(2,\), got \(3,\)"),
        ({"step_size": -1.0}, "step_size must be >= 0, got -1.0"),
        ({"step_size": float("inf")}, "step_size must be finite"),
        ({"norm": "l_inf"}, "unknown norm 'l_inf'; did you mean 'linf'"),
        ({"lo": 2.0}, "lo must be <= hi"),
        ({"sparsity": 0.0}, "sparsity must be in"),
    ],
)
def test_says_what_is_wrong(change, message):
    args = dict(zip(("x", "x0", "g"), inputs((2, 8), "cpu"), strict=True), eps=0.5, step_size=0.1)
    for key, value in change.items():
        args[key] = value(args[key]) if callable(value) else value
    with pytest.raises(InputError, match=message):
        ops.pgd_step(**args)


def test_wants_each_image_in_one_block():
    x, x0, g = (t.t() for t in inputs((8, 2), "cpu"))
    with pytest.raises(InputError, match="one block of memory"):
        ops.pgd_step(x, x0, g, eps=0.1, step_size=0.1)


def test_has_no_gradient():
    x, x0, g = inputs((2, 8), "cpu")
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.pgd_step(x.requires_grad_(), x0, g, eps=0.5, step_size=0.1)


def test_opcheck(device):
    scalars = (None, torch.full((2,), 0.1, dtype=torch.float64, device=device), 0.1, 0.0, 1, 0.0, 1.0, False, 0.01)
    torch.library.opcheck(torch.ops.tsrfast.pgd_step.default, (*inputs((2, 8), device), *scalars))
    torch.library.opcheck(torch.ops.tsrfast.pgd_step_.default, (*inputs((2, 8), device), *scalars))


def test_compiles_without_a_graph_break(device):
    args = inputs((2, 8), device)
    compiled = torch.compile(lambda *a: ops.pgd_step(*a, eps=0.1, step_size=0.05)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), step(*args, eps=0.1, step_size=0.05) * 2)
