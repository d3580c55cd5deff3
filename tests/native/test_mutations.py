"""Typical CUDA mistakes, planted one at a time: does the check of that kernel (sanitized, threads in random order) notice each?

Slow (it compiles): pytest -m slow tests/native/test_mutations.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# What holds the kernels of a file against the CPU, by the beginning of the file's name. "": all others.
CHECKS = {"chain_fused": "fused_check", "chain_correlation": "correlation_check", "chain": "layers_check", "": "emu_check"}


class Fault(NamedTuple):
    file: str  # in csrc/cuda
    right: str  # its first occurrence is replaced
    wrong: str


FAULTS = {
    "no barrier before partial sums are read": Fault(
        "reduce.cuh", "part[threadIdx.x / 32] = v;\n  __syncthreads();", "part[threadIdx.x / 32] = v;"
    ),
    "no barrier before partial sums are reused": Fault("reduce.cuh", "neutral, op);\n  __syncthreads();", "neutral, op);"),
    "one partial sum too many": Fault("reduce.cuh", "< blockDim.x / 32 ?", "<= blockDim.x / 32 ?"),
    "shuffle starts at 8": Fault("reduce.cuh", "int o = 16", "int o = 8"),
    "wrong lane mask": Fault("reduce.cuh", "0xffffffffu", "0x0000ffffu"),
    "maximum is minimum": Fault("reduce.cuh", "a > b ? a : b", "a > b ? b : a"),
    "unguarded store": Fault("pgd_step.cu", "if (j < a.d) store(m.out[j]", "store(m.out[j]"),
    "unguarded load": Fault("pgd_step.cu", "j < a.d ? m.gradient(j) : C(0)", "m.gradient(j)"),
    "loop runs one too far": Fault(
        "pgd_step.cu", "for (int64_t j = threadIdx.x; j < a.d;", "for (int64_t j = threadIdx.x; j <= a.d;"
    ),
    "stride forgets a warp": Fault("pgd_step.cu", "j += kThreads", "j += kThreads - 32"),
    "shared memory too small": Fault("pgd_step.cu", "32 * sizeof(double)", "4 * sizeof(double)"),
    "every lane adds the warp's count": Fault("pgd_step.cu", "if (nan && threadIdx.x % 32 == 0)", "if (nan)"),
    "projection forgets a warp": Fault("hyperplane_projection.cu", "j += kThreads", "j += kThreads - 32"),
    "projection writes one too far": Fault(
        "hyperplane_projection.cu",
        "j < d; j += kThreads) {\n      const Coordinate x = at(j);",
        "j <= d; j += kThreads) {\n      const Coordinate x = at(j);",
    ),
    "projection of the first image": Fault("hyperplane_projection.cu", "a.b[i] ? 1.0", "a.b[0] ? 1.0"),
    "gate bit of the wrong lane": Fault("relu_gate.cu", "a.gate[w] >> lane & 1u", "a.gate[w] >> (lane ^ 1) & 1u"),
    "vote inside a branch": Fault(
        "relu_gate.cu", "const uint32_t bits = __ballot", "if (!there) continue;\n    const uint32_t bits = __ballot"
    ),
    "rows overwritten while read": Fault("channel_correlation.cu", "__syncthreads();  // sums are there", "// sums are there"),
    "unguarded channel": Fault("channel_correlation.cu", "if (k < cs && col < ct)", "if (k < cs)"),
    "student's shift for the teacher": Fault("channel_correlation.cu", "first_j, shift + kEdge,", "first_j, shift,"),
    "a piece read before it has come": Fault(
        "channel_correlation.cu",
        "copy_async_wait<kDepth - 1>();\n      __syncwarp()",
        "copy_async_wait<kDepth>();\n      __syncwarp()",
    ),
    "halves of a fragment in the wrong order": Fault(
        "channel_correlation.cu",
        "hi[i][half] = x.hi[0], hi[i][half + 2] = x.hi[1]",
        "hi[i][2 * half] = x.hi[0], hi[i][2 * half + 1] = x.hi[1]",
    ),
    "unguarded product": Fault("channel_correlation.cu", "row < rows_m && column < rows_n", "row < rows_m"),
    "the lower half of one factor forgotten": Fault("channel_correlation.cu", "multiply(T{}, d, hi[i], y.lo);", ""),
    "student and teacher swapped back the wrong way": Fault(
        "channel_correlation.cu", "a.swapped ? cross_at(n, m,", "a.swapped ? cross_at(m, n,"
    ),
    "counter of the wrong image": Fault("philox_uniform.cu", "a.index[i]", "a.index[0]"),
    "last block unguarded": Fault("philox_uniform.cu", "if (j + k < a.d) a.out", "a.out"),
    # layer by layer
    "next stage read before all have written": Fault("chain_gemm.cuh", "    __syncthreads();  // everyone", "    // everyone"),
    "gate bit of another channel": Fault("chain_gemm.cuh", "open >> (first + 1) & 1, y", "open >> first & 1, y"),
    "gates of another image": Fault("chain_layers.cuh", "f.gates + image / f.sharing * groups", "f.gates + image * groups"),
    "waits for one copy too few": Fault(
        "chain_gemm.cuh", "copy_async_wait<T::stages - 2>();", "copy_async_wait<T::stages - 1>();"
    ),
    "a step's count taken twice": Fault("chain_attack.cuh", "  c.bad[l] = 0;\n}", "}"),
    # the whole attack in one kernel
    "layer begun before the one below is done": Fault(
        "chain_fused_layers.cuh",
        "gates + kGates, floats + kBias, warp, ring);\n    __syncthreads();",
        "gates + kGates, floats + kBias, warp, ring);",
    ),
    "ring goes on after an early stop": Fault("chain_fused.cuh", "        ring.restart();\n", ""),
    "stage refilled while a warp reads it": Fault(
        "chain_fused_layers.cuh",
        "count_up(counter(stage), kWarps - 1) == kWarps - 1",
        "count_up(counter(stage), kWarps - 1) == kWarps - 2",
    ),
    "gate of the neighbouring pair": Fault(
        "chain_fused_layers.cuh", "sign_masks(word << (pairs - 1 - pair))", "sign_masks(word << (pairs - pair))"
    ),
    "no zeros behind the last pixel": Fault("chain_fused_layers.cuh", "if (Conv::kNTiles % 2) clear_tail<Conv>(out);", ""),
    "no barrier between the networks": Fault(
        "chain_fused.cuh", "if (I::Teacher::kDepth % 2) __syncthreads();", "if (false) __syncthreads();"
    ),
    "the last iterate for the best": Fault("chain_fused.cuh", "a.keep_best ? better : done", "done"),
    "warps without a tile store": Fault(
        "chain_fused_layers.cuh",
        "static constexpr bool kHollow = kShort < kWarps && kLastPass == 1;",
        "static constexpr bool kHollow = false;",
    ),
    "tap mask of the other half": Fault(
        "chain_fused_layers.cuh", "(kx == next ? inside[t] : inside[t] >> upper)", "(inside[t])"
    ),
    # correlation in one kernel
    "a layer stored while its input is read": Fault(
        "chain_fused_layers.cuh", "warp, 0, ring);\n    block_barrier();", "warp, 0, ring);"
    ),
    "sums of maps that are not complete": Fault(
        "chain_correlation.cuh",
        "      __syncthreads();\n      sum_up<L>",
        "      sum_up<L>",
    ),
    "sums read while they are told": Fault("chain_correlation.cuh", "    __syncthreads();\n    T::add", "    T::add"),
    "next image over the sums of the last": Fault(
        "chain_correlation.cuh", "      __syncthreads();  // the next image", "      // the next image"
    ),
    "pixels behind the last": Fault(
        "chain_correlation.cuh",
        "min(at + uint32_t(k * 16 * L::kOutStride * 2), end)",
        "at + uint32_t(k * 16 * L::kOutStride * 2)",
    ),
    "no zeros behind the last pixel of a layer in place": Fault("chain_fused_layers.cuh", "  clear_tail<Conv>(map);\n", ""),
    "student's sums for the teacher's": Fault(
        "chain_correlation.cuh", "sums + mean_at(kS), sums + m2_at(kS, kS, kT)", "sums + mean_at(0), sums + m2_at(0, kS, kT)"
    ),
    "student and teacher exchanged": Fault("chain_correlation.cuh", "cross_at(k, j, kS, kT)", "cross_at(j, k, kT, kS)"),
    "student's weights from the teacher's place": Fault(
        "chain_correlation.cuh", "(what - kTeacherNext) * kStageBytes", "(what - kStudentNow) * kStageBytes"
    ),
    "products of channels that count as constant": Fault("chain_correlation.cu", "still ? 0 : ", ""),
    "equal squares in one sum": Fault("chain_correlation.cuh", "kParts = 4", "kParts = 1"),
    "every image begins the sums": Fault("chain_correlation.cuh", "image == int64_t(blockIdx.x)", "true"),
}


def compiled(source: Path, to: Path, *include: Path) -> Path:
    """An object of a C++ or (as C++) CUDA file; `include` directories come before csrc."""
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DTSR_EMU"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folders = [f"-I{i}" for i in (*include, CSRC)]
    subprocess.run(["g++", *flags, *sanitizers, *folders, "-x", "c++", "-c", str(source), "-o", str(to)], check=True)
    return to


def outcome(objects: list[Path], program: Path) -> str:
    """What went wrong in some order of threads, or nothing."""
    subprocess.run(["g++", "-fopenmp", "-fsanitize=address,undefined", *map(str, objects), "-o", str(program)], check=True)
    for order in ("random", "forward"):
        env = {**os.environ, "EMU_ORDER": order}
        run = subprocess.run([str(program)], capture_output=True, text=True, env=env, timeout=600)
        if run.returncode:
            said = (run.stderr + run.stdout).splitlines()
            return next((s for s in said if re.search("ERROR|runtime error|emu:|cuda ", s)), said[-1] if said else "killed")
    return ""


def units_that_include(file: str) -> list[str]:
    """Names of the .cu files that are `file` or include it, through others too."""

    def reaches(source: Path, seen: set[str]) -> bool:
        if source.name == file:
            return True
        inside = [n for n in re.findall(r'#include "cuda/([^"]+)"', source.read_text()) if n not in seen]
        return any(reaches(CSRC / "cuda" / name, seen | set(inside)) for name in inside)

    return [source.name for source in sorted((CSRC / "cuda").glob("*.cu")) if reaches(source, set())]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """Objects of the sources as they are (portable CPU twins: this is about the other side)."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sound")
    sources = list((CSRC / "cuda").glob("*.cu")) + [f for f in (CSRC / "cpu").glob("*.cpp") if "_avx" not in f.name]
    sources += [ROOT / "tests" / "native" / f"{check}.cpp" for check in set(CHECKS.values())]
    return {source.name: compiled(source, folder / f"{source.name}.o") for source in sources}


def program_of(check: str, objects: dict[str, Path]) -> list[Path]:
    return [o for name, o in objects.items() if not name.endswith("_check.cpp") or name == f"{check}.cpp"]


@pytest.mark.parametrize("check", sorted(set(CHECKS.values())))
def test_control_passes(check, sound, tmp_path):
    assert outcome(program_of(check, sound), tmp_path / "check") == ""


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, sound, tmp_path):
    fault = FAULTS[name]
    text = (CSRC / "cuda" / fault.file).read_text()
    assert fault.right in text, f"{fault.file} has changed: plant this fault elsewhere"
    (tmp_path / "cuda").mkdir()
    mutant = tmp_path / "cuda" / fault.file
    mutant.write_text(text.replace(fault.right, fault.wrong, 1))
    check = next(check for beginning, check in CHECKS.items() if fault.file.startswith(beginning))
    objects = dict(sound)
    for unit in units_that_include(fault.file):  # included by name: the mutated copy comes first
        source = mutant if unit == fault.file else CSRC / "cuda" / unit
        objects[unit] = compiled(source, tmp_path / f"{unit}.o", tmp_path)
    said = outcome(program_of(check, objects), tmp_path / "check")
    print(f"{name}: {said}")
    assert said, "not noticed"
