"""Steps that are recorded and replayed, with a recorder of Python calls in the place of a GPU's (which is in test_graph_recorder.py).

The double calls the recorded function again at each replay, on the recording's own buffers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import re
import threading
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tsrfast
from tsrfast.attacks import FGSM, MIM, PGD, CrossEntropy, Diversity, OracleL2, Smoothing, TargetedDLR, graph, skip_gradient
from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU

IMAGE = (3, 8, 8)


class Tape:
    """Records Python calls. One for all attacks of a test; counts what is asked of it."""

    def __init__(self):
        self.records = self.replays = self.inside = self.turns = 0
        self.fails = None
        self.holds = True

    def against(self):
        return None

    def record(self, step):
        assert self.inside == 1
        assert not any(p.requires_grad for p in self.watched)
        if self.fails is not None:
            try:
                raise self.fails
            finally:
                raise RuntimeError("the recording was lost")
        step()
        self.records += 1

        def replay():
            assert self.inside == 1
            self.replays += 1
            if self.holds:
                step()

        if not self.holds:
            step = None
        return replay

    @contextlib.contextmanager
    def turn(self):
        self.inside += 1
        self.turns += 1
        try:
            yield
        finally:
            self.inside -= 1

    watched = ()


@pytest.fixture
def tape(monkeypatch):
    tape = Tape()
    monkeypatch.setattr(graph, "recorder_for", lambda device: tape)
    return tape


class Residual(nn.Module):
    """Batch normalisation, dropout and a branch that is added: nothing that compiles."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GELU(), nn.Dropout(0.4))
            self.linear = nn.Linear(6 * 16, 10)

    def forward(self, x):
        h = F.gelu(self.bn(self.stem(x)))
        return 3 * self.linear(F.avg_pool2d(h + self.branch(h), 2).flatten(1))


def net(seed=0, dtype=torch.float32):
    return Residual(seed).to(dtype).eval()


def batch(n=8, seed=0, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return torch.rand(n, *IMAGE, generator=r, dtype=torch.float64).to(dtype), torch.randint(10, (n,), generator=r)


def assert_equal(a, b, atol=0.0):
    torch.testing.assert_close(a.x_adv, b.x_adv, rtol=0, atol=atol)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=atol, equal_nan=True)
    for name in ("success", "queries", "bad_gradients"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.steps == b.steps
    assert a.x_adv.stride() == b.x_adv.stride()


def check(attack, model, x, y, atol=0.0):
    """The graph's result, which is PyTorch's."""
    got = dataclasses.replace(attack, engine="graph").run(model, x, y) if attack.engine != "graph" else attack.run(model, x, y)
    assert (got.path, got.reason) == ("graph", "a step is recorded once and replayed")
    assert_equal(got, dataclasses.replace(attack, engine="eager").run(model, x, y), atol)
    return got


def sizes(attack):
    """Of the recordings that an attack keeps."""
    return sorted(r.steps.size for k in graph.graphs_of(attack).known.values() for r in k.recordings)


# ---- the same results


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "attack",
    [
        PGD(), PGD("l2", 0.5, 0.1), PGD("l1", 5.0, 1.0), PGD(keep="best", step_size=0.03), PGD(restarts=3), PGD(targeted=True, loss="margin"),
        PGD(loss=OracleL2(net(1))), PGD(momentum=0.9), MIM(nesterov=True), MIM(nesterov=True, keep="best"), MIM(smoothing=Smoothing(length=3)),
        PGD(eps=torch.linspace(0, 0.1, 8), step_size=torch.linspace(0.02, 0, 8)), PGD(loss=TargetedDLR(torch.arange(8))),
        PGD(eps=torch.tensor(0.05)), PGD(autocast=torch.bfloat16), PGD(memory_format=torch.channels_last, momentum=0.5),
    ],
    ids=lambda a: "-".join(f"{k}" for k, v in vars(a).items() if v is not vars(PGD()).get(k) and k != "seed") or "plain",
)  # fmt: skip
def test_step_by_step_what_is_launched_one_by_one(tape, attack, steps):
    model, (x, y) = net(), batch()
    attack = dataclasses.replace(attack, steps=steps)
    check(attack, model, x, y)
    assert tape.records == min(steps, 1)
    assert tape.replays == steps * attack.restarts


