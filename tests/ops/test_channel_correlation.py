from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from tsrfast import _native
from tsrfast.errors import InputError
from tsrfast.ops.channel_correlation import CorrelationState, channel_correlation, merge
from tsrfast.reference.channel_correlation import channel_correlation as reference
from tsrfast.reference.channel_correlation import merge as reference_merge

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MOMENTS = CorrelationState._fields[1:]


def activations(
    shape: tuple[int, ...], cs: int, ct: int, *, dtype=torch.float32, device="cpu", seed=0
) -> tuple[Tensor, Tensor]:
    """Post-ReLU maps of n = shape[0] images that share some signal."""
    g = torch.Generator().manual_seed(seed)
    n, *rest = shape
    common = torch.randn(n, 1, *rest, generator=g)
    maps = [(common + torch.randn(n, c, *rest, generator=g)).relu().to(dtype).to(device) for c in (cs, ct)]
    return maps[0], maps[1]


def assert_exact(got: CorrelationState, student: Tensor, teacher: Tensor, factor: float = 2.0) -> None:
    """At most `factor` times as far from float64 as plain PyTorch in the same dtype; moments relative to their largest."""
    exact = reference(student.double(), teacher.double())
    plain = reference(student, teacher)
    assert got.n.item() == exact.n.item()
    # Float32 products, whatever shorter type comes in; plain sums of a few values may happen to be exact. In float64 the exact
    # moments are plain sums themselves.
    floor = 128 * torch.finfo(torch.float64).eps if student.dtype == torch.float64 else 2 * torch.finfo(torch.float32).eps
    for name in MOMENTS:
        g, e, p = getattr(got, name), getattr(exact, name), getattr(plain, name)
        assert g.dtype == torch.float64
        assert g.shape == e.shape
        scale = float(e.abs().max())
        if name == "cross":
            scale = float((exact.m2_student.max() * exact.m2_teacher.max()).sqrt())
        err, allowed = float((g - e).abs().max()), factor * float((p - e).abs().max()) + floor * scale
        assert err <= allowed, f"{name}: error {err:.3e}, allowed {allowed:.3e}"


def correlation(m: CorrelationState) -> Tensor:
    return m.cross / (m.m2_student[:, None] * m.m2_teacher).sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("shape", "cs", "ct"),
    [((1,), 1, 1), ((3, 1, 1), 2, 1), ((65,), 17, 33), ((2, 5, 7), 5, 50), ((3, 30, 30), 22, 20), ((2, 32, 8), 49, 65)],
    ids=str,
)
def test_is_the_reference(shape, cs, ct, dtype, device):
    student, teacher = activations(shape, cs, ct, dtype=dtype, device=device)
    assert_exact(channel_correlation(student, teacher), student, teacher)


@pytest.mark.parametrize("shape", [((513,), 6, 4), ((4, 23, 23), 11, 7), ((700, 2, 2), 5, 5)], ids=str)
def test_every_instruction_set(shape, isa):
    for dtype in DTYPES:
        student, teacher = activations(*shape, dtype=dtype)
        assert_exact(channel_correlation(student, teacher), student, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("hw", [(1, 1), (1, 17), (24, 24), (30, 30)], ids=str)
@pytest.mark.parametrize(("cs", "ct"), [(50, 45), (35, 32), (64, 64), (129, 3)])
def test_is_the_reference_on_a_grid(n, hw, cs, ct, isa):
    student, teacher = activations((n, *hw), cs, ct)
    assert_exact(channel_correlation(student, teacher), student, teacher)


@pytest.mark.parametrize("layouts", [(0, 1), (1, 0), (1, 1), (2, 0), (3, 3)], ids=str)
def test_any_layout_is_read_in_place(layouts, device):
    student, teacher = activations((5, 9, 6), 7, 10, device=device)
    expected = channel_correlation(student, teacher)

    def lay(x: Tensor, layout: int) -> Tensor:
        if layout == 1:
            return x.to(memory_format=torch.channels_last)
        if layout == 2:  # channels out of a larger map
            return torch.cat([x, x.new_full(x.shape, torch.nan)], 1)[:, : x.shape[1]]
        if layout == 3:  # every other image
            return torch.stack([x, x.new_full(x.shape, torch.nan)], 1)[:, 0]
        return x

    got = channel_correlation(lay(student, layouts[0]), lay(teacher, layouts[1]))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("cs", "ct"), [(20, 22), (35, 32), (32, 35), (50, 45), (64, 64), (1, 49), (257, 100)])
