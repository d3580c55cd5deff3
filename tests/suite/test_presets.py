"""Presets and ``--set key=value``."""

import dataclasses

import pytest

from tsrfast.errors import InputError
from tsrfast.suite.presets import PAPER, PRESETS, SMOKE, Preset, preset


def test_presets_are_valid_and_in_order_of_size():
    assert list(PRESETS) == ["smoke", "quick", "paper"]
    for name, p in PRESETS.items():
        assert p.name == name
        assert preset(name) == p
        assert Preset(**dataclasses.asdict(p)) == p
    smoke, quick, paper = (PRESETS[name] for name in ("smoke", "quick", "paper"))
    assert smoke.student_images < quick.student_images
    assert smoke.eval_images < quick.eval_images < paper.eval_images
    assert smoke.epochs[-1] <= quick.epochs[-1] <= paper.epochs[-1]


def test_paper_has_the_papers_numbers():
    """Section 5.1 and table 1 of the paper: 64 channels pruned at 0.3, 0.5, 0.5, 0.7; l_inf PGD of 40 steps of 0.01 within 10/255."""
    p = PAPER
    assert p.widths == (64, 64, 64, 64)
    assert p.prune_ratios == (0.3, 0.5, 0.5, 0.7)
    assert p.epochs == (50, 100, 150, 200, 300)
    assert p.student_factor == 1.1
    assert (p.eps, p.steps, p.step_size) == (10 / 255, 40, 0.01)
    assert p.train_images is p.student_images is p.test_images is None


def test_every_setting_can_be_overridden_with_its_own_value():
    for f in dataclasses.fields(Preset):
        if f.name == "name":
            continue
        value = getattr(PAPER, f.name)
        if value is None:
            text = "none" if "str" in str(f.type) else "all"
        elif isinstance(value, tuple):
            text = ",".join(map(str, value))
        else:
            text = str(value)
        assert preset("paper", [f"{f.name}={text}"]) == PAPER, f.name


def test_overrides():
    p = preset(
        "smoke",
        ["steps=7", "eps=0.05", "teacher_augment=true", "test_images=all", "epochs=2,4,6,8,9", "lr=cosine:0.1", "steps=8",
         "widths=4,4", "prune_ratios=0.5,.25"],
    )  # fmt: skip
    want = dataclasses.replace(
        SMOKE, steps=8, eps=0.05, teacher_augment=True, test_images=None, epochs=(2, 4, 6, 8, 9), lr="cosine:0.1", widths=(4, 4),
        prune_ratios=(0.5, 0.25),
    )  # fmt: skip
    assert p == want
    assert preset("smoke") == SMOKE  # nothing sticks
    assert preset("smoke", ["teacher_epochs=0", "teacher_weight_decay=0", "finetune_epochs=0"]).teacher_epochs == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", r"unknown setting 'epoch'; did you mean 'epochs'\? \(allowed: batch_size, "),
        ("name=x", "unknown setting 'name'"),
        ("steps", "--set: must be key=value, got 'steps'"),
        ("", "--set: must be key=value, got ''"),
        ("steps=", "--set steps: must be an integer, got ''"),
        ("steps=2.5", "--set steps: must be an integer, got '2.5'"),
        ("steps=all", "--set steps: must be an integer, got 'all'"),
        ("steps=0", "--set steps: must be positive, got 0"),
        ("steps=-1", "--set steps: must be positive, got -1"),
        ("train_images=some", "--set train_images: must be an integer or 'all', got 'some'"),
        ("train_images=0", "--set train_images: must be positive, got 0"),
        ("eps=big", "--set eps: must be a number, got 'big'"),
        ("eps=-0.1", "--set eps: must be positive, got -0.1"),
        ("eps=nan", "--set eps: must be positive, got nan"),
        ("eps=8", r"--set eps: must be in pixels of \[0, 1\], got 8.0; did you mean 8.0/255 = 0.0314\?"),
        ("l2_eps=inf", "--set l2_eps: must be positive, got inf"),
        ("teacher_epochs=-1", "--set teacher_epochs: must be >= 0, got -1"),
        ("teacher_augment=yes", "--set teacher_augment: must be true or false, got 'yes'"),
        ("epochs=1,2,3", r"--set epochs: must be 5 increasing positive integers, got \[1, 2, 3\]"),
        ("epochs=1,2,2,3,4", "--set epochs: must be 5 increasing"),
        ("epochs=5,4,3,2,1", "--set epochs: must be 5 increasing"),
        ("epochs=0,1,2,3,4", "--set epochs: must be 5 increasing"),
        ("epochs=1,2,x,4,5", "--set epochs: must be numbers separated by commas, got '1,2,x,4,5'"),
        ("widths=8,8", "--set prune_ratios: must be 2 numbers, one a layer of widths"),
        ("widths=8,0,8,8", "--set widths: must be positive integers"),
        ("prune_ratios=0,0,0,1", r"--set prune_ratios: must be numbers in \[0, 1\)"),
        ("prune_ratios=0,0,0,nan", r"--set prune_ratios: must be numbers in \[0, 1\)"),
        ("optimizer=adma", "unknown optimizer 'adma'; did you mean 'adam'"),
        ("lr=cosin:0.1", "cosin"),
        ("teacher_lr=-1", "-1"),
    ],
)
def test_says_what_is_wrong(override, message):
    with pytest.raises(InputError, match=message) as caught:
        preset("smoke", [override])
    assert "\n" not in str(caught.value)


def test_unknown_preset():
    with pytest.raises(InputError, match=r"unknown preset 'smok'; did you mean 'smoke'\? \(allowed: paper, quick, smoke\)"):
        preset("smok")
