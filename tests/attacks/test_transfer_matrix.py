"""The transfer matrix: who falls for whose images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tsrfast
from tsrfast.attacks import FGSM, PGD, transfer_matrix
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)


def net(seed=0, dtype=torch.float32):
    return ConvReLU((6, 5), image=IMAGE, seed=seed).to(dtype)


def batch(n=6, dtype=torch.float32):
    r = torch.Generator().manual_seed(0)
    x = torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype)
    return x, torch.randint(10, (n,), generator=r)


class Target(nn.Module):
    """Counts what it is asked; nothing it does can be differentiated."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        assert not torch.is_grad_enabled()
        return self.model(x)


def near(seed):
    """Networks that agree on many images, not on all."""
    model, other = net(0, torch.float64), net(seed, torch.float64)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.add_(0.15 * q)
    return model.eval()


def test_matrix_equals_counting():
    models, (x, random) = [near(s) for s in (1, 2, 3)], batch(60, dtype=torch.float64)
    y = torch.where(torch.arange(60) % 4 == 0, random, models[0](x).argmax(1))
    attack = PGD(eps=0.02, steps=4)
    got = transfer_matrix(models, x, y, attack)
    right = [m(x).argmax(1) == y for m in models]
    for i, source in enumerate(models):
        adv = attack(source, x, y)
        change = (adv - x).flatten(1)
        assert float(got.linf[i]) == pytest.approx(float(change.abs().amax(1).mean()))
        assert float(got.l2[i]) == pytest.approx(float(change.norm(dim=1).mean()))
        for j, target in enumerate(models):
            missed = target(adv).argmax(1) != y
            for among, counted in {"all": right[0] | True, "target": right[j], "both": right[i] & right[j]}.items():
                assert int(got.counts(among)[i, j]) == int(counted.sum())
                want = float((missed & counted).sum()) / float(counted.sum())
                assert float(got.rates(among)[i, j]) == pytest.approx(want)
    assert got.rates().dtype == torch.float64
    assert not torch.equal(got.counts("both"), got.counts("target"))
    assert not torch.equal(got.rates("all"), got.rates("target"))
    assert (got.rates("target").diagonal() == got.rates("target").amax(0)).all()  # white box beats transfer
    batched = transfer_matrix(models, x, y, attack, batch_size=7)
    assert torch.equal(batched.wrong, got.wrong)


def test_matrix_of_other_targets():
    sources, targets, (x, y) = [net(1)], [Target(net(2)), tsrfast.compile(net(3).eval(), IMAGE)], batch(12)
    got = transfer_matrix(sources, x, y, FGSM(), targets=targets)
    assert got.wrong.shape == (1, 2, 12)
    assert got.rates("all").shape == (1, 2)
    assert targets[0].calls == 2  # clean, and attacked
    nobody = transfer_matrix(net(1), x, (net(1).eval()(x).argmax(1) + 1) % 10, FGSM())
    assert nobody.counts().tolist() == [[0]]
    assert nobody.rates().isnan().all()


def test_matrix_refuses():
    x, y = batch()
    with pytest.raises(InputError, match="attack must be an untargeted attack"):
        transfer_matrix([net()], x, y, PGD(targeted=True))
    with pytest.raises(InputError, match="sources must be one network at least"):
        transfer_matrix([], x, y, PGD())
    with pytest.raises(InputError, match=r"targets must be an nn\.Module"):
        transfer_matrix([net()], x, y, PGD(), targets=[3])
    with pytest.raises(InputError, match="y must be int64"):
        transfer_matrix([net()], x, y.float(), PGD())
    with pytest.raises(InputError, match=rf"index must be int64 of shape \({len(x)},\), got torch.int64 of shape \(3,\)"):
        transfer_matrix([net()], x, y, PGD(), index=torch.arange(3))
    with pytest.raises(InputError, match="batch_size must be an integer >= 1"):
        transfer_matrix([net()], x, y, PGD(), batch_size=0)
    with pytest.raises(InputError, match="x must be pixels in"):
        transfer_matrix([net()], 255 * x, y, PGD())
    with pytest.raises(InputError, match="unknown among 'source'"):
        transfer_matrix([net()], x, y, FGSM()).rates("source")