def test_any_number_of_channels(cs, ct, dtype, device):
    """Blocks of the GPU's kernel have 32 x 32, 32 x 40, 48 x 56 or 64 x 64 channels, either network's in the rows."""
    student, teacher = activations((5, 4, 4), cs, ct, dtype=dtype, device=device)
    assert_exact(channel_correlation(student, teacher), student, teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_any_alignment_is_read_in_place(offset, dtype, device):
    """Rows of 16, 36 and 9 positions, from any value on: what can be copied in 16, 8, 4 bytes or value by value."""
    for h, w in [(4, 4), (6, 6), (3, 3)]:
        student, teacher = activations((3, h, w), 5, 6, dtype=dtype, device=device)
        expected = channel_correlation(student, teacher)
        moved = student.new_full((offset + student.numel(),), torch.nan)[offset:].view(student.shape).copy_(student)
        for g, e in zip(channel_correlation(moved, teacher), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("far", ["images", "channels", "positions"])
def test_offsets_beyond_2_to_the_31(far, dtype, device):
    """Few values, far apart, in memory of which the rest is never touched."""
    student, teacher = activations((2, 1, 9), 3, 2, dtype=dtype, device=device)
    steps = {"images": (2**31 + 64, 16, 1), "channels": (16, 2**31 + 64, 1), "positions": (4, 1, 2**28 + 8)}[far]
    size = 1 + sum(s * (n - 1) for s, n in zip(steps, (2, 3, 9), strict=True))
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 2 * size * dtype.itemsize:
            pytest.skip("needs more memory")
        memory = torch.empty(size, dtype=dtype, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
        memory = torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)
    image, channel, position = steps
    spread = memory.as_strided(student.shape, (image, channel, position, position)).copy_(student)
    for g, e in zip(channel_correlation(spread, teacher), channel_correlation(student, teacher), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-5)  # the CPU twin adds up in another order


def test_flat_activations_are_maps_of_one_position(device):
    student, teacher = activations((70,), 6, 3, device=device)
    flat = channel_correlation(student, teacher)
    maps = channel_correlation(student[:, :, None, None], teacher[:, :, None, None])
    assert all(torch.equal(a, b) for a, b in zip(flat, maps, strict=True))


def test_no_samples(device):
    for shape in [(0,), (0, 4, 4), (3, 0, 4)]:
        got = channel_correlation(*activations(shape, 3, 2, device=device))
        assert all(m.eq(0).all() for m in got)
        assert got.cross.shape == (3, 2)


@pytest.mark.parametrize("where", ["everywhere", "after_a_jump"])
def test_a_mean_of_a_thousand_deviations(where, device):
    """Sums of squares in float32 are off by 0.85 here. Long enough for chunks of several tiles."""
    student, teacher = activations((20, 30, 30), 5, 4, device=device)
    student[:, 0] = teacher[:, 0]
    if where == "everywhere":
        student, teacher = student + 1000, teacher + 1000
    else:
        student[7:], teacher[7:] = student[7:] + 1000, teacher[7:] - 1000
    exact = reference(student.double(), teacher.double())
    torch.testing.assert_close(correlation(channel_correlation(student, teacher)), correlation(exact), rtol=0, atol=1e-6)


def test_constant_channels_have_no_variance(device):
    student = torch.zeros(3, 3, 30, 30, device=device)
    student[:, 1], student[:, 2] = 0.1, 1e4 / 3
    got = channel_correlation(student, student)
    mean_square = got.m2_student / got.n + got.mean_student**2
    assert (got.m2_student / got.n <= 1e-12 * mean_square).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_its_channel_only(bad, device):
    student, teacher = activations((2, 20, 20), 4, 3, device=device)
    student[1, 2, 3, 3] = bad
    got = channel_correlation(student, teacher)
    assert got.m2_student.isfinite().tolist() == [True, True, False, True]
    assert not got.cross[2].isfinite().any()
    assert got.cross[[0, 1, 3]].isfinite().all()
    assert got.m2_teacher.isfinite().all()


def test_does_not_depend_on_the_number_of_threads():
    student, teacher = activations((40, 24, 24), 22, 20)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(channel_correlation(student, teacher))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


@pytest.mark.parametrize("seed", [0, 1])
def test_chunks_of_several_tiles(seed, device):
    """Long enough for chunks of more than one tile, on the GPU too; the mean wanders, and the last tile is short."""
    layouts = [torch.contiguous_format, torch.channels_last]
    student, teacher = activations((19, 45, 46), 3, 2, device=device, seed=seed)
    student[4:] += 10
    teacher[:9] -= 300
    s, t = student.to(memory_format=layouts[seed]), teacher.to(memory_format=layouts[1 - seed])
    assert_exact(channel_correlation(s, t), student, teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_emulated_in_any_order(order, dtype, device, monkeypatch):
    if _native.emulator is None:
        pytest.skip("the order of threads can be chosen in the emulator only")
    monkeypatch.setenv("EMU_ORDER", order)
    for layout in (torch.contiguous_format, torch.channels_last):
        student, teacher = (x.to(memory_format=layout) for x in activations((3, 11, 13), 33, 20, dtype=dtype))
        assert_exact(channel_correlation(student, teacher), student, teacher)


def test_merge_is_one_pass_over_both(device):
    student, teacher = activations((9, 8, 8), 6, 5, dtype=torch.float64, device=device)
    student[4:] += 3
    whole = channel_correlation(student, teacher)
    a, b, c = (channel_correlation(student[i:j], teacher[i:j]) for i, j in [(0, 1), (1, 4), (4, 9)])
    empty = channel_correlation(student[:0], teacher[:0])
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a)), reference_merge(merge(a, b), c)):
        for m, w in zip(merged, whole, strict=True):
            torch.testing.assert_close(m, w, rtol=1e-12, atol=1e-10)
    for neutral in (merge(a, empty), merge(empty, a)):
        assert all(torch.equal(x, y) for x, y in zip(neutral, a, strict=True))
    assert all(m.eq(0).all() for m in merge(empty, empty))


