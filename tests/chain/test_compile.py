"""From modules to plans: random networks against their own float64 forward and autograd, folds, refusals."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast import UnsupportedModel, reference
from tsrfast.chain.folding import Record, winograd_pays
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.ops import chain as ops
from tsrfast.reference import chain as plain


class Normalize(nn.Module):
    def __init__(self, channels, order="(x-a)/b"):
        super().__init__()
        self.register_buffer("a", torch.rand(channels, 1, 1))
        self.register_buffer("b", torch.rand(1, channels, 1, 1) + 0.5)
        self.order = order

    def forward(self, x):
        return {
            "(x-a)/b": lambda: (x - self.a) / self.b,
            "x*b+a": lambda: torch.add(x * self.b, self.a),
            "2-x": lambda: 2 - x,
            "(a-x)*.5": lambda: 0.5 * (self.a - x),
        }[self.order]()


def redraw(model, seed):
    """Parameters and statistics of ordinary size, with their own generator."""
    r = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.weight.copy_(torch.randn(m.weight.shape, generator=r) / m.weight[0].numel() ** 0.5)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=r))
            elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=r))
                m.running_var.copy_(torch.rand(m.num_features, generator=r) + 0.3)
                if m.affine:
                    m.weight.copy_(torch.randn(m.num_features, generator=r))
                    m.bias.copy_(torch.randn(m.num_features, generator=r))
    return model


@st.composite
def networks(draw):
    """(Sequential, image)"""

    def pick(*values):
        return draw(st.sampled_from(values))

    c, h, w = pick(1, 3, 5), draw(st.integers(4, 13)), draw(st.integers(4, 13))
    image, layers = (c, h, w), []

    def rest(norm):
        order = pick(("act",), ("norm", "act"), ("act", "norm"), ("norm",), ("act", "act"), ("norm", "norm", "act"))
        for kind in order:
            if kind == "norm":
                layers.append(norm(affine=pick(True, False), eps=pick(1e-5, 0.1)))
            else:
                layers.append(pick(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.Identity()))

    if pick(True, False):
        layers.append(Normalize(c, pick("(x-a)/b", "x*b+a", "2-x", "(a-x)*.5")))
    for _ in range(draw(st.integers(0, 4))):
        kind = pick("conv", "conv", "conv", "avg", "max", "adaptive", "dropout")
        if kind == "conv":
            kernel = tuple(pick(*[k for k in (1, 2, 3, 3, 5, 7) if k <= n]) for n in (h, w))
            stride = pick(1, 1, 2)
            pad = pick(0, tuple(min(1, k - 1) for k in kernel), tuple(k - 1 for k in kernel), "same")
            if pad == "same" and (stride != 1 or not all(k % 2 for k in kernel)):
                pad = "valid"
            layers.append(nn.Conv2d(c, pick(1, 4, 7, 9), kernel, stride, pad, bias=pick(True, False)))
            c = layers[-1].out_channels
            rest(lambda **kw: nn.BatchNorm2d(c, **kw))  # noqa: B023
        elif kind in ("avg", "max"):
            k = (min(2, h), min(3, w))
            s, p = pick(None, 1, 2), pick(0, 1) if min(k) > 1 else 0
            layers.append(
                nn.AvgPool2d(k, s, p, count_include_pad=pick(True, False)) if kind == "avg" else nn.MaxPool2d(k, s, p)
            )
        elif kind == "adaptive":
            layers.append(nn.AdaptiveAvgPool2d(pick((h, w), 1, (None, 1))))
        else:
            layers.append(nn.Dropout2d())
        with torch.no_grad():
            c, h, w = nn.Sequential(*copy.deepcopy(layers)).eval()(torch.zeros(1, *image)).shape[1:]
    d = c * h * w
    layers.append(nn.Flatten())
    if pick(True, False, False):
        layers.append(nn.BatchNorm1d(d))
    for _ in range(draw(st.integers(0, 1))):
        layers.append(nn.Linear(d, 11))
        d = 11
        rest(lambda **kw: nn.BatchNorm1d(11, **kw))
    layers.append(nn.Linear(d, pick(1, 4, 10), bias=pick(True, False)))
    return redraw(nn.Sequential(*layers), draw(st.integers(0, 2**31))), image


def exact(model, x, cotangent):
    """Logits and gradient of the module itself, in float64 and eval mode."""
    model, x = copy.deepcopy(model).double().eval(), x.double().requires_grad_()
    for m in model.modules():  # two of them in a row have no gradient in autograd
        if isinstance(m, nn.ReLU):
            m.inplace = False
    logits = model(x)
    return logits.detach(), torch.autograd.grad((logits * cotangent.double()).sum(), x)[0]


def near(got, want, tolerance):
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= tolerance * (1 + float(want.abs().max()))


def as_input(chain, x):
    row = dict(zip(ops.FIELDS, chain.plan[0].tolist(), strict=True))
    return (
        x.flatten(1)
        if row["kind"] == ops.KINDS["linear"]
        else x.reshape(len(x), *(row[k] for k in ("channels", "height", "width")))
    )


def relative(got, want, tolerance):
    """Of the batch's largest value: one image's logit alone may be small by cancellation."""
    error, size = float((got.double() - want).abs().max()), float(want.abs().max())
    assert error <= tolerance * size + 1e-12, error / size


@settings(max_examples=200, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 2**31))
def test_plan_is_the_network(network, seed):
    """The plan in float64, and the engine in float32: logits and gradient to 1e-5 of the largest."""
    model, image = network
    chain = tsrfast.compile(model, image)
    x = torch.rand(3, *image, generator=torch.Generator().manual_seed(seed))
    cotangent = torch.randn(3, chain.classes, generator=torch.Generator().manual_seed(seed))
    logits, gradient = exact(model, x, cotangent)
    # In float64 all that is left is one rounding of each parameter.
    x64 = as_input(chain, x.double())
    near(plain.chain_forward(x64, chain.plan, chain.weights, [len(chain.plan) - 1])[0].flatten(1), logits, 3e-6)
    carried = plain.chain_gradient(x64, chain.plan, chain.weights, cotangent.double()[:, None])
    near(carried.reshape(x.shape), gradient, 3e-6)
    relative(chain(x), logits, 1e-5)
    relative(chain.input_gradient(x, cotangent), gradient, 1e-5)


class Functional(nn.Module):
    """Everything as functions and methods, in a forward of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, (3, 2), stride=2, bias=False)
        self.bn, self.last = nn.BatchNorm2d(6), nn.Linear(5, 4)
        self.scale = 2.0
        self.offset = torch.tensor([0.1, 0.3]).reshape(2, 1, 1)  # neither parameter nor buffer

    def forward(self, x):
        if x.shape[2] != 9 or x.device.type != "cpu":
            raise ValueError(f"want 9 rows, got {tuple(x.shape)}")
        x = torch.sub(x, self.offset).contiguous() * self.scale
        h = F.max_pool2d(F.leaky_relu(self.bn(self.first(x)), 0.3), 2, stride=1)
        h = F.avg_pool2d(torch.relu(self.second(h)), 2, 1, padding=1, count_include_pad=False).relu_()
        h = F.dropout(h, training=self.training).mean(dim=(-1, -2))
        return F.linear(h.view(h.size(0), -1), self.last.weight * 0.5, self.last.bias)


