"""Images in class folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tsrfast.data import load
from tsrfast.errors import InputError


@pytest.fixture
def root(tmp_path, encoded):
    rng = np.random.default_rng(1)
    for which in ("train", "test"):
        for name, n in (("zebra", 3), ("ant", 2)):
            (tmp_path / which / name).mkdir(parents=True)
            for i in range(n):
                image = rng.integers(0, 256, (3, 20, 24), np.uint8)
                (tmp_path / which / name / f"{i}.png").write_bytes(encoded(image, "PNG"))
    return tmp_path


def test_round_trip(root):
    (root / "train" / "ant" / ".hidden.png").write_bytes(b"")
    (root / "train" / "ant" / "notes.txt").write_bytes(b"")
    data = load(f"folder:{root}")
    assert data.classes == ("ant", "zebra")
    assert data.name == f"folder:{root.name}"
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1]  # balanced from the start
    for row, file in enumerate(["ant/0", "zebra/0", "ant/1", "zebra/1", "zebra/2"]):
        expected = np.asarray(Image.open(root / "train" / f"{file}.png"))
        assert np.array_equal(data.train.images[row].permute(1, 2, 0), expected)
    assert data.train.images.shape == (5, 3, 20, 24)
    assert [name for name, _ in data.sources] == ["train (5 files)", "test (5 files)"]
    part = load(f"folder:{root}", train=2, test=1)
    assert torch.equal(part.train.images, data.train.images[:2])
    assert part.fingerprint != data.fingerprint
    assert len(load(f"folder:{root}", train=6).train) == 5  # all there are


def test_colour_conversion(root):
    grey = np.arange(480, dtype=np.uint8).reshape(20, 24)
    file = root / "train" / "ant" / "0.png"
    Image.fromarray(grey).save(file)
    assert np.array_equal(load(f"folder:{root}").train.images[0], np.stack([grey] * 3))
    Image.fromarray(grey.astype(np.uint16) * 200).save(file)
    with pytest.raises(InputError, match=r"0\.png: image must have 8 bits a channel"):
        load(f"folder:{root}")


def test_wrong_layout(tmp_path, root, encoded):
    with pytest.raises(InputError, match=r"layout PATH/train/<class>/\*\.png.*missing train and test"):
        load(f"folder:{root / 'train'}")
    (root / "test" / "bee").mkdir()
    with pytest.raises(InputError, match="same classes, only one has bee"):
        load(f"folder:{root}")
    (root / "train" / "bee").mkdir()
    with pytest.raises(InputError, match=r"train/bee: must hold \*\.png or \*\.jpg images, got none"):
        load(f"folder:{root}")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        load(f"folder:{tmp_path / 'empty'}")


@pytest.mark.parametrize("file", ["train/ant/1.png", "test/zebra/2.png"])
def test_one_size_and_no_damage(root, encoded, file):
    (root / file).write_bytes(encoded(np.zeros((3, 24, 20), np.uint8), "PNG"))
    with pytest.raises(InputError, match=f"{file}: image must be 24x20 pixels, got 20x24"):
        load(f"folder:{root}")
    (root / file).write_bytes(encoded(np.zeros((3, 20, 24), np.uint8), "JPEG")[:300])
    with pytest.raises(InputError, match=f"{file}: not a readable PNG or JPEG"):
        load(f"folder:{root}")
