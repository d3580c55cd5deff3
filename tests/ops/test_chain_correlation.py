"""Moments of two networks' channels straight from images: against the reference in float64, bit by bit against itself, and what it refuses."""

from __future__ import annotations

import importlib
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast import _native, ops, reference
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.ops.chain import KINDS, has_fused_kernel
from tsrfast.ops.chain_correlation import has_fused_correlation
from tsrfast.ops.channel_correlation import CorrelationState

try:
    from tsrfast import _emu
except ImportError:
    _emu = None

MODULE = importlib.import_module("tsrfast.ops.chain_correlation")  # its name in tsrfast.ops is the function's
ISAS = [level for level in _native._C.isa_levels() if level != "avx512bf16"]  # which has nothing of its own here
ON_CUDA = ["emu", pytest.param("cuda", marks=pytest.mark.cuda)]
COUNTS = [0, 1, 2, 5, 15, 16, 17, 33]  # around the vectors' 4, 8 and 16 lanes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Built:
    """Records one after the other, with random parameters of a size that keeps activations near 1."""

    def __init__(self, image, seed=0):
        self.image = self.shape = tuple(image)
        self.rows, self.values, self.random = [], [], generator(seed)

    def _parameters(self, count, scale):
        offset = sum(v.numel() for v in self.values)
        self.values.append(torch.randn(count, generator=self.random) * scale)
        return offset

    def add(self, kind, out=None, kernel=(1, 1), stride=(1, 1), pad=(0, 0), activation="none", winograd=0):
        c, h, w = self.shape if kind != "linear" else (math.prod(self.shape), 1, 1)
        o, oh, ow = out or c, *((n + 2 * p - k) // s + 1 for n, p, k, s in zip((h, w), pad, kernel, stride, strict=True))
        weight = bias = slope = -1
        if kind in ("conv", "linear"):
            fan_in = c * math.prod(kernel)
            weight, bias = self._parameters(o * fan_in, (2 / fan_in) ** 0.5), self._parameters(o, 0.3)
        if kind == "affine":
            weight, bias = self._parameters(c, 1.0), self._parameters(c, 1.0)
        if activation == "leaky_relu":
            slope = self._parameters(1, 0.2)
        number = {"none": 0, "relu": 1, "leaky_relu": 2}[activation]
        self.rows.append([KINDS[kind], c, h, w, o, oh, ow, *kernel, *stride, *pad, number, weight, bias, slope, winograd, 0])
        self.shape = (o, oh, ow)
        return self

    @property
    def plan(self):
        return torch.tensor(self.rows)

    @property
    def weights(self):
        return torch.cat([*self.values, torch.zeros(1)])

    def on(self, device="cpu"):
        return self.plan, ops.chain_pack(self.plan, self.weights.to(device))

    @property
    def exact(self):
        return self.plan, self.weights.double()


def built(image, steps, widths, seed):
    """The same steps for two networks have the same heights and widths, whatever their channels are."""
    made, width = Built(image, seed), iter(widths)
    for kind, *rest in steps:
        made.add(kind, next(width) if kind in ("conv", "linear") else None, *rest)
    return made


@st.composite
def pairs(draw):
    """Two networks whose records have equal heights and widths."""

    def pick(*values):
        return draw(st.sampled_from(values))

    image = pick(1, 3), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    sides, steps = image[1:], []
    for _ in range(draw(st.integers(0, 4))):
        kind = pick("conv", "winograd", "affine", "max_pool", "avg_pool")
        kernel, stride, pad, winograd = (1, 1), (1, 1), (0, 0), 0
        if kind == "winograd" and min(sides) >= 2:
            kind, kernel, pad, winograd = "conv", (3, 3), (1, 1), 1
        elif kind != "affine":
            kind = "conv" if kind == "winograd" else kind
            kernel = tuple(pick(*[k for k in (1, 2, 3) if k <= n]) for n in sides)
            stride = pick(1, 2), pick(1, 2)
        steps.append((kind, kernel, stride, pad, pick("none", "relu", "leaky_relu"), winograd))
        sides = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(sides, pad, kernel, stride, strict=True))
    for _ in range(draw(st.integers(0 if steps else 1, 2))):
        steps.append(("linear", (1, 1), (1, 1), (0, 0), pick("none", "relu")))
    seed = draw(st.integers(0, 2**30))
    return [built(image, steps, [pick(1, 2, 7, 9, 17) for _ in steps], seed + k) for k in range(2)]


