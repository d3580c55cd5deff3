"""The store: what is computed once, what is thrown away, what is never half there."""

import os
import subprocess
import sys

import pytest

from tsrfast.errors import EnvironmentFault
from tsrfast.suite.store import Artifact, Store


@pytest.fixture
def store(tmp_path):
    with_lock = Store(tmp_path / "store")
    yield with_lock
    with_lock.close()


def write(text, calls):
    def build(folder):
        calls.append(sorted(p.name for p in folder.iterdir()))
        (folder / "result").write_text(text)

    return build


def test_same_configuration_is_computed_once(store):
    calls = []
    first = store.artifact("stage", {"a": 1, "b": [2, 3]}, {}, write("x", calls), resumable=False)
    again = store.artifact("stage", {"b": [2, 3], "a": 1}, {}, write("y", calls), resumable=False)  # order does not matter
    assert first == again
    assert (first.folder / "result").read_text() == "x"
    assert calls == [[]]
    assert [entry["cached"] for entry in store.log] == [False, True]


def test_a_later_process_finds_it(store, tmp_path):
    first = store.artifact("stage", {}, {}, write("x", []), resumable=False)
    store.close()
    other = Store(tmp_path / "store")
    assert other.artifact("stage", {}, {}, lambda folder: pytest.fail("built again"), resumable=False) == first


def other_version(monkeypatch):
    monkeypatch.setattr("tsrfast.__version__", "0.0.0.test")


@pytest.mark.parametrize(
    ("stage", "config", "inputs", "change"),
    [
        ("other", {"a": 1}, ("k",), None),
        ("stage", {"a": 2}, ("k",), None),
        ("stage", {"a": 1, "b": 1}, ("k",), None),
        ("stage", {"a": 1}, ("l",), None),
        ("stage", {"a": 1}, (), None),
        ("stage", {"a": 1}, ("k", "k"), None),
        ("stage", {"a": 1}, ("k",), other_version),
    ],
)
def test_anything_it_depends_on_makes_it_another(store, monkeypatch, stage, config, inputs, change):
    def ask(stage, config, inputs):
        made_from = {f"input {i}": Artifact("x", key, store.root) for i, key in enumerate(inputs)}
        return store.artifact(stage, config, made_from, write("x", []), resumable=False)

    before = ask("stage", {"a": 1}, ("k",))
    if change:
        change(monkeypatch)
    after = ask(stage, config, inputs)
    assert after.key != before.key
    assert after.folder != before.folder
    assert [entry["cached"] for entry in store.log] == [False, False]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("resumable", [False, True])
def test_a_build_that_fails_leaves_nothing_under_the_final_name(store, error, resumable):
    def broken(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.artifact("stage", {}, {}, broken, resumable=resumable)
    (work,) = (p for p in store.root.iterdir() if p.name != ".lock")
    assert work.suffix == ".work"
    calls = []
    done = store.artifact("stage", {}, {}, write("x", calls), resumable=resumable)
    assert calls == [["half"] if resumable else []]  # what can go on finds its work again, the rest starts clean
    assert not work.exists()
    assert {p.name for p in done.folder.iterdir()} == {"result", "stage.json"} | ({"half"} if resumable else set())


def test_leftovers_of_a_killed_write_do_not_get_into_the_artifact(store):
    def killed(folder):
        (folder / ".state.safetensors.abc123.part").write_text("ha")
        (folder / "state.safetensors").write_text("whole")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.artifact("stage", {}, {}, killed, resumable=True)
    calls = []
    store.artifact("stage", {}, {}, write("x", calls), resumable=True)
    assert calls == [["state.safetensors"]]


def test_a_disk_that_fails_in_a_build_is_the_environments_fault(store):
    def full(folder):
        raise OSError(28, os.strerror(28))

    with pytest.raises(EnvironmentFault, match=r"cannot write .*stage-.*: No space left on device"):
        store.artifact("stage", {}, {}, full, resumable=False)


def test_one_process_at_a_time(store):
    code = f"from pathlib import Path; from tsrfast.suite.store import Store; Store(Path({str(store.root)!r}))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "EnvironmentFault" in second.stderr
    assert "in use by another tsrfast process; wait for it or choose another --out" in second.stderr
    store.close()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file/store: Not a directory"):
        Store(tmp_path / "file" / "store")
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file: "):
        Store(tmp_path / "file")
