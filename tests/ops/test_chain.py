"""The native engine on plans: against the reference in float64, bit by bit against itself, and what it refuses."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast import _native, ops, reference
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.ops.chain import FIELDS, KINDS, LOSSES

try:
    from tsrfast import _emu
except ImportError:
    _emu = None

ISAS = [level for level in _native._C.isa_levels() if level != "avx512bf16"]  # which has nothing of its own here
ON_CUDA = ["emu", pytest.param("cuda", marks=pytest.mark.cuda)]
ORACLE = [name for name in LOSSES if name.startswith("oracle")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Builder:
    """Records one after the other, with random parameters of a size that keeps activations near 1."""

    def __init__(self, image, seed=0):
        self.shape, self.rows, self.values, self.random = tuple(image), [], [], generator(seed)

    def _parameters(self, *shape, scale=1.0):
        offset = sum(v.numel() for v in self.values)
        self.values.append(torch.randn(math.prod(shape), generator=self.random) * scale)
        return offset

    def add(self, kind, out=None, kernel=(1, 1), stride=(1, 1), pad=(0, 0), activation="none", winograd=0, count_pad=0):
        c, h, w = self.shape
        if kind == "linear":
            c, h, w = math.prod(self.shape), 1, 1
        o, oh, ow = out or c, (h + 2 * pad[0] - kernel[0]) // stride[0] + 1, (w + 2 * pad[1] - kernel[1]) // stride[1] + 1
        weight = bias = slope = -1
        if kind in ("conv", "linear"):
            fan_in = c * math.prod(kernel)
            weight, bias = self._parameters(o, fan_in, scale=(2 / fan_in) ** 0.5), self._parameters(o, scale=0.3)
        if kind == "affine":
            weight, bias = self._parameters(c), self._parameters(c)
        if activation == "leaky_relu":
            slope = self._parameters(1, scale=0.2)
        kinds = {"none": 0, "relu": 1, "leaky_relu": 2}
        self.rows.append([
            KINDS[kind], c, h, w, o, oh, ow, *kernel, *stride, *pad, kinds[activation], weight, bias, slope, winograd, count_pad
        ])  # fmt: skip
        self.shape = (o, oh, ow)
        return self

    @property
    def plan(self):
        return torch.tensor(self.rows)

    @property
    def weights(self):
        return torch.cat([*self.values, torch.zeros(1)])

    @property
    def net(self):
        return self.on("cpu")

    def on(self, device):
        return self.plan, ops.chain_pack(self.plan, self.weights.to(device))

    @property
    def exact(self):
        return self.plan, self.weights.double()


@st.composite
def builders(draw):
    def pick(*values):
        return draw(st.sampled_from(values))

    made = Builder((pick(1, 2, 3, 9), draw(st.integers(1, 12)), draw(st.integers(1, 12))), draw(st.integers(0, 2**31)))
    for _ in range(draw(st.integers(0, 5))):
        kind, activation = (
            pick("conv", "conv", "conv", "winograd", "affine", "avg_pool", "max_pool"),
            pick("none", "relu", "leaky_relu"),
        )
        _, h, w = made.shape
        pad = (pick(0, 1), pick(0, 1))
        if kind == "winograd":
            pad = (pick(0, 1, 2), pick(0, 1, 2))
            if min(h + 2 * pad[0], w + 2 * pad[1]) >= 3:
                made.add("conv", pick(1, 3, 8, 9, 17), (3, 3), (1, 1), pad, activation, winograd=1)
        elif kind == "affine":
            made.add("affine", activation=activation)
        else:
            kernel = tuple(pick(*[k for k in (1, 2, 3, 4, 7) if k <= n + 2 * p]) for n, p in zip((h, w), pad, strict=True))
            pad = tuple(min(p, k - 1) for p, k in zip(pad, kernel, strict=True))
            out = pick(1, 2, 7, 9, 16) if kind == "conv" else None
            made.add(kind, out, kernel, (pick(1, 2, 3), pick(1, 2)), pad, activation, count_pad=pick(0, 1))
    for _ in range(draw(st.integers(0, 2))):
        made.add("linear", pick(1, 3, 10, 17), activation=pick("none", "relu", "leaky_relu"))
    if not made.rows:
        made.add("affine")
    return made


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
    first = made.rows[0]
    shape = (first[1],) if first[0] == KINDS["linear"] else first[1:4]
    return torch.rand(n, *shape, generator=generator(seed))


def close(got, exact, tolerance):
    """Within `tolerance` of the largest value, NaN-safely."""
    assert got.shape == exact.shape
    assert got.dtype == torch.float32
    if exact.numel():
        assert float((got.double() - exact).abs().max()) <= tolerance * max(float(exact.abs().max()), 1e-3)


def open_gates(made, x, near=1e-5):
    """No unit so near 0, and no window so near a tie, that rounding decides: there, gradients jump."""
    a = x.double()
    for i, row in enumerate(made.rows):
        r = dict(zip(FIELDS, row, strict=True))
        plain_row = made.plan[i : i + 1].clone()
        plain_row[0, FIELDS.index("activation")] = 0
        (z,) = reference.chain_forward(a, plain_row, made.weights.double(), [0])
        if r["activation"] and float(z.abs().min()) <= near * float(z.abs().max()):
            return False
        if r["kind"] == KINDS["max_pool"]:
            shaken = a + near * float(a.abs().max()) * torch.randn(a.shape, generator=generator(), dtype=a.dtype)
            kernel, stride, pad = ((r[f"{k}_h"], r[f"{k}_w"]) for k in ("kernel", "stride", "pad"))
            places = [torch.nn.functional.max_pool2d(v.reshape(len(v), r["channels"], r["height"], r["width"]), kernel, stride, pad,
                                                     return_indices=True)[1] for v in (a, shaken)]  # fmt: skip
            if not torch.equal(*places):
                return False
        (a,) = reference.chain_forward(a, made.plan[i : i + 1], made.weights.double(), [0])
    return True


def check_plan(made, n, name, precision, tolerance):
    """Forward pass and gradients are within `tolerance` of the largest value."""
    x = images(made, n)
    every = list(range(len(made.rows)))
    with engine(name) as device:
        net = made.on(device)
        outputs = ops.chain_forward(x.to(device), *net, every, precision=precision)
        exact = reference.chain_forward(x.double(), *made.exact, every)
        size = 0.0
        for got, truth in zip(outputs, exact, strict=True):
            # In float16 an output may be small only because large terms cancel: relative to the largest so far.
            size = max(size, float(truth.abs().max())) if precision == "float16" else float(truth.abs().max())
            close(got.cpu(), truth, tolerance * size / max(float(truth.abs().max()), 1e-3) if size > 1e-3 else tolerance)
        if open_gates(made, x, tolerance):
            cotangent = torch.randn(n, 2, math.prod(made.shape), generator=generator(1))
            for layer in (-1, len(every) // 2, len(every) - 1):
                got = ops.chain_gradient(x.to(device), *net, cotangent.to(device), layer, precision=precision)
                close(got.cpu(), reference.chain_gradient(x.double(), *made.exact, cotangent.double(), layer), tolerance)


@pytest.mark.parametrize("isa_level", ISAS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(builders(), st.sampled_from([1, 3, 5, 9, 17]))
def test_is_the_reference(isa_level, made, n):
    """1e-5 of the largest value: float32 sums of some hundred terms over a few layers are about 1e-6 off."""
    check_plan(made, n, isa_level, "float32", 1e-5)


# float16 rounds every activation and weight to 11 bits: 5e-4 a factor, some of them in a row.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("split", 1e-5), ("float16", 4e-3)])
@pytest.mark.parametrize("name", ON_CUDA)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(builders(), st.sampled_from([1, 3, 17]))
def test_is_the_reference_on_cuda(name, precision, tolerance, made, n):
    check_plan(made, n, name, precision, tolerance)


def student(winograd=1, widths=(18, 13, 9), image=(3, 16, 16), seed=0):
    made = Builder(image, seed)
    for width in widths:
        made.add("conv", width, (3, 3), activation="relu", winograd=winograd)
    return made.add("linear", 10)


def pair():
    return student(), student(widths=(16, 12, 8), seed=1)


def near_pair():
    """A student that mostly agrees with its teacher."""
    s, t = student(), student()
    t.values = [v + 0.06 * v.std() * torch.randn(v.shape, generator=generator(k)) for k, v in enumerate(t.values)]
    return s, t


def test_winograd_rounds_little_worse_than_pytorch():
    """At most 4 times the error of PyTorch's own float32: twice in the transforms, twice for the luck of one draw."""
    made = student(widths=(50, 35, 35, 22), image=(3, 32, 32))
    x, every = images(made, 4), [0, 1, 2, 3, 4]
    exact = reference.chain_forward(x.double(), *made.exact, every)
    single = reference.chain_forward(x, made.plan, made.weights, every)
    for got, plain, truth in zip(ops.chain_forward(x, *made.net, every), single, exact, strict=True):
        assert (got - truth).norm() <= 4 * (plain - truth).norm()
    cotangent = torch.randn(4, 1, 10, generator=generator(2))
    truth = reference.chain_gradient(x.double(), *made.exact, cotangent.double())
    plain = reference.chain_gradient(x, made.plan, made.weights, cotangent)
    assert (ops.chain_gradient(x, *made.net, cotangent) - truth).norm() <= 4 * (plain - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.parametrize("name", [*ISAS, *ON_CUDA])
def test_zeros_stay_zeros(name):
    """Where a direct sum has nothing but zeros to add, Winograd's rounding error must not appear: sign(0) = 0 moves no pixel."""
    made = Builder((1, 20, 20), seed=4)
    for width in (3, 2):
        made.add("conv", width, (3, 3), activation="relu", winograd=1, pad=(1, 1))
        made.values[-1] *= 0  # no bias: black stays black
    made.add("linear", 10)
    x = images(made, 9)
    x[:, :, :, 11:] = 0
    cotangent = torch.randn(9, 1, 10, generator=generator(1))
    with engine(name) as device:
        net = made.on(device)
        outputs = [a.cpu() for a in ops.chain_forward(x.to(device), *net, [0, 1])]
        gradient = ops.chain_gradient(x.to(device), *net, cotangent.to(device)).cpu()
    exact = reference.chain_gradient(x.double(), *made.exact, cotangent.double())
    assert 0.1 < (exact == 0).float().mean() < 0.9
    assert torch.equal(gradient == 0, exact == 0)
    for got, truth in zip(outputs, reference.chain_forward(x.double(), *made.exact, [0, 1]), strict=True):
        assert torch.equal(got == 0, truth == 0)


def test_gradient_rows_are_the_jacobian(device):
    made = student()
    x = images(made, 3)
    eye = torch.eye(10).expand(3, 10, 10).contiguous()
    rows = ops.chain_gradient(x.to(device), *made.on(device), eye.to(device), 1).cpu()
    (a,) = reference.chain_forward(x.double(), *made.exact, [1])
    rest = made.plan[2:], made.weights.double()
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda v: reference.chain_forward(v[None], *rest, [1])[0][0], a[i])
        close(rows[i], jacobian, 1e-5)


