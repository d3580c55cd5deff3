"""The recursive gradient rule against Jacobians in float64, against its theory, and as something that streams."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tsrfast
from tsrfast import UnsupportedModel
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.reference import gradient_rule as plain
from tsrfast.specialization import GradientMatrices, GradientRule, gradient_rows, hidden_layers

FIELDS = ("a", "b_student", "b_teacher", "units_student", "units_teacher")


def eighths(*shape: int, generator: torch.Generator) -> Tensor:
    """Multiples of 1/8: sums of some products of them are exact in float32, so that every gate is that of float64."""
    return torch.randint(-8, 9, shape, generator=generator) / 8


def dense(*sizes: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        modules += [nn.Linear(n, m, bias=bias), nn.ReLU()]
    return settle(nn.Sequential(*modules[:-1]), g)


def conv(*channels: int, side: int = 8, classes: int = 3, kernel: int = 3, padding: int = 0, seed: int = 0) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for n, m in itertools.pairwise(channels):
        modules += [nn.Conv2d(n, m, kernel, padding=padding), nn.ReLU()]
        side += 2 * padding - kernel + 1
    return settle(nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels[-1] * side**2, classes)), g)


def settle(net: nn.Sequential, g: torch.Generator) -> nn.Sequential:
    for p in net.parameters():
        p.data = eighths(*p.shape, generator=g)
    return net


def images(n: int, *image: int, seed: int = 9) -> Tensor:
    return eighths(n, *image, generator=torch.Generator().manual_seed(seed))


def double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double().eval()


def relus(net: nn.Sequential) -> list[int]:
    return [i for i, m in enumerate(net) if isinstance(m, nn.ReLU)]


def exact(student: nn.Sequential, teacher: nn.Sequential, x: Tensor) -> list[dict[str, Tensor]]:
    layers = []
    for i, j in zip(relus(student), relus(teacher), strict=True):
        s, t = plain.gradient_rows(double(student), x.double(), i), plain.gradient_rows(double(teacher), x.double(), j)
        grams = plain.gram(s, t), plain.gram(s, s), plain.gram(t, t)
        layers.append(dict(zip(FIELDS, (*grams, plain.unit_squares(s), plain.unit_squares(t)), strict=True)))
    return layers


def stream(student: object, teacher: object, *batches: Tensor, batch_size: int = 32) -> list[GradientMatrices]:
    acc = GradientRule(student, teacher, batch_size)
    for batch in batches:
        acc.update(batch)
    return acc.compute()


def agree(got: list[GradientMatrices], want: list[dict[str, Tensor]], tolerance: float = 1e-6) -> None:
    """To `tolerance` of the nodes' norms (matrices), or of the largest unit's square."""
    assert len(got) == len(want)
    for layer, reference in zip(got, want, strict=True):
        s, t = (reference[f"b_{side}"].diagonal().sqrt() for side in ("student", "teacher"))
        scales = (
            s[:, None] * t,
            s[:, None] * s,
            t[:, None] * t,
            reference["units_student"].max(),
            reference["units_teacher"].max(),
        )
        for field, scale in zip(FIELDS, scales, strict=True):
            value, expected = getattr(layer, field), reference[field]
            assert value.dtype == torch.float64
            assert value.shape == expected.shape
            assert ((value - expected).abs() <= tolerance * scale).all(), field


def same(a: list[GradientMatrices], b: list[GradientMatrices], rtol: float = 1e-6) -> None:
    agree(a, [{field: getattr(layer, field) for field in FIELDS} for layer in b], rtol)
    assert [layer.count for layer in a] == [layer.count for layer in b]


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    classes=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_dense_nets_are_as_their_jacobians(widths, classes, cuts, batch_size, seed):
    sizes = list(zip(*widths, strict=True))
    student, teacher = (dense(5, *sizes[i], classes, seed=seed + 100 * i) for i in (0, 1))
    x = images(sum(cuts), 5)
    got = stream(student, teacher, *x.split(cuts), batch_size=batch_size)
    agree(got, exact(student, teacher, x))
    for layer in got:
        assert layer.count == len(x)
        torch.testing.assert_close(layer.beta_student, layer.units_student, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=2),
    side=st.integers(6, 9),
    kernel=st.integers(2, 3),
    padding=st.integers(0, 1),
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    seed=st.integers(0, 99),
)
def test_conv_nets_are_as_their_jacobians(widths, side, kernel, padding, cuts, seed):
    shape = {"side": side, "kernel": kernel, "padding": padding}
    sizes = list(zip(*widths, strict=True))
    student, teacher = (conv(2, *sizes[i], **shape, seed=seed + 100 * i) for i in (0, 1))
    x = images(sum(cuts), 2, side, side)
    chains = (tsrfast.compile(net, x, winograd=False) for net in (student, teacher))
    got = stream(*chains, *x.split(cuts), batch_size=3)
    agree(got, exact(student, teacher, x))
    for layer in got:
        torch.testing.assert_close(layer.beta_student, layer.units_student.sum((1, 2)), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.b_teacher, layer.b_teacher.mT)
        assert torch.linalg.eigvalsh(layer.b_student).min() >= -1e-6 * layer.beta_student.max()


def test_modules_whose_normalisation_is_folded():
    """Winograd, batch normalisation after the ReLU, pixels normalised: layers are the ReLUs, as where correlations are taken."""
    size = {"image": (3, 12, 12), "classes": 4}
    student = ConvReLU((6, 5), batch_norm=True, seed=1, **size).train()
    teacher = ConvReLU((4, 7), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), seed=2, **size)
    for norm in (m for m in student.modules() if isinstance(m, nn.BatchNorm2d)):
        for t in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            t.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    x = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    got = stream(student, teacher, x[:2], x[2:])
    assert student.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    rows = []
    for net in (double(student), double(teacher)):
        logits, hidden = net.features(x.double())
        grads = [torch.autograd.grad(logits[:, c].sum(), hidden, retain_graph=True) for c in range(4)]
        rows.append([torch.stack(each, 1) for each in zip(*grads, strict=True)])
    for layer, s, t in zip(got, *rows, strict=True):
        assert layer.units_student.shape == s.shape[2:]
        torch.testing.assert_close(layer.a, plain.gram(s, t), rtol=0, atol=1e-5 * float(plain.gram(s, s).max()))
        torch.testing.assert_close(layer.units_teacher, plain.unit_squares(t), rtol=1e-3, atol=1e-9)


def test_rows_are_the_chains_own():
    for net, image in ((conv(3, 4, 5, seed=1), (3, 8, 8)), (dense(6, 5, 4, 3), (6,))):
        chain, x = tsrfast.compile(net, image), images(3, *image)
        found = dict(gradient_rows(chain, x))
        assert list(found) == hidden_layers(chain)[::-1] == [1, 0]
        for layer, v in found.items():
            torch.testing.assert_close(v, chain.gradient_rows(x, layer))


def test_pooling_between_layers_and_a_leaky_relu():
    net = settle(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.25), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2),
        ),
        torch.Generator().manual_seed(4),
    )  # fmt: skip
    x = images(3, 2, 8, 8)
    chain = tsrfast.compile(net, x, winograd=False)
    for (_, v), module in zip(gradient_rows(chain, x), (8, 4, 1), strict=True):
        torch.testing.assert_close(v.double(), plain.gradient_rows(double(net), x.double(), module), rtol=1e-5, atol=1e-5)


def descent(student: nn.Sequential, teacher: nn.Sequential, x: Tensor) -> list[Tensor]:
    """-dJ/dz_l of J = 1/2 |f* - f|^2 at every layer, by autograd in float64."""
    out, kept = x.double(), []
    for module in double(student):
        out = module(out)
        if not isinstance(module, nn.ReLU | nn.Flatten):
            out.retain_grad()
            kept.append(out)
    (0.5 * (double(teacher)(x.double()).detach() - out).square().sum()).backward()
    return [-z.grad for z in kept[:-1]]


@pytest.mark.parametrize("make", ["conv", "dense"])
def test_rows_times_the_error_are_the_gradient(make):
    """D_l sum_c V_l[c] (f* - f)_c, with biases."""
    if make == "conv":
        student, teacher, x = conv(2, 4, 5, seed=1), conv(2, 3, 6, seed=2), images(4, 2, 8, 8)
    else:
        student, teacher, x = dense(6, 7, 5, 3, seed=1), dense(6, 4, 8, 3, seed=2), images(4, 6)
    chain = tsrfast.compile(student, x, winograd=False)
    error = (teacher(x) - student(x)).detach()
    want = descent(student, teacher, x)
    for (layer, v), g in zip(gradient_rows(chain, x), want[::-1], strict=True):
        got = torch.einsum("nc...,nc->n...", v, error) * chain.gates(x)[layer]
        torch.testing.assert_close(got.double(), g, rtol=1e-5, atol=1e-5)


def constants(net: nn.Sequential, rows: dict[int, Tensor], gates: list[Tensor]) -> list[Tensor]:
    """c_l of f = V_l f_l + c_l from the top, where it is the bias: c_{l-1} = c_l + V_l D_l b_l."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    c = [linear[-1].bias.detach().expand(len(gates[0]), -1)]
    for layer in range(len(gates) - 1, 0, -1):
        c.append(c[-1] + torch.einsum("ncu,nu->nc", rows[layer], gates[layer] * linear[layer].bias.detach()))
    return c[::-1]


