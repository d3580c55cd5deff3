"""Fused kernels compiled at run time: which networks can have one, the compiler, the cache, and (with a GPU) the attack itself."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import tsrfast
from tsrfast import _native
from tsrfast.chain import FusedKernel, fuse, fusing, nvrtc, precompile
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets import ConvReLU
from tsrfast.ops.chain import chain_pgd, has_fused_kernel
from tsrfast.ops.chain_fused import fused_headers, fused_kernel, load_fused

IMAGE = (3, 12, 12)
NET = "tsr::fused::Net<12, 4, 8, 16>"


def net(channels=(8, 16), image=IMAGE, classes=4, seed=0):
    return ConvReLU(channels, image=image, classes=classes, seed=seed)


def plan(model, image=None):
    """On the CPU the same as on CUDA; compiling tries a network, which the emulator is slow at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "emulator", None)
        return tsrfast.compile(model, image).plan


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Some build of the CUDA sources: what is asked here needs no GPU, and the emulator has no kernel more."""
    if _native._C.with_cuda:
        return
    try:
        from tsrfast import _emu
    except ImportError:
        pytest.skip("built without CUDA kernels and without their emulator")
    monkeypatch.setattr(_native, "emulator", _emu)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TSRFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fused"


@pytest.fixture
def compiler():
    return nvrtc.find()  # the extra `test` has it


class FakeCompiler:
    version = "1.2"

    def __init__(self):
        self.asked = []

    def compile(self, source, headers, kernel, options):
        self.asked.append((kernel, options))
        return f"cubin\n{len(self.asked)}".encode(), "symbol"


@pytest.fixture
def fake(monkeypatch):
    one = FakeCompiler()
    monkeypatch.setattr(nvrtc, "find", lambda: one)
    return one


# Which networks.


def test_the_name_says_the_sizes_of_the_plan():
    name, size = fused_kernel(plan(net()), None)
    assert name == f"tsr::fused::chain_fused_kernel<tsr::fused::Instance<tsr::fused::NoNet, {NET}>>"
    other, more = fused_kernel(plan(net()), plan(net((9, 3, 20))))
    assert other == f"tsr::fused::chain_fused_kernel<tsr::fused::Instance<tsr::fused::Net<12, 4, 9, 3, 20>, {NET}>>"
    image_and_stages = 4 * 3 * 12 * 12 + 2 * 5376
    assert image_and_stages < size < more < 232448


class Other(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def conv(c, o, **kw):
    return nn.Conv2d(c, o, 3, **kw)


@pytest.mark.parametrize(
    ("model", "image", "why"),
    [
        (net((64, 64, 64, 64), (3, 32, 32)), None, r"takes \d{6} bytes of shared memory, a block has 232448"),
        (net(image=(3, 150, 150)), None, "the image alone takes 270000 bytes of shared memory, a block has 232448"),
        (net((8,)), None, "2 to 6 convolutions and a linear layer, got 2 records"),
        (net((4,) * 7, (3, 18, 18)), None, "2 to 6 convolutions and a linear layer, got 8 records"),
        (net(image=(3, 13, 13)), None, "side must be even, got 13"),
        (net(image=(3, 12, 14)), None, "record 0 must be a 3x3 convolution .* 3 channels in, a square map"),
        (net(image=(1, 12, 12)), None, "record 0 must be a 3x3 convolution"),
        (net((8, 176)), None, "record 1 must have at most 168 channels, got 176"),
        (net((88, 8)), None, "record 0 must have at most 80 channels, got 88"),
        (net((8, 64), (3, 30, 30)), None, r"needs \d+ registers of a thread for sums, of 160"),
        (Other(conv(3, 8, padding=1), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4)), IMAGE, "record 0"),
        (Other(conv(3, 8), nn.ReLU(), conv(8, 8, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)), IMAGE, "record 1"),
        (Other(conv(3, 8), nn.LeakyReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)), IMAGE, "record 0"),
        (
            Other(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4), nn.Flatten()),
            IMAGE,
            "last record must be a linear layer",
        ),
        (Other(*[nn.Linear(12, 12), nn.ReLU()] * 3, nn.Linear(12, 4)), (12,), "record 0 must be a 3x3 convolution"),
    ],
)
def test_says_why_a_network_can_have_none(model, image, why):
    with pytest.raises(InputError, match=f"tsrfast.chain.fuse: no fused kernel can take this network: student: .*{why}"):
        fused_kernel(plan(model, image), None)
    assert not has_fused_kernel(plan(model, image), None, "cross_entropy", "linf")


def test_says_why_a_pair_can_have_none():
    with pytest.raises(InputError, match="same image and classes"):
        fused_kernel(plan(net()), plan(net(classes=5)))
    with pytest.raises(InputError, match="teacher: the image's side must be even"):
        fused_kernel(plan(net()), plan(net(image=(3, 13, 13))))
    first, second = (plan(net(channels, (3, 32, 32))) for channels in ((72, 8, 8), (8, 88, 8)))  # large in different buffers
    for alone in (first, second):
        fused_kernel(alone, None)
    with pytest.raises(InputError, match=r"student and teacher take \d+ bytes of shared memory, a block has 232448"):
        fused_kernel(first, second)


def test_refuses_what_is_no_network():
    with pytest.raises(InputError, match=r"student must be an nn.Module or a Chain, got str"):
        precompile("net")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"teacher must be an nn.Module or a Chain, got int"):
        fuse(net(), 3)  # type: ignore[arg-type]


# The compiler.


def test_headers_are_complete():
    """All that cuda/chain_fused.cuh includes, and no more; what only host code or the emulator needs is not seen by NVRTC."""
    headers = fused_headers()
    reached, left = set(), {"cuda/chain_fused.cuh"}
    while left:
        name = left.pop()
        reached.add(name)
        left |= {i for i in re.findall(r'^#include "(.+)"', headers[name], re.M) if not i.startswith("emu/")} - reached
    assert reached == set(headers)


def test_compiles_a_network_that_has_no_kernel(compiler, cache):
    model = net()
    assert not has_fused_kernel(plan(net((6, 16))), None, "cross_entropy", "linf")
    got = precompile(model)
    name, size = fused_kernel(plan(model), None)
    assert got == FusedKernel(name, size, "sm_90a", got.file)
    assert got.file is not None
    assert [got.file] == list(cache.iterdir())
    entry = fusing._read(got.file)
    assert entry is not None
    assert entry.cubin.startswith(b"\x7fELF")
    assert entry.symbol.encode() in entry.cubin
    assert "NetILi12ELi4EJLi8ELi16EEE" in entry.symbol
    assert entry.version == compiler.version


def test_says_what_the_compiler_said(compiler):
    with pytest.raises(EnvironmentFault, match=r"(?s)cannot compile f<1> .*identifier \"nonsense\" is undefined"):
        compiler.compile("template <int> __global__ void f() { nonsense; }", {}, "f<1>", ["--gpu-architecture=sm_90a"])
    with pytest.raises(EnvironmentFault, match=r"(?s)with --gpu-architecture=sm_1: .*invalid value for --gpu-architecture"):
        compiler.compile("template <int> __global__ void f() {}", {}, "f<1>", ["--gpu-architecture=sm_1"])


def test_says_how_to_get_the_compiler(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    with pytest.raises(EnvironmentFault, match=r"pip install 'tsrfast\[jit\]'.*TSRFAST_NVRTC; none was found"):
        precompile(net())
    monkeypatch.undo()
    for wrong in ("/nowhere/libnvrtc.so", "libc.so.6"):
        monkeypatch.setenv("TSRFAST_NVRTC", wrong)
        with pytest.raises(EnvironmentFault, match=f"tried {wrong} "):
            nvrtc.find()


def test_prefers_torchs_own_cuda(monkeypatch, tmp_path):
    monkeypatch.delenv("TSRFAST_NVRTC", raising=False)
    for place in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12"):
        (tmp_path / "nvidia" / place).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / place).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for version, first in (("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert next(nvrtc._candidates()).endswith(first)


# The cache.


def test_compiles_once(fake, cache, monkeypatch, capfd):
    first = precompile(net())
    assert first.file is not None
    assert first.file.parent == cache
    assert re.fullmatch(r"[0-9a-f]{64}\.cubin", first.file.name)
    assert f"NVRTC 1.2 compiles {first.name} for sm_90a" in capfd.readouterr().err
    monkeypatch.setattr(nvrtc, "find", lambda: pytest.fail("what is in the cache needs no compiler"))
    assert precompile(net(seed=1)) == first
    assert capfd.readouterr().err == ""
    assert fusing._read(first.file) == (b"cubin\n1", "symbol", "1.2")


def test_another_kernel_is_another_file(fake, monkeypatch):
    files = {precompile(net()).file, precompile(net((8, 8))).file, precompile(net(), net()).file}
    files.add(precompile(net(), architecture="sm_100").file)
    headers = fused_headers()
    monkeypatch.setattr(fusing, "fused_headers", lambda: {**headers, "cuda/tensor.cuh": ""})
    files.add(precompile(net()).file)
    assert len(files) == len(fake.asked) == 5
    assert [options[0] for _, options in fake.asked[2:4]] == ["--gpu-architecture=sm_90a", "--gpu-architecture=sm_100"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-1],
        lambda b: b + b"\0",
        lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        lambda b: b.replace(b"symbol", b"symbl", 1),
        lambda b: b.replace(b'"symbol": "symbol"', b'"symbol": "other"'),
        lambda b: b"[]\n",
        lambda b: b"\xff\n",
    ],
)
def test_a_damaged_file_is_compiled_anew(fake, damage, capfd):
    path = precompile(net()).file
    assert path is not None
    path.write_bytes(damage(path.read_bytes()))
    assert precompile(net()).file == path
    assert f"{path} is damaged" in capfd.readouterr().err
    assert len(fake.asked) == 2
    assert fusing._read(path) == (b"cubin\n2", "symbol", "1.2")


def test_a_failure_leaves_nothing(fake, cache, monkeypatch):
    def fail(*args):
        raise EnvironmentFault("log")

    monkeypatch.setattr(fake, "compile", fail)
    with pytest.raises(EnvironmentFault, match="log"):
        precompile(net())
    assert list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_written(fake, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSRFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFault, match=re.escape(str(tmp_path / "file"))):
        precompile(net())
    assert fake.asked == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert fusing._folder() == tmp_path / "cache" / "fused"
    monkeypatch.delenv("TSRFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fusing._folder() == tmp_path / "xdg" / "tsrfast" / "fused"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fusing._folder() == tmp_path / ".cache" / "tsrfast" / "fused"


AT_ONCE = """
import sys, time
from pathlib import Path
from tsrfast import _native
from tsrfast.chain import nvrtc, precompile
from tsrfast.nets import ConvReLU