@contextmanager
def engine(name):
    """The CPU engine at an instruction set, the CUDA engine emulated, or the CUDA engine; gives the device of tensors."""
    if (name == "emu" and _emu is None) or (name == "cuda" and not torch.cuda.is_available()):
        pytest.skip("tsrfast._emu is not built" if name == "emu" else "no CUDA device")
    before = _native._C.isa()
    if name in ISAS:
        _native.set_isa(name)
    _native.emulator = _emu if name == "emu" else None
    try:
        yield "cuda" if name == "cuda" else "cpu"
    finally:
        _native.set_isa(before)
        _native.emulator = None


def images(made, n, seed=0):
    shape = made.image if made.rows[0][0] != KINDS["linear"] else (math.prod(made.image),)
    return torch.rand(n, *shape, generator=generator(seed))


def every(made):
    return list(range(len(made.rows)))


def run(x, student, teacher, layers=None, teacher_layers=None, device="cpu", **kw):
    layers = every(student) if layers is None else layers
    teacher_layers = layers if teacher_layers is None else teacher_layers
    got = ops.chain_correlation(x.to(device), student.on(device), teacher.on(device), layers, teacher_layers, **kw)
    return [CorrelationState(*(m.cpu() for m in state)) for state in got]


def exact(x, student, teacher, layers=None, teacher_layers=None):
    layers = every(student) if layers is None else layers
    return reference.chain_correlation(
        x.double(), student.exact, teacher.exact, layers, layers if teacher_layers is None else teacher_layers
    )


def assert_close(got, truth, tolerance, sizes):
    """Errors of activations, `tolerance` of `sizes` (the largest activation of student and teacher), as they show in the moments."""
    n, (s, t) = float(truth.n), sizes
    assert float(got.n) == n
    scales = {"mean_student": s, "mean_teacher": t, "m2_student": n * s * s, "m2_teacher": n * t * t, "cross": n * s * t}
    for name, scale in scales.items():
        g, e = getattr(got, name), getattr(truth, name)
        assert g.dtype == torch.float64
        assert g.shape == e.shape
        err = float((g - e).abs().max())
        # A product has two factors that are wrong.
        assert err <= 2 * tolerance * scale, f"{name}: error {err:.3e}, allowed {2 * tolerance * scale:.3e}"


def largest(x, made):
    """For each layer the largest activation so far: one may be small only because large terms cancel."""
    sizes = [float(a.abs().max()) if a.numel() else 0.0 for a in reference.chain_forward(x.double(), *made.exact, every(made))]
    return itertools.accumulate(sizes, max)


def check(student, teacher, n, name, tolerance, **kw):
    x = images(student, n)
    with engine(name) as device:
        got = run(x, student, teacher, device=device, **kw)
    sizes = zip(largest(x, student), largest(x, teacher), strict=True)
    for g, e, size in zip(got, exact(x, student, teacher), sizes, strict=True):
        assert_close(g, e, tolerance, size)


@pytest.mark.parametrize("isa_level", ISAS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from(COUNTS))
def test_is_the_reference(isa_level, nets, n):
    """1e-5 of the largest activation, as `chain_forward`; the sums themselves add little."""
    check(*nets, n, isa_level, 1e-5)


# float16 rounds every activation and weight to 11 bits: 5e-4 a factor, some of them in a row.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("split", 1e-5), ("float16", 4e-3)])
@pytest.mark.parametrize("name", ON_CUDA)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from([0, 1, 5]))
def test_is_the_reference_on_cuda(name, precision, tolerance, nets, n):
    check(*nets, n, name, tolerance, precision=precision)


