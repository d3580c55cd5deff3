"""The skip gradient method: gradients equal to those of networks written with the factor in their forward; found, and removed again."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tsrfast import nets
from tsrfast.attacks import APGD, MIM, PGD, skip_gradient
from tsrfast.errors import InputError


def damped(r, gamma):
    """r, with gamma times its gradient."""
    return gamma * r + (1 - gamma) * r.detach()


class Block(nn.Module):
    """As in ResNets: in-place sum and ReLU, a shortcut with a convolution where sizes change."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)  # called twice
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x, gamma=None):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if gamma is not None:
            return F.relu(damped(out, gamma) + self.shortcut(x))
        out += self.shortcut(x)
        return self.relu(out)

    branch = "bn2"


class PreAct(nn.Module):
    """As in Wide ResNets: the branch ends in a dropout, the shortcut comes first."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.bn, self.conv1 = nn.BatchNorm2d(inside), nn.Conv2d(inside, width, 3, stride, 1)
        self.conv2, self.drop = nn.Conv2d(width, width, 3, 1, 1), nn.Dropout(0.5)
        self.shortcut = nn.Conv2d(inside, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x, gamma=None):
        h = F.relu(self.bn(x))
        short = self.shortcut(h)
        out = self.drop(self.conv2(F.relu(self.conv1(h))))
        return torch.add(short, out if gamma is None else damped(out, gamma))

    branch = "drop"


class Inverted(nn.Module):
    """As in MobileNetV2: one Sequential; no skip where sizes change. The branch is scaled by a number in the forward."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.skips = stride == 1
        self.conv = nn.Sequential(
            nn.Conv2d(inside, 2 * inside, 1), nn.ReLU6(), nn.Conv2d(2 * inside, width, 3, stride, 1), nn.BatchNorm2d(width)
        )

    def forward(self, x, gamma=None):
        out = self.conv(x)
        if not self.skips:
            return out
        return x + 0.7 * (out if gamma is None else damped(out, gamma))

    branch = "conv.3"


class Dense(nn.Module):
    """As in DenseNets: new features beside all that came before."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.stride = stride
        self.layers = nn.ModuleList(nn.Conv2d(inside + 4 * i, 4, 3, 1, 1) for i in range(3))
        self.last = nn.Conv2d(inside + 12, width, 1)

    def forward(self, x, gamma=None):
        features = [x]
        for layer in self.layers:
            new = layer(F.relu(torch.cat(features, 1)))
            features.append(new if gamma is None else damped(new, gamma))
        return F.avg_pool2d(self.last(torch.cat(features, 1)), self.stride)

    branch = "layers.0", "layers.1", "layers.2"


class Net(nn.Module):
    def __init__(self, block, strides=(1, 2, 1)):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.blocks = nn.ModuleList(block(6, 6, s) for s in strides)
        self.head = nn.Linear(6, 10)

    def forward(self, x, gamma=None):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, gamma)
        return self.head(x.mean((2, 3)))

    def branches(self):
        kept = [(i, b) for i, b in enumerate(self.blocks) if getattr(b, "skips", True)]
        return [f"blocks.{i}.{end}" for i, b in kept for end in ([b.branch] if isinstance(b.branch, str) else b.branch)]


def net(block, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(block)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.weight, 0.5, 1.5)
        return model.to(dtype).eval()


def batch(n=4, dtype=torch.float64, size=8):
    r = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, size, size, generator=r).to(dtype), torch.randint(10, (n,), generator=r)


def gradient(model, x, y, *args):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf, *args), y, reduction="sum"), leaf)[0]


BLOCKS = pytest.mark.parametrize("block", [Block, PreAct, Inverted, Dense])


@BLOCKS
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5, 1.0])
def test_gradient_is_that_of_the_formula(block, gamma):
    model, (x, y) = net(block), batch()
    plain, logits = gradient(model, x, y), model(x)
    with skip_gradient(model, gamma) as found:
        assert torch.equal(model(x), logits)
        got = gradient(model, x, y)
    assert found == model.branches()
    torch.testing.assert_close(got, gradient(model, x, y, gamma), rtol=1e-10, atol=1e-14)
    if gamma == 1:
        assert torch.equal(got, plain)
    else:
        assert not torch.allclose(got, plain, rtol=1e-2)
    assert torch.equal(gradient(model, x, y), plain)


def test_linear_blocks_have_a_closed_form():
    """The gradient is v prod (I + gamma A_i)."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.ModuleList(nn.Linear(5, 5, bias=False, dtype=torch.float64) for _ in range(3))
            self.head = nn.Linear(5, 1, bias=False, dtype=torch.float64)

        def forward(self, x):
            for m in self.maps:
                x = x + m(x)
            return self.head(x)

    model, x = Linear(), torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    for gamma in (0.0, 0.3, 1.0):
        want = model.head.weight
        for m in reversed(model.maps):
            want = want @ (torch.eye(5, dtype=torch.float64) + gamma * m.weight)
        with skip_gradient(model, gamma):
            (got,) = torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(got, want.expand(2, 5), rtol=1e-12, atol=1e-14)