if not _native._C.with_cuda:
    from tsrfast import _emu
    _native.emulator = _emu
mine, other = map(Path, sys.argv[1:])

class Compiler:
    version = "1.2"
    def compile(self, *args):
        mine.touch()
        while not other.exists():  # both are compiling now
            time.sleep(0.01)
        return b"cubin" * 100_000, "symbol"

nvrtc.find = Compiler
print(precompile(ConvReLU((8, 16), image=(3, 12, 12), classes=4)).file)
"""


def test_two_processes_at_once(cache, tmp_path):
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    runs = [
        subprocess.Popen([sys.executable, "-c", AT_ONCE, *order], stdout=subprocess.PIPE, text=True)
        for order in (names, names[::-1])
    ]
    try:
        said = {run.communicate(timeout=120)[0].strip() for run in runs}
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0]
    (path,) = cache.iterdir()
    assert said == {str(path)}
    assert fusing._read(path) == (b"cubin" * 100_000, "symbol", "1.2")


# Loading and running.


def test_needs_a_device(fake):
    if torch.cuda.is_available():
        with pytest.raises(InputError, match="the networks must be on one CUDA device, got cpu"):
            fuse(net())
    else:
        with pytest.raises(EnvironmentFault, match="there is no CUDA device here"):
            fuse(net())
    assert fake.asked == []


def test_what_is_no_kernel_is_not_taken():
    model = net((6, 16))
    with pytest.raises(EnvironmentFault, match="tsrfast: "):
        load_fused(plan(model), None, b"no cubin", "symbol", 0)
    assert not has_fused_kernel(plan(model), None, "cross_entropy", "linf")


def test_architectures():
    assert [fusing.architecture_of(c) for c in ((9, 0), (10, 0), (12, 0))] == ["sm_90a", "sm_100", "sm_120"]


@pytest.mark.cuda
@pytest.mark.parametrize("pair", [False, True])
def test_a_compiled_kernel_attacks_as_the_layers_do(compiler, pair):
    """Without the kernel float16 attacks run layer by layer; the two differ by the order of their float32 sums."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    generator = torch.Generator().manual_seed(1)
    student, teacher = net((11, 22 + pair, 9)).cuda().eval(), net((13, 10), seed=1).cuda().eval() if pair else None
    chains = [tsrfast.compile(n) for n in (student, teacher) if n is not None]
    networks = [(c.plan, c.packed) for c in chains]
    loss = "oracle_l2" if pair else "cross_entropy"
    x = torch.rand(300, *IMAGE, generator=generator).cuda()
    start = (x + (torch.rand(x.shape, generator=generator).cuda() * 2 - 1) * 8 / 255).clamp(0, 1)
    labels = None if pair else torch.randint(0, 4, (300,), generator=generator).cuda()

    def attack(steps, precision="float16"):
        return chain_pgd(
            x, start, *networks, labels=labels, loss=loss, eps=8 / 255, step_size=2 / 255, steps=steps, precision=precision
        )

    plans = [c.plan for c in chains] + [None] * (not pair)
    assert not has_fused_kernel(*plans, loss, "linf")
    layers = {steps: attack(steps) for steps in (1, 10)}
    made = fuse(student, teacher)
    assert made.file is not None
    assert has_fused_kernel(*plans, loss, "linf")
    assert fuse(*chains).file is None  # already there
    for steps, wanted in layers.items():
        got = attack(steps)
        assert got.queries.tolist() == [steps + 1] * 300
        assert int(got.bad.sum()) == 0
        same = (got.x - wanted.x).abs() <= 1e-6
        # a sign may differ where the gradient is a rounding error; after ten steps, where it has been one
        assert same.float().mean() >= (0.998 if steps == 1 else 0.97)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=2e-2, atol=2e-3)
    exact = attack(1, "float32")
    assert ((attack(1).x - exact.x).abs() <= 1e-6).float().mean() >= 0.99
