from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsrfast.errors import InputError
from tsrfast.nets import ConvReLU, apply_masks, fan_out_scores, fold, prune_masks, shrink, student_widths

NORMALISATION = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def random_net(
    widths: tuple[int, ...] = (5, 4, 6), *, seed: int = 0, dtype: torch.dtype = torch.float32, **kw: Any
) -> ConvReLU:
    """A net in eval mode whose batch norms have scales of both signs and statistics as after some training."""
    model = ConvReLU(widths, image=(3, 10, 9), seed=seed, **kw).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.norms if model.batch_norm else []:
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=g))
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=g))
            norm.running_mean.copy_(torch.randn(norm.bias.shape, generator=g))
            norm.running_var.copy_(torch.rand(norm.bias.shape, generator=g) + 0.1)
            norm.num_batches_tracked.fill_(7)
    return model.to(dtype)


def images(model: ConvReLU, count: int = 5, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *model.image, generator=generator).to(model.head.weight.dtype)


def assert_same_logits(a: ConvReLU, b: ConvReLU) -> None:
    x = images(a)
    with torch.no_grad():
        tolerance = 1e-10 if x.dtype == torch.float64 else 1e-5
        wanted = a(x)
        # Relative to the largest logit: random batch norms make logits far larger than 1.
        assert (b(x) - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


def unfolded_scores(model: ConvReLU, layer: int) -> list[float]:
    """The definition with explicit loops over (out, c, p, q); the linear layer indexed as (C, H, W)."""
    if layer + 1 < len(model.widths):
        w = model.convs[layer + 1].weight.tolist()
        every = [[v for out in w for row in out[c] for v in row] for c in range(model.widths[layer])]
    else:
        _, height, width = model.image
        area = (height - 2 * len(model.widths)) * (width - 2 * len(model.widths))
        w = model.head.weight.tolist()
        every = [[row[c * area + i] for row in w for i in range(area)] for c in range(model.widths[layer])]
    return [sum(map(abs, vs)) / len(vs) for vs in every]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_scores_follow_the_definition(layer: int, memory_format: torch.memory_format) -> None:
    model = random_net().to(memory_format=memory_format)
    wanted = torch.tensor(unfolded_scores(model, layer), dtype=torch.float64)
    torch.testing.assert_close(fan_out_scores(model, layer), wanted)


def test_pruning_64_gives_the_oracle_widths() -> None:
    model = ConvReLU(batch_norm=True)
    masks = prune_masks(model, [0.3, 0.5, 0.5, 0.7])
    assert [int(m.sum()) for m in masks] == [45, 32, 32, 20]
    for layer, mask in enumerate(masks):
        scores = fan_out_scores(model, layer)
        assert scores[~mask].max() <= scores[mask].min()
    assert sum(p.numel() for p in fold(shrink(model, masks)).parameters()) == 144_490


def test_ties_prune_the_lowest_index_first() -> None:
    model = random_net((6, 4), batch_norm=False)
    with torch.no_grad():
        model.convs[1].weight.fill_(0.5)
    assert prune_masks(model, [0.5, 0.0])[0].tolist() == [False, False, False, True, True, True]
    assert prune_masks(model, [0.5, 0.0])[1].all()


def test_student_widths() -> None:
    assert student_widths((45, 32, 32, 20)) == (50, 35, 35, 22)
    assert student_widths((45, 32, 32, 32, 20), 1.1) == (50, 35, 35, 35, 22)
    assert student_widths((3, 4), 0.5) == (2, 2)
    assert student_widths((64,), 2) == (128,)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    batch_norm=st.booleans(),
    normalise=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
    ratio=st.floats(0, 0.95),
)
def test_masked_shrunk_and_folded_agree(
    widths: list[int], batch_norm: bool, normalise: bool, double: bool, seed: int, ratio: float
) -> None:
    kw = NORMALISATION if normalise else {}
    dtype = torch.float64 if double else torch.float32
    model = random_net(tuple(widths), batch_norm=batch_norm, seed=seed, dtype=dtype, **kw)
    masks = prune_masks(model, [ratio] * len(widths))
    small = shrink(model, masks)
    masked = copy.deepcopy(model)
    apply_masks(masked, masks)
    assert small.widths == tuple(c - int(c * ratio) for c in widths)
    assert_same_logits(masked, small)
    pure = fold(small)
    assert_same_logits(masked, pure)
    assert pure.config == {**small.config, "batch_norm": False, "mean": None, "std": None}
    assert pure.head.weight.dtype == dtype
    for a, b, mask in zip(masked.activations(images(model)), pure.activations(images(model)), masks, strict=True):
        torch.testing.assert_close(b, a[:, mask], atol=2e-5, rtol=2e-5)


