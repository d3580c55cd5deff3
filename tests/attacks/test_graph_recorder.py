"""What records a step on a GPU: its calls of torch.cuda in order, without one, and whole attacks on one (marker `cuda`)."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
import torch
from torch import nn

from tsrfast.attacks import PGD, graph
from tsrfast.errors import InputError
from tsrfast.nets import resnet18

IMAGE = (3, 8, 8)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def net():
    """For images of 8x8; nothing that compiles."""
    convolution = (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.AvgPool2d(2))
    return nn.Sequential(*convolution, nn.Flatten(), nn.Dropout(0.4), nn.Linear(6 * 16, 10))


class Shown(nn.Module):
    """A network that is shown something else."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.model(self.change(x))


def cuda_double(monkeypatch, fail):
    """What the recorder calls of torch.cuda, with a log in the place of a device."""
    log = []

    class Stream:
        def __init__(self, name="inside"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for an event of {event.of}")

    outside = Stream("outside")

    class Event:
        def record(self, stream):
            self.of = stream.name

    class Generator:
        def clone_state(self):
            return "numbers"

        def graphsafe_set_state(self, state):
            log.append(f"generator gets {state}")

    @contextlib.contextmanager
    def block(name):
        log.append(f"in {name}")
        yield
        log.append(f"out of {name}")

    class Capture:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert (pool, stream.name, capture_error_mode) == ("pool", "inside", "thread_local")

        def __enter__(self):
            log.append("captures")

        def __exit__(self, *error):
            if fail:
                raise RuntimeError("capture invalidated")
            log.append("captured")

    fakes = {
        "graph_pool_handle": lambda: "pool", "current_device": lambda: 0, "current_stream": lambda device: outside,
        "Stream": lambda device: Stream(), "default_generators": [Generator()], "graph": Capture, "Event": Event,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: log.append("replays")), "device": lambda i: block("device"),
        "stream": lambda s: block("stream"), "set_stream": lambda s: log.append(f"stream is {s.name}"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_order_of_a_recording(monkeypatch):
    log = cuda_double(monkeypatch, fail=False)
    recorder = graph.CudaRecorder(torch.device("cuda", 0))
    assert recorder.against() is None
    for _ in range(2):
        with recorder.turn():
            replay = recorder.record(lambda: log.append("step"))
            replay()
    once = [
        "in device", "inside waits for outside", "in stream", "step", "out of stream", "captures", "step", "captured", "out of device",
        "outside waits for inside", "replays",
    ]  # fmt: skip
    assert log == [*once, "outside waits for an event of outside", *once]


def test_a_failed_recording_leaves_stream_and_generator(monkeypatch):
    log = cuda_double(monkeypatch, fail=True)
    calls = []

    def step():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="capture invalidated") as raised:
        graph.CudaRecorder(torch.device("cuda", 0)).record(step)
    assert log[-2:] == ["stream is outside", "generator gets numbers"]
    assert str(graph._root(raised.value, None)) == "operation not permitted"


# ---- on a GPU


@pytest.fixture
def gpu():
    """ResNet-18 and a small network, images and labels, on the device."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"resnet": resnet18(), "small": net()}
    x, y = torch.rand(32, 3, 32, 32, device="cuda"), torch.randint(10, (32,), device="cuda")
    return {k: m.eval().cuda() for k, m in models.items()}, x, y


@pytest.mark.cuda
@GPU
@pytest.mark.parametrize("name", ["resnet", "small"])
@pytest.mark.parametrize(
    "attack",
    [PGD(steps=10), PGD("l2", 0.5, 0.1), PGD(steps=10, keep="best", autocast=torch.float16, memory_format=torch.channels_last)],
)
def test_replays_are_the_steps(gpu, name, attack):
    models, x, y = gpu
    model, x = models[name], x if name == "resnet" else x[..., :8, :8].contiguous()
    attack = dataclasses.replace(attack, engine="graph")
    for seed in range(3):
        images = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        got, want = attack.run(model, images, y), dataclasses.replace(attack, engine="eager").run(model, images, y)
        assert got.path == "graph"
        # Not the same bits: cuDNN may choose other algorithms; signs of gradients near 0 flip.
        assert ((got.x_adv - want.x_adv).abs() > 1e-5).double().mean() < 0.05
        torch.testing.assert_close(got.loss.mean(), want.loss.mean(), rtol=0.02, atol=1e-3)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)


@pytest.mark.cuda
@GPU
def test_two_streams(gpu):
    models, x, y = gpu
    attack = PGD(steps=20, engine="graph", random_start=False)
    want = [attack(models["resnet"], images, y) for images in (x, 1 - x)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(3):
        got = []
        for stream, images in zip(streams, (x, 1 - x), strict=True):
            with torch.cuda.stream(stream):
                got.append(attack(models["resnet"], images, y))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert ((a - b).abs() > 1e-5).double().mean() < 0.01


@pytest.mark.cuda
@GPU
def test_captured_twice_and_tails(gpu):
    models, x, y = gpu
    attack, again = PGD(steps=10, engine="graph"), PGD(steps=10, engine="graph")
    for n in (32, 20, 7, 32):
        a, b = (each.run(models["resnet"], x[:n], y[:n]) for each in (attack, again))
        assert (a.path, b.path) == ("graph", "graph")
        assert ((a.x_adv - b.x_adv).abs() > 1e-5).double().mean() < 0.01


@pytest.mark.cuda
@GPU
def test_under_an_outer_capture(gpu):
    models, x, y = gpu
    outer = torch.cuda.CUDAGraph()
    y2 = torch.empty_like(x)
    with torch.cuda.graph(outer):
        y2.copy_(x)
        with pytest.raises(InputError, match="must not run while a CUDA graph is captured"):
            PGD(steps=10)(models["small"], x, y)
    outer.replay()
    assert torch.equal(y2, x)


@pytest.mark.cuda
@GPU
def test_failed_recordings_leave_the_gpu_usable(gpu):
    """A host copy that the watch does not see: hidden in a tensor made from Python numbers."""
    models, x, y = gpu
    model = Shown(models["small"], lambda x: x + 0 * torch.tensor([1.0, 2.0], device=x.device).sum())
    x = x[..., :8, :8].contiguous()
    got = PGD(steps=10).run(model, x, y)
    assert got.path in ("eager", "graph")
    torch.randn(4, device="cuda")
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert PGD(steps=10, engine="graph").run(models["small"], x, y).path == "graph"


@pytest.mark.cuda
@GPU
def test_networks_that_draw_numbers(gpu):
    models, x, y = gpu
    model = Shown(models["resnet"], lambda x: x + 0.1 * torch.randn_like(x))
    before = torch.cuda.get_rng_state()
    got = PGD(steps=10, engine="graph").run(model, x, y)
    assert got.path == "graph"
    assert torch.equal(torch.cuda.get_rng_state(), before)
    again = PGD(steps=10, engine="graph").run(model, x, y)
    assert ((again.x_adv - got.x_adv).abs() > 1e-5).double().mean() < 0.01