def convolutions(widths=(5, 4, 3), image=(3, 12, 12), seed=0):
    made = Built(image, seed)
    for width in widths:
        made.add("conv", width, (3, 3), activation="relu", winograd=1)
    return made.add("linear", 10)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", ISAS)
def test_as_good_as_the_moments_of_the_activations(name, n):
    """Whatever the number of images: what `channel_correlation` says of `chain_forward`, to the rounding of products."""
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    x = images(s, n)
    with engine(name):
        got = run(x, s, t, [0, 2])
        maps = [ops.chain_forward(x, *made.on(), [0, 2]) for made in (s, t)]
        want = [ops.channel_correlation(a, b) for a, b in zip(*maps, strict=True)]
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.n, w.n)
        for m, expected in zip(g[1:], w[1:], strict=True):
            torch.testing.assert_close(m, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_layers_in_any_order(device):
    """The same record twice, and a pair of unlike records."""
    s = convolutions((5, 4, 3))
    t = Built((3, 12, 12), 1).add("conv", 4, (3, 3)).add("affine", activation="relu").add("conv", 2, (5, 5)).add("linear", 4)
    x = images(s, 5)
    got = run(x, s, t, [3, 0, 0, 2], [3, 0, 1, 2], device)
    alone = [run(x, s, t, [i], [j], device)[0] for i, j in ((3, 3), (0, 0), (0, 1), (2, 2))]
    for g, a in zip(got, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(g, a, strict=True))
    for g, e in zip(got, exact(x, s, t, [3, 0, 0, 2], [3, 0, 1, 2]), strict=True):
        torch.testing.assert_close(g.cross, e.cross, rtol=0, atol=2e-5 * float(e.cross.abs().max()))


def test_features_against_a_map_of_one_pixel(device):
    s, t = Built((3, 4, 4)).add("linear", 7, activation="relu"), Built((3, 4, 4), 1).add("conv", 5, (4, 4), activation="relu")
    x = images(t, 9)
    got = ops.chain_correlation(x.to(device), t.on(device), s.on(device), [0], [0])[0]
    back = ops.chain_correlation(x.flatten(1).to(device), s.on(device), t.on(device), [0], [0])[0]
    (truth,) = exact(x, t, s)
    torch.testing.assert_close(got.cross.cpu(), truth.cross, rtol=0, atol=2e-5 * float(truth.cross.abs().max()))
    torch.testing.assert_close(back.cross.cpu(), truth.cross.mT, rtol=0, atol=2e-5 * float(truth.cross.abs().max()))


@pytest.mark.parametrize("name", ISAS)
def test_bits_do_not_depend_on_the_number_of_threads(name, monkeypatch):
    """Chunks of several groups and a last group with idle lanes: 64 chunks, and 64 x 4 (lanes, portable) < 1029."""
    s, t = Built((1, 4, 4)), Built((1, 4, 4), 1)
    for made, widths in ((s, (5, 3)), (t, (3, 4))):
        for width in widths:
            made.add("conv", width, (2, 2), activation="relu")
    x, results = images(s, 2053), []
    with engine(name):
        for threads in (1, 2, 3, 7):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(run(x, s, t))
    for other in results[1:]:
        assert all(torch.equal(a, b) for p, q in zip(results[0], other, strict=True) for a, b in zip(p, q, strict=True))
    for g, e in zip(results[0], exact(x, s, t), strict=True):
        torch.testing.assert_close(g.cross, e.cross, rtol=0, atol=2e-6 * float(e.cross.abs().max()))


@pytest.mark.parametrize("name", ISAS)
def test_a_large_mean_loses_nothing(name):
    """Activations of 1000 deviations above 0: float32 sums of their squares would have no digit of the variance left."""
    s, t = (Built((2, 6, 6), seed).add("affine", activation="relu") for seed in (0, 1))
    for made in (s, t):  # x + 300: exact enough, and of deviation 0.29
        made.values[0], made.values[1] = torch.ones(2), torch.full((2,), 300.0)
    x = images(s, 41)
    with engine(name):
        (got,) = run(x, s, t)
    a = (x + 300).double()  # as float32 has it
    truth = reference.channel_correlation(a, a)
    rho = [m.cross / (m.m2_student[:, None] * m.m2_teacher).sqrt() for m in (got, truth)]
    torch.testing.assert_close(rho[0], rho[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(got.mean_student, truth.mean_student, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.m2_teacher, truth.m2_teacher, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ISAS)
def test_a_value_that_is_not_finite_shows_in_its_channel(name, bad):
    made = Built((3, 5, 5)).add("affine", activation="relu")
    made.values[0], made.values[1] = torch.ones(3), torch.zeros(3)
    x = images(made, 21)
    x[19, 1, 2, 2] = bad
    with engine(name):
        (got,) = run(x, made, made)
    assert got.m2_student.isfinite().tolist() == [True, False, True]
    assert got.cross.isfinite().all(0).tolist() == [False, False, False]
    assert got.cross[[0, 2]][:, [0, 2]].isfinite().all()


def test_idle_lanes_are_no_samples():
    """A batch's last images alone: the lanes that repeat an image must not count, nor must what is left of other groups."""
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    x = images(s, 19)
    whole = run(x, s, t, [0, 1, 2])
    parts = [run(part, s, t, [0, 1, 2]) for part in x.split([16, 2, 1])]
    for k, w in enumerate(whole):
        merged = ops.merge(ops.merge(parts[0][k], parts[1][k]), parts[2][k])
        assert torch.equal(merged.n, w.n)
        for m, expected in zip(merged[1:], w[1:], strict=True):
            torch.testing.assert_close(m, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_memory_does_not_grow_with_the_images():
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    layers = ([0, 1, 2], [0, 1, 2])
    plans = (s.plan, t.plan)
    address = [v for p in plans for v in (p.data_ptr(), len(p))]
    few, many = (_native._C.cpu.chain_correlation_workspace(*address, *layers, n, 2) for n in (2**20, 2**30))
    assert few == many < 2_000_000


def test_no_images(device):
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    for precision in ("float32",) if _native.emulator is None and device.type == "cpu" else ("float32", "float16"):
        got = run(images(s, 0), s, t, [0, 1, 2], device=device, precision=precision)
        assert [tuple(m.cross.shape) for m in got] == [(5, 4), (4, 6), (3, 2)]
        assert all((moment == 0).all() for m in got for moment in m)


def test_addresses_need_no_alignment(device):
    """Images that begin in the middle of 16 bytes, as a slice of a flat buffer does."""
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    x = images(s, 3).to(device)
    flat = torch.zeros(x.numel() + 1, device=device)
    moved = flat[1:].copy_(x.flatten()).view(x.shape)
    assert moved.data_ptr() % 16
    for a, b in zip(run(moved, s, t, device=device), run(x, s, t, device=device), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ON_CUDA)
def test_batches_on_cuda_are_joined(name, monkeypatch):
    """Layer by layer, a batch's activations are bounded: three images of these networks at a time."""
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    x, values = images(s, 8), sum(math.prod(r[4:7]) for made in (s, t) for r in made.rows)
    with engine(name) as device:
        whole = run(x, s, t, device=device)
        monkeypatch.setattr(MODULE, "_BATCH_BYTES", 3 * 4 * values)
        parts = run(x, s, t, device=device)
    assert not all(torch.equal(a.cross, b.cross) for a, b in zip(whole, parts, strict=True))
    for a, b in zip(whole, parts, strict=True):
        # Tensor cores cut sums instead of rounding them, always towards 0.
        torch.testing.assert_close(a.cross, b.cross, rtol=0, atol=5e-6 * float(a.cross.abs().max()))


# Student, teacher, side of the image: those with a fused kernel in the emulator's build, and in the build for GPUs.
FUSED = {
    "emu": [((17, 8, 24), (9, 8, 5), 12), ((7, 33), (20, 8), 14)],
    "cuda": [((50, 35, 35, 22), (45, 32, 32, 20), 32), ((50, 35, 35, 35, 22), (45, 32, 32, 32, 20), 32)],
}
FUSED_ON = [pytest.param(name, *case, id=f"{name} {case[0]}", marks=[pytest.mark.cuda] if name == "cuda" else [])
            for name, cases in FUSED.items() for case in cases]  # fmt: skip


@pytest.mark.parametrize(("name", "widths", "teacher_widths", "side"), FUSED_ON)
def test_fused_kernel(name, widths, teacher_widths, side, monkeypatch):
    """As near to the truth as float16 layer by layer; the same bits again; not taken for some of the layers."""
    s, t = (convolutions(w, (3, side, side), seed) for seed, w in enumerate((widths, teacher_widths)))
    x, layers = images(s, 5), list(range(len(widths)))
    unfused, by_layers = MODULE._by_layers, []
    monkeypatch.setattr(MODULE, "_by_layers", lambda *args: by_layers.append(1) or unfused(*args))
    with engine(name) as device:
        fused = name == "emu" or torch.cuda.get_device_capability() >= (9, 0)
        assert has_fused_correlation(s.plan, t.plan) == fused
        assert not has_fused_correlation(t.plan, s.plan)
        got = run(x, s, t, layers, device=device, precision="float16")
        again = run(x, s, t, layers, device=device, precision="float16")
        assert by_layers == [1, 1] * (not fused)
        by_layers.clear()
        none = run(x[:0], s, t, layers, device=device, precision="float16")
        by_layers.clear()
        part = run(x, s, t, layers[:1], device=device, precision="float16")
        assert by_layers == [1]
    truth = exact(x, s, t, layers)
    sizes = zip(largest(x, s), largest(x, t), strict=True)
    for g, a, e, empty, size in zip(got, again, truth, none, itertools.islice(sizes, len(layers)), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(g, a, strict=True))
        assert_close(g, e, 4e-3, size)
        assert all((m == 0).all() for m in empty)
    assert_close(part[0], truth[0], 4e-3, (next(largest(x, s)), next(largest(x, t))))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 19, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 19)]
)
def test_plans_that_are_none(wrong):
    s = convolutions()
    for ask in (lambda p: has_fused_correlation(p, s.plan), lambda p: has_fused_correlation(s.plan, p),
                lambda p: has_fused_kernel(p, None, "margin", "linf")):  # fmt: skip
        with pytest.raises(InputError, match=r"must be int64 \[records, 19\]"):
            ask(wrong)
    with pytest.raises(InputError, match="must be contiguous"):
        has_fused_correlation(s.plan.t().contiguous().t(), s.plan)


def on_a_gpu(test):
    """Where only a GPU can tell: its multiprocessors, streams and graphs. Before compute capability 9.0 it goes layer by layer."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@pytest.fixture(params=FUSED["cuda"], ids=lambda case: f"{len(case[0])} layers")
def papers_pair(request):
    """Student and teacher of the paper on the GPU, and the numbers of their convolutions."""
    widths, teacher_widths, side = request.param
    nets = (convolutions(w, (3, side, side), seed).on("cuda") for seed, w in enumerate((widths, teacher_widths)))
    return *nets, list(range(len(widths)))


def fused_flat(x, student, teacher, layers):
    """All moments as one tensor, where x is."""
    states = ops.chain_correlation(x, student, teacher, layers, layers, precision="float16")
    return torch.cat([m.flatten() for state in states for m in state])


def varying(m2, mean, n):
    """Channels that float16 tells much of: mean at most 3 deviations, and deviation not a small part of the layer's largest."""
    variance = m2 / n
    return (variance > 0.1 * (variance + mean.square())) & (variance > 1e-2 * variance.max())


def assert_as_layer_by_layer(x, student, teacher, layers):
    """Both ways round activations to float16, after sums in another order: now and then to a neighbouring value."""
    fused = ops.chain_correlation(x, student, teacher, layers, layers, precision="float16")
    for got, flat in zip(fused, MODULE._by_layers(x, student, teacher, layers, layers, "float16"), strict=True):
        want = MODULE._state(flat, *got.cross.shape)
        assert float(got.n) == float(want.n)
        for mean, other in ((got.mean_student, want.mean_student), (got.mean_teacher, want.mean_teacher)):
            # of a channel that is hardly ever above 0, a part of the layer's largest
            torch.testing.assert_close(mean, other, rtol=1e-3, atol=1e-4 * float(other.max()))
        rows, columns = (varying(m2, mean, want.n) for m2, mean in
                         ((want.m2_student, want.mean_student), (want.m2_teacher, want.mean_teacher)))  # fmt: skip
        assert rows.any()
        assert columns.any()
        rho = [(s.cross / s.m2_student.sqrt()[:, None] / s.m2_teacher.sqrt())[rows][:, columns] for s in (got, want)]
        torch.testing.assert_close(rho[0], rho[1], rtol=0, atol=1e-3)


# Images: one; one for each block; two for each, and one more.
@pytest.mark.parametrize(("turns", "more"), [(0, 1), (1, 0), (2, 1)])
@pytest.mark.parametrize(("name", "widths", "teacher_widths", "side"), FUSED_ON)
def test_fused_kernel_is_the_layers_on_any_number_of_blocks(name, widths, teacher_widths, side, turns, more):
    with engine(name) as device:
        blocks = torch.cuda.get_device_properties(0).multi_processor_count if name == "cuda" else 2
        nets = [convolutions(w, (3, side, side), seed) for seed, w in enumerate((widths, teacher_widths))]
        x = images(nets[0], turns * blocks + more).to(device)
        assert_as_layer_by_layer(x, *(net.on(device) for net in nets), list(range(len(widths))))


@on_a_gpu
def test_fused_kernel_gives_equal_bits_on_any_stream(papers_pair):
    x = torch.rand(301, 3, 32, 32, generator=generator()).cuda()
    first = fused_flat(x, *papers_pair)
    for _ in range(3):
        assert torch.equal(fused_flat(x, *papers_pair), first)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for stream in streams:
        with torch.cuda.stream(stream):
            got.append(fused_flat(x, *papers_pair))
    torch.cuda.synchronize()
    assert all(torch.equal(flat, first) for flat in got)


@on_a_gpu
def test_fused_kernel_captured_twice(papers_pair):
    """A graph, replayed on other images; and a second one beside it."""
    x = torch.rand(150, 3, 32, 32, generator=generator()).cuda()
    fused_flat(x, *papers_pair)  # what is done once only is done
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_flat(x, *papers_pair)
        graphs.append((graph, out))
    for seed in (5, 6):
        x.copy_(torch.rand(x.shape, generator=generator(seed)))
        expected = fused_flat(x, *papers_pair)
        for graph, out in graphs:
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)


