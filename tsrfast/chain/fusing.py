"""Fused attacks for networks that have no kernel in the build: compiled by NVRTC, kept on disk, loaded into this process.

A fused kernel (csrc/cuda/chain_fused.cuh) is made for the exact sizes of its networks. The build has those of the paper's networks; for
others there is `fuse`, which takes about half a minute once for a machine, and `precompile`, which needs no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tsrfast._files import atomic_path
from tsrfast.chain import nvrtc
from tsrfast.chain.chain import Chain, compile
from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.ops.chain_fused import fused_headers, fused_kernel, fused_ready, load_fused

Network = nn.Module | Chain
_SOURCE = '#include "cuda/chain_fused.cuh"\n'
_LEAST = (9, 0)  # what the kernel's copies and barriers need


class FusedKernel(NamedTuple):
    """A kernel for one pair of networks, or one network alone.

    Attributes:
        name: in C++, with the networks' sizes: image side, classes, channels of each convolution.
        shared_bytes: of shared memory that it takes.
        architecture: e.g. ``sm_90a``.
        file: where it is kept; None if the process had it already.
    """

    name: str
    shared_bytes: int
    architecture: str
    file: Path | None


def fuse(student: Network, teacher: Network | None = None, *, image: Sequence[int] | Tensor | None = None) -> FusedKernel:
    """Give this process the fused kernel for float16 attacks on these networks; compile it if the cache has it not.

    From then on `PGD` and `tsrfast.ops.chain_pgd` take it for all networks of the same sizes: with a teacher for the oracle losses, without
    one for those of labels. The cache is the folder TSRFAST_CACHE, else tsrfast in XDG_CACHE_HOME or ~/.cache; what it has needs no NVRTC.

    Args:
        student: network, or its chain, on the CUDA device that is to run it: 2 to 6 convolutions 3x3 (stride 1, no padding) with ReLU on
            square RGB images of even side, then one linear layer; channel counts such that all fits into shared memory.
        teacher: the same, if the attack has one.
        image: as in `tsrfast.compile`.

    Returns:
        The kernel.

    Raises:
        InputError: no fused kernel can take the networks, and why (too large: with its bytes); they are not on one CUDA device.
        EnvironmentFault: no CUDA device of compute capability 9.0 or later; no NVRTC, and not in the cache; it does not compile (with the
            compiler's log); the cache cannot be written.
    """
    plans = _plans(student, teacher, image)
    name, size = fused_kernel(*plans)
    device = _device(student, teacher)
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        raise EnvironmentFault(
            f"tsrfast.chain.fuse: the kernel needs a GPU of compute capability 9.0 or later, {device} has {capability[0]}.{capability[1]}"
        )
    architecture = architecture_of(capability)
    if fused_ready(*plans, capability):
        return FusedKernel(name, size, architecture, None)
    path, (cubin, symbol, version) = _obtain(name, architecture)
    try:
        load_fused(*plans, cubin, symbol, torch.cuda.current_device() if device.index is None else device.index)
    except EnvironmentFault as e:
        raise EnvironmentFault(f"tsrfast.chain.fuse: {path}, compiled by NVRTC {version} for {architecture}: {e}") from None
    return FusedKernel(name, size, architecture, path)


def precompile(
    student: Network,
    teacher: Network | None = None,
    *,
    image: Sequence[int] | Tensor | None = None,
    architecture: str = "sm_90a",
) -> FusedKernel:
    """Put the kernel of `fuse` into the cache, on any machine: for one whose GPU nodes lack NVRTC.

    Args:
        student, teacher, image: as in `fuse`, on any device.
        architecture: of the GPU, as in nvcc's ``-arch``; ``sm_90a`` for H100 and H200.

    Raises:
        InputError, EnvironmentFault: as `fuse`, but for the device.
    """
    name, size = fused_kernel(*_plans(student, teacher, image))
    path, _ = _obtain(name, architecture)
    return FusedKernel(name, size, architecture, path)


def architecture_of(capability: tuple[int, int]) -> str:
    """Of a compute capability, as NVRTC calls it; for 9.0 the one the build's kernels are for."""
    return f"sm_{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}"


def _plans(student: Network, teacher: Network | None, image: Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor | None]:
    for who, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, (nn.Module, Chain)) and not (network is None and who == "teacher"):
            raise InputError(f"tsrfast.chain.fuse: {who} must be an nn.Module or a Chain, got {type(network).__name__}")
    return _plan(student, image), None if teacher is None else _plan(teacher, image)


def _plan(network: Network, image: Sequence[int] | Tensor | None) -> Tensor:
    return network.plan if isinstance(network, Chain) else compile(network, image).plan


def _device(student: Network, teacher: Network | None) -> torch.device:
    if not torch.cuda.is_available():
        raise EnvironmentFault("tsrfast.chain.fuse: there is no CUDA device here; tsrfast.chain.precompile needs none")
    devices = [n.device if isinstance(n, Chain) else next(n.parameters()).device for n in (student, teacher) if n is not None]
    if devices[0].type != "cuda" or len(set(devices)) > 1:
        raise InputError(f"tsrfast.chain.fuse: the networks must be on one CUDA device, got {', '.join(map(str, devices))}")
    return devices[0]


class _Entry(NamedTuple):
    cubin: bytes
    symbol: str
    version: str  # of the NVRTC that compiled it


def _folder() -> Path:
    own = os.environ.get("TSRFAST_CACHE")
    if own:
        return Path(own) / "fused"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tsrfast" / "fused"


def _obtain(name: str, architecture: str) -> tuple[Path, _Entry]:
    """From the cache, whose names are the hashes of all that goes into a kernel, or compiled into it."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space"]
    headers = fused_headers()
    key = hashlib.sha256(json.dumps([name, options, _SOURCE, headers], sort_keys=True).encode()).hexdigest()
    path = _folder() / f"{key}.cubin"
    entry = _read(path)
    if entry is not None:
        return path, entry
    from tsrfast._progress import Reporter  # rich: not when tsrfast is imported

    reporter = Reporter()
    if path.exists():
        reporter.say(f"tsrfast.chain.fuse: {path} is damaged, compiling anew")
    compiler = nvrtc.find()
    with atomic_path(path) as temp:  # first: a folder that cannot be written is found out at once
        reporter.say(
            f"tsrfast.chain.fuse: NVRTC {compiler.version} compiles {name} for {architecture} (about half a minute, once)"
        )
        began = time.monotonic()
        entry = _Entry(*compiler.compile(_SOURCE, headers, name, options), compiler.version)
        temp.write_bytes(_written(entry))
        reporter.say(f"tsrfast.chain.fuse: compiled in {time.monotonic() - began:.1f} s, kept in {path}")
    return path, entry


# An entry of the cache: a line of JSON, then the cubin.
def _written(entry: _Entry) -> bytes:
    about = {"symbol": entry.symbol, "nvrtc": entry.version}
    return json.dumps({**about, "sha256": _sum(about, entry.cubin)}).encode() + b"\n" + entry.cubin


def _read(path: Path) -> _Entry | None:
    """None if there is no such file, or not what was written."""
    try:
        line, _, cubin = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise EnvironmentFault(f"tsrfast.chain.fuse: cannot read {path}: {e.strerror or e}") from e
    try:
        about = json.loads(line)
        whole = isinstance(about, dict) and about.pop("sha256", None) == _sum(about, cubin)
    except ValueError:
        return None
    return _Entry(cubin, about["symbol"], about["nvrtc"]) if whole else None


def _sum(about: dict[str, str], cubin: bytes) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode() + cubin).hexdigest()
