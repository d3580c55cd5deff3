"""The engine for chains at every instruction set, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def test_sanitized_program():
    """tests/native/chain_check.cpp; CMake builds it with -DTSRFAST_SANITIZE=ON."""
    program = os.environ.get("TSRFAST_CHAIN_CHECK")
    if not program:
        pytest.skip("TSRFAST_CHAIN_CHECK does not name a built chain_check")
    assert Path(program).is_file()
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
