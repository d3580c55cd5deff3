"""What benchmarks share: devices, and a timer that waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device) -> Callable[..., None]:
    """measure(group, run, moved): time `run` on `device`; `moved` is the bytes that have to cross the memory bus, if that counts."""

    def timed(group: str, run: Callable[[], object], moved: int | None = None) -> None:
        def synchronised() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        synchronised()  # the first call is not the one to be measured
        benchmark(synchronised)
        if moved is not None and benchmark.stats:
            benchmark.extra_info["GB/s"] = round(1e-9 * moved / benchmark.stats["min"], 2)

    return timed
