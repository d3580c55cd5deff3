"""Files compiled for one instruction set keep their code to themselves, and TSRFAST_ISA is obeyed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*_avx*.cpp"))


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
LEVELS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
# -O1, where the build has -O3: quicker, and less is inlined, so more would show.
COMMON = ["-std=c++17", "-O1", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fPIC"]


def test_flags_are_those_of_the_build():
    build = (ROOT / "CMakeLists.txt").read_text()
    assert set(re.findall(r"(?<=[ ;\"])-m[a-z0-9=-]+", build)) == set(LEVELS["avx512bf16"])
    assert set(re.findall(r"-f[a-z-]*(?:math|contract)[a-z=-]*", build)) == {
        f for f in COMMON if "math" in f or "contract" in f
    }


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_weak_symbols(source, tmp_path):
    """The linker keeps one copy of a weak symbol, and it may be this one: other CPUs would meet AVX-512 in shared code."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the instruction sets of x86-64")
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("needs g++ and nm")
    made = tmp_path / "made.o"
    subprocess.run(
        [
            "g++",
            *COMMON,
            *LEVELS[source.stem.rsplit("_", 1)[1]],
            "-fvisibility=hidden",
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(source),
            "-o",
            str(made),
        ],
        check=True,
    )
    table = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^[0-9a-f]*\s+([A-Za-z]) (.+)$", table, re.M)
    assert any(kind == "T" for kind, _ in symbols), "no functions in it?"
    shared = [name for kind, name in symbols if kind in "WwVvu" and not name.startswith("DW.ref.")]  # data, of the C++ runtime
    assert shared == []


def isa_of(value: str) -> subprocess.CompletedProcess[str]:
    code = """
from tsrfast.errors import InputError
try:
    from tsrfast import _native
except InputError as e:
    print("InputError:", e)
else:
    print(_native._C.isa(), _native._C.isa_levels())
"""
    env = {**os.environ, "TSRFAST_ISA": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)


def test_environment_picks_the_instruction_set():
    assert isa_of("portable").stdout.split()[0] == "portable"


def test_environment_with_an_unknown_instruction_set():
    from tsrfast import _native

    message = isa_of("avx1024").stdout.strip()
    assert message.startswith("InputError: TSRFAST_ISA must be one of")
    assert f"({', '.join(_native._C.isa_levels())}), got 'avx1024'" in message