def attack(x, made, teacher=None, labels=None, start=None, exact=False, device="cpu", **kw):
    """On `device`; everything given and returned is on the CPU."""
    kw = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 5, "loss": "cross_entropy", **kw}
    nets = [None if m is None else m.exact if exact else m.on(device) for m in (made, teacher)]
    start = x if start is None else start
    if exact:
        return reference.chain_pgd(x.double(), start.double(), *nets, labels, **kw)
    kw = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    got = ops.chain_pgd(x.to(device), start.to(device), *nets, None if labels is None else labels.to(device), **kw)
    return ops.chain.ChainPGD(*(None if t is None else t.cpu() for t in got))


def labels_of(n, seed=3):
    return torch.randint(10, (n,), generator=generator(seed))


@pytest.mark.parametrize("targeted", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_of_every_loss(loss, targeted, device):
    """A step of length 1 in l2 shows the gradient's direction itself."""
    s, t = pair()
    x, y = images(s, 5), labels_of(5)
    kw = {"loss": loss, "norm": "l2", "eps": math.inf, "step_size": 1.0, "steps": 1, "lo": -math.inf, "hi": math.inf}
    kw["targeted"] = targeted and loss in ("cross_entropy", "margin")
    got = attack(x, s, t if loss in ORACLE else None, y, device=device, **kw)
    truth = attack(x, s, t if loss in ORACLE else None, y, exact=True, **kw)
    close(got.x - x, truth.x - x.double(), 1e-4)
    close(got.loss, truth.loss, 1e-4)
    assert torch.equal(got.adversarial, truth.adversarial)
    assert got.queries.tolist() == [2] * 5
    assert got.bad.tolist() == [0] * 5
    assert torch.equal(got.closeness.isnan(), truth.closeness.isnan())
    torch.testing.assert_close(got.closeness.double(), truth.closeness, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*ISAS, *ON_CUDA])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attack_is_the_reference(norm, name):
    """Five steps. A pixel whose gradient is rounding noise may step the other way and drag the path a little: 1 % of them."""
    s, t = pair()
    x, y = images(s, 9), labels_of(9)
    radius = {"linf": (8 / 255, 2 / 255), "l2": (0.5, 0.2), "l1": (6.0, 2.0)}[norm]
    eps = torch.linspace(0, 1, 9, dtype=torch.float64) * radius[0]
    kw = {"norm": norm, "eps": eps, "step_size": radius[1], "loss": "oracle_l2", "iterates": True}
    with engine(name) as device:
        got = attack(x, s, t, y, device=device, **kw)
    truth = attack(x, s, t, y, exact=True, **kw)
    assert ((got.x - truth.x).abs() > 1e-4).float().mean() <= 0.01
    assert torch.equal(got.x[0], x[0])  # eps = 0
    close(got.loss, truth.loss, 1e-2)
    assert got.iterates.shape == (6, 9, 3, 16, 16)
    assert torch.equal(got.iterates[0], x)
    assert torch.equal(got.iterates[-1], got.x)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("judge", [False, True])