@pytest.mark.parametrize("bias", [False, True])
def test_lemma_1(bias):
    """g_l = D_l [A_l f*_l - B_l f_l + V_l^T (c*_l - c_l)] for each image; c = 0 without biases."""
    student, teacher = dense(6, 9, 8, 7, 3, seed=1, bias=bias), dense(6, 8, 5, 6, 3, seed=2, bias=bias)
    x = images(20, 6)
    chains = [tsrfast.compile(net) for net in (student, teacher)]
    (s, t), (fs, ft) = ([dict(gradient_rows(c, x)) for c in chains], [c.activations(x, [0, 1, 2]) for c in chains])
    parts = [
        constants(net, rows, chain.gates(x)) if bias else [torch.zeros(20, 3)] * 3
        for net, rows, chain in zip((student, teacher), (s, t), chains, strict=True)
    ]
    for layer, g in enumerate(descent(student, teacher, x)):
        a, b = s[layer].mT @ t[layer], s[layer].mT @ s[layer]
        difference = torch.einsum("nkj,nj->nk", a, ft[layer]) - torch.einsum("nkj,nj->nk", b, fs[layer])
        shift = torch.einsum("nck,nc->nk", s[layer], parts[1][layer] - parts[0][layer])
        rule = chains[0].gates(x)[layer] * (difference + shift)
        torch.testing.assert_close(rule.double(), g, rtol=1e-5, atol=1e-5 * float(g.abs().max()))
    sums = stream(student, teacher, x)  # the means are of these matrices
    torch.testing.assert_close(
        sums[0].a, (s[0].mT @ t[0]).double().mean(0), rtol=1e-5, atol=1e-6 * float(sums[0].a.abs().max())
    )


