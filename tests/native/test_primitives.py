"""The functions of csrc/cuda/tensor.cuh, run by tests/native/primitives.cu: the emulator, and a GPU, against their definitions.

The definitions are written here once more, in NumPy, from the tables of the PTX manual. An intrinsic whose machine code does something
else than its documentation is only seen on a GPU (marker cuda; nvcc compiles for the one at hand).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

NATIVE = Path(__file__).resolve().parent
CSRC = NATIVE.parents[1] / "csrc"
SOURCE = NATIVE / "primitives.cu"
THREADS, WORDS = 64, 1024
# Relative to sum |a b| + |c|: sixteen float32 additions. (Tensor cores align all products to the largest, and cut: no worse.)
MMA_ERROR = 16 * 2.0**-24

Words = dict[str, np.ndarray]


# --- the input ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bits() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 2**32, WORDS, dtype=np.uint32)


@pytest.fixture(scope="module")
def value() -> np.ndarray:
    """Three quarters of ordinary numbers, for products; then what conversions have to get right."""
    rng = np.random.default_rng(6)
    v = rng.uniform(-2, 2, WORDS).astype(np.float32)
    half = rng.integers(0, 2**16, 128, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        ties = np.nextafter(half, np.float16(np.inf)).astype(np.float64) / 2 + half.astype(np.float64) / 2
    special = [
        np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        65504.0,
        65519.9,
        65520.0,
        -65520.0,
        1e30,
        -1e30,
        3e-8,
        2.9e-8,
        1e-40,
        -1e-9,
        6e-5,
    ]
    v[-len(special) :] = special
    v[768 : 768 + len(ties)] = ties  # halfway between two float16: to the even one
    return v


# --- the definitions ------------------------------------------------------------------------------------------------------


def float16(v: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return v.astype(np.float16).view(np.uint16).astype(np.uint32)


def bfloat16(v: np.ndarray) -> np.ndarray:
    return torch.from_numpy(v).bfloat16().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def tf32(v: np.ndarray) -> np.ndarray:
    """11 significant bits, ties away from 0."""
    bits = v.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x1000) & 0xFFFFE000
    return np.where(np.isfinite(v), rounded, bits).astype(np.uint32)


def words(v: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(v).view(np.uint32).reshape(-1)


def pairs(lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    return lo | hi << np.uint32(16)


def matrices(bits: np.ndarray, transposed: bool) -> np.ndarray:
    """[threads, 4] words of ldmatrix: row r of matrix q is at the address of lane 8 q + r; lane l has (l / 4, 2 (l % 4) and next)."""
    found = np.zeros((THREADS, 4), np.uint32)
    at = bits[:THREADS] % (WORDS // 4) * 8  # in 16-bit values
    halves = bits.view(np.uint16).astype(np.uint32)
    for thread in range(THREADS):
        warp, row, column = thread // 32 * 32, thread % 32 // 4, 2 * (thread % 4)
        for q in range(4):
            matrix = np.stack([halves[at[warp + 8 * q + r] :][:8] for r in range(8)])
            matrix = matrix.T if transposed else matrix
            found[thread, q] = pairs(matrix[row, column], matrix[row, column + 1])
    return found.reshape(-1)


def fragments(value: np.ndarray, kind: str, warp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and C of a warp in float64, from the tables in tensor.cuh; operands rounded to the kind."""
    number, raw = value.reshape(-1, THREADS)[:, warp : warp + 32], value.reshape(-1, THREADS)[:4, warp : warp + 32]
    g, t = np.arange(32) // 4, np.arange(32) % 4
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(4):
        c[g + 8 * (i // 2), 2 * t + i % 2] = raw[i]
    if kind == "tf32":  # one number a register
        number = tf32(number).view(np.float32).astype(np.float64)
        for r in range(4):
            a[g + 8 * (r % 2), t + 4 * (r // 2)] = number[r]
        for r in range(2):
            b[t + 4 * r, g] = number[4 + r]
        return a, b, c
    number = torch.from_numpy(number.copy()).to(getattr(torch, kind.split()[0])).double().numpy()
    depth = int(kind.split()[1])
    for half in range(2):
        for r in range(depth // 4):
            a[g + 8 * (r % 2), 2 * t + half + 8 * (r // 2)] = number[2 * r + half]
        for r in range(depth // 8):
            b[2 * t + half + 8 * r, g] = number[8 + 2 * r + half]
    return a, b, c


def product(value: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """C + A B in float64 as [threads, 4], and sum |a b| + |c|."""
    result, size = np.zeros((THREADS, 4)), np.zeros((THREADS, 4))
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for warp in (0, 32):
        a, b, c = fragments(value, kind, warp)
        for i in range(4):
            at = g + 8 * (i // 2), 2 * t + i % 2
            result[warp : warp + 32, i], size[warp : warp + 32, i] = (c + a @ b)[at], (abs(c) + abs(a) @ abs(b))[at]
    return result, size


PRODUCTS = {"mma_f16_k16": "float16 16", "mma_f16_k8": "float16 8", "mma_bf16_k16": "bfloat16 16", "mma_tf32_k8": "tf32"}
FLOAT16_PAIRS, BFLOAT16_PAIRS, FLOAT32 = (
    {"pack_f16", "pack_f16_relu", "float_to_half_bits"},
    {"pack_bf16"},
    {"unpack_f16", "half_bits_to_float", "round_tf32"},
)


def definitions(bits: np.ndarray, value: np.ndarray) -> Words:
    """What each function must give; sums of products apart."""
    thread = np.arange(THREADS, dtype=np.uint32)
    behind = bits[::-1].copy()  # the second half of shared memory

    def loads(count: int) -> np.ndarray:
        at = bits[:THREADS] % (WORDS // count) * count
        return bits[at[:, None] + np.arange(count)].reshape(-1)

    def stores(at: int, what: np.ndarray) -> np.ndarray:
        after = behind[: 4 * THREADS].reshape(THREADS, 4).copy()
        after[:, at : at + what.shape[1]] = what
        return after.reshape(-1)

    copied = loads(4).reshape(THREADS, 4) * (thread % 3 != 0)[:, None]
    few = behind[: 4 * THREADS].reshape(THREADS, 4).copy()
    few[:, 0], few[:, 2:] = loads(1) * (thread % 3 != 0), loads(2).reshape(THREADS, 2) * (thread % 5 != 0)[:, None]
    swapped = np.concatenate([bits[WORDS // 2 :], bits[: WORDS // 2]])
    again = np.concatenate([bits[WORDS // 2 + 4 :], bits[:4], bits[4 : WORDS // 2], bits[:4]])
    halves, mirrored = bits.view(np.uint16).reshape(-1, 2), value[::-1].copy()
    with np.errstate(invalid="ignore"):
        positive, mirrored_positive = (np.where(v > 0, v, np.where(np.isnan(v), v, np.float32(0))) for v in (value, mirrored))
    return {
        "shared_address": 12 * thread,
        "lane_id": thread % 32,
        "warp_id": thread // 32,
        "block_barrier": ~bits[:THREADS][::-1] + (thread >= 40),
        "load_u32": loads(1),
        "load_f32": loads(1),
        "load_f64": loads(2),
        "load_u32x2": loads(2),
        "load_u32x4": loads(4),
        "store_u32": stores(1, bits[:THREADS, None]),
        "store_f32": stores(2, words(value[:THREADS])[:, None]),
        "store_f64": stores(2, words(value[:THREADS].astype(np.float64)).reshape(THREADS, 2)),
        "store_u32x4": stores(0, bits[: 4 * THREADS].reshape(THREADS, 4)),
        "ldmatrix_x4": matrices(bits, False),
        "ldmatrix_x4_trans": matrices(bits, True),
        "pack_f16": pairs(float16(value), float16(mirrored)),
        "pack_f16_relu": pairs(float16(positive), float16(mirrored_positive)),
        "pack_bf16": pairs(bfloat16(value), bfloat16(mirrored)),
        "unpack_f16": words(halves.view(np.float16).astype(np.float32)),
        "half_bits_to_float": words(halves.view(np.float16)[:, 0].astype(np.float32)),
        "float_to_half_bits": float16(value),
        "round_tf32": tf32(value),
        "sign_masks": pairs(*((halves[:, k] >> 15).astype(np.uint32) * 0xFFFF for k in (0, 1))),
        "copy_async_16": np.concatenate([copied, bits[: 4 * THREADS].reshape(THREADS, 4)], 1).reshape(-1),
        "copy_async_cached": np.concatenate([few.reshape(-1), copied.reshape(-1)]),
        "copy_bulk": np.concatenate([swapped, again]),
        "count_up": np.sort(thread % 6),
    }


def same_nan(name: str, found: np.ndarray) -> np.ndarray:
    """With one NaN for all: nobody promises its bits."""
    if name in FLOAT32:
        return np.where(np.isnan(found.view(np.float32)), np.uint32(0x7FFFFFFF), found)
    halves = found.view(np.uint16)
    if name in FLOAT16_PAIRS:
        return np.where(np.isnan(halves.view(np.float16)), np.uint16(0x7FFF), halves)
    if name in BFLOAT16_PAIRS:
        return np.where(halves & 0x7FFF > 0x7F80, np.uint16(0x7FFF), halves)
    return found


def assert_as_defined(found: Words, bits: np.ndarray, value: np.ndarray, architecture: int) -> None:
    exact = definitions(bits, value)
    if architecture < 90:
        del exact["copy_bulk"]
    assert found.keys() == exact.keys() | PRODUCTS.keys()
    for name, want in exact.items():
        got = np.sort(found[name]) if name == "count_up" else found[name]  # who comes first is open
        np.testing.assert_array_equal(same_nan(name, got), same_nan(name, want.astype(np.uint32)), name)
    for name, kind in PRODUCTS.items():
        want, size = product(value, kind)
        error = abs(found[name].view(np.float32).reshape(THREADS, 4) - want)
        assert (error <= MMA_ERROR * size).all(), f"{name}: {(error / size).max():.2e}"


# --- the runs -------------------------------------------------------------------------------------------------------------


def run(program: Path, folder: Path, bits: np.ndarray, value: np.ndarray, **env: str) -> Words:
    (folder / "in").write_bytes(bits.tobytes() + value.tobytes())
    done = subprocess.run([program, folder / "in"], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = (line.split() for line in done.stdout.splitlines())
    return {name: np.array([int(w, 16) for w in rest], np.uint32) for name, *rest in lines}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("primitives") / "emulated"
    flags = [
        "-std=c++17",
        "-O1",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-parameter",
    ]
    subprocess.run(["g++", *flags, "-DTSR_EMU", f"-I{CSRC}", "-x", "c++", SOURCE, "-o", program], check=True)
    return program


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_emulator_is_as_defined(emulated, tmp_path, bits, value, order):
    assert_as_defined(run(emulated, tmp_path, bits, value, EMU_ORDER=order), bits, value, 90)


@pytest.mark.cuda
def test_gpu_is_as_defined(tmp_path, bits, value):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("needs nvcc")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    program = tmp_path / "primitives"
    subprocess.run([nvcc, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{arch}", SOURCE, "-o", program], check=True)
    assert_as_defined(run(program, tmp_path, bits, value), bits, value, 10 * major + minor)


def test_every_primitive_is_run():
    def declared(header: str) -> set[str]:
        return set(re.findall(r"^TSR_DEVICE [\w ]+?(\w+)\(", (CSRC / header).read_text(), re.MULTILINE))

    device, program = declared("cuda/tensor.cuh"), SOURCE.read_text()
    assert len(device) > 30
    assert declared("emu/tensor.h") >= device, "functions without an emulation"
    missing = {name for name in device if not re.search(rf"\b{name}(<\d+>)?\(", program)}
    assert not missing, f"primitives.cu does not run {sorted(missing)}"
    kernels, listed = set(re.findall(r"void (\w+)_check\(", program)), set(re.findall(r'\{"(\w+)", \1_check,', program))
    assert kernels == listed