@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_those_who_stand_are_gathered_in_smaller_graphs(tape, restarts, keep):
    """40 images stand, then fewer and fewer: a graph of half the size too, which the next batch finds."""
    model = net(dtype=torch.float64)
    x, _ = batch(40, dtype=torch.float64)
    y = model(x).argmax(1)
    attack = PGD(eps=0.03, step_size=0.002, steps=24, early_stop=True, restarts=restarts, keep=keep, engine="graph")
    got = check(attack, model, x, y, atol=1e-9)
    assert 0 < int(got.success.sum()) <= 40
    assert len(got.queries.unique()) > 6
    assert sizes(attack) == [20, 40]
    assert tape.records == 2
    other = batch(33, seed=1, dtype=torch.float64)[0]
    check(attack, model, other, model(other).argmax(1), atol=1e-9)
    assert sizes(attack) == [20, 40]
    assert tape.records == 2


def test_layouts(tape):
    model, (x, y) = net(), batch()
    attack = PGD(steps=3, engine="graph")
    for arranged in (
        x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat(1, 1, 1, 2)[..., ::2], x.double().float()[:1],
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x), x.expand(8, *IMAGE), x[:1].expand(3, *IMAGE),
    ):  # fmt: skip
        check(attack, model, arranged, y[: len(arranged)])


def test_auto(tape):
    model, (x, y) = net(), batch()
    route = PGD(steps=8).plan(model, x)
    assert str(route) == "graph: a step is recorded once and replayed"
    got = PGD(steps=8).run(model, x, y)
    assert (got.path, tape.records, tape.replays) == ("graph", 1, 8)
    chain = ConvReLU((4,), image=IMAGE).eval()
    assert PGD(steps=8).plan(chain, x).path == "chain"
    assert PGD(steps=8, engine="graph").plan(chain, x).path == "graph"
    assert PGD(steps=8, engine="eager").plan(model, x).path == "eager"
    assert tape.records == 1


# ---- reuse


def test_the_next_batch_and_weights_changed_in_place(tape):
    model = net()
    attack = PGD(steps=4, engine="graph", loss="margin")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(4):
        x, y = batch(seed=seed)
        got = attack.run(model, x, y)
        assert_equal(got, dataclasses.replace(attack, engine="eager").run(model, x, y))
        model.train()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.requires_grad for p in model.parameters())
    assert tape.records == 1
    assert tape.replays == 16


CHANGES = {
    "a parameter elsewhere": lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.weight.detach() * 2)),
    "its data elsewhere": lambda m: setattr(m.stem.weight, "data", m.stem.weight.data * 2),
    "a buffer elsewhere": lambda m: setattr(m.bn, "running_mean", m.bn.running_mean + 1),
    "another module": lambda m: setattr(m, "branch", nn.Conv2d(6, 6, 1)),
    "a number": lambda m: setattr(m.bn, "eps", 0.1),
    "a hook": lambda m: m.stem.register_forward_hook(lambda m, args, out: 2 * out),
    "format": lambda m: m.to(memory_format=torch.channels_last),
    "assigned": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_a_recording_does_not_survive(tape, change):
    model, (x, y) = net(), batch()
    attack = PGD(steps=3, engine="graph")
    attack(model, x, y)
    CHANGES[change](model)
    model.eval()
    got = attack.run(model, x, y)
    assert tape.records == 2
    assert len(graph.graphs_of(attack).known[id(model)].recordings) == 1
    assert_equal(got, dataclasses.replace(attack, engine="eager").run(model, x, y))