def test_two_layers_have_constant_matrices():
    """V_1 = W_2 at every x: beta_kk = |v_k|^2, A_kj = v_k . v*_j."""
    student, teacher = dense(5, 7, 3, seed=1), dense(5, 4, 3, seed=2)
    (layer,) = stream(student, teacher, images(50, 5), batch_size=7)
    ws, wt = student[-1].weight.detach().double(), teacher[-1].weight.detach().double()
    for got, want in ((layer.a, ws.mT @ wt), (layer.b_teacher, wt.mT @ wt), (layer.beta_student, ws.square().sum(0))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_three_linear_layers_have_a_closed_form():
    """Without gates V_2 = W_3, V_1 = W_3 W_2, at every x; and the mean weight gradient follows from E x x^T."""
    nets, g = [], torch.Generator().manual_seed(8)
    for n, m in ((6, 5), (4, 7)):
        layers = nn.Linear(5, n, False), nn.LeakyReLU(1.0), nn.Linear(n, m, False), nn.LeakyReLU(1.0), nn.Linear(m, 3, False)
        nets.append(settle(nn.Sequential(*layers), g))
    x = images(40, 5)
    first, second = stream(*nets, x)
    (s1, s2, s3), (t1, t2, t3) = ([m.weight.detach().double() for m in net[::2]] for net in nets)
    torch.testing.assert_close(second.a, s3.mT @ t3, rtol=0, atol=1e-6 * float(s3.square().sum()))
    torch.testing.assert_close(first.a, (s3 @ s2).mT @ t3 @ t2, rtol=0, atol=1e-6 * float((s3 @ s2).square().sum()))
    torch.testing.assert_close(first.units_student, (s3 @ s2).square().sum(0))
    student = double(nets[0])
    (0.5 * (double(nets[1])(x.double()) - student(x.double())).square().sum() / len(x)).backward()
    covariance = (x.mT @ x / len(x)).double()
    rule = (first.a @ t1 - first.b_student @ s1) @ covariance
    torch.testing.assert_close(rule, -student[0].weight.grad, rtol=1e-5, atol=1e-5 * float(rule.abs().max()))


def test_the_population_gradient_of_one_node():
    """Tian 2017: E -grad = -1/2 (w - w*) - 1/(2 pi) (theta w* - |w*| / |w| sin theta w) for x of N(0, I)."""
    d, n = 4, 200_000
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=g)
    nets = [nn.Sequential(nn.Linear(d, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)) for _ in range(2)]
    for net in nets:
        net[0].weight.data = torch.randn(1, d, generator=g)
        net[2].weight.data.fill_(1)
    (layer,) = stream(*nets, x, batch_size=n)
    assert (layer.a.item(), layer.b_student.item()) == (1, 1)
    student, teacher = (tsrfast.compile(net) for net in nets)
    (fs,), (ft,), (open_,) = student.activations(x, [0]), teacher.activations(x, [0]), student.gates(x)
    rule = (open_ * (layer.a @ ft.mT.double() - layer.b_student @ fs.mT.double()).mT).mT @ x.double() / n
    w, v = (net[0].weight.detach()[0].double() for net in nets)
    theta = torch.acos(w @ v / w.norm() / v.norm())
    closed = (v - w) / 2 - (theta * v - v.norm() / w.norm() * theta.sin() * w) / (2 * math.pi)
    assert (rule[0] - closed).norm() <= 0.02 * closed.norm()  # of sampling, some 1 / sqrt(n)


