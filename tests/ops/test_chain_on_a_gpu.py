"""The CUDA engine where only a GPU can tell: streams, capture, memory, large batches, the paper's nets. What it computes: test_chain.py."""

from __future__ import annotations

import pytest
import torch

from tsrfast import ops
from tsrfast.chain import compile
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU
from tsrfast.ops.chain import PRECISIONS, has_fused_kernel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ATTACK = {"loss": "oracle_l2", "eps": 8 / 255, "step_size": 2 / 255, "steps": 4}
EACH = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(scope="module")
def pair():
    """(plan, packed) of the paper's student and teacher."""
    nets = ConvReLU((50, 35, 35, 22), seed=1), ConvReLU((45, 32, 32, 20), seed=2)
    chains = [compile(net.cuda().eval()) for net in nets]
    return [(c.plan, c.packed) for c in chains]


def images(n, seed=0, device="cuda"):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def attack(pair, x, **kw):
    return ops.chain_pgd(x, x, *pair, **{**ATTACK, **kw})


def test_the_papers_pair_has_a_fused_kernel(pair):
    assert has_fused_kernel(pair[0][0], pair[1][0], "oracle_l2", "linf") == (torch.cuda.get_device_capability() >= (9, 0))


@pytest.mark.parametrize("n", [1, 127, 133])
@pytest.mark.parametrize(
    ("precision", "equal", "losses"), [("float32", 0.999, 1e-4), ("split", 0.999, 1e-4), ("float16", 0.97, 5e-3)]
)
def test_one_step_is_the_cpu_engines(pair, precision, equal, losses, n):
    """A pixel whose gradient is rounding noise may step the other way: 2 % of them in float16, by the design study's emulation."""
    on_cpu = [compile(ConvReLU(w, seed=s).eval()) for w, s in (((50, 35, 35, 22), 1), ((45, 32, 32, 20), 2))]
    x = images(n, device="cpu")
    want = ops.chain_pgd(x, x, *((c.plan, c.packed) for c in on_cpu), **{**ATTACK, "steps": 1})
    got = attack(pair, x.cuda(), steps=1, precision=precision)
    assert ((got.x.cpu() - want.x).abs() < 1e-6).float().mean() >= equal
    torch.testing.assert_close(got.loss.cpu(), want.loss, rtol=losses, atol=0)
    torch.testing.assert_close(got.closeness.cpu(), want.closeness, rtol=losses, atol=0)


@EACH
def test_runs_are_equal_bit_by_bit(pair, precision):
    x = images(300)
    first = attack(pair, x, precision=precision)
    for _ in range(3):
        assert torch.equal(attack(pair, x, precision=precision).x, first.x)
    parts = [attack(pair, part, precision=precision).x for part in x.split([1, 132, 167])]
    assert torch.equal(torch.cat(parts), first.x)


@EACH
def test_early_stops_leave_no_trace_on_others(pair, precision):
    """Images that end at different steps share blocks and the queue; alone they fare the same."""
    x = images(280)
    kw = {"loss": "oracle_margin", "early_stop": True, "keep": "best", "steps": 10, "eps": 0.02, "step_size": 0.004}
    whole = attack(pair, x, precision=precision, **kw)
    assert len(whole.queries.unique()) > 1
    for i in (0, 131, 132, 279):
        alone = attack(pair, x[i : i + 1].contiguous(), precision=precision, **kw)
        assert torch.equal(alone.x[0], whole.x[i])
        assert int(alone.queries[0]) == int(whole.queries[i])


@EACH
def test_two_streams_at_once(pair, precision):
    batches = [images(200, seed) for seed in range(2)]
    expected = [attack(pair, x, precision=precision).x for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    got = []
    for stream, x in zip(streams, batches, strict=True):
        with torch.cuda.stream(stream):
            got.append(attack(pair, x, precision=precision).x)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@EACH
def test_captured_twice(pair, precision):
    """A graph of the whole attack, replayed on other images; and a second one beside it."""
    x = images(64)
    attack(pair, x, precision=precision)  # what is done once only is done
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attack(pair, x, precision=precision).x
        graphs.append((graph, out))
    for seed in (5, 6):
        x.copy_(images(64, seed))
        expected = attack(pair, x, precision=precision).x
        for graph, out in graphs:
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)


@EACH
def test_running_out_of_memory_is_an_error_and_no_more(pair, precision):
    x = images(64)
    expected = attack(pair, x, precision=precision).x
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            ops.chain_pgd(x, x, *pair, **{**ATTACK, "steps": 2000, "iterates": True}, precision=precision)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(attack(pair, x, precision=precision).x, expected)


def test_mixed_devices(pair):
    x, (plan, packed) = images(2), pair[0]
    with pytest.raises(InputError, match="packed must be on cuda:0, got cpu"):
        ops.chain_forward(x, plan, packed.cpu(), [0])
    with pytest.raises(InputError, match="plan must be on cpu, got cuda:0"):
        ops.chain_forward(x, plan.cuda(), packed, [0])
    with pytest.raises(InputError, match="start must be on cuda:0, got cpu"):
        ops.chain_pgd(x, x.cpu(), *pair, **ATTACK)


@pytest.mark.slow  # 18 GB
def test_more_than_two_to_the_31_values():
    net = ConvReLU((8, 8), seed=3).cuda().eval()
    chain = compile(net)
    n = 2**31 // 3072 + 300
    x = images(300).repeat(-(-n // 300), 1, 1, 1)[:n]
    logits = chain(x)
    assert torch.equal(logits[-300:], chain(x[-300:].contiguous()))
    got = ops.chain_pgd(x, x, (chain.plan, chain.packed), None, torch.zeros(n, dtype=torch.int64, device="cuda"),
                        loss="cross_entropy", eps=0.03, step_size=0.02, steps=1, precision="float16")  # fmt: skip
    last = x[-300:].contiguous()
    alone = ops.chain_pgd(last, last, (chain.plan, chain.packed), None, torch.zeros(300, dtype=torch.int64, device="cuda"),
                          loss="cross_entropy", eps=0.03, step_size=0.02, steps=1, precision="float16")  # fmt: skip
    assert torch.equal(got.x[-300:], alone.x)
