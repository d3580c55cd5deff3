"""Native code as programs of its own, under AddressSanitizer and UndefinedBehaviorSanitizer.

CMake builds them with -DTSRFAST_SANITIZE=ON; TSRFAST_SANITIZED names the folder they are in. They hold CUDA kernels, emulated, against their
CPU twins, with threads in the orders given, and the CPU's instruction sets against each other.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ORDERS = {
    "emu_check": ["forward", "reverse", "random"],
    "fused_check": ["forward", "reverse", "random"],
    "correlation_check": ["forward", "reverse", "random"],
    "layers_check": ["random"],  # takes minutes; the others run unsanitized through Python
    "chain_check": ["forward"],  # emulates nothing
}


@pytest.mark.parametrize(("program", "order"), [(p, order) for p, orders in ORDERS.items() for order in orders])
def test_sanitized_program(program, order):
    folder = os.environ.get("TSRFAST_SANITIZED")
    if not folder:
        pytest.skip("TSRFAST_SANITIZED does not name a folder of sanitized programs")
    file = Path(folder) / program
    assert file.is_file()
    run = subprocess.run([file], capture_output=True, text=True, env={**os.environ, "EMU_ORDER": order})
    assert run.returncode == 0, run.stdout + run.stderr