def test_a_network_with_itself():
    net = conv(2, 4, 5, seed=1)
    for layer in stream(net, net, images(5, 2, 8, 8)):
        torch.testing.assert_close(layer.a, layer.b_student)
        assert torch.equal(layer.b_student, layer.b_teacher)


def test_large_means_do_no_harm():
    """All weights of one sign and all gates open: rows whose mean is large against their spread."""
    student, teacher = conv(2, 4, 5, seed=1), conv(2, 3, 6, seed=2)
    for p in [*student.parameters(), *teacher.parameters()]:
        p.data = 1 + p.data / 16
    x = images(4, 2, 8, 8).abs()
    chains = (tsrfast.compile(net, x, winograd=False) for net in (student, teacher))
    agree(stream(*chains, x), exact(student, teacher, x))


STUDENT, TEACHER, IMAGES = conv(2, 4, 5, seed=1), conv(2, 3, 6, seed=2), images(9, 2, 8, 8)


def test_any_batches_and_threads_give_the_same():
    whole = stream(STUDENT, TEACHER, IMAGES)
    same(stream(STUDENT, TEACHER, *IMAGES.split([2, 0, 7]), batch_size=1), whole)
    same(stream(tsrfast.compile(STUDENT, IMAGES), TEACHER, IMAGES.to(memory_format=torch.channels_last)), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = stream(STUDENT, TEACHER, IMAGES)
    finally:
        torch.set_num_threads(threads)
    same(again, whole)


def test_bytes_are_pixels():
    pixels = torch.randint(0, 256, (4, 2, 8, 8), dtype=torch.uint8)
    same(stream(STUDENT, TEACHER, pixels), stream(STUDENT, TEACHER, pixels / 255), 0)


def test_gradients_are_ignored():
    (first, _) = stream(STUDENT, TEACHER, IMAGES.clone().requires_grad_())
    assert not first.a.requires_grad
    assert not first.units_student.requires_grad


def test_states_merge_and_reset():
    parts = [GradientRule(STUDENT, TEACHER) for _ in range(3)]
    for part, batch in zip(parts, IMAGES.split([2, 1, 6]), strict=True):
        part.update(batch)
    whole, merged = stream(STUDENT, TEACHER, IMAGES), GradientRule(STUDENT, TEACHER)
    for part in (GradientRule(STUDENT, TEACHER), *parts[::-1]):
        merged.merge_state(part)
    same(merged.compute(), whole)
    assert parts[0].compute()[0].count == 2  # untouched
    merged.reset()
    with pytest.raises(InputError, match="at least one image, got none"):
        merged.compute()
    merged.update(IMAGES)
    same(merged.compute(), whole, 0)


def test_a_state_is_saved_and_goes_on(tmp_path):
    acc = GradientRule(STUDENT, TEACHER)
    acc.update(IMAGES[:4])
    torch.save(acc.state_dict(), tmp_path / "state.pt")
    again = GradientRule(STUDENT, TEACHER)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    same(again.compute(), acc.compute(), 0)
    for each in (acc, again):
        each.update(IMAGES[4:])
    same(again.compute(), acc.compute(), 0)
    again.load_state_dict(GradientRule(STUDENT, TEACHER).state_dict())
    with pytest.raises(InputError, match="got none"):
        again.compute()
    for broken in ({}, {"count": torch.tensor(1), "0.a": torch.ones(2, 2)}):
        with pytest.raises(InputError, match="state must be of state_dict"):
            again.load_state_dict(broken)


def test_an_empty_batch_changes_nothing():
    acc = GradientRule(STUDENT, TEACHER)
    acc.update(IMAGES[:0])
    with pytest.raises(InputError, match="at least one image, got none"):
        acc.compute()
    acc.update(IMAGES)
    acc.update(IMAGES[:0])
    same(acc.compute(), stream(STUDENT, TEACHER, IMAGES), 0)


def test_a_module_counts_as_it_is_and_a_chain_as_it_was():
    net = conv(2, 4, 5, seed=1)
    snapshot = tsrfast.compile(net, IMAGES)
    before = stream(net, TEACHER, IMAGES)
    with torch.no_grad():
        net[-1].weight.mul_(2)
    same(stream(snapshot, TEACHER, IMAGES), before, 0)
    doubled = stream(net, TEACHER, IMAGES)
    torch.testing.assert_close(doubled[0].b_student, 4 * before[0].b_student)
    torch.testing.assert_close(doubled[0].a, 2 * before[0].a)


def test_wrong_images():
    acc = GradientRule(STUDENT, TEACHER)
    acc.update(IMAGES)
    before = acc.compute()
    for value in (torch.nan, torch.inf):
        broken = IMAGES.clone()
        broken[8, 1, 2, 3] = value
        with pytest.raises(InputError, match="images must be finite, got NaN or inf"):
            acc.update(broken)
    for wrong in (IMAGES[0], "images", torch.zeros(3)):
        with pytest.raises(InputError, match=r"images must be \[N, C, H, W\] or \[N, D\], got"):
            acc.update(wrong)
    for wrong in (IMAGES.double(), IMAGES.half()):
        with pytest.raises(InputError, match="x must be float32"):
            acc.update(wrong)
    with pytest.raises(InputError):
        acc.update(images(2, 2, 9, 9))
    with pytest.raises(InputError):
        GradientRule(tsrfast.compile(STUDENT, IMAGES), TEACHER).update(images(2, 2, 9, 9))
    same(acc.compute(), before, 0)


def test_weights_that_are_not_finite():
    broken = conv(2, 4, 5, seed=1)
    broken[-1].weight.data[0, 3] = torch.nan
    with pytest.raises(InputError, match=r"student must have finite gradients \(hidden layer 0\)"):
        stream(broken, TEACHER, IMAGES)
    with pytest.raises(InputError, match="teacher must have finite gradients"):
        stream(STUDENT, broken, IMAGES)


def test_networks_that_do_not_fit():
    def fails(student: nn.Module, teacher: nn.Module, words: str, x: Tensor = IMAGES) -> None:
        with pytest.raises(InputError, match=words):
            GradientRule(student, teacher).update(x)

    fails(
        STUDENT,
        conv(2, 3, seed=2),
        r"as many hidden layers as student, of its heights and widths \[\[6, 6\], \[4, 4\]\], got \[\[6, 6\]\]",
    )
    fails(STUDENT, conv(2, 3, 6, kernel=2, seed=2), r"got \[\[7, 7\], \[6, 6\]\]")
    fails(STUDENT, conv(2, 3, 6, classes=4), "teacher must have student's 3 classes, got 4")
    flat = dense(5, 3)
    fails(flat, flat, "student must have a hidden layer", images(2, 5))
    with pytest.raises(UnsupportedModel, match="GELU"):
        GradientRule(nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2)), flat).update(images(2, 5))
    with pytest.raises(UnsupportedModel):
        GradientRule(copy.deepcopy(STUDENT).to("meta"), TEACHER).update(IMAGES)
    with pytest.raises(InputError, match="batch_size must be an integer, at least 1, got 0"):
        GradientRule(STUDENT, TEACHER, batch_size=0)
    acc, other = GradientRule(STUDENT, TEACHER), GradientRule(TEACHER, STUDENT)
    acc.update(IMAGES)
    other.update(IMAGES)
    with pytest.raises(InputError, match=r"the layers of the updates before .*\(4, 3\).*got .*\(3, 4\)"):
        acc.merge_state(other)
    assert acc.compute()[0].count == 9
    with pytest.raises(InputError, match="float16"):
        GradientRule(STUDENT, TEACHER, precision="float16").update(IMAGES)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_as_on_the_cpu():
    x = IMAGES.cuda()
    same(stream(copy.deepcopy(STUDENT).cuda(), copy.deepcopy(TEACHER).cuda(), x), stream(STUDENT, TEACHER, IMAGES), 1e-5)
