"""The generated images: reproducible, spectrum of patches like CIFAR-10's, made for convolutions and not for pixels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tsrfast.data import load


def test_shapes_and_defaults():
    data = load("synthetic:train=40,test=30")
    assert data.name == "synthetic:seed=0"
    assert data.train.images.shape == (40, 3, 32, 32)
    assert data.test.images.shape == (30, 3, 32, 32)
    assert len(data.classes) == len(set(data.classes)) == 10
    assert len(load("synthetic", train=10).test) == 2048
    assert len(load("synthetic", train=10, test=9000).test) == 9000
    assert len(load("synthetic:train=40", train=10, test=1).train) == 10
    assert len(load("synthetic:train=40", train=41).train) == 40


def test_an_image_depends_on_seed_split_and_number_only():
    many = load("synthetic:seed=3,train=600,test=300")
    for n in (1, 255, 256, 257):
        few = load(f"synthetic:train={n},seed=3,test=2")
        assert torch.equal(few.train.images, many.train.images[:n])
        assert torch.equal(few.train.labels, many.train.labels[:n])
        assert torch.equal(few.test.images, many.test.images[:2])
    other = load("synthetic:seed=4", train=600, test=300)
    blocks = [many.train, many.test, other.train, other.test]
    firsts = [split.images[start] for split in blocks for start in (0, 256)]
    assert len({bytes(image.flatten().tolist()) for image in firsts}) == 8
    assert many.fingerprint == load("synthetic:seed=3", train=600, test=300).fingerprint != other.fingerprint


def test_the_definition_has_not_changed():
    # Published results name this fingerprint: a change of the generator is a new data set.
    known = "af7212ac1fa5e1053b3a2504effd3fb57a09b4fc5b97677320704d606e641644"
    assert load("synthetic", train=300, test=300).fingerprint == known


def test_labels_are_balanced():
    labels = load("synthetic", test=1).train.labels
    assert (labels.bincount(minlength=10) - 819.2).abs().max() < 110  # four standard deviations


def test_patch_spectrum_decays_like_that_of_cifar():
    images = load("synthetic", train=1000, test=1).train.pixels().double()
    patches = functional.unfold(images, 3).transpose(1, 2).reshape(-1, 27)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    share = values.flip(0) / values.sum()
    assert 0.78 < share[0] < 0.9
    assert vectors[:, -1].abs().min() > 0.8 * vectors[:, -1].abs().max()  # brightness: all entries alike
    assert share[:17].sum() > 0.999
    assert share[-1] > 1e-6  # the noise leaves no direction empty
    clipped = ((images == 0) | (images == 1)).double().mean()
    assert clipped < 0.04


def test_convolutions_learn_it_and_pixels_do_not():
    data = load("synthetic", train=2048, test=1000)
    mean, deviation = data.train.pixels().mean(), data.train.pixels().std()

    def accuracy(net: nn.Module, rate: float) -> float:
        x, y = (data.train.pixels() - mean) / deviation, data.train.labels
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for rows in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
        with torch.no_grad():
            answers = net((data.test.pixels() - mean) / deviation).argmax(1)
        return float((answers == data.test.labels).double().mean())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        layers = [part for c in (3, 16, 16) for part in (nn.Conv2d(c, 16, 3), nn.ReLU())]
        convolutions = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 26 * 26, 10))
    by_pixels, by_convolutions = accuracy(linear, 1e-3), accuracy(convolutions, 2e-3)
    assert by_pixels < 0.3
    assert by_convolutions > by_pixels + 0.1
