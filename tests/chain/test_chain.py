"""A chain as an object: what it computes, how it follows its network, and that it lets go of it."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tsrfast
from tsrfast import UnsupportedModel
from tsrfast.chain import Differentiable, automatic, logits
from tsrfast.chain import chain as chain_module
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.reference import chain as plain

IMAGE = (3, 9, 10)


def net(seed=0, **kw):
    return ConvReLU((6, 5), image=IMAGE, classes=4, seed=seed, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2), **kw)


def images(n=3, seed=0):
    return torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(seed))


def double(model):
    return copy.deepcopy(model).double().eval()


def agrees(chain, model, image=IMAGE):
    x = torch.rand(3, *image, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(chain(x).double(), double(model)(x.double()), rtol=1e-4, atol=1e-5)


def test_activations_gates_and_rows():
    model, x = net(), images()
    chain = tsrfast.compile(model)
    assert chain.names == ("sub+div+convs.0+relu", "convs.1+relu", "head")
    assert (chain.image, chain.classes) == (IMAGE, 4)
    logits, (a, b) = double(model).features(x.double())
    for got, want in zip(chain.activations(x), (a, b, logits), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    for got, want in zip(chain.activations(x, [2, 0, 2]), (logits, a, logits), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert chain.activations(x, []) == []
    gates = chain.gates(x)
    assert [g.dtype for g in gates] == [torch.bool] * 2
    for g, want in zip(gates, (a, b), strict=True):
        assert torch.equal(g, want > 0)
    # V_l as its definition says: d logits_k / d activation
    pixels = x.double().requires_grad_()
    logits, (a, b) = double(model).features(pixels)
    for layer, at in ((0, a), (1, b), (2, logits), (-1, pixels)):
        rows = chain.gradient_rows(x, layer)
        exact = torch.stack([torch.autograd.grad(logits[:, k].sum(), at, retain_graph=True)[0] for k in range(4)], 1)
        torch.testing.assert_close(rows.double(), exact, rtol=1e-4, atol=1e-5)
        reference = plain.chain_gradient(x.double(), chain.plan, chain.weights, torch.eye(4).double().expand(3, 4, 4), layer)
        torch.testing.assert_close(rows.double(), reference, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(3, 4)
    torch.testing.assert_close(
        chain.input_gradient(x, cotangent), (chain.gradient_rows(x, -1) * cotangent[:, :, None, None, None]).sum(1)
    )


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded", "read-only", "leaf", "inference"])
def test_inputs_are_taken_as_they_are(layout):
    chain, x = tsrfast.compile(net()), images()
    want, gradient = chain(x), chain.input_gradient(x, torch.ones(3, 4))
    if layout == "channels_last":
        given = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        given = torch.rand(6, 3, 9, 20)[::2, :, :, ::2].copy_(x)
    elif layout == "expanded":
        given = x[:1].expand(3, -1, -1, -1)
        want, gradient = want[:1].expand(3, -1), gradient[:1].expand(3, -1, -1, -1)
    elif layout == "read-only":
        array = x.numpy().copy()
        array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of such arrays, once
            given = torch.from_numpy(array)
    elif layout == "leaf":
        given = x.clone().requires_grad_()
    else:
        with torch.inference_mode():
            given = x.clone()
    before = given.detach().clone()
    assert torch.equal(chain(given), want)
    assert not chain(given).requires_grad
    assert torch.equal(chain.input_gradient(given, torch.ones(4, 3).t()), gradient)
    assert torch.equal(given.detach(), before)


def test_empty_batch():
    chain = tsrfast.compile(net())
    assert chain(images(0)).shape == (0, 4)
    assert chain.input_gradient(images(0), torch.ones(0, 4)).shape == (0, *IMAGE)
    assert chain.gradient_rows(images(0), 0).shape == (0, 4, 6, 7, 8)


@pytest.mark.parametrize(
    ("shape", "network"),
    [
        ((2, 3, 4), nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))),
        ((7,), nn.Sequential(nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.BatchNorm1d(5))),
        ((2, 5, 4), nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten())),
        ((2, 5, 4), nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())),
    ],
)
def test_shapes_of_inputs_and_logits(shape, network):
    chain, model = tsrfast.compile(network, shape), double(network)
    x = torch.rand(3, *shape)
    x64 = x.double().requires_grad_()
    logits = model(x64)
    torch.testing.assert_close(chain(x).double(), logits, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(3, chain.classes)
    (gradient,) = torch.autograd.grad((logits * cotangent.double()).sum(), x64)
    torch.testing.assert_close(chain.input_gradient(x, cotangent).double(), gradient, rtol=1e-4, atol=1e-5)
    assert chain.gradient_rows(x, -1).shape == (3, chain.classes, *shape)
    last = len(chain.names) - 1
    assert chain.gradient_rows(x, last).shape == (3, chain.classes, *chain.activations(x)[-1].shape[1:])


def test_bad_inputs():
    chain, x = tsrfast.compile(net()), images()
    for bad in (x.double(), x[0], x[:, :2], x.to("meta"), x.numpy()):
        with pytest.raises(InputError, match=r"tsrfast.Chain: x must be float32 \[N, 3, 9, 10\] on the CPU, got "):
            chain(bad)
    for bad in (torch.ones(4), torch.ones(3, 5), torch.ones(3, 4).double(), None):
        with pytest.raises(InputError, match=r"cotangent must be float32 \[3, 4\]"):
            chain.input_gradient(x, bad)
    for bad in (-1, 3, 0.0):
        with pytest.raises(InputError, match="layer must be a record, 0 to 2"):
            chain.activations(x, [bad])
    with pytest.raises(InputError, match="layer must be a record"):
        chain.gradient_rows(x, -2)


def test_table():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    lines = str(tsrfast.compile(nn.Sequential(*layers), (3, 8, 8))).split("\n")
    assert [[cell.strip() for cell in line.split("  ") if cell] for line in lines] == [
        ["record", "name", "in", "out", "kernel", "algorithm", "MFLOP"],
        ["0", "conv", "0+relu", "3x8x8", "8x8x8", "3x3 / 1x1 + 1x1", "winograd", "0.028"],
        ["1", "max_pool", "2", "8x8x8", "8x4x4", "2x2 / 2x2 + 0x0", "0.001"],
        ["2", "linear", "4", "128", "5", "0.001"],
    ]


class Scaled(nn.Module):
    """Reads much from plain attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.scale, self.pool, self.shift = 2.0, nn.MaxPool2d(2), torch.zeros(3, 1, 1)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x * self.scale + self.shift)))
        return self.head(self.pool(h).mean((2, 3)))


