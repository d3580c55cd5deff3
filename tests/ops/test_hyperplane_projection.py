"""The nearest point of a hyperplane in the box: the reference by conditions of optimality, the kernels by the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast import _native, ops, reference
from tsrfast.errors import InputError

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}
SHAPES = [(1, 1), (3, 31), (2, 257), (5, 3, 8, 8), (1, 1025)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = pytest.mark.parametrize("project", [reference.hyperplane_projection, ops.hyperplane_projection])


def inputs(shape, device="cpu", dtype=torch.float32, seed=0, reach=0.3):
    """Points (some pixels at the ends of the box), normals (some entries 0), offsets; `reach`: as a share of what the box admits."""
    r = torch.Generator().manual_seed(seed)
    t = (1.2 * torch.rand(shape, generator=r) - 0.1).clamp(0, 1).to(dtype)
    w = torch.randn(shape, generator=r) * 10 ** (4 * torch.rand((len(t), *[1] * (t.ndim - 1)), generator=r) - 2)
    w = torch.where(torch.rand(shape, generator=r) < 0.1, torch.zeros(()), w).to(dtype)
    side = torch.where(torch.rand(len(t), generator=r) < 0.5, -1.0, 1.0).double()
    t64, w64 = t.double().flatten(1), w.double().flatten(1)
    room = torch.where(w64 * side[:, None] > 0, t64, 1 - t64)
    b = (w64 * t64).sum(1) - side * reach * (w64.abs() * room).sum(1)
    return t.to(device), w.to(device), b.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [1e-4, 0.3, 0.99, 1.5])
def test_is_the_reference(shape, norm, reach, device, assert_as_exact):
    args = inputs(shape, device, reach=reach)
    assert_as_exact(ops.hyperplane_projection(*args, norm=norm), reference.hyperplane_projection, *args, norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(dtype, norm, device):
    """Sums are float64 whatever the dtype: one rounding from the exact answer, where the reference would have the dtype's own sums."""
    t, w, b = inputs((4, 3, 9, 7), device, dtype)
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    assert got.dtype == dtype
    exact = reference.hyperplane_projection(t.double(), w.double(), b, norm=norm)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7 if dtype == torch.float16 else 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_every_instruction_set_gives_the_same_bits(norm, isa):
    for dtype in DTYPES:
        args = inputs((3, 1027), dtype=dtype)
        _native.set_isa(isa)
        got = ops.hyperplane_projection(*args, norm=norm)
        _native.set_isa("portable")
        assert torch.equal(got, ops.hyperplane_projection(*args, norm=norm))


@IMPLEMENTATIONS
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_nearer(project, norm, seed):
    """Against the smallest of all changes where each pixel stays, goes to the end of its room, or moves with the others.

    Every solution is of that kind: which pixels are at their end, which move by lambda (linf) or lambda |w| (l2), and for l1 which
    single pixel stops in between.
    """
    t, w, b = inputs((1, 5), dtype=torch.float64, seed=seed, reach=0.05 + 0.045 * seed)
    d = project(t, w, b, norm=norm)[0]
    t, w = t[0], w[0]
    beyond = (w @ t - b).item()
    assert abs((w @ (t + d) - b).item()) <= 1e-12 * w.abs().sum()
    toward = -torch.sign(w) * (1 if beyond > 0 else -1)
    room = torch.where(toward > 0, 1 - t, t) * (toward != 0)
    best = torch.inf
    for state in itertools.product(["stay", "end", "move"], repeat=5):
        end = torch.tensor([s == "end" for s in state])
        move = torch.tensor([s == "move" for s in state])
        if norm == "l1" and move.sum() > 1:
            continue
        speed = (w.abs() if norm == "l2" else (w != 0).double()) * move
        left, slope = abs(beyond) - (w.abs() * room * end).sum(), (w.abs() * speed).sum()
        if slope > 0:
            v = room * end + speed * left / slope
            if left >= 0 and (v <= room + 1e-12).all():
                best = min(best, v.norm(p=ORDER[norm]).item())
    assert d.norm(p=ORDER[norm]).item() == pytest.approx(best, rel=1e-9)


