"""Which precision attacks on CUDA take: float16, and split for the images that need it. Emulated, and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from tsrfast import _native
from tsrfast.attacks import PGD, CrossEntropy, OracleL2, native
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)
ATTACK = {"engine": "chain", "eps": 0.06, "step_size": 0.02, "steps": 3, "random_start": True}


# The CPU engine has one precision.
ON_CUDA = pytest.mark.parametrize("device", ["emu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def images(n=6):
    return torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(0))


def pair(device, noise):
    """A teacher, and a student that is it plus noise."""
    teacher = ConvReLU((6, 5), image=IMAGE, seed=1).eval()
    student = copy.deepcopy(teacher)
    r = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in student.parameters():
            p += noise * p.std() * torch.randn(p.shape, generator=r)
    return student.to(device), teacher.to(device)


def run(device, noise, precision, x=None, **kw):
    student, teacher = pair(device, noise)
    x = images() if x is None else x
    index = torch.arange(len(x), device=device)
    return PGD(loss=OracleL2(teacher), precision=precision, **ATTACK, **kw).run(student, x.to(device), index=index)


@ON_CUDA
def test_students_far_away_are_attacked_in_float16(device):
    auto, half, split = (run(device, 0.7, p) for p in ("auto", "float16", "split"))
    assert torch.equal(auto.x_adv, half.x_adv)
    assert not torch.equal(auto.x_adv, split.x_adv)  # so the comparison says something
    # What is said of them comes from a pass in split precision, which is one more query.
    assert (auto.queries == half.queries + 1).all()
    torch.testing.assert_close(auto.loss, half.loss, rtol=2e-2, atol=0)


@ON_CUDA
def test_near_students_are_attacked_in_split(device):
    auto, half, split = (run(device, 0.01, p) for p in ("auto", "float16", "split"))
    assert torch.equal(auto.x_adv, split.x_adv)
    assert not torch.equal(auto.x_adv, half.x_adv)
    assert torch.equal(auto.loss, split.loss)


@ON_CUDA
def test_each_image_decides_for_itself(device, monkeypatch):
    """Half of the images are near, by a bound between them; alone they fare the same."""
    student, teacher = pair(device, 0.2)
    x = images().to(device)
    with torch.no_grad():
        near = ((student(x) - teacher(x)).norm(dim=1) / teacher(x).norm(dim=1)).sort()
    monkeypatch.setattr(native, "NEAR", float(near.values[2:4].mean()))
    kw = ATTACK | {"random_start": False}
    attacks = {p: PGD(loss=OracleL2(teacher), precision=p, **kw) for p in ("auto", "float16", "split")}
    auto, half, split = (attacks[p](student, x) for p in attacks)
    few, many = near.indices[:3], near.indices[3:]
    assert torch.equal(auto[few], split[few])
    assert torch.equal(auto[many], half[many])
    assert not torch.equal(half[few], split[few])
    assert torch.equal(torch.cat([attacks["auto"](student, x[i : i + 1]) for i in range(6)]), auto)


@ON_CUDA
def test_float32_is_the_cpu_engine_up_to_rounding(device):
    got = run(device, 0.7, "float32")
    plain = torch.device("cpu")
    before, _native.emulator = _native.emulator, None
    try:
        want = run(plain, 0.7, "auto")
    finally:
        _native.emulator = before
    # A pixel whose gradient is rounding noise may step the other way.
    assert ((got.x_adv.cpu() - want.x_adv).abs() > 1e-6).float().mean() <= 0.01
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=1e-3, atol=0)
    assert torch.equal(got.success.cpu(), want.success)


@ON_CUDA
def test_overflow_is_attacked_again(device):
    """Activations beyond 65504 are infinite in float16, and in split, which is made of it; float32 takes them."""
    student, _ = pair(device, 0.5)
    with torch.no_grad():
        student.convs[0].weight *= 3e5
    x, y = images().to(device), torch.zeros(6, dtype=torch.int64, device=device)
    got = {p: PGD(loss=CrossEntropy(), precision=p, **ATTACK).run(student, x, y) for p in ("auto", "float16", "float32")}
    assert (got["float16"].bad_gradients > 0).all()
    assert (got["auto"].bad_gradients == 0).all()
    assert got["auto"].loss.isfinite().all()
    torch.testing.assert_close(got["auto"].loss, got["float32"].loss, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["split", "float16"])
def test_the_cpu_has_one(precision):
    student, teacher = pair("cpu", 0.5)
    with pytest.raises(InputError, match=f"precision must be 'auto' or 'float32' on cpu, got '{precision}'"):
        PGD(loss=OracleL2(teacher), precision=precision)(student, images())


def test_bad_values():
    with pytest.raises(InputError, match="unknown precision 'half'"):
        PGD(precision="half")
    student, teacher = pair("cpu", 0.5)
    with pytest.raises(InputError, match="precision must be 'auto' where native code does not run, got 'float32'"):
        PGD(loss=OracleL2(teacher), precision="float32", engine="eager")(student, images())