def test_functions_and_methods():
    model, x = redraw(Functional(), 1), torch.rand(4, 2, 9, 8)
    chain = tsrfast.compile(model, x)
    cotangent = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    logits, gradient = exact(with_double_offset(model), x, cotangent)
    near(chain(x), logits, 1e-5)
    near(chain.input_gradient(x, cotangent), gradient, 1e-5)
    assert chain.names == (
        "sub+mul", "first+bn+leaky_relu", "max_pool", "second+relu", "avg_pool+relu", "avg_pool", "linear",
    )  # fmt: skip


def with_double_offset(model):
    model = copy.deepcopy(model)
    model.offset = model.offset.double()
    return model


def kinds(chain):
    named = {v: k for k, v in ops.KINDS.items()}
    return [named[k] for k in chain.plan[:, ops.FIELDS.index("kind")].tolist()]


def column(chain, name):
    return chain.plan[:, ops.FIELDS.index(name)].tolist()


def bn(channels):
    return redraw(nn.Sequential(nn.BatchNorm2d(channels)), channels)[0]


@pytest.mark.parametrize(
    ("layers", "records"),
    [
        ([bn(3), nn.Conv2d(3, 4, 3), nn.ReLU()], ["conv"]),
        ([bn(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()], ["affine", "conv"]),  # its zeros would be shifted
        ([nn.Conv2d(3, 4, 3, padding=1), bn(4), nn.ReLU()], ["conv"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), bn(4)], ["conv"]),  # into the linear layer
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), nn.AvgPool2d(2)], ["conv", "avg_pool"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), nn.AvgPool2d(2, padding=1)], ["conv", "affine", "avg_pool"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), nn.MaxPool2d(2)], ["conv", "affine", "max_pool"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), nn.ReLU()], ["conv", "affine"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), bn(4), nn.AvgPool2d(2), nn.ReLU()], ["conv", "affine", "avg_pool"]),
        ([nn.ReLU(), nn.MaxPool2d(2), nn.ReLU()], ["affine", "max_pool"]),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LeakyReLU(0.1)], ["conv", "affine"]),
    ],
)
def test_folds(layers, records):
    model = nn.Sequential(*layers, nn.Flatten())
    x = torch.rand(2, 3, 6, 6)
    model.append(nn.Linear(model.eval()(x).shape[1], 3))
    chain = tsrfast.compile(model, x)
    assert kinds(chain) == [*records, "linear"]
    near(
        plain.chain_forward(x.double(), chain.plan, chain.weights, [len(chain.plan) - 1])[0],
        exact(model, x, torch.ones(2, 3))[0],
        1e-6,
    )