def test_settings_of_pytorch_are_recorded_too(tape):
    model, (x, y) = net(), batch()
    attack = PGD(steps=3, engine="graph")
    attack(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        check_eager = dataclasses.replace(attack, engine="eager").run(model, x, y)
        assert_equal(attack.run(model, x, y), check_eager)
    assert tape.records == 2


def test_values_of_images_are_new_each_time(tape):
    """eps, step sizes and the loss' own fields are of the call that they came with; so are labels and starts."""
    model = net()
    eps = torch.linspace(0.01, 0.1, 8)
    attack = PGD(steps=4, eps=eps, step_size=eps / 4, engine="graph", loss=TargetedDLR(torch.arange(8)))
    for _ in range(3):
        x, y = batch(seed=_)
        assert_equal(attack.run(model, x, y), dataclasses.replace(attack, engine="eager").run(model, x, y))
        eps.mul_(0.5)
        attack.loss.targets.add_(1).remainder_(10)
    assert tape.records == 1


def test_smaller_batches(tape):
    """They fill up a graph of the largest size, its half, or a quarter, the smallest that has room; of 16 images at least."""
    model = net(dtype=torch.float64)
    attack = PGD(steps=3, engine="graph")
    for n, kept in (
        (64, [64]), (63, [64]), (33, [64]), (20, [32, 64]), (32, [32, 64]), (16, [16, 32, 64]), (2, [16, 32, 64]), (65, [16, 32, 64, 65]),
        (33, [16, 32, 64, 65]), (1, [16, 32, 64, 65]),
    ):  # fmt: skip
        x, y = batch(n, seed=n, dtype=torch.float64)
        assert_equal(attack.run(model, x, y), dataclasses.replace(attack, engine="eager").run(model, x, y), atol=1e-9)
        assert sizes(attack) == kept, n
    assert tape.records == 4


def test_graphs_are_few(tape):
    attack = PGD(steps=2, engine="graph")
    models = [net(i) for i in range(graph.KEPT + 3)]
    for model in models:
        attack(model, *batch(4))
    assert sizes(attack) == [4] * graph.KEPT
    assert tape.records == graph.KEPT + 3
    attack(models[-1], *batch(4))  # the latest stay
    assert tape.records == graph.KEPT + 3


def test_networks_and_attacks_are_not_kept_alive(tape):
    tape.holds = False  # as a CUDA graph: no Python inside
    attack, model, teacher = PGD(steps=2, engine="graph"), net(), net(1)
    attack(model, *batch())
    graphs = graph.graphs_of(attack)
    assert len(graphs.known) == 1
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert not graphs.known
    attack = PGD(steps=2, engine="graph", loss=OracleL2(teacher))
    attack(net(), *batch())
    key, seen = id(attack), weakref.ref(teacher)
    assert key in graph._graphs
    del attack, teacher, graphs
    gc.collect()
    assert seen() is None
    assert key not in graph._graphs


def test_copies_of_an_attack_record_their_own(tape):
    model, (x, y) = net(), batch()
    attack = PGD(steps=2, engine="graph")
    want = attack(model, x, y)
    assert torch.equal(copy.deepcopy(attack)(model, x, y), want)
    assert torch.equal(dataclasses.replace(attack)(model, x, y), want)
    assert tape.records == 3


def test_threads_take_turns(tape):
    model = net()
    attack = PGD(steps=5, engine="graph")
    batches = [batch(seed=i) for i in range(6)]
    want = [dataclasses.replace(attack, engine="eager")(model, *b) for b in batches]
    got = [None] * 6

    def work(i):
        got[i] = attack(model, *batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    model.eval()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert None not in got
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert tape.records == 1
    assert tape.turns == 6


def test_skip_gradient(tape):
    """Its hooks are installed by the first call, and a recording with them is not used without."""
    model, (x, y) = net(), batch()
    attack = PGD(steps=3, engine="graph")
    with skip_gradient(model, 0.3, modules=["branch"]):
        check(attack, model, x, y)
        damped = attack(model, x, y)
    assert not torch.equal(attack(model, x, y), damped)
    check(attack, model, x, y)


# ---- what cannot be recorded


class Changed(nn.Module):
    """Another network with something done to its images, and perhaps something done."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change, self.calls, self.seen = net, change, 0, None

    def forward(self, x):
        return self.net(self.change(self, x))


def counting(m, x):
    m.calls += 1
    return x


def growing(m, x):
    m.seen = x.detach().clone()
    return x


HABITS = {
    "item": (lambda m, x: x * 2 if x.mean().item() > 2 else x, "_local_scalar_dense.* brings a value to the host"),
    "if": (lambda m, x: x * 2 if (x > 2).any() else x, "brings a value to the host"),
    "nonzero": (lambda m, x: x + 0 * len((x[:, 0, 0, 0] > 0.5).nonzero()), "size depends on the data"),
    "mask": (lambda m, x: x + 0 * x[x > 0.5].sum(), "selects by a mask"),
    "write by mask": (lambda m, x: x + 0 * torch.zeros_like(x).index_put((x > 0.5,), x[0, 0, 0, 0]), "selects by a mask"),
    "unique": (lambda m, x: x + 0 * len(x.detach().unique()), "size depends on the data"),
    "counter": (counting, "a call changes attributes of the model or the loss"),
    "memory": (growing, "a call changes attributes of the model or the loss"),
}  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
def test_what_a_graph_cannot_hold_is_named(tape, habit):
    change, reason = HABITS[habit]
    model, (x, y) = Changed(net(), change), batch()
    attack = PGD(steps=8)
    assert attack.plan(model, x).path == "graph"  # only trying tells
    got = attack.run(model, x, y)
    assert got.path == "eager"
    assert re.search(reason, got.reason)
    assert_equal(got, dataclasses.replace(attack, engine="eager").run(model, x, y))
    with pytest.raises(InputError, match="engine must be 'auto' or 'eager' for this call, got 'graph': .*" + reason):
        dataclasses.replace(attack, engine="graph").run(model, x, y)
    assert tape.records == 0


class Patient(CrossEntropy):
    """A loss of a user: grows with the calls, or has a factor."""

    def __init__(self, grows=False):
        object.__setattr__(self, "factor", torch.ones(()))
        object.__setattr__(self, "calls", 0 if grows else None)

    def __call__(self, x, logits, y):
        if self.calls is not None:
            object.__setattr__(self, "calls", self.calls + 1)
        value, answer = super().__call__(x, logits, y)
        return value * self.factor, answer


def test_losses_of_users(tape):
    model, (x, y) = net(), batch()
    got = PGD(steps=8, loss=Patient(grows=True)).run(model, x, y)
    assert (got.path, got.reason[:42]) == ("eager", "a call changes attributes of the model or ")
    loss = Patient()
    attack = PGD(steps=8, loss=loss, engine="graph")
    check(attack, model, x, y)
    loss.factor.fill_(-1.0)
    check(attack, model, x, y)
    assert tape.records == 1
    object.__setattr__(loss, "factor", torch.tensor(2.0))
    check(attack, model, x, y)
    assert tape.records == 2


@pytest.mark.parametrize("index", [torch.tensor([2, 1, 0]), [2, 1, 0]])
def test_indices_are_no_masks(tape, index):
    model = Changed(net(), lambda m, x: x[:, index])
    check(PGD(steps=2), model, *batch())


def test_copies_between_devices_are_seen():
    aten, here, there = torch.ops.aten, torch.zeros(3), torch.zeros(3, device="meta")
    number = torch.tensor(1.0)
    assert graph.complaint(aten.add.Tensor, (here, here), {}) is None
    assert "copies between devices (cpu, meta)" in graph.complaint(aten.copy_.default, (there, here), {})
    assert "copies between devices" in graph.complaint(aten.copy_.default, (there, number), {})
    assert "copies between devices" in graph.complaint(aten._to_copy.default, (here,), {"device": torch.device("meta")})
    assert graph.complaint(aten._to_copy.default, (here,), {"dtype": torch.float64}) is None
    assert graph.complaint(aten.mul.Tensor, (there, number), {}) is None  # an argument of the kernel
    assert "copies between devices" in graph.complaint(aten.index.Tensor, (there, [torch.tensor([0, 1])]), {})


def test_a_recording_that_fails(tape):
    model, (x, y) = net(), batch()
    tape.fails = RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
    attack = PGD(steps=8)
    want = dataclasses.replace(attack, engine="eager").run(model, x, y)
    for _ in range(2):
        got = attack.run(model, x, y)
        assert got.path == "eager"
        assert got.reason == "a step cannot be recorded: RuntimeError: operation not permitted when stream is capturing"
        assert_equal(got, want)
    with pytest.raises(InputError, match="got 'graph': a step cannot be recorded: RuntimeError: operation not permitted"):
        PGD(steps=2, engine="graph")(model, x, y)
    tape.fails = None
    assert attack.run(model, x, y).path == "eager"  # not tried again
    CHANGES["a number"](model)
    assert attack.run(model, x, y).path == "graph"


def test_no_memory_for_a_recording(tape):
    model, (x, y) = net(), batch()
    attack = PGD(steps=8)
    attack(model, *batch(2))
    tape.fails = torch.OutOfMemoryError("CUDA out of memory")
    tape.record, real = lambda step: (_ for _ in ()).throw(tape.fails), tape.record
    got = attack.run(model, x, y)
    assert (got.path, got.reason) == ("eager", "there was not enough memory to record a step")
    assert not sizes(attack)
    assert_equal(got, dataclasses.replace(attack, engine="eager").run(model, x, y))
    tape.record, tape.fails = real, None
    assert attack.run(model, *batch(2)).path == "graph"


@pytest.mark.parametrize(
    ("attack", "n", "reason", "always"),
    [
        (PGD(steps=8, on_step=lambda s: None), 4, "on_step is called between steps", True),
        (MIM(steps=8, diversity=Diversity()), 4, "diversity draws other numbers at each step", True),
        (PGD(steps=7), 4, "fewer than 8 steps do not pay for recording one", False),
        (FGSM(), 4, "fewer than 8 steps", False),
        (PGD(steps=8), 1025, "1025 images keep a GPU busy by themselves", False),
    ],
)
def test_calls_that_are_not_recorded(tape, attack, n, reason, always):
    model, x = net(), torch.zeros(n, *IMAGE, device="meta")
    route = attack.plan(model.to("meta"), x)
    assert route.path == "eager"
    assert f"; no graph: {reason}" in route.reason
    forced = dataclasses.replace(attack, engine="graph")
    if always:
        with pytest.raises(InputError, match=f"engine must be 'auto' or 'eager' for this call, got 'graph': {reason}"):
            forced.plan(model, x)
    else:
        assert forced.plan(model, x).path == "graph"


def test_on_the_cpu_there_are_no_graphs():
    model, (x, y) = net(), batch()
    with pytest.raises(InputError, match="got 'graph': x is on cpu, and only CUDA devices replay graphs"):
        PGD(engine="graph")(model, x, y)
    with pytest.raises(InputError, match="got 'graph': no images say on which device"):
        PGD(engine="graph").plan(ConvReLU((4,), image=IMAGE))
    with pytest.raises(
        InputError, match=r"model must be an nn\.Module for this call, got a Chain: engine='graph' asks for PyTorch"
    ):
        PGD(engine="graph")(tsrfast.compile(ConvReLU((4,), image=IMAGE)), x, y)
    got = PGD(steps=20).run(model, x, y)
    assert got.path == "eager"
    assert got.reason.startswith("model does not compile")


def test_inside_somebody_elses_recording(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    graph.check_not_recording(torch.device("cpu"))
    with pytest.raises(InputError, match="must not run while a CUDA graph is captured"):
        graph.check_not_recording(torch.device("cuda"))


# ---- faults


class Stops(nn.Module):
    """Another network, that fails at a call."""

    def __init__(self, net, error):
        super().__init__()
        self.net, self.error = net, error
        self.calls = types.SimpleNamespace(left=None)  # out of sight: a number of its own would say that the network changes

    def forward(self, x):
        if self.calls.left is not None:
            self.calls.left -= 1
            if self.calls.left == 0:
                raise self.error
        return self.net(x)


class Fault(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Fault("stop"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")], ids=["any", "memory"]
)
@pytest.mark.parametrize("at", range(1, 10))
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_everything_is_left_as_it_was_when_the_network_fails(tape, error, at, engine):
    model = Stops(net(), error)
    model.train()
    frozen = model.net.bn.weight.requires_grad_(False)
    for i, m in enumerate(model.modules()):
        m.training = i % 2 == 0
    modes = [m.training for m in model.modules()]
    numbers = torch.get_rng_state()
    x, y = batch()
    attack = PGD(steps=8, engine=engine)
    model.calls.left = at
    with pytest.raises(type(error)) as raised:
        attack.run(model, x, y)
    if isinstance(error, torch.OutOfMemoryError):
        assert "Tried to allocate 2 GiB" in str(raised.value)
        assert "tsrfast.attacks: memory ran out; cut the batch" in str(raised.value)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad == (p is not frozen) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert tape.inside == 0
    if isinstance(error, torch.OutOfMemoryError):
        assert not sizes(attack)
    model.calls.left = None
    assert_equal(attack.run(model, x, y), dataclasses.replace(attack, engine="eager").run(model, x, y))


def test_labels_are_checked_with_every_batch(tape):
    model, (x, y) = net(), batch()
    for attack in (PGD(steps=2, engine="graph"), PGD(steps=8)):
        for _ in range(2):
            with pytest.raises(InputError, match=r"y must be in 0..9, the model's classes, got 12"):
                attack(model, x, torch.full_like(y, 12))
            assert attack.run(model, x, y).path == "graph"
    targets = torch.arange(8)
    attack = PGD(steps=2, engine="graph", loss=TargetedDLR(targets))
    attack(model, x, y)
    targets[0] = 10
    with pytest.raises(InputError, match=r"targets must be in 0..9"):
        attack(model, x, y)


def test_parameters_are_frozen_only_while_a_step_is_recorded(tape):
    model, (x, y) = net(), batch()
    Tape.watched = tuple(model.parameters())
    try:
        check(PGD(steps=2), model, x, y)
    finally:
        Tape.watched = ()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_model_without_gradient(tape):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x).detach()

    for engine in ("graph", "auto"):
        with pytest.raises(InputError, match="must be differentiable"):
            PGD(steps=8, engine=engine)(Detached(), *batch())


def test_images_and_networks_apart(tape):
    model, (x, y) = net(), batch()
    for attack in (PGD(steps=8, engine="graph"), PGD(steps=8)):
        with pytest.raises(InputError, match="model must be on x's device meta, got cpu"):
            attack.plan(model, x.to("meta"))
        with pytest.raises(InputError, match="teacher must be on x's device cpu, got meta"):
            dataclasses.replace(attack, loss=OracleL2(net(1).to("meta")))(model, x)
        with pytest.raises(InputError, match="y must be on x's device cpu, got meta"):
            attack(model, x, y.to("meta"))
        with pytest.raises(InputError, match="index must be on x's device cpu, got meta"):
            attack(model, x, y, y.to("meta"))
