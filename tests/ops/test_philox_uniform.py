from __future__ import annotations

import pytest
import torch

from tsrfast import ops, reference
from tsrfast.errors import InputError
from tsrfast.reference.philox_uniform import philox

SHAPES = [(1, 1), (3, 4), (2, 5), (4, 130), (0, 8), (3, 0)]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # known answers of the Random123 distribution (philox4x32-10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, want):
    got = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == want


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_reference_bit_for_bit(shape, seed, device):
    n, count = shape
    index = torch.arange(n, device=device) * 3 + 2**40
    got = ops.philox_uniform(seed, index, count, draw=7)
    assert torch.equal(got, reference.philox_uniform(seed, index, count, draw=7))


def test_depends_on_the_image_alone(device):
    index = torch.tensor([5, 3, 900], device=device)
    whole = ops.philox_uniform(1, index, 10)
    for i, row in zip(index, whole, strict=True):
        assert torch.equal(ops.philox_uniform(1, i[None], 10)[0], row)
    assert torch.equal(ops.philox_uniform(1, index, 6), whole[:, :6])


def test_is_uniform():
    u = ops.philox_uniform(0, torch.arange(64), 4096).double()
    assert u.min() >= 0
    assert u.max() < 1
    # 2^18 samples: five standard errors of mean, variance and of the largest of 16 bin counts
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 512
    assert abs(u.var() - 1 / 12) < 5 * 180**-0.5 / 512
    assert (torch.histc(u, 16, 0, 1) / u.numel() - 1 / 16).abs().max() < 5 * (1 / 16) ** 0.5 / 512
    other = ops.philox_uniform(0, torch.arange(64), 4096, draw=1).double()
    assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 5 / 512


def test_says_what_is_wrong():
    index = torch.arange(3)
    for call, message in [
        (lambda: ops.philox_uniform(0, index.float(), 4), "index must be int64"),
        (lambda: ops.philox_uniform(0, index[None], 4), r"index must be contiguous \[N\]"),
        (lambda: ops.philox_uniform(0, index, -1), "count must be in"),
        (lambda: ops.philox_uniform(0, index, 4, draw=-1), "draw must be in"),
        (lambda: ops.philox_uniform(2**64, index, 4), "seed must be a 64-bit integer"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_opcheck(device):
    torch.library.opcheck(torch.ops.tsrfast.philox_uniform.default, (3, torch.arange(4, device=device), 9, 1))


def test_compiles_without_a_graph_break(device):
    index = torch.arange(4, device=device)
    compiled = torch.compile(lambda i: ops.philox_uniform(3, i, 9, draw=1) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), ops.philox_uniform(3, index, 9, draw=1) + 1)
