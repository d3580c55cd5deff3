"""Exact surgery on conv ReLU nets: prune by fan-out, drop what was pruned, fold the normalisations into the weights.

Batch normalisation follows the ReLU and convolutions have no padding, so both a constant shift and a scale of a channel
pass exactly into the next layer, and a channel whose fan-out weights are zero can be dropped without changing the
logits (Yang et al., AISTATS 2021, section 5.1; rule of the first author's pruning code).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tsrfast.errors import InputError
from tsrfast.nets.conv_relu import KERNEL, ConvReLU

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def fan_out_scores(model: ConvReLU, layer: int) -> Tensor:
    """Mean |w| of the weights that read each channel of conv `layer` (0-based): float64 [C].

    The weights are W[:, c, :, :] of the following conv or, for the last conv, the block of H*W columns of channel c in
    the linear layer.

    Raises:
        InputError: no such layer.
    """
    if not 0 <= layer < len(model.widths):
        raise InputError(f"tsrfast.fan_out_scores: layer must be in 0..{len(model.widths) - 1}, got {layer}")
    return _fan_out(model, layer).double().abs().mean((0, 2))


def prune_masks(model: ConvReLU, ratios: Sequence[float]) -> list[Tensor]:
    """Which channels survive when in each layer l the int(C_l * ratio_l) channels of smallest fan-out score are pruned.

    Layers are ranked one by one, not together. Among equal scores the lower index is pruned first. [0.3, 0.5, 0.5, 0.7]
    turns 64-64-64-64 into the paper's 45-32-32-20.

    Returns:
        One bool [C_l] per layer, True where the channel survives.

    Raises:
        InputError: not one ratio in [0, 1) per layer, or a layer would lose all its channels.
    """
    if len(ratios) != len(model.widths):
        raise InputError(f"tsrfast.prune_masks: ratios must be {len(model.widths)} numbers, one a layer, got {len(ratios)}")
    masks = []
    for layer, (channels, ratio) in enumerate(zip(model.widths, ratios, strict=True)):
        if not 0 <= ratio < 1 or int(channels * ratio) >= channels:
            raise InputError(f"tsrfast.prune_masks: ratios must be in [0, 1), got {ratio} for layer {layer}")
        order = fan_out_scores(model, layer).argsort(stable=True)
        mask = torch.ones(channels, dtype=torch.bool, device=order.device)
        mask[order[: int(channels * ratio)]] = False
        masks.append(mask)
    return masks


def apply_masks(model: ConvReLU, masks: Sequence[Tensor]) -> None:
    """Zero, in place, the fan-out weights of every channel that `masks` does not keep.

    Masks are one bool [C_l] per layer, True where the channel is kept, as `prune_masks` makes them. Training with masks
    calls this after every optimiser step: gradients and momentum still move the weights.

    Raises:
        InputError: masks that do not fit the net.
    """
    _check_masks("apply_masks", model, masks)
    for layer, mask in enumerate(masks):
        fan_out = _fan_out(model, layer)
        fan_out[:, ~mask.to(fan_out.device)] = 0


def shrink(model: ConvReLU, masks: Sequence[Tensor]) -> ConvReLU:
    """A smaller net without the channels that `masks` does not keep; its logits are those of the masked net.

    Rows of the layer, its bias and its batch normalisation go, and so do the matching inputs of the next layer. Because
    a dropped channel is a channel whose fan-out is zero, `model` itself need not have been masked. Mode, dtype and
    device stay.

    Raises:
        InputError: masks that do not fit the net, or that keep no channel of a layer.
    """
    _check_masks("shrink", model, masks)
    for layer, mask in enumerate(masks):
        if not mask.any():
            raise InputError(f"tsrfast.shrink: masks must keep at least one channel a layer, got none for layer {layer}")
    old = model.state_dict()
    new = {name: value for name, value in old.items() if name in ("mean", "std", "head.bias")}
    kept = [mask.to(model.head.weight.device).nonzero().flatten() for mask in masks]
    inputs = torch.arange(model.image[0], device=model.head.weight.device)
    for layer, rows in enumerate(kept):
        new[f"convs.{layer}.weight"] = old[f"convs.{layer}.weight"][rows][:, inputs]
        for name in (f"convs.{layer}.bias", *(f"norms.{layer}.{key}" for key in _NORM)):
            if name in old:
                new[name] = old[name][rows] if old[name].ndim else old[name]
        inputs = rows
    new["head.weight"] = _fan_out(model, len(kept) - 1)[:, inputs].flatten(1)
    config = {**model.config, "widths": [len(rows) for rows in kept]}
    return _build(model, config, new)


def fold(model: ConvReLU) -> ConvReLU:
    """The net without batch normalisation and input normalisation that has the logits of `model` in eval mode.

    With a channel mapped to s*h + t (batch normalisation: s = gamma / sqrt(var + eps), t = beta - s * mean; input: s =
    1 / std, t = -mean / std), the next layer becomes W'[:, c] = s_c W[:, c], b' = b + sum_c t_c sum_pq W[:, c, p, q].
    Computed in float64, rounded once to the net's dtype. ReLUs see the same values, so the activations (after ReLU,
    before BN) are the same too.
    """
    old = model.state_dict()
    new = {}
    scale = torch.ones(model.image[0], dtype=torch.float64, device=model.head.weight.device)
    shift = torch.zeros_like(scale)
    if "mean" in old:
        scale = 1 / old["std"].double().flatten()
        shift = -old["mean"].double().flatten() * scale
    for layer, channels in enumerate(model.widths):
        weight = old[f"convs.{layer}.weight"].double()
        new[f"convs.{layer}.weight"] = weight * scale.view(1, -1, 1, 1)
        new[f"convs.{layer}.bias"] = old[f"convs.{layer}.bias"].double() + weight.sum((2, 3)) @ shift
        scale = torch.ones(channels, dtype=torch.float64, device=weight.device)
        shift = torch.zeros_like(scale)
        if model.batch_norm:
            gamma, beta, mean, var = (old[f"norms.{layer}.{key}"].double() for key in _NORM[:4])
            scale = gamma / (var + model.norms[layer].eps).sqrt()
            shift = beta - scale * mean
    blocks = _fan_out(model, len(model.widths) - 1).double()
    new["head.weight"] = (blocks * scale.view(1, -1, 1)).flatten(1)
    new["head.bias"] = old["head.bias"].double() + blocks.sum(2) @ shift
    return _build(model, {**model.config, "batch_norm": False, "mean": None, "std": None}, new)


def student_widths(widths: Sequence[int], factor: float = 1.1) -> tuple[int, ...]:
    """floor(factor * k + 0.5) for each width k: 45-32-32-20 gives the paper's students 50-35-35-22 at 1.1.

    Raises:
        InputError: `factor` not finite and positive, or a width that would become 0.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise InputError(f"tsrfast.student_widths: factor must be a positive number, got {factor}")
    scaled = tuple(math.floor(factor * k + 0.5) for k in widths)
    if not scaled or min(scaled) < 1:
        raise InputError(
            f"tsrfast.student_widths: factor * widths must be at least 1 channel a layer, got {factor} * {list(widths)}"
        )
    return scaled


def _fan_out(model: ConvReLU, layer: int) -> Tensor:
    """The weights that read the channels of conv `layer`, as a view [out, C, rest] outside autograd.

    Writing to it writes to the net.
    """
    tensors = model.state_dict()
    if layer + 1 < len(model.widths):
        return tensors[f"convs.{layer + 1}.weight"].view(-1, model.widths[layer], KERNEL * KERNEL)
    return tensors["head.weight"].view(model.classes, model.widths[layer], -1)


def _build(model: ConvReLU, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConvReLU:
    """A net of architecture `config` with these tensors, on the device and in the dtype and mode of `model`."""
    reference = model.head.weight
    new = ConvReLU.from_config(config).to(device=reference.device, dtype=reference.dtype)
    new.load_state_dict(tensors)
    return new.train(model.training)


def _check_masks(function: str, model: ConvReLU, masks: Sequence[Tensor]) -> None:
    shapes = [(list(m.shape), str(m.dtype).removeprefix("torch.")) for m in masks]
    if shapes != [([c], "bool") for c in model.widths]:
        raise InputError(f"tsrfast.{function}: masks must be bool of lengths {list(model.widths)}, one a layer, got {shapes}")
