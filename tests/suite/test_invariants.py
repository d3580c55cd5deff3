"""What must hold without any training (specification, section 10), on whole networks of the paper's family.

Here are those that take several rooms of the package together; the others are beside the code they speak of.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tsrfast import compile
from tsrfast.attacks import PGD, OracleCrossEntropy, OracleL2
from tsrfast.data import load
from tsrfast.nets import ConvReLU, fold, student_widths
from tsrfast.ops import chain_pgd
from tsrfast.specialization import (
    GradientRule,
    bnc,
    correlate,
    distance_to_patches,
    eps_curves,
    patch_basis,
    sorted_bnc,
    specialized_counts,
    subspace_distance,
)
from tsrfast.suite.experiments.table1 import PUBLISHED
from tsrfast.suite.stages import MEAN, STD

WIDTHS = (10, 8, 8, 6)
DATA = load("synthetic", train=64, test=48)
IMAGES = DATA.test.pixels()
LOSSLESS = Path(os.environ.get("TSRFAST_DATA", "/nonexistent")) / "cifar10" / "lossless-subset" / "cifar-10-batches-py"


def oracle() -> ConvReLU:
    return ConvReLU(WIDTHS, mean=MEAN, std=STD, seed=1).eval()


def shuffled(net: ConvReLU, *, scale: bool) -> ConvReLU:
    """`net` with the channels of every layer in another order, each a > 0 times as large and its readers' weights 1/a."""
    other, g = copy.deepcopy(net), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer, channels in enumerate(net.widths):
            order = torch.randperm(channels, generator=g)
            factor = torch.rand(channels, generator=g) + 0.5 if scale else torch.ones(channels)
            conv = other.convs[layer]
            conv.weight.copy_(conv.weight[order] * factor.view(-1, 1, 1, 1))
            conv.bias.copy_(conv.bias[order] * factor)
            reader = other.convs[layer + 1] if layer + 1 < len(net.widths) else other.head
            weight = reader.weight.view(len(reader.weight), channels, -1)
            weight.copy_(weight[:, order] / factor.view(1, -1, 1))
    return other


def with_extra(net: ConvReLU, factor: float) -> tuple[ConvReLU, list[int]]:
    """`net` beside random channels that nothing reads, as wide as a student of that factor; and how many there are, a layer."""
    wide = ConvReLU(student_widths(net.widths, factor), mean=MEAN, std=STD, seed=9).eval()
    channels = net.image[0]
    with torch.no_grad():
        for layer, width in enumerate(net.widths):
            weight, source = wide.convs[layer].weight, net.convs[layer]
            weight[:, channels:] = 0
            weight[:width] = 0
            weight[:width, :channels] = source.weight
            wide.convs[layer].bias[:width] = source.bias
            channels = width
        head = wide.head.weight.view(net.classes, wide.widths[-1], -1)
        head.zero_()
        head[:, :channels] = net.head.weight.view(net.classes, channels, -1)
        wide.head.bias.copy_(net.head.bias)
    return wide, [a - b for a, b in zip(wide.widths, net.widths, strict=True)]


@pytest.mark.parametrize("loss", [OracleL2, OracleCrossEntropy])
def test_a_student_that_is_the_oracle(loss):
    """Spec 10: s = t has robust accuracy 100 %, a diagonal of ones, eps_in = eps_out = 0."""
    net, basis = oracle(), patch_basis(DATA.train.pixels())
    x = PGD(eps=0.1, step_size=0.05, steps=3, loss=loss(net))(copy.deepcopy(net), IMAGES, net(IMAGES).argmax(1))
    assert torch.equal(net(x).argmax(1), copy.deepcopy(net)(x).argmax(1))
    for nc in correlate(net, net, IMAGES):
        alive = ~nc.dead_teacher
        torch.testing.assert_close(
            nc.rho.diagonal()[alive], torch.ones(int(alive.sum()), dtype=torch.float64), rtol=0, atol=1e-6
        )
    weight = fold(net).convs[0].weight.detach()
    for distances in subspace_distance(weight, weight, basis):
        assert distances.diagonal().max() == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_forty_steps_in_one_call_are_forty_calls_and_raise_the_loss(norm):
    """Spec 10: on the CPU bit by bit, since an image's numbers depend on nothing else; the loss rises for more than 99 % of images."""
    net, student = oracle(), ConvReLU((11, 9, 9, 7), mean=MEAN, std=STD, seed=2).eval()
    eps, step_size = {"linf": (10 / 255, 0.01), "l2": (0.5, 0.05)}[norm]
    attack = PGD(norm=norm, eps=eps, step_size=step_size, steps=40, loss=OracleL2(net), engine="chain")
    whole = attack.run(student, IMAGES)
    plans, packed = zip(*((c.plan, c.packed) for c in (compile(n, IMAGES.shape[1:]) for n in (student, net))), strict=True)
    first = dataclasses.replace(attack, steps=0).run(student, IMAGES)
    x = first.x_adv
    for _ in range(40):
        x = chain_pgd(
            IMAGES,
            x,
            (plans[0], packed[0]),
            (plans[1], packed[1]),
            loss="oracle_l2",
            norm=norm,
            eps=eps,
            step_size=step_size,
            steps=1,
        ).x
    assert torch.equal(x, whole.x_adv)
    with torch.no_grad():
        before, after = ((student(v) - net(v)).square().sum(1) for v in (IMAGES, x))
    assert (after >= before).double().mean() > 0.99


