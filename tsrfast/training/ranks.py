"""The processes that share a computation: whose number this one is, and what they tell each other.

What is split keeps the order and the random numbers of one process. Work on images is dealt out in whole batches, so each image meets the
same others and its result is the same, bit for bit; a batch of a training is itself cut, and its gradients are summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tsrfast.errors import EnvironmentFault

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`size` processes of torch.distributed's default group, of which this is number `rank`; by default one alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def part(self) -> slice:
        """Which of the things that are dealt out are this process's: every `size`-th."""
        return slice(self.rank, None, self.size)

    def barrier(self) -> None:
        """Wait until all processes are here.

        Raises:
            EnvironmentFault: another process has stopped.
        """
        if self.size > 1:
            with _lost():
                dist.barrier()

    def together(self, mine: Sequence[T]) -> list[T]:
        """The things that all processes made of their `part`, in the order of what was dealt out. Tensors must be on the CPU.

        Raises:
            EnvironmentFault: another process has stopped.
        """
        if self.size == 1:
            return list(mine)
        everybodys: list[list[T]] = [[] for _ in range(self.size)]
        with _lost():
            dist.all_gather_object(everybodys, list(mine))
        nothing = object()
        return [t for turn in zip_longest(*everybodys, fillvalue=nothing) for t in turn if t is not nothing]  # type: ignore[misc]

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its sum over the processes, the same bits in all of them; return the sum of `loss`, [].

        Raises:
            EnvironmentFault: another process has stopped.
        """
        if self.size == 1:
            return loss.detach()
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.detach().to(gradients[0]).reshape(1)])
        with _lost():
            dist.all_reduce(flat)
        *sums, total = flat.split([*(g.numel() for g in gradients), 1])
        for g, s in zip(gradients, sums, strict=True):
            g.copy_(s.view_as(g))
        return total[0]


ALONE = Ranks()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise EnvironmentFault(f"another process of this run has stopped or does not answer: {reason}") from e
