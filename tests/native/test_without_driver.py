"""The compiled module asks for no NVIDIA library: a build with CUDA kernels imports where there is no driver."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tsrfast import _native


def test_links_no_nvidia_library_and_no_torch():
    if not shutil.which("readelf"):
        pytest.skip("needs readelf (binutils)")
    said = subprocess.run(["readelf", "-d", _native._C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert any("libc.so" in name for name in needed)
    assert not [name for name in needed if re.match(r"lib(cuda|nv|torch|c10)", name)]


def test_says_that_there_is_no_gpu():
    """Where there is no driver, a CUDA build imports, names what it was built with, and reports no device."""
    if not _native._C.with_cuda:
        pytest.skip(f"built without CUDA kernels ({_native._C.cuda_note})")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is a driver")
    assert not torch.cuda.is_available()
    run = subprocess.run([sys.executable, "-m", "tsrfast", "info"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(r"cuda kernels +yes", run.stdout), run.stdout