def test_bookkeeping(keep, early_stop, judge, device):
    s, t = near_pair()
    n = 33 if _native.emulator is None else 9  # emulated, an image takes its time
    x = images(s, n)
    kw = {
        "keep": keep,
        "early_stop": early_stop,
        "judge": judge,
        "loss": "oracle_margin",
        "iterates": True,
        "eps": 0.01,
        "step_size": 0.004,
    }
    got, truth = attack(x, s, t, device=device, **kw), attack(x, s, t, exact=True, **kw)
    assert torch.equal(got.adversarial, truth.adversarial)
    assert torch.equal(got.queries, truth.queries)
    assert torch.equal(got.loss.isnan(), truth.loss.isnan())
    if early_stop or judge or keep == "best":
        assert 0 < int(got.adversarial.sum()) < n
        close(got.loss, truth.loss, 1e-2)
    assert ((got.x - truth.x).abs() > 1e-4).float().mean() <= 0.01
    assert ((got.iterates - truth.iterates).abs() > 1e-4).float().mean() <= 0.01
    if early_stop:
        assert len(set(got.queries.tolist())) > 2  # images stop at different steps


@pytest.mark.parametrize("name", ISAS)
def test_bits_depend_on_the_image_alone(name):
    """Not on its batch (so on the vectors' width and its neighbours), nor on the threads, nor on who stops when."""
    s, t = near_pair()
    x = images(s, 37)
    kw = {"loss": "oracle_l2", "early_stop": True, "keep": "best", "eps": 0.01, "step_size": 0.004}
    cotangent = torch.randn(37, 1, 10, generator=generator())
    threads = torch.get_num_threads()
    try:
        with engine(name):
            torch.set_num_threads(1)
            whole, forward = attack(x, s, t, **kw), ops.chain_forward(x, *s.net, [1, 3])
            gradient = ops.chain_gradient(x, *s.net, cotangent)
            for n, count in ((37, 2), (1, 1), (4, 1), (5, 2), (8, 1), (9, 1), (16, 2), (17, 1)):
                torch.set_num_threads(count)
                parts = [attack(part, s, t, **kw) for part in x.split(n)]
                for k in range(6):
                    assert torch.equal(torch.cat([p[k] for p in parts]), whole[k])
                for k in range(2):
                    assert torch.equal(torch.cat([ops.chain_forward(p, *s.net, [1, 3])[k] for p in x.split(n)]), forward[k])
                pieces = zip(x.split(n), cotangent.split(n), strict=True)
                assert torch.equal(torch.cat([ops.chain_gradient(p, *s.net, c) for p, c in pieces]), gradient)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["float32", "split", "float16"])