@IMPLEMENTATIONS
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4), d=st.integers(1, 70), norm=st.sampled_from(NORMS), reach=st.floats(0, 0.999), seed=st.integers(0, 10**6),
    shift=st.floats(-2, 2), size=st.floats(0.1, 300),
)  # fmt: skip
def test_lands_on_the_hyperplane_in_the_box_and_is_optimal(project, n, d, norm, reach, seed, shift, size):
    """The conditions of Karush, Kuhn and Tucker: one multiplier for all pixels that the box does not hold."""
    t, w, b = inputs((n, d), dtype=torch.float64, seed=seed, reach=reach)
    t, b, lo, hi = shift + size * t, shift * w.sum(1) + size * b, shift, shift + size
    got = project(t, w, b, norm=norm, lo=lo, hi=hi)
    assert (t + got).min() >= lo - 1e-12 * (abs(lo) + size)
    assert (t + got).max() <= hi + 1e-12 * (abs(lo) + size)
    assert (((w * (t + got)).sum(1) - b).abs() <= 1e-11 * (w.abs().sum(1) * (size + abs(lo)))).all()
    beyond = (w * t).sum(1) - b
    room = torch.where(w * beyond[:, None].sign() > 0, t - lo, hi - t) * (w != 0)
    v, weight = got.abs(), w.abs()
    assert (v <= room * (1 + 1e-12) + 1e-12 * size).all()
    inner, tiny = v < room * (1 - 1e-9), 1e-9 * size
    for row in range(n):
        inside, moving = inner[row], v[row] > tiny
        if norm == "linf":  # what could go further has gone as far as anything
            assert (v[row] >= v[row].max() - tiny)[inside & (weight[row] > 0)].all()
        elif norm == "l2":  # the same lambda wherever the box does not hold
            free = (v[row] / weight[row])[inside & (weight[row] > 0)]
            bound = (v[row] / weight[row])[~inside & (weight[row] > 0)]
            if len(free):
                torch.testing.assert_close(free, free.max().expand_as(free), rtol=1e-6, atol=1e-9 * size)
                assert (bound <= free.max() * (1 + 1e-6) + 1e-9 * size).all()
        elif moving.any():  # no pixel moves while a heavier one still has room
            free = inside & (room[row] > tiny)
            assert not free.any() or weight[row][free].max() <= weight[row][moving].min()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reach", [0.001, 0.3, 0.98, 3.0])
def test_equals_the_authors(norm, reach):
    """Their sums are float32, and near the end of the box the pixel that makes up for them is one of little weight."""
    theirs = getattr(pytest.importorskip("pyautoattack.fab_projections"), f"projection_{norm}")
    t, w, b = inputs((40, 300), reach=reach)
    want = theirs(t, w / w.abs().amax(1, keepdim=True), (b / w.abs().amax(1)).float())
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4 if reach == 0.98 else 2e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_numbers_of_the_authors(norm):
    t = torch.tensor([[0.1, 0.5, 0.9, 0.3], [0.1, 0.5, 0.9, 0.3]])
    w = torch.tensor([[1.0, -2.0, 0.5, 0.0], [1.0, -2.0, 0.5, 0.0]])
    b = torch.tensor([-1.25, 4.0])  # <w, t> = -0.45; the second is out of reach
    want = {"linf": [-0.1, 0.28, -0.28, 0.0], "l2": [-0.1, 0.32941, -0.08235, 0.0], "l1": [0.0, 0.4, 0.0, 0.0]}[norm]
    far = [0.9, -0.5, 0.1, 0.0]
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    torch.testing.assert_close(got, torch.tensor([want, far]), rtol=0, atol=1e-5)


def test_equal_weights_share_in_l1(device):
    t = torch.tensor([[0.9, 0.5, 0.3]], device=device)
    w = torch.tensor([[2.0, -2.0, 1.0]], device=device)
    got = ops.hyperplane_projection(
        t, w, torch.tensor([0.4], device=device), norm="l1"
    )  # <w, t> = 1.1: 0.35 in all, rooms 0.9, 0.5
    torch.testing.assert_close(got, torch.tensor([[-0.225, 0.125, 0.0]], device=device))