def test_no_fused_kernel_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    s = convolutions()
    assert not has_fused_correlation(s.plan, s.plan)


def test_bad_arguments():
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    x, net, other = images(s, 2), s.on(), t.on()
    wide, flat = convolutions(image=(3, 13, 12)), Built((3, 12, 12)).add("linear", 3)
    for text, call in {
        "x must be float32": lambda: ops.chain_correlation(x.double(), net, other, [0], [0]),
        r"x must have shape \[N, 3, 12, 12\]": lambda: ops.chain_correlation(x[:, :2].contiguous(), net, other, [0], [0]),
        "x must be contiguous": lambda: ops.chain_correlation(
            x.to(memory_format=torch.channels_last), net, other, [0], [0]
        ),
        r"layers_student must be in 0\.\.3, got 4": lambda: ops.chain_correlation(x, net, other, [4], [0]),
        r"layers_teacher must be in 0\.\.3, got -1": lambda: ops.chain_correlation(x, net, other, [0], [-1]),
        "layers_student must name at least one layer, got none": lambda: ops.chain_correlation(x, net, other, [], []),
        r"layers_teacher must be as many as layers_student \(2\), got 1": lambda: ops.chain_correlation(x, net, other, [0, 1], [0]),
        r"layers_teacher must have the height and width .*record 0: \[5, 10, 10\]\), got record 1: \[6, 8, 8\]": (
            lambda: ops.chain_correlation(x, net, other, [0], [1])
        ),
        r"got record 0: \[3\]": lambda: ops.chain_correlation(x, net, flat.on(), [0], [0]),
        "teacher must have the student's 432 inputs, got 468": lambda: ops.chain_correlation(x, net, wide.on(), [0], [0]),
        "packed must have the": lambda: ops.chain_correlation(x, net, (t.plan, torch.zeros(5)), [0], [0]),
        "teacher_packed must be contiguous": lambda: ops.chain_correlation(
            x, net, (t.plan, torch.zeros(1).expand(other[1].numel())), [0], [0]
        ),
        "teacher must be int64": lambda: ops.chain_correlation(x, net, (t.plan.int(), other[1]), [0], [0]),
        "precision must be 'float32' on the CPU, got 'split'": lambda: ops.chain_correlation(
            x, net, other, [0], [0], precision="split"
        ),
        "unknown precision 'double'": lambda: ops.chain_correlation(x, net, other, [0], [0], precision="double"),
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=text):
            call()
    broken = s.plan.clone()
    broken[1, 1] = 77
    with pytest.raises(InputError, match=r"student: .*record 1"):
        ops.chain_correlation(x, (broken, net[1]), other, [0], [0])
    with pytest.raises(EnvironmentFault, match="cannot be traced"):
        ops.chain_correlation(x.to("meta"), net, other, [0], [0])