@pytest.mark.parametrize("name", ON_CUDA)
def test_bits_depend_on_the_image_alone_on_cuda(name, precision):
    s, t = near_pair()
    x = images(s, 4)
    kw = {"loss": "oracle_l2", "early_stop": True, "keep": "best", "eps": 0.01, "step_size": 0.004, "steps": 2}
    cotangent = torch.randn(4, 1, 10, generator=generator())
    with engine(name) as device:
        kw |= {"device": device, "precision": precision}
        net, whole = s.on(device), attack(x, s, t, **kw)
        forward = ops.chain_forward(x.to(device), *net, [1, 3], precision=precision)
        gradient = ops.chain_gradient(x.to(device), *net, cotangent.to(device), precision=precision)
        for n in (1, 3):  # and what is left
            parts = [attack(part, s, t, **kw) for part in x.split(n)]
            for k in range(6):
                assert torch.equal(torch.cat([p[k] for p in parts]), whole[k])
            pieces = [ops.chain_forward(p.to(device), *net, [1, 3], precision=precision) for p in x.split(n)]
            for k in range(2):
                assert torch.equal(torch.cat([p[k] for p in pieces]), forward[k])
            both = zip(x.to(device).split(n), cotangent.to(device).split(n), strict=True)
            assert torch.equal(torch.cat([ops.chain_gradient(p, *net, c, precision=precision) for p, c in both]), gradient)