def test_parameters_without_folds_are_kept_bit_by_bit():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[3].bias[1] = torch.nan
        model[0].weight[0, 0, 0] = torch.tensor([torch.inf, 1e-45, -0.0])
    chain = tsrfast.compile(model, (1, 4, 4))
    parts = [model[0].weight, torch.zeros(2), torch.tensor([0.3]), model[3].weight, model[3].bias]
    want = torch.cat([p.detach().flatten() for p in parts])
    assert torch.equal(chain.weights.view(torch.int32), want.view(torch.int32))


def test_reference_speaks_the_same_plan():
    assert plain.FIELDS == ops.FIELDS
    assert list(ops.KINDS.values()) == [plain.CONV, plain.LINEAR, plain.AFFINE, plain.AVG_POOL, plain.MAX_POOL]
    assert list(ops.ACTIVATIONS.values()) == [plain.NONE, plain.RELU, plain.LEAKY_RELU]
    assert reference.chain_forward is plain.chain_forward


def test_winograd_where_it_pays():
    def record(c, o, out, kernel=(3, 3), stride=(1, 1)):
        return Record("conv", [], (c, out + 2, out + 2), (o, out, out), kernel, stride)

    assert winograd_pays(record(50, 35, 28))
    assert not winograd_pays(record(50, 35, 28, kernel=(3, 1)))
    assert not winograd_pays(record(50, 35, 28, stride=(2, 2)))
    assert not winograd_pays(record(1, 1, 28))  # its transforms cost more than they save
    assert not winograd_pays(record(64, 64, 1))  # one output of a tile's sixteen
    model = ConvReLU((50, 35))
    assert column(tsrfast.compile(model), "winograd") == [1, 1, 0]
    assert column(tsrfast.compile(model, winograd=False), "winograd") == [0, 0, 0]


