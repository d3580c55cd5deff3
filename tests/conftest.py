from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores; before torch is loaded, and for what tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tsrfast import _native

try:
    from tsrfast import _emu
except ImportError:
    _emu = None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The big grids run only when the command line asks for markers itself (-m slow, -m "slow or not slow")."""
    if not config.option.markexpr:
        slow = [i for i in items if "slow" in i.keywords]
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if "slow" not in i.keywords]


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not in the repository's root, where a Python started by a test would import the source tree instead of what is installed."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Also under nohup or in a script's background, where SIGINT is ignored and programs that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _gpu_still_works() -> Iterator[None]:
    """After a kernel's fault nothing works in its process: with -n, pytest starts another one for the next test."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            raise


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: call(words...) -> (exit code, standard output, standard error)."""
    from tsrfast.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tsrfast", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
        return code, *capfd.readouterr()

    return run


@pytest.fixture(params=["cpu", "emu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each kernel three ways: the CPU twin, the CUDA source emulated on the CPU, the CUDA kernel."""
    if request.param == "emu":
        if _emu is None:
            pytest.skip("tsrfast._emu is not built (-C cmake.define.TSRFAST_EMU=ON)")
        monkeypatch.setattr(_native, "emulator", _emu)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=_native._C.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this CPU can run."""
    before = _native._C.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def assert_as_exact() -> Callable[..., None]:
    """A kernel may be at most `factor` times as far from the float64 reference as the same reference in its own dtype."""

    def check(
        got: torch.Tensor, reference: Callable[..., torch.Tensor], *args: object, factor: float = 2.0, **kw: object
    ) -> None:
        def double(a: object) -> object:
            return a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

        exact = reference(*map(double, args), **{k: double(v) for k, v in kw.items()})
        plain = reference(*args, **kw)
        assert got.dtype == plain.dtype
        assert got.shape == plain.shape
        if got.numel() == 0:
            return
        # One rounding of the largest value: the reference may happen to be exact on a small input.
        floor = torch.finfo(got.dtype).eps * float(exact.abs().max()) / 2
        err, allowed = float((got.double() - exact).abs().max()), factor * float((plain.double() - exact).abs().max()) + floor
        assert err <= allowed, f"max error {err:.3e}, allowed {allowed:.3e}"  # False for NaN as well

    return check