def test_native_arguments_are_checked_again():
    """Addresses and sizes, by the binding: whatever calls it."""
    s, t = convolutions(), convolutions((4, 6, 2), seed=1)
    (plan, packed), (other, other_packed), x = s.on(), t.on(), images(s, 2)
    plans = (plan.data_ptr(), len(plan), other.data_ptr(), len(other))
    nets = (plan.data_ptr(), len(plan), packed.data_ptr(), len(packed), other.data_ptr(), len(other), other_packed.data_ptr())
    size = _native._C.cpu.chain_correlation_workspace(*plans, [0], [0], 2, 1)
    workspace, out = torch.empty(size, dtype=torch.uint8), torch.empty(39, dtype=torch.float64)
    given = {"values": len(other_packed), "at": 0, "moments": out.data_ptr(), "x": x.data_ptr(), "size": size}

    def call(**wrong):
        values, at, moments, address, size = {**given, **wrong}.values()
        rest = ([at], [0], [moments], 2, workspace.data_ptr(), size, 1)
        _native._C.cpu.chain_correlation(*nets, values, address, *rest)

    call()
    for wrong, text in [
        ({"values": 3}, "packed: is not of this plan"),
        ({"at": 9}, "layers: must be records of the plans"),
        ({"at": 1}, "layers: must have the same height and width"),
        ({"moments": 0}, "moments: null address"),
        ({"x": 0}, "x: null address"),
        ({"size": size - 1}, f"workspace: needs {size} bytes, got {size - 1}"),
    ]:
        with pytest.raises(ValueError, match=text):
            call(**wrong)
    with pytest.raises(ValueError, match="layers: must be as many of the teacher as of the student"):
        _native._C.cpu.chain_correlation_workspace(*plans, [0, 1], [0], 2, 1)


def test_no_gradient():
    s = convolutions()
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.chain_correlation(images(s, 2).requires_grad_(), s.on(), s.on(), [0], [0])