def test_fold_is_exact_in_float64_with_negative_and_zero_scales() -> None:
    model = random_net(batch_norm=True, dtype=torch.float64, **NORMALISATION)
    with torch.no_grad():
        model.norms[0].weight[0] = -2.0
        model.norms[1].weight[1] = 0.0
    before = copy.deepcopy(model.state_dict())
    assert_same_logits(model, fold(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fold_rounds_once() -> None:
    model = random_net(batch_norm=True, **NORMALISATION)
    exact = fold(copy.deepcopy(model).double())
    for a, b in zip(fold(model).parameters(), exact.parameters(), strict=True):
        assert torch.equal(a, b.float())


def test_fold_of_a_pure_net_is_the_net() -> None:
    model = random_net()
    for a, b in zip(model.parameters(), fold(model).parameters(), strict=True):
        assert torch.equal(a, b)


def test_shrink_keeps_batch_norm_normalisation_and_mode() -> None:
    model = random_net(batch_norm=True, **NORMALISATION)
    mask = torch.tensor([True, False, True, True, False])
    for training in (True, False):
        small = shrink(model.train(training), [mask, torch.ones(4, dtype=torch.bool), torch.ones(6, dtype=torch.bool)])
        assert small.training is training
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(small.norms[0], key), getattr(model.norms[0], key)[mask])
        assert small.norms[0].num_batches_tracked == 7
        assert torch.equal(small.std, model.std)
        assert torch.equal(small.convs[1].weight, model.convs[1].weight[:, mask])


def test_masking_zeroes_fan_out_and_nothing_else() -> None:
    model = random_net(batch_norm=True)
    before = copy.deepcopy(model)
    masks = prune_masks(model, [0.4, 0.5, 0.5])
    apply_masks(model, masks)
    for layer, mask in enumerate(masks):
        assert (fan_out_scores(model, layer) == 0).tolist() == (~mask).tolist()
    assert torch.equal(model.convs[0].weight, before.convs[0].weight)
    assert torch.equal(model.convs[1].weight[:, masks[0]], before.convs[1].weight[:, masks[0]])
    assert torch.equal(model.convs[1].bias, before.convs[1].bias)


def test_five_extra_channels_without_fan_out_change_nothing() -> None:
    teacher = random_net((6, 4, 5))
    student = random_net((11, 4, 5), seed=1)
    with torch.no_grad():
        for name, value in student.state_dict().items():
            source = teacher.state_dict()[name]
            if name.startswith("convs.0"):
                value[:6] = source
            elif name == "convs.1.weight":
                value.zero_()
                value[:, :6] = source
            else:
                value.copy_(source)
    assert_same_logits(teacher, student)
    masks = prune_masks(student, [5 / 11, 0, 0])
    assert masks[0].tolist() == [True] * 6 + [False] * 5
    back = shrink(student, masks)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in teacher.state_dict().items())


def test_permuted_and_rescaled_channels_give_equal_logits() -> None:
    model = random_net(dtype=torch.float64)
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer, channels in enumerate(model.widths):
            order = torch.randperm(channels, generator=g)
            factor = torch.rand(channels, generator=g).double() + 0.5
            conv = other.convs[layer]
            conv.weight.copy_(conv.weight[order] * factor.view(-1, 1, 1, 1))
            conv.bias.copy_(conv.bias[order] * factor)
            if layer + 1 < len(model.widths):
                reader = other.convs[layer + 1].weight
                reader.copy_(reader[:, order] / factor.view(1, -1, 1, 1))
            else:
                blocks = other.head.weight.view(10, channels, -1)[:, order] / factor.view(1, -1, 1)
                other.head.weight.copy_(blocks.flatten(1))
    assert_same_logits(model, other)


def test_bad_arguments() -> None:
    model = random_net()
    with pytest.raises(InputError, match=r"layer must be in 0\.\.2"):
        fan_out_scores(model, 3)
    with pytest.raises(InputError, match="must be 3 numbers"):
        prune_masks(model, [0.5, 0.5])
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match=r"ratios must be in \[0, 1\)"):
            prune_masks(model, [0.5, ratio, 0.5])
    masks = prune_masks(model, [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"masks must be bool of lengths \[5, 4, 6\]"):
        apply_masks(model, masks[:2])
    with pytest.raises(InputError, match="masks must be bool"):
        shrink(model, [m.float() for m in masks])
    with pytest.raises(InputError, match="got none for layer 1"):
        shrink(model, [masks[0], ~masks[1], masks[2]])
    for factor in (0.0, float("inf")):
        with pytest.raises(InputError, match="factor must"):
            student_widths((3,), factor)
    with pytest.raises(InputError, match="at least 1 channel"):
        student_widths((1, 8), 0.1)
