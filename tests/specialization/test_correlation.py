from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tsrfast
from tsrfast import _native
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.specialization import ChannelCorrelation, NormalizedCorrelation, bnc, correlate
from tsrfast.specialization.correlation import accumulate

try:
    from tsrfast import _emu
except ImportError:
    _emu = None


def maps(n: int, c: int, *rest: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Post-ReLU activations with a common part, the same for every seed."""
    common = torch.randn(n, 1, *rest, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    own = torch.randn(n, c, *rest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (common + own).relu().to(dtype)


def stream(student: Tensor, teacher: Tensor, sizes: list[int] | None = None) -> NormalizedCorrelation:
    acc = ChannelCorrelation()
    for s, t in zip(student.split(sizes or [len(student)]), teacher.split(sizes or [len(teacher)]), strict=True):
        acc.update(s, t)
    return acc.compute()


def one_shot(student: Tensor, teacher: Tensor) -> Tensor:
    rows = torch.cat([x.double().transpose(0, 1).flatten(1) for x in (student, teacher)])
    return torch.corrcoef(rows)[: student.shape[1], student.shape[1] :]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(lambda s: sum(s) >= 2),
    cs=st.integers(1, 9),
    ct=st.integers(1, 9),
    side=st.integers(3, 12),
    offset=st.sampled_from([0.0, 3.0, -1000.0]),
)
def test_any_split_is_one_shot(sizes, cs, ct, side, offset):
    student, teacher = maps(sum(sizes), cs, side, side, seed=1) + offset, maps(sum(sizes), ct, side, side, seed=2)
    nc = stream(student, teacher, sizes)
    assert nc.rho.dtype == torch.float64
    assert nc.count == sum(sizes) * side * side
    torch.testing.assert_close(nc.rho, one_shot(student, teacher), rtol=0, atol=1e-6)


def test_a_network_with_itself():
    x = maps(6, 8, 7, 7)
    nc = stream(x, x, [2, 4])
    torch.testing.assert_close(nc.rho.diagonal(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(nc.rho, nc.rho.mT)
    assert nc.rho.abs().max() <= 1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 100.0])
def test_positive_scale_and_shift_change_nothing(scale, shift):
    student, teacher = maps(5, 4, 9, 9, seed=1, dtype=torch.float64), maps(5, 3, 9, 9, seed=2, dtype=torch.float64)
    torch.testing.assert_close(stream(scale * student + shift, teacher).rho, stream(student, teacher).rho, rtol=0, atol=1e-10)
    torch.testing.assert_close(stream(-student, teacher).rho, -stream(student, teacher).rho, rtol=0, atol=1e-10)


def test_permuted_and_rescaled_channels_are_found_again():
    teacher = maps(5, 6, 9, 9)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    student = teacher[:, order] * torch.tensor([0.1, 2.0, 3.0, 40.0, 5.0, 0.6])[:, None, None]
    nc = stream(student, teacher, [1, 4])
    torch.testing.assert_close(bnc(nc), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)
    assert nc.rho.argmax(1).tolist() == order.tolist()


def test_dead_nodes_are_flagged_and_uncorrelated():
    student, teacher = maps(4, 4, 9, 9, seed=1), maps(4, 3, 9, 9, seed=2)
    student[:, 1] = 0
    student[:, 3] = 0.3
    teacher[:, 2] = 7e4
    nc = stream(student, teacher, [1, 3])
    assert nc.dead_student.tolist() == [False, True, False, True]
    assert nc.dead_teacher.tolist() == [False, False, True]
    assert (nc.rho[[1, 3]] == 0).all()
    assert (nc.rho[:, 2] == 0).all()
    assert (nc.rho[[0, 2], :2] != 0).all()


def test_almost_constant_is_not_dead():
    """Mean 1000 times the deviation: variance is 1e-6 of the mean square."""
    x = maps(4, 3, 9, 9) + 1000
    nc = stream(x, x)
    assert not nc.dead_student.any()
    torch.testing.assert_close(nc.rho, one_shot(x, x), rtol=0, atol=1e-6)


def test_tiny_activations_do_not_underflow():
    x = maps(4, 3, 9, 9, dtype=torch.float64) * 1e-120
    nc = stream(x, x)
    torch.testing.assert_close(nc.rho.diagonal(), torch.ones(3, dtype=torch.float64))


def test_flat_activations():
    student, teacher = maps(70, 4, seed=1), maps(70, 3, seed=2)
    assert torch.equal(stream(student, teacher).rho, stream(student[..., None, None], teacher[..., None, None]).rho)


def test_states_merge_and_reset():
    student, teacher = maps(9, 4, 5, 5, seed=1), maps(9, 3, 5, 5, seed=2)
    parts = []
    for i, j in [(0, 2), (2, 3), (3, 9)]:
        acc = ChannelCorrelation()
        acc.update(student[i:j], teacher[i:j])
        parts.append(acc)
    left, right = ChannelCorrelation(), ChannelCorrelation()
    for p in parts:
        left.merge_state(p)
    for p in reversed(parts):
        right.merge_state(p)
    left.merge_state(ChannelCorrelation())
    torch.testing.assert_close(left.compute().rho, right.compute().rho, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.compute().rho, one_shot(student, teacher), rtol=0, atol=1e-6)
    assert parts[0].compute().count == 50  # untouched
    left.reset()
    with pytest.raises(InputError, match="at least one sample"):
        left.compute()


def test_an_empty_batch_changes_nothing():
    student, teacher = maps(4, 4, 5, 5, seed=1), maps(4, 3, 5, 5, seed=2)
    acc = ChannelCorrelation()
    acc.update(student[:0], teacher[:0])
    with pytest.raises(InputError, match="at least one sample, got none"):
        acc.compute()
    acc.update(student, teacher)
    acc.update(student[:0], teacher[:0])
    assert torch.equal(acc.compute().rho, stream(student, teacher).rho)


def test_gradients_are_ignored():
    student, teacher = maps(4, 4, 5, 5).requires_grad_(), maps(4, 3, 5, 5, seed=2)
    assert not stream(student, teacher).rho.requires_grad


def test_bad_activations():
    student, teacher = maps(4, 4, 5, 5, seed=1), maps(4, 3, 5, 5, seed=2)
    for bad in (torch.nan, torch.inf):
        broken = teacher.clone()
        broken[1, 2, 0, 0] = bad
        with pytest.raises(InputError, match=r"teacher must have finite activations .* got others in channels \[2\]"):
            stream(student, broken, [2, 2])
        with pytest.raises(InputError, match="student must have finite activations"):
            stream(broken, student)
    with pytest.raises(InputError, match=r"\[N, C\] or \[N, C, H, W\], got shape \(4, 4, 5\)"):
        stream(student[..., 0], teacher[..., 0])
    with pytest.raises(InputError, match="must have student's N, H and W"):
        ChannelCorrelation().update(student, teacher[:2])
    acc = ChannelCorrelation()
    acc.update(student, teacher)
    with pytest.raises(InputError, match=r"must have a's channels \(4, 3\)"):
        acc.update(teacher, student)


IMAGES = torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def test_correlate_runs_layer_by_layer_whatever_the_batches():
    student = ConvReLU(widths=(5, 4), image=(3, 12, 12), seed=1, batch_norm=True).train()
    teacher = ConvReLU(widths=(3, 6), image=(3, 12, 12), seed=2).eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    layers = correlate(student, teacher, IMAGES, batch_size=3)
    assert [tuple(nc.rho.shape) for nc in layers] == [(5, 3), (4, 6)]
    assert student.training
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with torch.no_grad():
        for nc, s, t in zip(layers, student.eval().activations(IMAGES), teacher.activations(IMAGES), strict=True):
            expected = one_shot(s, t).nan_to_num()
            torch.testing.assert_close(nc.rho, expected, rtol=0, atol=1e-6)
            assert nc.count == s[:, 0].numel()
    whole = correlate(student, teacher, IMAGES, batch_size=100)
    for a, b in zip(layers, whole, strict=True):
        torch.testing.assert_close(a.rho, b.rho, rtol=0, atol=1e-6)


def test_correlate_takes_bytes_and_finds_a_copy():
    net = ConvReLU(widths=(5, 4), image=(3, 12, 12), seed=1)
    images = (IMAGES * 255).to(torch.uint8)
    for a, b in zip(correlate(net, net, images), correlate(net, net, images / 255), strict=True):
        assert torch.equal(a.rho, b.rho)
        live = ~a.dead_student
        assert (a.rho.diagonal()[live] - 1).abs().max() < 1e-6


def test_correlate_with_bad_arguments():
    net = ConvReLU(widths=(5, 4), image=(3, 12, 12))
    with pytest.raises(InputError, match="images must be"):
        correlate(net, net, IMAGES[:0])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        correlate(net, net, IMAGES, batch_size=0)
    with pytest.raises(InputError, match="teacher must have student's 2 layers, got 1"):
        correlate(net, ConvReLU(widths=(3,), image=(3, 12, 12)), IMAGES)


def test_correlate_restores_the_mode_after_an_error():
    class Broken(nn.Module):
        def activations(self, x: Tensor) -> list[Tensor]:
            raise RuntimeError("broken")

    net = ConvReLU(widths=(5,), image=(3, 12, 12)).train()
    with pytest.raises(RuntimeError, match="broken"):
        correlate(net, Broken(), IMAGES)
    assert net.training


def networks() -> tuple[ConvReLU, ConvReLU]:
    student = ConvReLU(widths=(5, 4), image=(3, 12, 12), seed=1, batch_norm=True, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3])
    return student.eval(), ConvReLU(widths=(3, 6), image=(3, 12, 12), seed=2).eval()


def assert_same(got: list[NormalizedCorrelation], want: list[NormalizedCorrelation], atol: float = 1e-6) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.rho, w.rho, rtol=0, atol=atol)
        assert torch.equal(g.dead_student, w.dead_student)
        assert torch.equal(g.dead_teacher, w.dead_teacher)
        assert g.count == w.count


class Counted(ConvReLU):
    """Counts the images whose activations PyTorch has shown."""

    seen = 0

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.seen += len(x)
        return super().features(x)


@pytest.mark.parametrize("images", [IMAGES, (IMAGES * 255).to(torch.uint8)], ids=["float32", "uint8"])
def test_engines_agree(images):
    student, teacher = networks()
    eager = correlate(student, teacher, images, engine="eager")
    for engine in ("auto", "chain"):
        assert_same(correlate(student, teacher, images, engine=engine), eager)


def test_auto_is_native_code_on_the_cpu():
    """PyTorch sees two images, to find out that the chain's activations are the network's; in eager mode all of them."""
    student, teacher = Counted(widths=(5, 4), image=(3, 12, 12), seed=1), networks()[1]
    for engine, seen in (("auto", 2), ("chain", 2), ("eager", 7)):
        student.seen = 0
        correlate(student, teacher, IMAGES, engine=engine)
        assert student.seen == seen


def test_native_pieces_are_joined(monkeypatch):
    student, teacher = networks()
    whole = correlate(student, teacher, IMAGES, engine="chain")
    monkeypatch.setattr("tsrfast.specialization.correlation.PIECE", 2)
    assert_same(correlate(student, teacher, IMAGES, engine="chain"), whole)


def test_chains_show_all_their_records():
    """A chain's activations are those of every record, ReLU or not: here convolutions, and the logits."""
    chains = [tsrfast.compile(net) for net in networks()]
    layers = correlate(*chains, IMAGES, engine="chain")
    assert [tuple(nc.rho.shape) for nc in layers] == [(5, 3), (4, 6), (10, 10)]
    assert_same(layers, correlate(*chains, IMAGES, engine="eager"))


def test_linear_networks():
    class Flat(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(432, width), nn.Linear(width, 3)

        def activations(self, x: Tensor) -> list[Tensor]:
            return [self.hidden(x.flatten(1)).relu()]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x.flatten(1)).relu())

    torch.manual_seed(0)
    nets = Flat(6), Flat(5)
    assert_same(correlate(*nets, IMAGES, engine="chain"), correlate(*nets, IMAGES, engine="eager"))


