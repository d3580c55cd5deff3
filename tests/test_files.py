"""Files appear whole or not at all."""

import os
import stat

import pytest

from tsrfast._files import atomic_path, atomic_write, lock, remove_leftovers
from tsrfast.errors import EnvironmentFault


def test_writes_text_and_bytes_and_makes_the_folder(tmp_path):
    atomic_write(tmp_path / "a" / "b" / "text", "ä")
    atomic_write(tmp_path / "a" / "b" / "bytes", b"\0")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "ä".encode()
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\0"
    atomic_write(tmp_path / "a" / "b" / "text", "new")
    assert (tmp_path / "a" / "b" / "text").read_text() == "new"
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["bytes", "text"]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    atomic_write(tmp_path / "file", "old")

    def fail():
        with atomic_path(tmp_path / "file") as temp:
            temp.write_text("ha")
            raise error

    with pytest.raises(EnvironmentFault if error is OSError else error):
        fail()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_the_final_name_is_free_until_the_end(tmp_path):
    with atomic_path(tmp_path / "file") as temp:
        temp.write_text("x")
        assert temp.parent == tmp_path  # a rename across file systems would not be atomic
        assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("where", ["file/inside", "folder"])
def test_faults_of_the_environment_name_the_file(tmp_path, where):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFault, match=rf"^cannot write {tmp_path / where}: \w"):
        atomic_write(tmp_path / where, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_leftovers_go_and_nothing_else(tmp_path):
    for name in (".results.json.ab12cd.part", "results.json", ".lock", "movie.part"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, tmp_path / "not there")
    assert sorted(os.listdir(tmp_path)) == [".lock", "movie.part", "results.json"]


def test_a_locked_folder_belongs_to_one(tmp_path):
    held = lock(tmp_path / "out")
    with pytest.raises(EnvironmentFault, match=r"out is in use by another tsrfast process"):
        lock(tmp_path / "out")
    held.close()
    lock(tmp_path / "out").close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault, match=r"^cannot write .*file"):
        lock(tmp_path / "file")
