"""bench/gpu_race.py, gpu_precision.py and ceilings.cu: what they accept as the same attack, and tiny runs of all of it on the CPU."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsrfast.nets import ConvReLU

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import ceilings  # noqa: E402
import contestants  # noqa: E402
import gpu_contestants as gpu  # noqa: E402
import gpu_precision  # noqa: E402
import gpu_race  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> contestants.Pair:
    nets = [ConvReLU(widths, image=(3, 8, 8), classes=4, seed=k) for k, widths in enumerate(([5, 5], [4, 4]))]
    return contestants.Pair(*(net.eval().requires_grad_(False) for net in nets))


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def test_spread():
    found = gpu_race.spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found == {"median_s": 3.0, "min_s": 1.0, "max_s": 5.0, "iqr_s": 2.0, "rounds": 5}
    assert gpu_race.spread([2.0])["iqr_s"] == 0


def test_rounds_end_with_the_time():
    calls = []
    found = gpu_race.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, limit=-1)
    assert "".join(calls) == "ab" + "abbaab"  # warm-up, then each round begins with another one
    assert found["a"]["rounds"] == gpu_race.LEAST_ROUNDS
    assert gpu_race.interleave({"a": lambda: None}, CPU, limit=60)["a"]["rounds"] == gpu_race.ROUNDS


def test_weaker_attacks_and_ones_outside_are_refused():
    x = torch.full((2, 3), 0.5)
    row = gpu_race.compare(x + gpu.EPS, x, (0.99, 0.5), (1.0, 0.5), weaker=0.01)
    assert row == {"mean_loss": 0.99, "loss_ratio": 0.99, "success": 0.5}
    for loss in (0.98, math.nan):
        with pytest.raises(ArithmeticError, match="the float32 loop reaches 1"):
            gpu_race.compare(x, x, (loss, 0.5), (1.0, 0.5), weaker=0.01)
    for made in (x + gpu.EPS + 1e-3, x * math.nan):
        with pytest.raises(ArithmeticError, match="outside of ball or box"):
            gpu_race.compare(made, x, (1.0, 0.5), (1.0, 0.5), weaker=0.01)
    with pytest.raises(ArithmeticError, match="outside"):
        gpu_race.compare(torch.full((2, 3), -0.01), torch.zeros(2, 3), (1.0, 0.5), (1.0, 0.5), weaker=0.01)


@pytest.mark.parametrize("piece", [8, 4])
def test_rivals_run_the_same_attack(pair, images, piece):
    x, y = images
    want = gpu.reference(pair, 3, 8)(x, y)
    for one in (*gpu.OURS["cpu"], *gpu.RIVALS):
        made = one.build(pair, 3, x, piece)(x, y)
        assert made.shape == x.shape
        allowed = 0.2 if "float16" in one.name else 0.01  # bfloat16 on the CPU: signs of small gradients
        assert ((made - want).abs() > 1e-6).float().mean() <= allowed, one.name
        gpu_race.compare(made, x, (1.0, 0.0), (1.0, 0.0), 0.0)


def test_score_is_float64(pair, images):
    exact = contestants.Pair(
        *(ConvReLU(w, image=(3, 8, 8), classes=4, seed=k).double().eval() for k, w in enumerate(([5, 5], [4, 4])))
    )
    s, t = exact.student(images[0].double()), exact.teacher(images[0].double())
    loss, differ = gpu_race.score(exact, images[0])
    assert loss == pytest.approx(((s - t) ** 2).sum(1).mean().item(), rel=1e-12)
    assert differ == (s.argmax(1) != t.argmax(1)).double().mean().item()


def test_tf32_flags_are_put_back():
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    for allowed in (True, False):
        with gpu.tf32(allowed):
            assert flags() == (allowed, allowed)
        assert flags() == before


def test_absences_are_found_at_any_depth():
    record = {"a": {"b": {"absent": "one"}, "c": 3}, "d": {"absent": "two", "e": {"absent": "three"}}, "f": [1]}
    assert gpu_race.absences(record) == ["one", "two", "three"]
    assert gpu_race.attempt(lambda: 1 / 0) == {"absent": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    ("mine", "holds"),
    [
        ([[0.8, 0.5], [0.9, 0.6]], True),
        ([[0.76, 0.46], [0.76, 0.46]], True),  # below the mean, by less than the seeds are apart
        ([[0.9, 0.44], [0.9, 0.44]], False),
        ([[math.nan, 0.5]], False),
        ([[1.0, 1.0]], True),
    ],
)
def test_within_the_spread_of_seeds(mine, holds):
    assert gpu_precision.within_spread([[0.8, 0.5], [0.9, 0.6]], mine) is holds


def test_criteria_by_hand():
    found = {
        "ascent": {"m": {"efficiency": 0.97, "zeros": 0.001}},
        "attacks": {"m": {"interval": [-0.009, 0.1], "points": 0.1}},
        "nan_gradients": {"m": 0},
    }
    assert gpu_precision.criteria(found, "m") == dict.fromkeys(("ascent", "log_ratio", "robust_accuracy", "gradients"), True)
    found["ascent"]["m"] |= {"efficiency": 0.969, "zeros": 0.0011}
    found["attacks"]["m"] = {"interval": [-0.011, 0.1], "points": 0.11}
    assert not any(gpu_precision.criteria(found, "m").values())
    found["ascent"]["m"]["zeros"] = 0
    found["nan_gradients"]["m"] = 1
    assert not gpu_precision.criteria(found, "m")["gradients"]


def test_ascent_of_float32_is_whole_and_of_a_wrong_direction_is_not(pair, images, monkeypatch):
    nets = gpu_precision.Nets(pair, CPU)
    found = gpu_precision.ascent(nets, ["float32"], *images, 2)["float32"]
    assert found["efficiency"] > 0.999
    assert found["zeros"] < 0.01
    monkeypatch.setattr(gpu_precision, "pgd", lambda *a, **kw: lambda net, x, y: x)
    assert gpu_precision.ascent(nets, ["float32"], *images, 2)["float32"] == {"efficiency": 0, "lowest": 0, "zeros": 1}


def run(script: str, tmp_path: Path) -> dict:
    out = tmp_path / "out.json"
    options = ["--device", "cpu", "--images", "8", "--steps", "2", "--pair", str(tmp_path / "pair"), "--out", str(out)]
    done = subprocess.run([sys.executable, str(BENCH / script), *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path) not in out.read_text()
    assert platform.node() not in out.read_text()
    return json.loads(out.read_text())


def test_smoke_of_the_race(tmp_path):
    record = run("gpu_race.py", tmp_path)
    rows = record["oracle"]["8"]["rows"]
    assert list(rows) == [one.name for one in (*gpu.OURS["cpu"], *gpu.RIVALS)]
    for row in rows.values():
        assert row["rounds"] == gpu_race.LEAST_ROUNDS
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["useful_tflop_per_s"] > 0
    assert set(record["oracle"]["8"]["ratios"]) == set(rows) - {"tsrfast float32"}
    assert record["chain"]["8"]["gradient"]["ratios"].keys() == {"PyTorch, TF32"}
    correlation = record["correlation"]["layers"]["rows"]
    assert len(correlation) == 24
    assert all(row["gb_per_s"] > 0 for row in correlation.values())
    networks = record["correlation"]["networks"]
    assert networks["ratios"].keys() == {"PyTorch, TF32"}
    assert networks["error"]["tsrfast float32"] < 1e-5
    assert record["generic"]["8"]["overhead"].keys() == {"tsrfast eager", "tsrfast auto"}


def test_smoke_of_precision(tmp_path):
    record = run("gpu_precision.py", tmp_path)
    assert record["criteria"].keys() == {"trained, float32", "near 0.04, float32"}
    assert len(record["criteria"]["trained, float32"]) == 5
    assert all(holds for one in record["criteria"].values() for holds in one.values())
    near = record["pairs"]["near 0.04"]
    assert near["logit_distance"] == pytest.approx(0.04, rel=0.05)
    assert near["attacks"].keys() == {"float32", "chaos"}
    assert len(record["training"]["agreement"]["float32"]) == len(gpu_precision.SEEDS)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_ceilings_compile_without_warnings(tmp_path, capability):
    try:
        ceilings.nvcc()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    ceilings.build(ceilings.architecture(*capability), tmp_path / "ceilings")
    assert (tmp_path / "ceilings").is_file()


@pytest.mark.cuda
def test_ceilings_are_plausible():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = ceilings.measure()
    assert 100 < found["copy_gb_per_s"] < 20000
    assert found["matmul_f16_tflop_per_s"] > 10
    alone = [row for row in found["tensor"] if not row["ldmatrix"]]
    assert all(row["cycles_per_mma_and_subcore"] > 1 for row in alone)
    assert all(
        row["ldmatrix_bytes_per_cycle_and_sm"] < 130 for row in found["tensor"] if row["ldmatrix"]
    )  # 32 banks of 4 bytes