def test_two_python_threads():
    s, t = pair()
    x = images(s, 40)
    expected = attack(x, s, t, loss="oracle_l2", steps=10)
    got = [None] * 4

    def run(k):
        got[k] = attack(x, s, t, loss="oracle_l2", steps=10)

    workers = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for result in got:
        assert torch.equal(result.x, expected.x)


def test_many_images_in_little_memory():
    """10,001 images; the engine's own memory is that of its threads."""
    made = Builder((1, 3, 3)).add("conv", 2, (3, 3), activation="relu").add("linear", 3)
    x, y = torch.rand(10_001, 1, 3, 3, generator=generator()), torch.randint(3, (10_001,), generator=generator())
    got = attack(x, made, None, y)
    assert torch.equal(got.x[-5:], attack(x[-5:], made, None, y[-5:]).x)
    assert _native._C.cpu.chain_workspace(made.plan.data_ptr(), 2, 0, 0) < 100_000


def test_no_images(device):
    s, t = pair()
    x = images(s, 0)
    got = attack(x, s, t, loss="oracle_l2", iterates=True, device=device)
    assert got.x.shape == (0, 3, 16, 16)
    assert got.iterates.shape == (6, 0, 3, 16, 16)
    x, net = x.to(device), s.on(device)
    assert ops.chain_forward(x, *net, [3])[0].shape == (0, 10)
    assert ops.chain_gradient(x, *net, torch.zeros(0, 1, 10, device=device)).shape == (0, 1, 3, 16, 16)


def test_addresses_need_no_alignment(device):
    """Images that begin in the middle of 16 bytes, as a slice of a flat buffer does."""
    s, t = pair()
    x = images(s, 3).to(device)
    flat = torch.zeros(x.numel() + 1, device=device)
    moved = flat[1:].copy_(x.flatten()).view(x.shape)
    assert moved.data_ptr() % 16
    assert torch.equal(ops.chain_forward(moved, *s.on(device), [3])[0], ops.chain_forward(x, *s.on(device), [3])[0])
    kw = {"loss": "oracle_l2", "steps": 1, "device": device}
    assert torch.equal(attack(moved, s, t, **kw).x, attack(x, s, t, **kw).x)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_broken_parameters_are_counted(poison, device):
    s, t = pair()
    s.values[0][3] = poison
    x = images(s, 3)
    got = attack(x, s, t, loss="oracle_l2", steps=2, device=device)
    assert (got.bad > 0).all()
    assert ((got.x - x).abs() <= 8 / 255 + 1e-6).all()
    assert got.x.isfinite().all()
    assert got.loss.isnan().all()