@pytest.mark.parametrize("scale", [False, True])
def test_a_student_with_the_oracles_channels_in_another_order(scale):
    """Spec 10: permuted, or permuted and rescaled: equal logits, BNC = 1, eps curves 0; so nothing to attack."""
    net, basis = oracle(), patch_basis(DATA.train.pixels())
    student = shuffled(net, scale=scale)
    torch.testing.assert_close(student(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)
    layers = correlate(student, net, IMAGES)
    for nc in layers:
        torch.testing.assert_close(bnc(nc), torch.ones_like(bnc(nc)), rtol=0, atol=1e-5)
    weights = (fold(n).convs[0].weight.detach() for n in (student, net))
    for curve in eps_curves(layers[0].rho, *subspace_distance(*weights, basis), dead_teacher=layers[0].dead_teacher):
        assert curve.max() < 1e-5
    x = PGD(eps=0.04, step_size=0.01, steps=5, loss=OracleL2(net))(student, IMAGES)
    torch.testing.assert_close(student(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_student_with_channels_that_nothing_reads():
    """Spec 10: robust accuracy 100 %, BNC = 1, no more unspecialized nodes than extra ones, beta_kk = 0 for these."""
    net = oracle()
    student, extra = with_extra(net, 1.5)
    assert extra == [5, 4, 4, 3]
    x = PGD(eps=0.1, step_size=0.05, steps=3, loss=OracleL2(net))(student, IMAGES)
    assert torch.equal(student(x).argmax(1), net(x).argmax(1))
    for nc, more in zip(correlate(student, net, IMAGES), extra, strict=True):
        assert sorted_bnc(nc)[0] > 1 - 1e-5
        counts = specialized_counts(nc)
        dead = int(nc.dead_teacher.sum())  # a dead node of the oracle has a dead copy: as little specialized as the extra ones
        assert counts.unspecialized <= more + dead
        assert counts.specialized >= len(bnc(nc))
    rule = GradientRule(student, net)
    rule.update(IMAGES)
    for layer, width in zip(rule.compute(), net.widths, strict=True):
        assert layer.beta_student[width:].abs().max() == 0
        torch.testing.assert_close(layer.beta_student[:width], layer.beta_teacher, rtol=1e-5, atol=1e-12)


def test_beta_of_the_last_convolution_is_its_fan_out():
    """Spec 10: E beta_kk of the last hidden layer is the sum over positions of the squared weights that read the channel, at any x."""
    student, teacher = oracle(), ConvReLU((6, 5, 4, 3), mean=MEAN, std=STD, seed=2).eval()
    rule = GradientRule(student, teacher)
    rule.update(IMAGES[:8])
    last = rule.compute()[-1]
    for got, net in ((last.beta_student, student), (last.beta_teacher, teacher)):
        fan_out = net.head.weight.detach().double().view(net.classes, net.widths[-1], -1).square().sum((0, 2))
        torch.testing.assert_close(got, fan_out, rtol=1e-5, atol=0)


@pytest.mark.parametrize("components", [1, 17, 26])
def test_distances_inside_and_outside_make_up_the_whole(components):
    """Spec 10, Parseval: dist_in^2 + dist_out^2 is the squared length of the patches about their mean."""
    x = IMAGES[:5].double()
    basis = patch_basis(DATA.train.pixels(), components=components)
    patches = torch.nn.functional.unfold(x, 3).mT - basis.mean
    inside = (patches @ basis.basis).square().sum((1, 2))
    outside = distance_to_patches(x, basis).square()
    torch.testing.assert_close(inside + outside, patches.square().sum((1, 2)))


def test_published_variances_are_in_fractions_squared(tiny):
    """Spec 10 (and ambiguity 8): sigma^2 of a fraction; the report has 100 sigma, in %. Repetitions that agree have none."""
    found = {
        (c["row"], c["column"]): c for c in tiny.results["experiments"]["table1"]["cells"] if c["group"] == "Robust accuracy"
    }
    columns = list(dict.fromkeys(column for _, column in found))
    for row, values in PUBLISHED.items():
        for column, (mean, variance) in zip(columns, values, strict=True):
            c = found[row, column]
            assert c["published"] == mean
            assert (c["published_std"] / 100) ** 2 == pytest.approx(variance)
            # The variance of an accuracy of n images is at most p (1 - p): in %^2 the published ones would mean billions of images.
            assert variance < mean / 100 * (1 - mean / 100)


@pytest.mark.skipif(not LOSSLESS.is_dir(), reason="TSRFAST_DATA/cifar10/lossless-subset is not there")
def test_channel_statistics_of_cifar():
    """Spec 10: means .4914 .4822 .4465 and standard deviations .247 .2435 .2616 of pixels; the authors' are means of the images' own."""
    pixels = load(f"cifar10:{LOSSLESS}").train.pixels().double()
    assert tuple(MEAN) == (0.4914, 0.4822, 0.4465)
    for got, want in (
        (pixels.mean((0, 2, 3)), MEAN),
        (pixels.permute(1, 0, 2, 3).flatten(1).std(1), (0.2470, 0.2435, 0.2616)),
        (pixels.flatten(2).std(2).mean(0), STD),
    ):
        torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=0.004)  # a subset of the training images