@BLOCKS
def test_attacks_take_it(block):
    """The attack on the network with hooks is the attack on the network that has the factor in its forward."""

    class Written(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, 0.4)

    model, (x, y) = net(block), batch()
    for attack in (PGD(steps=4), MIM(steps=4), APGD(steps=4)):
        with skip_gradient(model, 0.4):
            got = attack(model, x, y)
        torch.testing.assert_close(got, attack(Written(model), x, y), rtol=0, atol=1e-9)


def test_a_compiled_network_is_left_aside_meanwhile():
    """Hooks on a network that compiles: the chain would not see them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).eval()
    x, y = batch(dtype=torch.float32)
    attack = PGD(steps=3, random_start=False)
    before = attack(model, x, y)
    assert attack.plan(model, x).path == "chain"
    for modules in (None, ["0"]):
        with skip_gradient(model, 0.0, modules):
            assert attack.plan(model, x).path == "eager"
            assert "has hooks" in attack.plan(model, x).reason
            with pytest.raises(InputError, match="has hooks"):
                PGD(engine="chain").plan(model, x)
            if modules:
                assert torch.equal(attack(model, x, y), x)  # nothing of the gradient is left
    assert torch.equal(attack(model, x, y), before)
    assert attack.plan(model, x).path == "chain"


@pytest.mark.parametrize(
    ("make", "count", "first", "last"),
    [
        (lambda: nets.resnet18(), 8, "layer1.0.bn2", "layer4.1.bn2"),
        (lambda: nets.resnet50(stem="imagenet"), 16, "layer1.0.bn3", "layer4.2.bn3"),
        (lambda: nets.preact_resnet18(), 8, "layer1.0.conv2", "layer4.1.conv2"),
        (lambda: nets.wide_resnet(16, 2), 6, "block1.layer.0.conv2", "block3.layer.1.conv2"),
        (lambda: nets.mobilenet_v2(width=0.5), 10, "features.3.conv.3", "features.16.conv.3"),
    ],
)
def test_finds_the_branches_of_known_networks(make, count, first, last):
    """As many as there are blocks with a skip."""
    model, x = make().train(), torch.rand(2, 3, 32, 32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    with skip_gradient(model, 0.5) as found:
        model.eval()(x)
        model.train()
        assert (len(found), found[0], found[-1]) == (count, first, last)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_looking_for_branches_changes_nothing():
    model, (x, y) = net(PreAct).train(), batch()
    model.blocks[0].eval()
    for p in model.stem.parameters():
        p.requires_grad_(False)
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    with skip_gradient(model, 0.5) as found, torch.no_grad():
        PGD(steps=2)(model, x, y)
    assert found == model.branches()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_removed_whatever_happens():
    model, (x, y) = net(Block), batch()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    kept = model.head.register_forward_hook(lambda *_: None)
    with skip_gradient(model, 0.5) as found:
        model(x)
        assert hooks() == 2 + len(found)
    assert hooks() == 1
    with pytest.raises(RuntimeError), skip_gradient(model, 0.5):
        model(x[:, :1])
    with pytest.raises(InputError, match="has no 'nothing'"), skip_gradient(model, 0.5, ["head", "nothing"]):
        pass
    assert hooks() == 1
    kept.remove()
    # One inside the other.
    with skip_gradient(model, 0.5), skip_gradient(model, 0.4):
        twice = gradient(model, x, y)
    torch.testing.assert_close(twice, gradient(model, x, y, 0.2), rtol=1e-10, atol=1e-14)
    assert hooks() == 0


def test_modules_that_are_named():
    model, (x, y) = net(Block), batch()
    with skip_gradient(model, 0.5) as found:
        want = gradient(model, x, y)
    for modules in (list(found), [model.get_submodule(n) for n in found]):
        with skip_gradient(model, 0.5, modules) as named:
            assert named == found
            assert torch.equal(gradient(model, x, y), want)
    with skip_gradient(model, 0.5, ["blocks.2.bn2"]):
        assert not torch.equal(gradient(model, x, y), want)


def test_a_module_that_is_named_twice_counts_once():
    model, (x, y) = net(Block), batch()
    name = model.branches()[0]
    with skip_gradient(model, 0.5, [name]):
        want = gradient(model, x, y)
    with skip_gradient(model, 0.5, [name, model.get_submodule(name)]) as found:
        assert torch.equal(gradient(model, x, y), want)
    assert found == [name]


def test_several_threads_find_the_branches_once():
    model, (x, y) = net(Block), batch()
    with skip_gradient(model, 0.5):
        want = gradient(model, x, y)
    got = {}
    for _ in range(5):
        together = threading.Barrier(4)

        def first_call(i, together=together):
            together.wait()
            got[i] = gradient(model, x, y)

        got.clear()
        with skip_gradient(model, 0.5) as found:
            threads = [threading.Thread(target=first_call, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == len(set(found))
        assert len(got) == 4
        for g in got.values():
            torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-12)


def test_inside_another_module():
    model, (x, y) = net(Block), batch()
    wrapped = nn.Sequential(nn.BatchNorm2d(3, affine=False, dtype=torch.float64), model).eval()
    with skip_gradient(wrapped, 0.5) as found:
        want = gradient(wrapped, x, y)
    with skip_gradient(model, 0.5):
        assert torch.equal(gradient(wrapped, x, y), want)
    assert found == [f"1.{n}" for n in model.branches()]


class Functional(nn.Module):
    """A branch without a module of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 3, 1), nn.Parameter(torch.rand(3, 3, 3, 3))

    def forward(self, x):
        x = self.stem(x)
        return (x + F.conv2d(x, self.weight, padding=1)).mean((2, 3))