@pytest.mark.parametrize("norm", NORMS)
def test_what_has_no_direction_stays(norm, device):
    t, w, b = inputs((4, 40), device)
    w[0] = 0
    w[1, 3], w[1, 7] = torch.nan, torch.inf
    b[2] = torch.nan
    b[3] = (w[3].double() * t[3].double()).sum()
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    assert got.isfinite().all()
    assert (got[0] == 0).all()
    assert got[1, 3] == got[1, 7] == 0
    assert (got[1] != 0).any()
    assert (got[2] == 0).all()
    assert got[3].abs().max() <= 1e-7
    want = reference.hyperplane_projection(t[1:2].double(), w[1:2].double(), b[1:2], norm=norm)
    torch.testing.assert_close(got[1:2].double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_any_size(norm):
    """Sixty orders of magnitude in one image: each step of the search gains little; and gradients that are tiny altogether."""
    t = torch.full((2, 200), 0.5, dtype=torch.float64)
    w = torch.stack([torch.logspace(-30, 30, 200, dtype=torch.float64), torch.full((200,), 1e-30, dtype=torch.float64)])
    b = (w * t).sum(1) - 0.499 * w.sum(1)
    got = ops.hyperplane_projection(t, w, b, norm=norm)
    torch.testing.assert_close((w * (t + got)).sum(1) / b, torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_neither_threads_nor_batch_change_the_result(norm):
    args = inputs((33, 300))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.hyperplane_projection(*args, norm=norm))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = [ops.hyperplane_projection(*(a[i : i + 1] for a in args), norm=norm) for i in range(33)]
    assert torch.equal(results[0], torch.cat(alone))


def test_channels_last(device):
    t, w, b = inputs((2, 3, 8, 8), device)
    last = [a.contiguous(memory_format=torch.channels_last) for a in (t, w)]
    got = ops.hyperplane_projection(*last, b, norm="l2")
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, ops.hyperplane_projection(t, w, b, norm="l2"), rtol=0, atol=1e-6)


def test_empty_batch(device):
    assert ops.hyperplane_projection(*inputs((0, 8), device)).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": lambda t: t[:1]}, r"w must have t's shape \(2, 8\), got \(1, 8\)"),
        ({"w": lambda t: t.double()}, "w must be torch.float32 as t is, got torch.float64"),
        ({"t": lambda t: t.int(), "w": lambda t: t.int()}, "t must be float32, bfloat16.*got torch.int32"),
        ({"t": lambda t: t[:, :1].expand(2, 8)}, "t must be dense"),
        ({"t": lambda t: t.flatten()}, r"t must be \[N, ...\]"),
        ({"t": lambda t: t.t().contiguous().t(), "w": lambda t: t.t().contiguous().t()}, "one block of memory"),
        ({"b": lambda t: t[:1]}, r"b must be float32 or float64 of shape \(2,\), got torch.float64 of shape \(1,\)"),
        ({"b": lambda t: t.long()}, r"b must be float32 or float64 of shape \(2,\), got torch.int64"),
        ({"norm": "l_inf"}, "unknown norm 'l_inf'; did you mean 'linf'"),
        ({"lo": 2.0}, "lo <= hi must hold, both finite, got lo=2.0"),
        ({"hi": float("inf")}, "lo <= hi must hold, both finite, got lo=0.0, hi=inf"),
    ],
)
def test_says_what_is_wrong(change, message):
    args = dict(zip(("t", "w", "b"), inputs((2, 8)), strict=True))
    for key, value in change.items():
        args[key] = value(args[key]) if callable(value) else value
    with pytest.raises(InputError, match=message):
        ops.hyperplane_projection(**args)


def test_has_no_gradient():
    t, w, b = inputs((2, 8))
    with pytest.raises(RuntimeError, match="has no gradient"):
        ops.hyperplane_projection(t.requires_grad_(), w, b)


def test_opcheck(device):
    torch.library.opcheck(torch.ops.tsrfast.hyperplane_projection.default, (*inputs((2, 8), device), 1, 0.0, 1.0))


def test_compiles_without_a_graph_break(device):
    args = inputs((2, 8), device)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *a: ops.hyperplane_projection(*a) * 2, fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        assert torch.equal(compiled(*args), ops.hyperplane_projection(*args) * 2)
