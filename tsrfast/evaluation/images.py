"""What an evaluation takes as data: a split of a data set, two tensors, or batches from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tsrfast.data import Dataset, Split
from tsrfast.errors import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """Images in [0, 1], labels, and what they are called (no path of this machine)."""

    x: Tensor
    y: Tensor
    name: str


def gather(data: Any, limit: int | None = None, name: str | None = None) -> Images:
    """The first `limit` images (None: all) of `data`, in its order.

    Args:
        data: a `tsrfast.data.Split`; ``(x, y)``, x ``[N, C, H, W]`` in [0, 1] and y int64 ``[N]``; or an iterable of such pairs, for
            example a DataLoader that does not shuffle. No more batches are taken than the limit needs.
        limit: at least 1.
        name: what the data are called in the report.

    Raises:
        InputError: something else, or no image. (Values are checked by who attacks.)
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"tsrfast.evaluation: limit must be an integer >= 1 or None, got {limit!r}")
    if isinstance(data, Dataset):
        raise InputError("tsrfast.evaluation: data must be one split, data.test or data.train, got a whole Dataset")
    if isinstance(data, Split):
        chosen = slice(limit)
        x, y = data.pixels(chosen), data.labels[chosen]
    elif isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        x, y = _pair(data)
    elif isinstance(data, Iterable) and not isinstance(data, (Tensor, str)):
        pairs, count = [], 0
        for batch in data:
            pairs.append(_pair(batch))
            count += len(pairs[-1][0])
            if limit is not None and count >= limit:
                break
        if not pairs:
            raise InputError("tsrfast.evaluation: data must hold at least one image, got none")
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    else:
        what = type(data).__name__
        raise InputError(f"tsrfast.evaluation: data must be a Split, (x, y), or batches of (x, y), got {what}")
    if not len(x):
        raise InputError("tsrfast.evaluation: data must hold at least one image, got none")
    return Images(x[:limit], y[:limit], name or ("tensors" if isinstance(data, (tuple, list)) else type(data).__name__))


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    pair = list(islice(batch, 3)) if isinstance(batch, (tuple, list)) else []
    if len(pair) != 2 or not all(isinstance(t, Tensor) and t.ndim for t in pair) or len(pair[0]) != len(pair[1]):
        shown = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in pair] or type(batch).__name__
        raise InputError(f"tsrfast.evaluation: a batch must be (x, y), tensors with one label an image, got {shown}")
    return pair[0].detach(), pair[1].detach()