def test_bad_arguments():
    student, teacher = activations((2, 4, 4), 3, 2)
    for s, t, message in [
        (student[0], teacher, r"student must be \[N, C\] or \[N, C, H, W\], got shape \(3, 4, 4\)"),
        (student, teacher[:1], r"teacher must have student's N, H and W .*, got \(1, 2, 4, 4\)"),
        (student, teacher[:, :, 0, 0], "teacher must have student's N, H and W"),
        (student, teacher.double(), "teacher must be torch.float32 as student is, got torch.float64"),
        (student.long(), teacher, "student must be float32, bfloat16, float16, float64, got torch.int64"),
        (student[:, :0], teacher, "student must have at least one channel"),
        (student, teacher.mT, "teacher's rows must follow each other in memory"),
        (student[..., :3], teacher[..., :3], "student's rows must follow each other in memory"),
    ]:
        with pytest.raises(InputError, match=message):
            channel_correlation(s, t)
    a = channel_correlation(student, teacher)
    with pytest.raises(InputError, match=r"b must have a's channels \(3, 2\)"):
        merge(a, channel_correlation(teacher, student))


def test_no_gradient():
    student, teacher = activations((2, 4, 4), 3, 2)
    with pytest.raises(RuntimeError, match="no gradient"):
        channel_correlation(student.requires_grad_(), teacher)


def test_operator_contract(device):
    student, teacher = activations((2, 4, 4), 3, 2, device=device)
    torch.library.opcheck(torch.ops.tsrfast.channel_correlation.default, (student, teacher))


def test_compiles(device):
    student, teacher = activations((2, 4, 4), 3, 2, device=device)

    def both(s: Tensor, t: Tensor) -> CorrelationState:
        return merge(channel_correlation(s, t), channel_correlation(t, s))

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    square = student[:, :2]
    expected = both(square, teacher)
    for g, e in zip(compiled(square, teacher), expected, strict=True):
        torch.testing.assert_close(g, e)
