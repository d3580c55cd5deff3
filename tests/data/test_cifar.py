"""CIFAR-10 from batches and archives: round trips, and files that lie, are damaged or want to run code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import pickletools
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from tsrfast.data import load
from tsrfast.data.batches import read_batch
from tsrfast.errors import InputError


def pack(folder: Path, file: Path, prefix: str = "cifar-10-batches-py") -> Path:
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted(folder.iterdir(), reverse=True):  # the published archive is not in order either
            archive.add(path, f"{prefix}/{path.name}")
    return file


def test_batches_round_trip(tmp_path, pictures, write_batches):
    images, labels = map(torch.from_numpy, pictures)
    folder = write_batches(tmp_path / "cifar-10-batches-py")
    for path in (folder, tmp_path):
        data = load(f"cifar10:{path}")
        assert torch.equal(data.train.images, images[:10])
        assert torch.equal(data.train.labels, labels[:10])
        assert torch.equal(data.test.images, images[10:])
        assert torch.equal(data.test.labels, labels[10:])
        assert data.train.images.dtype == torch.uint8
        assert data.train.labels.dtype == torch.int64
    assert data.name == "cifar10"
    assert data.classes[3] == "cat"
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    assert dict(data.sources) == digests
    assert data.notes == ()


def test_first_images_only(tmp_path, pictures, write_batches):
    folder = write_batches(tmp_path)
    (folder / "data_batch_4").write_bytes(b"never looked at")
    data = load(f"cifar10:{folder}", train=5, test=1)
    assert torch.equal(data.train.images, torch.from_numpy(pictures[0][:5]))
    assert (len(data.train), len(data.test)) == (5, 1)
    assert [name for name, _ in data.sources] == ["data_batch_1", "data_batch_2", "data_batch_3", "test_batch"]
    assert len(load(f"cifar10:{folder}", train=5, test=3).test) == 2  # all there are


def test_batches_written_by_python_2(pictures):
    # Protocol 2 as Python 2 wrote it: byte strings instead of _codecs.encode, and the old module name.
    images = pictures[0][:2].reshape(2, 3072)
    raw = images.tobytes()
    stream = (
        b"\x80\x02}(U\x06labelsq\x00](K\x03K\x09eU\x04datacnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tbu."
    )
    pickletools.dis(stream, io.StringIO())  # well formed
    split = read_batch(stream, "data_batch_1")
    assert torch.equal(split.images, torch.from_numpy(pictures[0][:2]))
    assert split.labels.tolist() == [3, 9]


def test_archive_round_trip(tmp_path, write_batches):
    folder = write_batches(tmp_path / "batches")
    (folder / "batches.meta").write_bytes(b"not needed")
    archive = pack(folder, tmp_path / "cifar-10-python.tar.gz")
    data, plain = load(f"cifar10:{archive}"), load(f"cifar10:{folder}")
    assert data.fingerprint == plain.fingerprint
    assert data.sources == (("cifar-10-python.tar.gz", hashlib.sha256(archive.read_bytes()).hexdigest()),)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    assert data.notes == (f"cifar-10-python.tar.gz: MD5 {md5}, not the published archive (c58f30108f718f92721af3b95e74349a)",)
    assert len(load(f"cifar10:{archive}", train=3).train) == 3


def test_published_archive_is_recognised(tmp_path, write_batches, monkeypatch):
    archive = pack(write_batches(tmp_path / "batches"), tmp_path / "any.tgz")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr("tsrfast.data.cifar.PUBLISHED_MD5", md5)
    assert load(f"cifar10:{archive}").notes == (f"any.tgz: MD5 {md5}, the published archive",)


def test_precedence(tmp_path, pictures, write_batches, write_parquet):
    images, labels = pictures
    black = np.zeros_like(images[:2])

    def first() -> int:
        data = load(f"cifar10:{tmp_path}", train=1, test=1)
        return data.sources[0][0], int(data.train.images.sum())

    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", images, labels)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", images, labels)
    assert first() == ("train-00000-of-00001.parquet", images[0].sum())
    write_batches(tmp_path / "cifar-10-batches-py")
    assert first()[0] == "data_batch_1"
    write_parquet(tmp_path / "train.parquet", black, [0, 1])
    write_parquet(tmp_path / "test.parquet", black, [0, 1])
    assert first() == ("train.parquet", 0)
    pack(tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz")
    assert first()[0] == "cifar-10-python.tar.gz"
    write_batches(tmp_path)
    assert first()[0] == "data_batch_1"


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickle_that_runs_code_is_refused(tmp_path, write_batches):
    marker = tmp_path / "ran"
    payloads = {
        "posix.system": Payload(os.system, f"touch {marker}"),
        "builtins.eval": Payload(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Payload(getattr, "", "join"),
        "functools.partial": Payload(__import__("functools").partial, print),
        "numpy.load": Payload(np.load, str(marker)),
    }
    for name, payload in payloads.items():
        folder = write_batches(tmp_path / "b", payload=payload)
        wanted = name.replace(".", r"\.").replace("builtins", "(builtins|__builtin__)").replace("posix", "(posix|nt)")
        with pytest.raises(InputError, match=rf"data_batch_2: refused, the pickle wants the global '{wanted}'.*run code"):
            load(f"cifar10:{folder}")
        archive = pack(folder, tmp_path / "b.tar.gz")
        with pytest.raises(InputError, match="member data_batch_2: refused"):
            load(f"cifar10:{archive}")
    assert not marker.exists()
    # the stand-ins for NumPy's own names cannot be talked into anything else
    for stream in (
        b"\x80\x02c_codecs\nencode\nU\x01xU\x03zip\x86R.",
        b"\x80\x02cnumpy\nndarray\n)R}U\x01xU\x01ysb.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.shape\x93.",
    ):
        with pytest.raises(InputError):
            read_batch(stream, "b")
    read_batch(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, 2), "b")  # unharmed by those


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [3, 10]}, r"labels must be in 0\.\.9, got 10 for image 1"),
        ({"labels": [-1, 1]}, r"labels must be in 0\.\.9, got -1 for image 0"),
        ({"labels": [1]}, "labels must be as many as images, got 1 for 2"),
        ({"labels": [1.0, 2.0]}, "labels must be a list of integers"),
        ({"labels": "12"}, "labels must be a list of integers, got"),
        ({"data": np.zeros((2, 3071), np.uint8)}, r"shape \(n, 3072\) with n >= 1, got \(2, 3071\)"),
        ({"data": np.zeros((2, 3, 32, 32), np.uint8)}, r"got \(2, 3, 32, 32\)"),
        ({"data": np.zeros((2, 3072), np.float32)}, "C-ordered uint8 array, got dtype b?'f4'"),
        ({"data": np.zeros((3072, 2), np.uint8).T}, "in Fortran order"),
        ({"data": [1, 2]}, "data must be a NumPy array, got list"),
    ],
)
def test_wrong_content(tmp_path, write_batches, changed, message):
    folder = write_batches(tmp_path, **changed)
    with pytest.raises(InputError, match=f"data_batch_2: .*{message}"):
        load(f"cifar10:{folder}")


def test_few_bytes_that_announce_gigabytes():
    for stream in (b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x."):
        tracemalloc.start()
        with pytest.raises(InputError, match="b: truncated or not a pickle"):
            read_batch(stream, "b")
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()


def test_wrong_structure():
    with pytest.raises(InputError, match="b: a CIFAR-10 batch must be a dictionary, got list"):
        read_batch(pickle.dumps([1], 2), "b")
    empty = {"data": np.zeros((0, 3072), np.uint8), "labels": []}
    with pytest.raises(InputError, match=r"b: data must have shape \(n, 3072\) with n >= 1, got \(0, 3072\)"):
        read_batch(pickle.dumps(empty, 3), "b")
    hundred = {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [1]}
    with pytest.raises(InputError, match="b: a CIFAR-10 batch must have the entry 'labels', got data, fine_labels"):
        read_batch(pickle.dumps(hundred, 2), "b")


def test_truncated_at_every_place(pictures, write_batches, tmp_path):
    whole = (write_batches(tmp_path) / "data_batch_1").read_bytes()
    for length in [*range(0, 120), len(whole) // 2, *range(len(whole) - 20, len(whole))]:
        with pytest.raises(InputError, match="b: "):
            read_batch(whole[:length], "b")


def test_truncated_archive(tmp_path, write_batches):
    archive = pack(write_batches(tmp_path / "b"), tmp_path / "a.tar.gz")
    whole = archive.read_bytes()
    for length in (0, 5, 30, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 4):
        archive.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tar\.gz: (truncated or not a tar\.gz|must have the members)"):
            load(f"cifar10:{archive}")


@pytest.mark.parametrize("kind", ["absolute", "parent", "symlink", "hardlink", "fifo", "huge", "twice"])
def test_odd_members_are_refused(tmp_path, write_batches, kind):
    folder = write_batches(tmp_path / "b")
    file = tmp_path / "odd.tar.gz"
    member = tarfile.TarInfo({"absolute": "/etc/x", "parent": "a/../../x", "twice": "b/test_batch"}.get(kind, "b/x"))
    data = b""
    if kind == "symlink":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    elif kind == "hardlink":
        member.type, member.linkname = tarfile.LNKTYPE, "b/test_batch"
    elif kind == "fifo":
        member.type = tarfile.FIFOTYPE
    elif kind == "huge":
        member.size, data = 65 << 20, bytes(65 << 20)
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        for path in folder.iterdir():
            archive.add(path, f"b/{path.name}")
        archive.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match=r"odd\.tar\.gz: refused, member"):
        load(f"cifar10:{file}")


def test_missing_files(tmp_path, write_batches):
    with pytest.raises(InputError, match=r"cifar10:PATH must hold cifar-10-batches-py/, cifar-10-python\.tar\.gz or train-"):
        load(f"cifar10:{tmp_path}")
    folder = write_batches(tmp_path / "b")
    (folder / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"missing data_batch_3$"):
        load(f"cifar10:{folder}")
    with pytest.raises(InputError, match=r"missing data_batch_3$"):
        load(f"cifar10:{pack(folder, tmp_path / 'b.tar.gz')}")
    with pytest.raises(InputError, match=r"not a tar\.gz"):
        load(f"cifar10:{folder / 'test_batch'}")