def one_bit(model):
    with torch.no_grad():
        model.head.weight[2, 3] = torch.nextafter(model.head.weight[2, 3], torch.tensor(9.0))


def patch_forward(model):
    model.norm.forward = lambda x: x + 1


CHANGES = {
    "replaced parameter": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.randn(4, 3, 3, 3))),
    "in place": lambda m: m.conv.weight.data[1, 2, 0].add_(1e-3),
    "one bit": one_bit,
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "running mean": lambda m: m.norm.running_mean.add_(0.3),
    "running variance": lambda m: m.norm.running_var.mul_(2),
    "eps": lambda m: setattr(m.norm, "eps", 0.5),
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "tensor attribute": lambda m: setattr(m, "shift", torch.ones(3, 1, 1)),
    "tensor attribute in place": lambda m: m.shift.add_(1),
    "new bias": lambda m: setattr(m.conv, "bias", nn.Parameter(torch.ones(4))),
    "sub-module": lambda m: setattr(m, "pool", nn.AvgPool2d(2)),
    "pool": lambda m: setattr(m.pool, "stride", (1, 2)),
    "stride": lambda m: setattr(m.conv, "stride", (1, 2)),
    "patched forward": patch_forward,
    "NaN": lambda m: m.conv.weight.data[0, 0, 0].fill_(torch.nan),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_follows_its_network(change):
    model, image = Scaled().eval(), (3, 9, 17)
    chain, found = tsrfast.compile(model, image), automatic(model, image)
    assert not chain.stale()
    assert automatic(model, image) is found
    x = torch.rand(3, *image, generator=torch.Generator().manual_seed(5))
    old = found(x)
    change(model)
    assert chain.stale()
    chain.refresh()
    assert not chain.stale()
    now = automatic(model, image)
    assert now is not found
    assert automatic(model, image) is now
    assert torch.equal(found(x), old)  # a chain that was given out stays as it was
    exact = double(model)
    exact.shift = exact.shift.double()
    for c in (chain, now):
        torch.testing.assert_close(c(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_becomes_unsupported_and_supported_again():
    model = net()
    chain, found = tsrfast.compile(model), automatic(model, IMAGE)
    hook = model.convs[1].register_forward_hook(lambda *args: None)
    assert chain.stale()
    for call in (chain.refresh, lambda: automatic(model, IMAGE)):
        with pytest.raises(UnsupportedModel, match=r"model.convs.1 \(Conv2d\): has hooks"):
            call()
    hook.remove()
    assert not chain.stale()
    agrees(automatic(model, IMAGE), model)
    assert found is not None


def test_automatic_by_image_shape():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for image in ((3, 9, 10), (3, 5, 5), (3, 9, 10)):
        chain = automatic(model, image)
        assert chain.image == image
        agrees(chain, model, image)
    with pytest.raises(UnsupportedModel, match="in_channels must be 1"):
        automatic(model, (1, 9, 10))


class Alike(nn.Linear):
    """Equal to any other."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def test_networks_are_told_apart_by_identity():
    models = [Alike(4, 2), Alike(4, 2)]
    for m in models * 2:
        agrees(automatic(m, (4,)), m, (4,))


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_chain_in_the_cache_keeps_no_network(cyclic):
    model = net()
    if cyclic:
        object.__setattr__(model, "itself", model)
    gc.collect()
    known = len(chain_module._automatic)
    chain, gone = automatic(model, IMAGE), weakref.ref(model)
    assert len(chain_module._automatic) == known + 1
    parameter = weakref.ref(model.head.weight)
    x, want = images(), double(model)(images().double())
    del model
    gc.collect()
    assert gone() is None
    assert parameter() is None
    assert len(chain_module._automatic) == known
    torch.testing.assert_close(chain(x).double(), want, rtol=1e-4, atol=1e-5)
    for call in (chain.refresh, chain.stale):
        with pytest.raises(InputError, match="must still exist"):
            call()


def test_a_compiled_chain_keeps_its_network():
    inner = nn.Linear(4, 2)
    chain = tsrfast.compile(nn.Sequential(nn.Flatten(), inner), (4,))  # the Sequential has no other owner
    gc.collect()
    with torch.no_grad():
        inner.weight.mul_(2)
    chain.refresh()
    torch.testing.assert_close(chain(torch.ones(1, 4)), inner(torch.ones(1, 4)).detach())


def test_a_layer_used_twice():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(3 * 90, 2))
    agrees(tsrfast.compile(model, IMAGE), model)


def test_tracing_leaves_other_threads_alone():
    """While one thread compiles, another one uses the same network and others."""
    model, other, x = net(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), images()
    model.eval()
    want, failed, stop = (model(x).detach(), other(x).detach()), [], threading.Event()

    def use():
        try:
            while not stop.is_set():
                assert torch.equal(model(x).detach(), want[0])
                assert torch.equal(other(x).detach(), want[1])
        except BaseException as e:
            failed.append(e)

    def attack():
        try:
            for _ in range(60):
                assert torch.equal(automatic(model, IMAGE)(x), chain(x))
        except BaseException as e:
            failed.append(e)

    chain = automatic(model, IMAGE)
    threads = [threading.Thread(target=use), *(threading.Thread(target=attack) for _ in range(2))]
    for t in threads:
        t.start()
    for t in threads[1:]:
        t.join()
    stop.set()
    threads[0].join()
    assert not failed


def test_logits_of_any_network():
    """Through the chain where there is one; in eval mode, without graph, with the modes left alone."""
    model, x = net().train(), images()
    with torch.no_grad():
        exact = copy.deepcopy(model).double().eval()(x.double())
    got = logits(model, x)
    assert torch.equal(got, tsrfast.compile(model)(x))
    assert float((got - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
    assert model.training
    assert not got.requires_grad
    other = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4), nn.Dropout(), nn.Tanh()).train()
    assert torch.equal(logits(other, x), copy.deepcopy(other).eval()(x).detach())
    assert other[2].training
    assert logits(copy.deepcopy(model).double(), x.double()).dtype == torch.float64


def test_differentiable():
    """A loss in PyTorch, the network in native code: the gradient is the network's own, and only once."""
    model, x = net().eval(), images().requires_grad_()
    through = Differentiable(tsrfast.compile(model))
    got = torch.autograd.grad(F.cross_entropy(through(x), torch.tensor([0, 1, 2])), x)[0]
    exact = x.detach().double().requires_grad_()
    want = torch.autograd.grad(F.cross_entropy(double(model)(exact), torch.tensor([0, 1, 2])), exact)[0]
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert not through(x.detach()).requires_grad
    (g,) = torch.autograd.grad(through(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        g.sum().backward()


def test_inputs_of_other_shapes_are_left_to_pytorch():
    """[N, T, D] is no image: what mixes T and D is refused, and `logits` asks PyTorch."""
    x = torch.rand(5, 3, 4)
    for model in (
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3)),
    ):
        assert torch.allclose(logits(model, x), model.eval()(x))


def test_weights_at_odd_places_of_a_storage():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    chain = automatic(model, (3, 4, 4))
    assert automatic(model, (3, 4, 4)) is chain


def test_weights_that_ask_to_be_computed_otherwise():
    class Trebled(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            args = [3 * a.as_subclass(Tensor) if type(a) is cls else a for a in args]
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    weight = model[1].weight.detach()
    del model[1].weight
    model[1].weight = weight.as_subclass(Trebled)
    with pytest.raises(UnsupportedModel, match="ordinary tensors; got Trebled"):
        tsrfast.compile(model, (3, 2, 2))


def test_scratch_weights():
    class Scratch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.buffer = torch.rand(2, 12, 12), torch.zeros(12, 12)

        def forward(self, x):
            x = x.flatten(1)
            for w in self.weights:
                with torch.no_grad():
                    self.buffer.copy_(w)
                x = F.relu(F.linear(x, self.buffer))
            return x

    with pytest.raises(UnsupportedModel, match="changes tensors that it computes with"):
        tsrfast.compile(Scratch(), (3, 2, 2))


def test_modes_with_a_meaning_of_their_own():
    class Averaged(nn.Sequential):
        def train(self, mode=True):
            return super().train(mode)

    with pytest.raises(UnsupportedModel, match=r"has a train\(\) or eval\(\) of its own"):
        tsrfast.compile(Averaged(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2))


def test_compiling_draws_no_random_numbers():
    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1) * torch.rand(())

    before = torch.get_rng_state()
    with pytest.raises(UnsupportedModel, match="draws random numbers"):
        tsrfast.compile(Noisy(), (3, 2, 2))
    assert torch.equal(torch.get_rng_state(), before)
