"""MobileNetV2 against torchvision's; the numbers were recorded from torchvision 0.28, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.nets import load_published, mobilenet_v2

# CIFAR's strides in torchvision's own terms (t, c, n, s).
CIFAR = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]


def test_torchvision_recorded(weights: Any, digest: Any, images: Callable[[int], Tensor]) -> None:
    net = mobilenet_v2(1000, "imagenet").double().eval()
    assert digest(net) == "b37e2a9130e6341b"
    assert sum(p.numel() for p in net.parameters()) == 3_504_872
    net.load_state_dict(weights(net.state_dict()))
    with torch.no_grad():
        got = net(images(64))[:, :3].flatten()
    logits = [-0.134634474291, 0.084539529235, -0.043489670622, -0.134895043496, 0.08247608905, -0.045523559979]
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [0.35, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_torchvision(stem: str, width: float, torchvision_models: Any, weights: Any, images: Callable[[int], Tensor]) -> None:
    theirs = torchvision_models.MobileNetV2(10, width, inverted_residual_setting=CIFAR if stem == "cifar" else None)
    if stem == "cifar":
        theirs.features[0][0].stride = (1, 1)
    theirs = theirs.double().eval()
    theirs.load_state_dict(weights(theirs.state_dict()))
    ours = mobilenet_v2(stem=stem, width=width).double().eval()
    assert not load_published(ours, theirs.state_dict()).renamed
    x = images(32).requires_grad_()
    a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()
    ga, gb = (torch.autograd.grad(z.logsumexp(1).sum(), x)[0] for z in (a, b))
    assert (ga - gb).abs().max() <= 1e-12 * gb.abs().max()


@pytest.mark.parametrize(("stem", "plane"), [("cifar", 4), ("imagenet", 1)])
def test_plane_before_pooling(stem: str, plane: int) -> None:
    net = mobilenet_v2(stem=stem, width=0.1)
    assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 1280, plane, plane)


def test_classifier_without_dropout_layer() -> None:
    net, source = mobilenet_v2(width=0.1), mobilenet_v2(width=0.1, seed=1)
    theirs = {name.replace("classifier.1.", "classifier."): t for name, t in source.state_dict().items()}
    assert load_published(net, theirs).renamed == {
        "classifier.weight": "classifier.1.weight",
        "classifier.bias": "classifier.1.bias",
    }
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in source.state_dict().items())


@pytest.mark.parametrize("width", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_bad_width(width: Any) -> None:
    with pytest.raises(InputError, match="MobileNetV2: width must be a positive number"):
        mobilenet_v2(width=width)
    with pytest.raises(InputError, match="stem must be one of cifar, imagenet, got 'imagenette'"):
        mobilenet_v2(stem="imagenette")