class Shows(ConvReLU):
    """Says something else of its activations than the chain of the same forward pass can know."""

    change = staticmethod(lambda layers: layers)

    def activations(self, x: Tensor) -> list[Tensor]:
        return self.change(super().activations(x))


@pytest.mark.parametrize(
    "change",
    [lambda a: a[:1], lambda a: [a[0], 2 * a[1]], lambda a: [m[:, :2] for m in a], lambda a: [*a, a[-1]]],
    ids=["fewer", "other values", "fewer channels", "more"],
)
def test_activations_that_are_no_records_go_through_pytorch(change):
    student, teacher = (Shows(widths=(5, 4), image=(3, 12, 12), seed=seed) for seed in (1, 2))
    for net in (student, teacher):
        net.change = change
    got = correlate(student, teacher, IMAGES)
    with torch.no_grad():
        shown = zip(student.eval().activations(IMAGES), teacher.eval().activations(IMAGES), strict=True)
        assert_same(got, [stream(s, t) for s, t in shown])
    with pytest.raises(InputError, match="got 'chain': the activations of student are not those of its 2 ReLUs"):
        correlate(student, teacher, IMAGES, engine="chain")


def test_what_native_code_cannot_do_is_said():
    student, teacher = networks()
    short = ConvReLU(widths=(3,), image=(3, 12, 12))

    class Plain:
        activations = student.activations

    class Branches(ConvReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    for pair, images, reason in [
        ((Plain(), teacher), IMAGES, "student is no nn.Module"),
        ((student, Branches(widths=(3, 6), image=(3, 12, 12))), IMAGES, "teacher does not compile: "),
        ((student, teacher), IMAGES.double(), "images are float64 on cpu"),
        ((student, short), IMAGES, "the networks must have as many layers"),
        ((tsrfast.compile(short), short), IMAGES[:, :, 1:], r"student was compiled for images \[3, 12, 12\]"),
    ]:
        with pytest.raises(InputError, match=f"engine must be 'auto' or 'eager' for this call, got 'chain': {reason}"):
            correlate(*pair, images, engine="chain")
    with pytest.raises(InputError, match=r"unknown engine 'chains'; did you mean 'chain'\?"):
        correlate(student, teacher, IMAGES, engine="chains")
    with pytest.raises(InputError, match="unknown precision 'double'"):
        correlate(student, teacher, IMAGES, precision="double")
    with pytest.raises(InputError, match="precision must be 'auto' or 'float32' on cpu, got 'float16'"):
        correlate(student, teacher, IMAGES, precision="float16")
    with pytest.raises(
        InputError, match="precision must be 'auto' where native code does not run, got 'float32': engine='eager'"
    ):
        correlate(student, teacher, IMAGES, engine="eager", precision="float32")


def test_native_activations_that_are_not_finite():
    student, teacher = networks()
    images = IMAGES.clone()
    images[5, 1, 3, 3] = torch.nan  # not among those that network and chain are compared on
    for engine in ("chain", "eager"):
        with pytest.raises(InputError, match="student must have finite activations"):
            correlate(student, teacher, images, engine=engine)


@pytest.mark.parametrize("precision", ["auto", "float32", "split", "float16"])
def test_native_code_emulated(precision, monkeypatch):
    if _emu is None:
        pytest.skip("tsrfast._emu is not built")
    want = correlate(*networks(), IMAGES, engine="eager")
    monkeypatch.setattr(_native, "emulator", _emu)
    got = correlate(*networks(), IMAGES, engine="chain", precision=precision)
    assert_same(got, want, atol=2e-3 if precision == "float16" else 1e-5)  # float16 rounds to 11 bits


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["auto", "float32", "split", "float16"])
def test_native_code_on_cuda(precision):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    student, teacher = networks()
    want = correlate(student, teacher, IMAGES)
    student, teacher = student.cuda(), teacher.cuda()
    got = correlate(student, teacher, IMAGES, engine="chain", precision=precision)
    assert_same(got, want, atol=2e-3 if precision == "float16" else 1e-5)  # float16 rounds to 11 bits
    assert_same(correlate(student, teacher, IMAGES), want, atol=2e-3)  # eager; PyTorch's convolutions may be TF32
    assert accumulate(student, teacher, IMAGES, engine="chain")[0].to("cpu").compute().count == want[0].count