class Twins(nn.Module):
    """Two lines side by side, of which neither is a shortcut."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return (self.left(x) + self.right(x)).mean((2, 3))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


X = torch.rand(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("model", "gamma", "modules", "message"),
    [
        (Twins(), 0.5, None, r"model \(Twins\) must have residual branches for skip_gradient, found none"),
        (nn.Flatten(), 0.5, None, "found none"),
        (Functional(), 0.5, None, "has 1 residual branches of 1 that end in no module that is called once: give modules="),
        (Twins(), 1.5, None, r"gamma must be in \[0, 1\], got 1.5"),
        (Twins(), float("nan"), None, r"gamma must be in \[0, 1\], got nan"),
        (print, 0.5, None, r"model must be an nn.Module for skip_gradient, got builtin_function_or_method"),
        (Twins(), 0.5, [], "modules must name at least one, got none"),
        (Twins(), 0.5, "left", "modules must be a list of names or modules, got one str"),
        (Twins(), 0.5, [nn.ReLU()], "modules must be of the model, got a ReLU that is not"),
        (nn.Sequential(Pair()), 0.5, ["0"], "modules of skip_gradient must return a tensor, got tuple"),
        (Pair(), 0.5, None, "model must return a tensor with a gradient"),
    ],
)
def test_says_what_is_wrong(model, gamma, modules, message):
    with pytest.raises(InputError, match=message), skip_gradient(model, gamma, modules):
        model(X)