def test_nan_pixels_reach_the_logits(device):
    made = Builder((1, 8, 8)).add("max_pool", None, (2, 2), (2, 2)).add("conv", 3, (3, 3), activation="relu").add("linear", 2)
    x = images(made, 2)
    x[1, 0, 3, 3] = math.nan
    (logits,) = ops.chain_forward(x.to(device), *made.on(device), [2])
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_tiny_cotangents_do_not_underflow(device):
    """A student so sure that its gradient is 1e-35 of its weights' size: the attack still finds its direction."""
    made = Builder((1, 6, 6)).add("conv", 4, (3, 3), activation="relu").add("linear", 2)
    made.values[2] *= 0  # a network with logits (80, 0) or so
    made.values[3] = torch.tensor([80.0, 0.0])
    made.values[2] += 1e-3 * torch.randn(made.values[2].shape, generator=generator())
    x = images(made, 4)
    got = attack(x, made, None, torch.zeros(4, dtype=torch.int64), steps=1, device=device)
    # Of two classes: the gradient is that of s_1 - s_0, times what is left for class 1. (Autograd, even in float64, cancels.)
    direction = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(4, 1, 2)
    sign = reference.chain_gradient(x.double(), *made.exact, direction)[:, 0].sign()
    want = (x + 2 / 255 * sign).clamp(0, 1)
    assert float((got.x - x).abs().max()) > 0
    assert ((got.x - want).abs() > 1e-6).float().mean() <= 0.01


@pytest.mark.parametrize("gap", [0.0, 20.0, 30.0, 40.0, 90.0, 715.0, 730.0])
def test_confident_students(gap, device):
    """The gradient of cross-entropy at logits (gap, 0): their difference, however small; 1 - softmax must not cancel."""
    made = Builder((2, 1, 1)).add("linear", 2)
    made.values[0], made.values[1] = torch.eye(2).flatten(), torch.tensor([gap, 0.0])
    x = torch.full((1, 2), 0.5)
    kw = {"norm": "l2", "eps": math.inf, "step_size": 1.0, "steps": 1, "lo": -math.inf, "hi": math.inf}
    got = attack(x, made, None, torch.zeros(1, dtype=torch.int64), device=device, **kw)
    assert got.bad.tolist() == [0]
    torch.testing.assert_close((got.x - x)[0], torch.tensor([-1.0, 1.0]) / 2**0.5, rtol=1e-5, atol=1e-5)


def test_plans_are_checked():
    made = student()
    for field, value in (("kind", 7), ("channels", 4), ("out_height", 3), ("weight", 10**6), ("bias", -2), ("pad_h", 3),
                         ("kernel_h", 9), ("stride_h", 0), ("activation", 3)):  # fmt: skip
        plan = made.plan.clone()
        plan[1, FIELDS.index(field)] = value
        with pytest.raises(InputError, match="record 1"):
            ops.chain_pack(plan, made.weights)
    with pytest.raises(InputError, match="plan must be int64"):
        ops.chain_pack(made.plan[:, :5].contiguous(), made.weights)
    x, net = images(made, 1), made.net
    with pytest.raises(InputError, match="packed must have the"):
        ops.chain_forward(x, made.plan, torch.zeros(5), [0])
    for field, value in (("stride_h", 0), ("channels", 0), ("channels", 2**62), ("stride_w", 2**40)):
        plan = net[0].clone()  # changed after it was packed
        plan[0, FIELDS.index(field)] = value
        with pytest.raises(InputError, match="record 0"):
            ops.chain_forward(x, plan, net[1], [0])
        with pytest.raises(InputError, match="record 0"):
            ops.chain_gradient(x, plan, net[1], torch.zeros(1, 1, 10))


def test_columns_that_mean_nothing_are_not_read(device):
    made = Builder((9, 4, 4)).add("max_pool", None, (2, 2), (2, 2), activation="leaky_relu").add("linear", 2)
    plan = made.plan.clone()
    plan[0, FIELDS.index("bias")] = 0
    x = images(made, 3) - 0.5
    for layer in (0, 1):
        (got,) = ops.chain_forward(x.to(device), plan, ops.chain_pack(plan, made.weights.to(device)), [layer])
        close(got.cpu(), reference.chain_forward(x.double(), *made.exact, [layer])[0], 1e-5)


