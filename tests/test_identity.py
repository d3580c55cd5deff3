from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch

from tsrfast._identity import describe, digest, tensor_hash
from tsrfast.nets import ConvReLU


@dataclass(frozen=True)
class Thing:
    a: Any
    b: Any = 1


class Plain:
    def __init__(self, model: object) -> None:
        self.model = model
        self._cache = object()


def double(x: int) -> int:
    return 2 * x


def net(seed: int = 0) -> ConvReLU:
    return ConvReLU((2,), image=(1, 4, 4), classes=2, seed=seed)


def test_equal_things_have_equal_descriptions() -> None:
    for make in (
        lambda: Thing(net(), b=(1, 2.5, None, True, "x")),
        lambda: Thing(Plain(net()), b={"x": torch.ones(3), "y": [torch.float32]}),
        lambda: functools.partial(double, masks=[torch.tensor([True, False])]),
    ):
        assert describe(make()) == describe(make())
        assert digest(json.loads(json.dumps(describe(make())))) == digest(describe(make()))


def test_any_difference_shows() -> None:
    things = [
        *(
            Thing(net()),
            Thing(net(1)),
            Thing(net(), b=2),
            Thing(Plain(net())),
            Thing(Plain(net(1))),
            Plain(net()),
            net(),
        ),
        *(double, test_any_difference_shows, functools.partial(double, 1), functools.partial(double, x=1)),
        *(torch.ones(2), torch.ones(1, 2), torch.ones(2).double(), torch.zeros(2)),
        *([1, 2], [2, 1], {"a": 1}, {"a": 2}, 1, "1", 1.5),
    ]
    assert len({digest(describe(t)) for t in things}) == len(things)


def test_what_a_module_holds_beside_its_weights_counts() -> None:
    models = [net() for _ in range(5)]
    models[1].shift = torch.tensor(0.1)
    models[2]._shift = (0.1, 0.2)
    models[3].register_buffer("late", torch.ones(1), persistent=False)
    models[4].owner = Plain(models[4])  # an object is not looked into: it may know the module
    found = [digest(describe(m)) for m in models]
    assert len(set(found[:4])) == 4
    assert found[4] == found[0]


def test_memory_format_and_mode_do_not_count() -> None:
    a, b = net(), net().eval().to(memory_format=torch.channels_last)
    assert describe(a) == describe(b)
    x = torch.rand(2, 3, 4, 5)
    assert tensor_hash(x) == tensor_hash(x.to(memory_format=torch.channels_last))
    assert tensor_hash(torch.tensor(3)) != tensor_hash(torch.tensor([3]))
