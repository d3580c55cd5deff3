"""What the GPU at hand can do at best, as JSON: `ceilings.cu`, compiled for it, and PyTorch's dense float16 products.

python bench/ceilings.py [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent


def nvcc() -> str:
    """As CMakeLists.txt looks for it: PATH, CUDA_HOME, the usual place.

    Raises:
        FileNotFoundError: there is none.
    """
    places = [shutil.which("nvcc")] + [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for place in places:
        if place and Path(place).is_file():
            return place
    raise FileNotFoundError("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")


def architecture(major: int, minor: int) -> str:
    """nvcc's name of a compute capability; 9.0 with the instructions that only it has."""
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def build(arch: str, program: Path) -> None:
    """Compile `ceilings.cu`; a warning is an error."""
    command = [nvcc(), "-std=c++17", "-O3", "-Werror=all-warnings", f"-I{BENCH.parent / 'csrc'}", f"-arch={arch}"]
    subprocess.run([*command, BENCH / "ceilings.cu", "-o", program], check=True)


def dense_float16(n: int = 8192, rounds: int = 20) -> float:
    """TFLOP/s of n^3 matrix products in PyTorch, float16 with float32 sums, the fastest of `rounds`."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return round(2e-12 * n**3 / min(times[3:]), 1)


def measure() -> dict[str, Any]:
    """All ceilings.

    Raises:
        RuntimeError, subprocess.CalledProcessError: something did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        build(architecture(*torch.cuda.get_device_capability()), program)
        found: dict[str, Any] = json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    return {"matmul_f16_tflop_per_s": dense_float16(), **found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    text = json.dumps(measure(), indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
