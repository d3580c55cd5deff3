"""What CUDA kernels take: the reader of build logs, and the log of this build where TSRFAST_CUDA_LOG names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parent
sys.path.insert(0, str(NATIVE))
import kernel_resources as resources  # noqa: E402

MANGLED = "_ZN3tsr55_GLOBAL__N__c838a993_22_channel_correlation_cu_67eb096326channel_correlation_kernelIfLi3ELi2EEEvNS_18ChannelCorrelationEl"
LOG = f"""  [3/9] Building CUDA object CMakeFiles/_C.dir/csrc/cuda/channel_correlation.cu.o
  ptxas info    : 24 bytes gmem
  ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90a'
  ptxas info    : Function properties for {MANGLED}
      24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
  ptxas info    : Used 122 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
  ptxas info    : Compile time = 144.300 ms
  ptxas info    : Compiling entry function '_Z4stepIdEvPT_' for 'sm_80'
  ptxas info    : Function properties for _Z4stepIdEvPT_
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 16 registers, used 0 barriers, 400 bytes cmem[0]
"""
NAME = "channel_correlation_kernel<float, 3, 2>"


def test_log_by_hand():
    found = resources.read_log(LOG)
    assert found == {
        "sm_90a": {NAME: resources.Resources(122, 24, 20, 28, 512)},
        "sm_80": {"step<double>": resources.Resources(16, 0, 0, 0, 0)},
    }
    shown = resources.table(found).splitlines()
    assert [line.split()[:6] for line in shown[1:]] == [
        ["sm_80", "16", "0", "0", "0", "0"],
        ["sm_90a", "122", "24", "20", "28", "512"],
    ]


def test_template_arguments_with_casts_stay():
    assert resources.plain_names(["_Z1kILN3tsr4NormE1EEvi"]) == {"_Z1kILN3tsr4NormE1EEvi": "k<(Norm)1>"}


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("f<(Norm)1>(int, A (*)(int))", "f<(Norm)1>"),
        ("g<{lambda(int)#1}>(long)", "g<{lambda(int)#1}>"),
        ("h", "h"),
        ("k()", "k"),
    ],
)
def test_parameters_are_cut_off(full, name):
    assert resources.without_parameters(full) == name


def test_one_kernel_compiled_twice_differently():
    with pytest.raises(ValueError, match=r"step<double> is compiled twice for sm_80"):
        resources.read_log(LOG + LOG.replace("Used 16", "Used 18"))


def test_budgets_survive_the_file(tmp_path):
    resources.write_budgets(resources.read_log(LOG), tmp_path / "budgets.json")
    read = resources.read_budgets(tmp_path / "budgets.json")
    assert read["sm_90a"][NAME] == resources.Resources(128, 24, 20, 28, 512)  # registers in steps of 8
    assert resources.complaints(resources.read_log(LOG), read) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 129}, "registers 129, budget 128"),
        ({"stack": 32}, "stack 32, budget 24"),
        ({"spill_stores": 21}, "spill_stores 21, budget 20"),
        ({"spill_loads": 29}, "spill_loads 29, budget 28"),
        ({"shared": 513}, "shared 513, budget 512"),
    ],
)
def test_more_than_the_budget(change, complaint):
    kernels = resources.read_log(LOG)
    budgets = {arch: {name: row.budget() for name, row in rows.items()} for arch, rows in kernels.items()}
    kernels["sm_90a"][NAME] = kernels["sm_90a"][NAME]._replace(**change)
    assert resources.complaints(kernels, budgets) == [f"sm_90a {NAME}: {complaint}"]


def test_kernels_and_budgets_without_the_other():
    kernels = resources.read_log(LOG)
    one = {"sm_80": kernels["sm_80"]}
    assert resources.complaints(kernels, one) == [f"sm_90a {NAME}: has no budget (--update records one)"]
    assert resources.complaints(one, kernels) == []  # another architecture was not compiled
    assert resources.complaints({"sm_80": {}}, one) == ["sm_80 step<double>: has a budget, but is not there"]


def test_warnings():
    heard = [
        "/a/csrc/cuda/chain.cu(12): warning #177-D: variable was declared but never referenced",
        "csrc/cuda/chain.cuh:12:3: warning: unused variable",
        "  ptxas warning : Value of threads per SM for entry k is out of range",
        "nvcc warning : Support for offline compilation is deprecated",
    ]
    deaf = ["WARNING: pip is old", "  -- warning about nothing", LOG, "csrc/cpu/chain.cpp:3:1: warning: of the other compiler"]
    assert resources.warnings("\n".join([*heard, *deaf])) == heard


def test_command(tmp_path):
    (tmp_path / "log").write_text("nothing")
    command = [sys.executable, resources.__file__, str(tmp_path / "log")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "Xptxas=-v" in run.stderr
    (tmp_path / "log").write_text(LOG)
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert NAME in run.stdout
    assert "step<double>: has no budget" in run.stderr


def test_this_build():
    """No kernel takes more than its budget, and every one has one."""
    path = os.environ.get("TSRFAST_CUDA_LOG")
    if not path:
        pytest.skip("TSRFAST_CUDA_LOG does not name the log of a CUDA build with -Xptxas=-v")
    text = Path(path).read_text(errors="replace")
    kernels = resources.read_log(text)
    assert kernels
    assert resources.complaints(kernels, resources.read_budgets()) == []
    assert resources.warnings(text) == []
