from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU, init_

SMALL = {"widths": (4, 3), "image": (2, 8, 7), "classes": 5}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: ConvReLU) -> int:
    """Multiply-accumulates of one image, counted from the shapes that the layers really produce."""
    total = model.head.weight.numel()
    for conv, act in zip(model.convs, model.activations(torch.zeros(1, *model.image)), strict=True):
        total += conv.weight.numel() * act.shape[2] * act.shape[3]
    return total


@pytest.mark.parametrize(
    ("widths", "params", "mac"),
    [
        ((64, 64, 64, 64), 481_226, 76_978_944),
        ((45, 32, 32, 20), 144_490, 20_917_116),
        ((50, 35, 35, 22), 161_927, 25_134_300),
        ((64, 64, 64, 64, 64), 459_274, 94_762_240),
        ((45, 32, 32, 32, 20), 135_338, 25_677_212),
        ((50, 35, 35, 35, 22), 152_747, 30_826_900),
    ],
)
def test_sizes_are_those_of_the_paper(widths: tuple[int, ...], params: int, mac: int) -> None:
    model = ConvReLU(widths)
    assert parameters(model) == params
    assert macs(model) == mac


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_is_conv_relu_norm_head(batch_norm: bool, mode: str) -> None:
    model = ConvReLU(**SMALL, batch_norm=batch_norm, mean=(0.4, 0.5), std=(0.2, 0.3)).train(mode == "train")
    x = torch.rand(6, 2, 8, 7, generator=torch.Generator().manual_seed(1))
    h = (x - torch.tensor([0.4, 0.5]).view(1, 2, 1, 1)) / torch.tensor([0.2, 0.3]).view(1, 2, 1, 1)
    wanted = []
    for i in range(2):
        h = F.conv2d(h, model.convs[i].weight, model.convs[i].bias).clamp(min=0)
        wanted.append(h)
        if batch_norm:
            norm = model.norms[i]
            statistics = norm.running_mean.clone(), norm.running_var.clone()
            h = F.batch_norm(h, *statistics, norm.weight, norm.bias, mode == "train")
    logits = h.reshape(6, -1) @ model.head.weight.T + model.head.bias
    got, acts = model.features(x)
    torch.testing.assert_close(got, logits)
    torch.testing.assert_close(acts, wanted)
    torch.testing.assert_close(model(x), logits)
    torch.testing.assert_close(model.activations(x), wanted)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_features_without_gradients_are_the_same(batch_norm: bool) -> None:
    """Through the compiled chain: equal up to float32 rounding; with gradients, or hooks that must see it, through PyTorch."""
    net = ConvReLU((6, 5, 7), image=(3, 12, 11), batch_norm=batch_norm, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)).eval()
    x = torch.rand(4, 3, 12, 11)
    logits, kept = net.features(x)
    assert logits.requires_grad
    with torch.no_grad():
        quick_logits, quick = net.features(x)
        assert not torch.equal(quick_logits, logits)  # other sums
        for a, b in zip([quick_logits, *quick], [logits, *kept], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        seen = []
        net.convs[1].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(net.features(x)[0], logits)
        assert seen


def test_features_of_changed_networks() -> None:
    """Layers replaced, or some in train mode: what PyTorch says."""
    x = torch.rand(4, 3, 12, 11)
    net = ConvReLU((6, 5), image=(3, 12, 11), batch_norm=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)).eval()
    for change in (
        lambda n: setattr(n, "head", torch.nn.Sequential(n.head, torch.nn.ReLU(), torch.nn.Linear(10, 10))),
        lambda n: setattr(n.convs[0], "padding", (1, 1)) or setattr(n, "head", torch.nn.Linear(5 * 10 * 9, 10)),
        lambda n: n.norms.train(),
    ):
        changed = copy.deepcopy(net)
        change(changed)
        logits, kept = copy.deepcopy(changed).features(x)
        with torch.no_grad():
            again, others = changed.features(x)
        torch.testing.assert_close([again, *others], [logits, *kept], rtol=1e-4, atol=1e-5)


def test_memory_format_does_not_change_the_flatten_order() -> None:
    model = ConvReLU(**SMALL)
    x = torch.rand(3, 2, 8, 7, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted)


def test_weights_are_those_of_pytorch_under_the_same_seed() -> None:
    torch.manual_seed(5)
    convs = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)]
    head = nn.Linear(3 * 4 * 3, 5)
    model = ConvReLU(**SMALL, seed=5)
    for mine, theirs in [*zip(model.convs, convs, strict=True), (model.head, head)]:
        torch.testing.assert_close(mine.weight, theirs.weight)
        torch.testing.assert_close(mine.bias, theirs.bias)


def test_seed_decides_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = ConvReLU(**SMALL, seed=1), ConvReLU(**SMALL, seed=1), ConvReLU(**SMALL, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert init_(c, 1) is c
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


def test_init_resets_batch_norm() -> None:
    model = ConvReLU(**SMALL, batch_norm=True)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.norms[0].weight.fill_(3)
    model(torch.rand(4, 2, 8, 7))
    init_(model, 0)
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())


def test_config_rebuilds_the_architecture() -> None:
    model = ConvReLU(**SMALL, batch_norm=True, mean=(0.1, 0.2), std=(0.3, 0.4), seed=3)
    again = ConvReLU.from_config(model.config, seed=3)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": ()}, "widths must be one or more positive integers"),
        ({"widths": (4, 0)}, "widths must"),
        ({"widths": (4, 2.5)}, "widths must"),
        ({"widths": 4}, "widths must"),
        ({"image": (3, 32)}, "image must be 3 positive integers"),
        ({"widths": (4, 4), "image": (3, 4, 32)}, "image must be larger than 4x4 for 2 layers, got 4x32"),
        ({"classes": 0}, "classes must"),
        ({"mean": (0.5, 0.5, 0.5)}, "together"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, "mean must be 3 finite numbers"),
        ({"mean": (0.5, 0.5, 0.5), "std": (1, 0, 1)}, "std must be 3 finite positive numbers"),
        ({"mean": (0.5, float("nan"), 0.5), "std": (1, 1, 1)}, "mean must be"),
        ({"mean": "abc", "std": (1, 1, 1)}, "mean must be 3 finite numbers, got 'abc'"),
        ({"mean": 0.5, "std": 0.5}, "mean must be 3 finite numbers, got 0.5"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvReLU(**arguments)


def test_smallest_image_that_fits() -> None:
    assert ConvReLU((2, 2), image=(3, 5, 5))(torch.zeros(1, 3, 5, 5)).shape == (1, 10)


def test_bad_config_and_input() -> None:
    with pytest.raises(InputError, match="did you mean 'widths'"):
        ConvReLU.from_config({"width": [3]})
    with pytest.raises(InputError, match="must name widths"):
        ConvReLU.from_config({})
    for shape in [(1, 3, 32, 31), (3, 32, 32), (1, 1, 32, 32)]:
        with pytest.raises(InputError, match=r"x must have shape \[N, 3, 32, 32\]"):
            ConvReLU((2,))(torch.zeros(shape))


def test_can_be_traced() -> None:
    model = ConvReLU(**SMALL, batch_norm=True, mean=(0.1, 0.2), std=(0.3, 0.4)).eval()
    x = torch.rand(2, 2, 8, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