def test_image():
    net = ConvReLU((4, 3), image=(2, 9, 8))
    assert tsrfast.compile(net).image == (2, 9, 8)  # of the model
    assert tsrfast.compile(net, torch.rand(5, 2, 9, 8)).image == (2, 9, 8)
    mlp = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    assert tsrfast.compile(mlp).image == (7,)
    assert tsrfast.compile(nn.Sequential(nn.Flatten(), mlp), [7, 1, 1]).image == (7, 1, 1)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(InputError, match=r"image must be given .* got None"):
        tsrfast.compile(conv)
    for bad in ((3, 4), (3, 0, 4), (3.0, 4, 4), "abc", torch.rand(3), 7, (True, 4, 4)):
        with pytest.raises(InputError, match=r"tsrfast.compile: image must be \(C, H, W\)"):
            tsrfast.compile(conv, bad)
    with pytest.raises(InputError, match=r"model must be a torch\.nn\.Module, got function"):
        tsrfast.compile(F.relu)


class Of(nn.Module):
    """A module from a function; parameters and sub-modules are attributes."""

    def __init__(self, f, **attributes):
        super().__init__()
        self.f = f
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.f(self, x)


class Straight(torch.autograd.Function):
    """ReLU with another backward."""

    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, g):
        return g


def remembers(self, x):
    self.seen = h = F.relu(x)
    return h


def swallows(self, x):
    try:
        return torch.tanh(x)
    except Exception:
        return F.relu(x)


def unaware(x):
    with torch.no_grad():
        return F.relu(x)


def hooked(kind):
    m = nn.Conv2d(3, 4, 3)
    getattr(m, kind)(lambda *args: None)
    return m