def test_no_parameters_at_all(device):
    made = Builder((1, 4, 4)).add("max_pool", None, (2, 2), (2, 2))
    x = images(made, 2).to(device)
    net = made.plan, ops.chain_pack(made.plan, torch.empty(0, device=device))
    assert torch.equal(ops.chain_forward(x, *net, [0])[0], torch.nn.functional.max_pool2d(x, 2))


def test_bad_arguments():
    s, _ = pair()
    x, y = images(s, 2), labels_of(2)
    for text, call in {
        "x must be float32": lambda: ops.chain_forward(x.double(), *s.net, [0]),
        r"x must have shape \[N, 3, 16, 16\]": lambda: ops.chain_forward(x[:, :2].contiguous(), *s.net, [0]),
        "x must be contiguous": lambda: ops.chain_forward(x.to(memory_format=torch.channels_last), *s.net, [0]),
        r"layers must be in 0\.\.3": lambda: ops.chain_forward(x, *s.net, [4]),
        r"layer must be in -1\.\.3": lambda: ops.chain_gradient(x, *s.net, torch.zeros(2, 1, 10), 4),
        "cotangent must have shape": lambda: ops.chain_gradient(x, *s.net, torch.zeros(2, 10)),
        "unknown loss": lambda: attack(x, s, loss="oracle_l3"),
        "unknown norm": lambda: attack(x, s, None, y, norm="l3"),
        "unknown keep": lambda: attack(x, s, None, y, keep="first"),
        "teacher must be given": lambda: attack(x, s, None, y, loss="oracle_l2"),
        "labels must be given": lambda: attack(x, s),
        r"labels must be in 0\.\.9, got 10": lambda: attack(x, s, None, y + 10 - y),
        "labels must be int64": lambda: attack(x, s, None, y.int()),
        "teacher must have the student's": lambda: attack(x, s, student(image=(3, 17, 16)), loss="oracle_l2"),
        "start must have shape": lambda: attack(x, s, None, y, start=x[:1]),
        "step_size must be finite": lambda: attack(x, s, None, y, step_size=math.inf),
        "teacher_packed must be contiguous": lambda: ops.chain_pgd(
            x, x, s.net, (s.plan, torch.zeros(1).expand(s.net[1].numel())), loss="oracle_l2", eps=0.1, step_size=0.1, steps=1
        ),
        "eps must be >= 0": lambda: attack(x, s, None, y, eps=-0.1),
        "step_size must be >= 0": lambda: attack(x, s, None, y, step_size=torch.tensor([0.1, -1.0])),
        "steps must be": lambda: attack(x, s, None, y, steps=-1),
        "lo must be <= hi": lambda: attack(x, s, None, y, lo=1.0, hi=0.0),
    }.items():
        with pytest.raises(InputError, match=text):
            call()


def test_devices():
    s, _ = pair()
    x, (plan, packed) = images(s, 1), s.net
    with pytest.raises(EnvironmentFault, match="cannot be traced"):
        ops.chain_forward(x.to("meta"), plan, packed, [0])
    for precision in ("split", "float16"):
        with pytest.raises(InputError, match=f"precision must be 'float32' on the CPU, got '{precision}'"):
            ops.chain_forward(x, plan, packed, [0], precision=precision)
    with pytest.raises(InputError, match="unknown precision 'half'"):
        ops.chain_forward(x, plan, packed, [0], precision="half")


def test_no_gradient_through_it():
    s, _ = pair()
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.chain_forward(images(s, 1).requires_grad_(), *s.net, [0])


def test_registered_properly():
    s, t = pair()
    x, y = images(s, 2), labels_of(2)
    args = (
        x,
        x,
        *s.net,
        *t.net,
        y,
        LOSSES.index("oracle_l2"),
        0,
        None,
        None,
        0.01,
        0.03,
        0.0,
        1.0,
        0.01,
        2,
        False,
        True,
        False,
        True,
        True,
        0,
    )
    torch.library.opcheck(torch.ops.tsrfast.chain_pgd.default, args)
    net, kw = s.net, {"loss": "cross_entropy", "eps": 0.03, "step_size": 0.01, "steps": 2}
    run = torch.compile(lambda a, b: ops.chain_pgd(a, a, net, None, b, **kw).x + 1, fullgraph=True, backend="eager")
    assert torch.equal(run(x, y), ops.chain_pgd(x, x, net, None, y, **kw).x + 1)
