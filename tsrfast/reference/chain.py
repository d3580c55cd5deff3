"""`tsrfast.ops.chain` in plain PyTorch, in x's dtype, on parameters that are not packed (each record's, at the plan's offsets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tsrfast.reference.pgd_step import pgd_step

FIELDS = (
    "kind", "channels", "height", "width", "out_channels", "out_height", "out_width", "kernel_h", "kernel_w",
    "stride_h", "stride_w", "pad_h", "pad_w", "activation", "weight", "bias", "slope", "winograd", "count_pad",
)  # fmt: skip
CONV, LINEAR, AFFINE, AVG_POOL, MAX_POOL = range(5)
NONE, RELU, LEAKY_RELU = range(3)

Network = tuple[Tensor, Tensor]
"""(plan, weights)"""


class ChainPGD(NamedTuple):
    x: Tensor
    loss: Tensor
    adversarial: Tensor
    closeness: Tensor
    bad: Tensor
    queries: Tensor
    iterates: Tensor | None


def _record(x: Tensor, row: Tensor, weights: Tensor) -> Tensor:
    r = dict(zip(FIELDS, row.tolist(), strict=True))
    channels, out = r["channels"], r["out_channels"]
    kernel, stride, pad = ((r[f"{name}_h"], r[f"{name}_w"]) for name in ("kernel", "stride", "pad"))

    def parameter(name: str, *shape: int) -> Tensor:
        return weights[r[name] : r[name] + shape[0] * torch.Size(shape[1:]).numel()].reshape(shape).to(x.dtype)

    if r["kind"] == LINEAR:
        x = F.linear(x.flatten(1), parameter("weight", out, channels), parameter("bias", out))
    else:
        x = x.reshape(len(x), channels, r["height"], r["width"])
    if r["kind"] == CONV:
        x = F.conv2d(x, parameter("weight", out, channels, *kernel), parameter("bias", out), stride, pad)
    elif r["kind"] == AFFINE:
        x = parameter("weight", channels, 1, 1) * x + parameter("bias", channels, 1, 1)
    elif r["kind"] == AVG_POOL:
        x = F.avg_pool2d(x, kernel, stride, pad, count_include_pad=bool(r["count_pad"]))
    elif r["kind"] == MAX_POOL:
        x = F.max_pool2d(x, kernel, stride, pad)
    if r["activation"] == RELU:
        x = F.relu(x)
    elif r["activation"] == LEAKY_RELU:
        x = F.leaky_relu(x, parameter("slope", 1).item())
    return x


def _run(x: Tensor, plan: Tensor, weights: Tensor) -> list[Tensor]:
    out: list[Tensor] = []
    for row in plan:
        out.append(x := _record(x, row, weights))
    return out


def chain_forward(
    x: Tensor, plan: Tensor, weights: Tensor, layers: Sequence[int], *, precision: str = "float32"
) -> list[Tensor]:
    """What the records `layers` of the plan return for x ``[N, ...]``; kinds and formulas in csrc/core/chain.h.

    Here and below everything is computed in x's dtype, whatever the kernels' `precision`.
    """
    out = _run(x, plan, weights)
    return [out[layer] for layer in layers]


def chain_gradient(
    x: Tensor, plan: Tensor, weights: Tensor, cotangent: Tensor, layer: int = -1, *, precision: str = "float32"
) -> Tensor:
    """Gradients of sum(logits * cotangent[:, r]), r = 0 .. R - 1, for what record `layer` returns (-1: x): ``[N, R, ...]``."""
    with torch.enable_grad():
        leaf = (x if layer == -1 else chain_forward(x, plan, weights, [layer])[0]).detach().requires_grad_()
        out = _run(leaf, plan[layer + 1 :], weights)
        logits = (out[-1] if out else leaf).flatten(1)
        rows = [torch.autograd.grad(logits, leaf, cotangent[:, r], retain_graph=True)[0] for r in range(cotangent.shape[1])]
    return torch.stack(rows, 1) if rows else leaf.detach().new_empty((len(x), 0, *leaf.shape[1:]))


def _loss(loss: str, s: Tensor, t: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """(value [N], right answer [N]); formulas in csrc/core/chain_loss.h."""
    if t is not None and loss.startswith("oracle_"):
        y = t.detach().argmax(1)
    assert y is not None
    if loss in ("cross_entropy", "oracle_cross_entropy"):
        return F.cross_entropy(s, y, reduction="none"), y
    if loss in ("margin", "oracle_margin"):
        return s.scatter(1, y[:, None], -torch.inf).amax(1) - s.gather(1, y[:, None]).squeeze(1), y
    assert t is not None
    if loss == "oracle_kl":
        log_p = t.log_softmax(1)
        return (log_p.exp() * (log_p - s.log_softmax(1))).sum(1), y
    if loss == "oracle_max_difference":
        return (s - t).abs().max(1).values, y
    assert loss == "oracle_l2"
    return (s - t).square().sum(1), y


def chain_pgd(
    x0: Tensor,
    start: Tensor,
    student: Network,
    teacher: Network | None = None,
    labels: Tensor | None = None,
    *,
    loss: str,
    norm: str = "linf",
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    lo: float = 0.0,
    hi: float = 1.0,
    sparsity: float = 0.01,
    targeted: bool = False,
    keep: str = "last",
    early_stop: bool = False,
    judge: bool = True,
    iterates: bool = False,
    precision: str = "float32",
) -> ChainPGD:
    """`steps` of `pgd_step` on the loss, image by image; an image that is done is frozen (`early_stop`)."""
    n, x, running = len(x0), start.clone(), torch.ones(len(x0), dtype=torch.bool)
    best = x.clone()
    value, closeness = (torch.full((n,), torch.nan, dtype=x0.dtype) for _ in range(2))
    adversarial = torch.zeros(n, dtype=torch.bool)
    bad, queries = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    path = [x]

    def column(mask: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (x0.ndim - 1))

    for step in range(steps + 1):
        if step == steps and not (judge or early_stop or keep == "best"):
            break
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            s = _run(leaf, *student)[-1].flatten(1)
            t = None if teacher is None else _run(leaf, *teacher)[-1].flatten(1)
            now, answer = _loss(loss, s, t, labels)
            g = torch.autograd.grad(now.sum(), leaf)[0] if step < steps else None
        if step == 0 and t is not None and loss.startswith("oracle_"):
            closeness = ((s - t).norm(dim=1) / t.norm(dim=1)).detach()
        now, wrong = now.detach(), (s.argmax(1) != answer) ^ targeted
        queries += running
        if keep == "best":
            score, held = ((-v if targeted else v).nan_to_num(nan=-torch.inf) for v in (now, value))
            taken = running & ((wrong & ~adversarial) | ((wrong == adversarial) & (score > held)))
        else:
            taken = running & ((early_stop & wrong) | (step == steps))
        if keep == "best" and step == 0:
            taken = running  # the first candidate, whatever its loss
        best = torch.where(column(taken), x, best)
        value, adversarial = torch.where(taken, now, value), torch.where(taken, wrong, adversarial)
        if early_stop:
            running = running & ~wrong
        if g is not None:
            moved, count = pgd_step(
                x, x0, g, step_size=step_size, eps=eps, norm=norm, lo=lo, hi=hi, targeted=targeted, sparsity=sparsity
            )
            bad += count * running
            x = torch.where(column(running), moved, x)
            path.append(x)
    result = best if judge or early_stop or keep == "best" else x
    return ChainPGD(result, value, adversarial, closeness, bad, queries, torch.stack(path) if iterates else None)