CONV = nn.Conv2d(3, 3, 3, padding=1)
# a layer from [N, 3, 6, 6], and what is said about it
REFUSED = [
    (nn.Conv2d(3, 6, 3, groups=3), r"model.1.conv \(Conv2d\): groups must be 1, got 3"),
    (nn.Conv2d(3, 4, 2, dilation=2), r"model.1.conv \(Conv2d\): dilation must be 1"),
    (nn.Conv2d(3, 4, 9, padding=3), "kernel_size must be at most 7"),
    (nn.Conv2d(3, 4, 3, stride=5), "stride must be at most 4"),
    (nn.Conv2d(3, 4, 3, padding=3), "padding must be less than the kernel"),
    (nn.Conv2d(3, 4, 2, padding="same"), "needs odd kernels"),
    (nn.Conv2d(3, 4, 7), r"kernel 7 must fit into 6"),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), r"\(Conv2d\): pad is not supported"),
    (nn.Conv2d(4, 4, 3), "in_channels must be 3 as its input has, got 4"),
    (nn.Conv2d(3, 4, 3).double(), "the chain computes in float32; got float64"),
    (nn.Conv2d(3, 4, 3).half(), "float32; got float16"),
    (nn.Conv2d(3, 4, 3).bfloat16(), "float32; got bfloat16"),
    (nn.Conv2d(3, 4, 3, device="meta"), "on cpu; got torch.strided on meta"),
    (nn.LazyConv2d(4, 3), "parameters without a shape"),
    (hooked("register_forward_hook"), r"model.1.conv \(Conv2d\): has hooks"),
    (hooked("register_forward_pre_hook"), "has hooks"),
    (hooked("register_full_backward_hook"), "has hooks"),
    (nn.ConvTranspose2d(3, 4, 3), "conv_transpose2d is not supported"),
    (nn.LeakyReLU(-0.1), "negative_slope must be >= 0"),
    (nn.Sigmoid(), r"model.1.conv \(Sigmoid\): sigmoid is not supported"),
    (nn.GELU(), "gelu is not supported"),
    (nn.GroupNorm(1, 3), r"\(GroupNorm\)"),
    (nn.BatchNorm2d(3, track_running_stats=False), "running statistics"),
    (nn.MaxPool2d(2, dilation=2), "dilation must be 1"),
    (nn.MaxPool2d(2, return_indices=True), "return_indices must be False"),
    (nn.MaxPool2d(4, ceil_mode=True), "ceil_mode must change nothing"),
    (nn.AvgPool2d(2, divisor_override=3), "divisor_override must be None"),
    (nn.AdaptiveAvgPool2d(4), "output_size must divide"),
    (nn.AdaptiveMaxPool2d(1), "adaptive_max_pool2d"),
    (nn.Linear(6, 4), r"needs \[N, D\], got \[N, 3, 6, 6\]: flatten it before"),
    (nn.Unflatten(1, (3, 1)), "is not supported"),
    (Of(lambda self, x: x + self.conv(x), conv=CONV), "add uses a value that is used elsewhere too"),
    (Of(lambda self, x: [self.conv(x), F.relu(x)][0], conv=CONV), "used elsewhere too"),
    (Of(lambda self, x: torch.cat([x, x])), "cat is not supported"),
    (Of(lambda self, x: x * x), "used elsewhere"),
    (Of(lambda self, x: 1 / x), "rdiv"),
    (Of(lambda self, x: torch.ones(3, 1, 1) / x), "division by a value"),
    (Of(lambda self, x: x * torch.ones(3, 6, 6)), r"one a channel, got shape \(3, 6, 6\)"),
    (Of(lambda self, x: x * torch.ones(1, 1, 1, 1, 1)), "one a channel"),
    (Of(lambda self, x: x - torch.ones(3, 1, 1).double()), "float32; got float64"),
    (Of(lambda self, x: x * True), "needs a number or a tensor, got bool"),
    (Of(lambda self, x: x + torch.rand(1)), r"model \(Sequential\): its forward draws random numbers"),
    (Of(lambda self, x: x * random.random()), "its forward draws random numbers"),
    (Of(lambda self, x: x if type(x) is torch.Tensor else x * -1), "its logits of random images are not those"),
    (Of(lambda self, x: x * 2 if len(x) % 2 else x * 3), "is not the same network twice"),
    (Of(lambda self, x: x * 2 if len(x) == 1 else x * 3), "is not the same network twice"),
    (Of(lambda self, x: x / x.shape[0]), "is not the same network twice"),
    (Of(lambda self, x: F.relu(x) if len(x) > 100 else x * 2), "is not the same network twice"),
    (Of(lambda self, x: x.permute(0, 2, 3, 1)), "permute is not supported"),
    (Of(lambda self, x: x.reshape(-1, 6)), r"change of shape must be to \[N, D\]"),
    (Of(lambda self, x: x.to(torch.float64)), "float32 on cpu; got torch.float64"),
    (Of(lambda self, x: x.detach()), "detach is not supported"),
    (Of(lambda self, x: F.dropout(x)), "dropout is on in eval mode"),
    (Of(lambda self, x: F.relu(x) if x.mean() > 0 else x), "mean must be over"),
    (Of(lambda self, x: x.mean((2, 3), dtype=torch.float64)), "mean must be over"),
    (Of(lambda self, x: F.relu(x) if x[0, 0, 0, 0] > 0 else x), "getitem"),
    (Of(lambda self, x: Straight.apply(x)), "relu runs without gradient"),
    (Of(lambda self, x: unaware(x)), "relu runs without gradient"),
    (Of(lambda self, x: self.missing(x)), r"model \(Sequential\): AttributeError: .*missing"),
    (Of(lambda self, x: torch.ops.aten.relu(x)), "is not supported"),
    (Of(lambda self, x: x.numpy()), "numpy is not supported"),
    (Of(lambda self, x: torch.relu(torch.ones(len(x), 3, 6, 6))), "must return the logits"),
    (Of(swallows), "tanh is not supported"),
    (Of(remembers), r"model \(Sequential\): keeps intermediate values"),
]


@pytest.mark.parametrize(("layer", "why"), REFUSED, ids=[why[:40] for _, why in REFUSED])
def test_refusals(layer, why):
    model = nn.Sequential(nn.Identity(), nn.Sequential(), nn.Flatten(), nn.Identity())
    model[1].add_module("conv", layer)
    with pytest.raises(UnsupportedModel, match=why) as e:
        tsrfast.compile(model, (3, 6, 6))
    assert str(e.value).startswith("tsrfast.compile: model")


@pytest.mark.parametrize(
    ("model", "image", "why"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            (3, 6, 6),
            r"must return the logits \[N, classes\] .*, got of shape \[N, 4, 4, 4\]",
        ),
        (Of(lambda self, x: (x.flatten(1),)), (3, 6, 6), "got tuple"),
        (Of(lambda self, x: {"logits": x}), (3, 6, 6), "got dict"),
        (nn.Flatten(), (3, 6, 6), "computes nothing"),
        (nn.Conv2d(3, 4, 3), (6,), r"needs \[N, C, H, W\], got \[N, 6\]"),
        (nn.Linear(6, 3), (7,), "in_features must be 7"),
        (nn.BatchNorm1d(6), (7,), "running_mean must have 7 numbers"),
        (ConvReLU((4,)), (3, 9, 9), "InputError: tsrfast.ConvReLU: x must have shape"),
    ],
)
def test_refused_networks(model, image, why):
    with pytest.raises(UnsupportedModel, match=why):
        tsrfast.compile(model, image)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_refuses_what_other_compilers_made():
    net = nn.Linear(6, 3)

    def refused(model, why):
        with pytest.raises(UnsupportedModel, match=why) as e:
            tsrfast.compile(model, (6,))
        assert "\n" not in str(e.value)

    refused(torch.compile(net, backend="eager"), r"model \(OptimizedModule\): is compiled by torch.compile")
    refused(Of(torch.compile(lambda self, x: self.net(F.relu(x)), backend="eager"), net=net), "is not supported")
    refused(torch.jit.trace(nn.Linear(6, 3), torch.rand(2, 6)), "is not supported")
    refused(nn.Sequential(torch.jit.script(nn.ReLU()), net), r"model.0 \(RecursiveScriptModule\)")
    scripted = torch.jit.script(torch_relu)
    refused(Of(lambda self, x: self.net(scripted(x)), net=net), "must return the logits")
    net.compile(backend="eager")
    refused(net, "compiled by torch.compile")


def torch_relu(x):
    return torch.relu(x)


def test_refuses_autocast_and_global_hooks():
    model = nn.Linear(6, 3)
    with torch.autocast("cpu"), pytest.raises(UnsupportedModel, match="under autocast"):
        tsrfast.compile(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(UnsupportedModel, match="hooks for all modules"):
            tsrfast.compile(model)
    finally:
        handle.remove()


def test_computed_weights_are_what_they_are_now():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))
    chain = tsrfast.compile(model, (6,))
    x = torch.rand(2, 6)
    near(chain(x), exact(model, x, torch.ones(2, 3))[0], 1e-6)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(2)
    assert chain.stale()


def test_defaults_of_torch_do_not_matter():
    model, x = (
        redraw(nn.Sequential(Normalize(2), nn.BatchNorm2d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8, 3)), 0),
        (2, 2, 2),
    )
    want = tsrfast.compile(model, x)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            chain = tsrfast.compile(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(chain.plan, want.plan)
    assert torch.equal(chain.weights, want.weights)
    assert chain.weights.dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_network_is_left_alone(mode):
    model = redraw(Functional(), 3).train()
    model.bn.eval()
    x = torch.rand(2, 2, 9, 8)
    before, random = copy.deepcopy(model), torch.get_rng_state()
    attributes = {n: (m.training, dict(vars(m))) for n, m in model.named_modules()}
    with mode():
        chain = tsrfast.compile(model, x)
    chain.refresh()
    near(chain(x), exact(with_double_offset(model), x, torch.ones(2, 4))[0], 1e-5)
    assert torch.equal(random, torch.get_rng_state())
    assert {n: (m.training, dict(vars(m))) for n, m in model.named_modules()} == attributes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_first_compiled_in_inference_mode():
    """What is kept between traces serves later ones outside of that mode."""
    from tsrfast.chain import tracing

    tracing._nan.cache_clear()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))
    with torch.inference_mode():
        tsrfast.compile(model, image=(3, 4, 4))
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(tsrfast.compile(model, image=(3, 4, 4))(x), model(x).detach())
