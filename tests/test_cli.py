"""The command line: exit codes, one clear line for every mistake, nothing half-written."""

import os
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

FAST = [
    "fig2",
    "--preset",
    "smoke",
    *(f"--set={s}" for s in ("train_images=32", "student_images=8", "teacher_epochs=1", "widths=2,2,2,2")),
]


def check_refusal(result, code, message, out=None):
    """That exit code, nothing on standard output, one line beside progress, and no results."""
    given, said, complaint = result
    assert given == code, complaint
    assert said == ""
    assert "Traceback" not in complaint
    lines = [line for line in complaint.splitlines() if line.startswith("tsrfast: ")]
    assert len(lines) == 1, complaint
    assert complaint.splitlines()[-1] == lines[0]
    assert re.search(message, lines[0]), lines[0]
    if out is not None and out.exists():
        left = {str(p.relative_to(out)) for p in out.rglob("*")}
        assert left <= {"store", "store/.lock"}, left


def run_process(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "tsrfast", *map(str, words)], capture_output=True, text=True, check=False, **more
    )


# --- what works ---------------------------------------------------------------------------------------------------------


def test_info(call):
    code, out, _ = call("info")
    assert code == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert list(lines) == ["tsrfast", "cuda kernels", "cpu kernels", "torch", "devices"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", lines["tsrfast"])
    assert re.fullmatch(r"(yes|no) \(.+\)", lines["cuda kernels"])
    assert "portable" in lines["cpu kernels"]
    assert lines["torch"].startswith(torch.__version__)
    assert lines["devices"].startswith("cpu")


def test_forced_instruction_set_is_shown():
    run = run_process("info", env=os.environ | {"TSRFAST_ISA": "portable"})
    assert run.returncode == 0
    assert "cpu kernels   portable (of " in run.stdout


def test_run_and_report(call, tmp_path):
    code, out, progress = call("reproduce", *FAST, "--out", tmp_path / "run")
    assert code == 0
    assert out == f"{tmp_path / 'run' / 'report.html'}\n"  # the result alone; progress goes to standard error
    assert "for real ones: --data cifar10:PATH" in progress
    assert re.search(r"^teacher: \d+\.\d s$", progress, re.MULTILINE)
    assert "\x1b" not in progress  # no bars where there is no terminal
    before = (tmp_path / "run" / "report.html").read_bytes()
    (tmp_path / "run" / "report.html").unlink()
    code, out, _ = call("report", tmp_path / "run")
    assert (code, out) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_report_over_seeds(call, tmp_path):
    for seed in (0, 1):
        assert call("reproduce", *FAST, "--seed", str(seed), "--out", tmp_path / str(seed))[0] == 0
    assert call("reproduce", *FAST, "--seed", "0", "--seed", "1", "--out", tmp_path / "both")[0] == 0
    both = (tmp_path / "0", tmp_path / "1" / "results.json")
    check_refusal(call("report", *both), 2, "--out: must be given with several results, got none")
    assert call("report", *both, "--out", tmp_path / "joined")[:2] == (0, f"{tmp_path / 'joined' / 'report.html'}\n")
    for name in os.listdir(tmp_path / "both" / "csv"):
        assert (tmp_path / "joined" / "csv" / name).read_bytes() == (tmp_path / "both" / "csv" / name).read_bytes()
    check_refusal(
        call("report", tmp_path / "0", tmp_path / "0", "--out", tmp_path / "x"),
        2,
        r"different seeds, got \[0, 0\]",
        tmp_path / "x",
    )


def test_oracle(call, tmp_path):
    """Trained alone, and taken up by a run: the students are those of the run that trains its own."""
    code, out, progress = call("oracle", *FAST[1:], "--out", tmp_path / "oracle")
    assert (code, out) == (0, f"{tmp_path / 'oracle' / 'oracle.safetensors'}\n")
    assert re.search(r"^oracle: \d+\.\d s$", progress, re.MULTILINE)
    assert {p.name for p in (tmp_path / "oracle").iterdir()} == {"oracle.safetensors", "oracle.json", "store"}
    cells = []
    for more in ([], ["--set", f"oracle={out.strip()}"]):
        where = tmp_path / str(len(cells))
        assert call("reproduce", *FAST, *more, "--out", where)[0] == 0
        cells.append({table.name: table.read_bytes() for table in (where / "csv").iterdir()})
    assert cells[0] == cells[1]


def test_help(call):
    code, out, _ = call("reproduce", "--help")
    assert code == 0
    for word in (
        "--preset",
        "--data",
        "--out",
        "--device",
        "--seed",
        "--set",
        "table1 to table5, fig2 to fig12",
        "cifar10:PATH",
    ):
        assert word in out
    code, out, err = call()
    assert code in (0, 2)  # click changed its mind
    assert "reproduce" in out + err


# --- the user's mistakes: 2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "quik"], "unknown preset 'quik'"),
        (["--set", "widths=0,1,1,1"], "--set widths: must be positive integers"),
        (["--set", "oracle=pretrained"], "--set oracle: must not be given where the oracle is to be trained, got 'pretrained'"),
        (["--data", "cifar10:/no/such/place"], "path must exist, got '/no/such/place'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--seed", "-1"], "--seed: must be an integer >= 0, got -1"),
    ],
)
def test_wrong_words_for_the_oracle(call, tmp_path, words, message):
    check_refusal(call("oracle", *words, "--out", tmp_path / "run"), 2, message, tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tabel1"], r"unknown experiment 'tabel1'; did you mean 'table1'\? \(allowed: all, fig10, fig11, fig12, fig14, "),
        (["fig2", "fig13"], "unknown experiment 'fig13'"),
        (["--preset", "quik"], r"unknown preset 'quik'; did you mean 'quick'\? \(allowed: paper, quick, smoke\)"),
        (["--set", "epoch=3"], r"unknown setting 'epoch'; did you mean 'epochs'\? \(allowed: "),
        (["--set", "steps"], "--set: must be key=value, got 'steps'"),
        (["--set", "eps=-0.1"], "--set eps: must be positive, got -0.1"),
        (["--set", "steps=many"], "--set steps: must be an integer, got 'many'"),
        (["--set", "lr=sqrt:1"], "sqrt"),
        (["--data", "cifar:x"], r"unknown data set 'cifar'; did you mean 'cifar10'\? \(allowed: cifar10, folder, synthetic\)"),
        (["--data", "cifar10:/no/such/place"], "path must exist, got '/no/such/place'"),
        (["--data", "cifar10:"], "must name a path, cifar10:PATH"),
        (["--data", "/"], "cifar10:/ or folder:/"),
        (["--data", "synthetic:sed=3"], "unknown .*'sed'; did you mean 'seed'"),
        (["--data", "synthetic:seed=x"], "NAME=INTEGER"),
        (["--device", "tpu"], r"unknown device 'tpu'.*\(allowed: cpu, cuda\)"),
        (["--device", "cuda:first"], "--device: must be cpu, cuda or cuda:N, got 'cuda:first'"),
        (["--seed", "-1"], "--seed: must be 0 or more, each once, got -1"),
        (["--seed", "1", "--seed", "1"], "--seed: must be 0 or more, each once, got 1, 1"),
    ],
)
def test_wrong_words(call, tmp_path, words, message):
    out = tmp_path / "out"
    check_refusal(call("reproduce", *FAST[1:], "--out", out, *words), 2, message, out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reproduc"], "No such command 'reproduc'"), (["reproduce", "--sed", "3"], "No such option"), (["reproduce", "--seed", "x"], "--seed"),
        (["reproduce", "--seed"], "--seed"), (["report"], "(?i)missing argument"),
    ],
)  # fmt: skip
def test_words_that_do_not_parse(call, words, message):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "Traceback" not in err


def test_report_without_results(call, tmp_path):
    check_refusal(call("report", tmp_path), 2, f"no such file: {tmp_path / 'results.json'}")
    (tmp_path / "results.json").write_text('{"schema": 1, "measured": NaN')
    check_refusal(call("report", tmp_path), 2, "results.json is not valid JSON")
    assert os.listdir(tmp_path) == ["results.json"]


# --- unusable data: 2 ---------------------------------------------------------------------------------------------------


def png(size):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(folder, labels=(0, 1), size=32):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows = pa.array(
        [{"bytes": png(size), "path": None}] * len(labels), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    for name in ("train", "test"):
        pq.write_table(
            pa.table({"img": rows, "label": pa.array(labels, pa.int64())}), folder / f"{name}-00000-of-00001.parquet"
        )
    return folder


def write_batches(folder, last=9, bad=None):
    folder.mkdir()
    good = {b"labels": [0, last], b"data": np.zeros((2, 3072), np.uint8)}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(bad or good, protocol=2))
    return folder


@pytest.fixture
def refuse_data(call, tmp_path):
    def refuse(spec, message):
        out = tmp_path / "out"
        check_refusal(call("reproduce", "--preset", "smoke", "--out", out, "--data", spec), 2, message, out)

    return refuse


def test_truncated_parquet(refuse_data, tmp_path):
    folder = write_parquet(tmp_path / "data")
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    refuse_data(f"cifar10:{folder}", r"train-00000-of-00001\.parquet: truncated or not a parquet file")


@pytest.mark.parametrize("label", [10, -1])
def test_label_out_of_range_in_parquet(refuse_data, tmp_path, label):
    folder = write_parquet(tmp_path / "data", labels=(0, label))
    refuse_data(f"cifar10:{folder}", rf"train-00000-of-00001\.parquet, row 1: label must be in 0\.\.9, got {label}")


def test_image_of_the_wrong_size_in_parquet(refuse_data, tmp_path):
    refuse_data(f"cifar10:{write_parquet(tmp_path / 'data', size=28)}", r"row 0: image must be 32x32 pixels, got 28x28")


def test_label_out_of_range_in_a_batch(refuse_data, tmp_path):
    refuse_data(f"cifar10:{write_batches(tmp_path / 'data', last=10)}", r"data_batch_1.*label.*0\.\.9, got 10")


def test_a_pickle_that_would_run_code(refuse_data, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    refuse_data(f"cifar10:{write_batches(tmp_path / 'data', bad=Trap())}", r"data_batch_1.*mkdir")
    assert not (tmp_path / "it ran").exists()


def test_folder_with_images_of_two_sizes(refuse_data, tmp_path):
    for which, name, size in (("train", "a", 32), ("train", "b", 31), ("test", "a", 32), ("test", "b", 32)):
        (tmp_path / "data" / which / name).mkdir(parents=True)
        (tmp_path / "data" / which / name / "1.png").write_bytes(png(size))
    refuse_data(f"folder:{tmp_path / 'data'}", r"b/1\.png: image must be 32x32 pixels, got 31x31")


# --- faults of the environment: 1 ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_here(call, tmp_path):
    out = tmp_path / "out"
    message = r"--device cuda: there is no such CUDA device here \(0 found\); --device cpu works everywhere"
    check_refusal(call("reproduce", "--out", out, "--device", "cuda"), 1, message, out)
    assert not out.exists()


@pytest.mark.parametrize("under", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(call, tmp_path, under):
    (tmp_path / "file").write_text("precious")
    check_refusal(call("reproduce", *FAST, "--out", tmp_path / under), 1, rf"cannot write {tmp_path / under}\S*: \w")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 286. GiB"), torch.OutOfMemoryError("CUDA out of memory.\nTried")]
)
def test_out_of_memory(call, tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("tsrfast.suite.reproduce.load", load)
    first = str(error).splitlines()[0]
    check_refusal(call("reproduce", *FAST, "--out", tmp_path / "out"), 1, f"out of memory: {first}$", tmp_path / "out")


def test_a_folder_in_use(call, tmp_path):
    from tsrfast.suite.store import Store

    store = Store(tmp_path / "out" / "store")
    check_refusal(
        call("reproduce", *FAST, "--out", tmp_path / "out"),
        1,
        "in use by another tsrfast process; wait for it or choose another --out",
    )
    store.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of `size` bytes; needs the right to mount."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", ["64k", "800k"])
def test_full_disk(call, small_disk, size):
    """Full in the teacher's training, and (800k holds all stages, not the report) at the end."""
    disk = small_disk(size)
    result = call("reproduce", *FAST, "--out", disk / "run")
    check_refusal(result, 1, rf"cannot write {disk}/run/\S+: No space left on device")
    for file in (p for p in disk.rglob("*") if p.is_file()):
        assert not file.name.endswith(".part"), file
    assert not (disk / "run" / "report.html").exists()


# --- interrupted: 130 ---------------------------------------------------------------------------------------------------


def test_ctrl_c_and_on(tmp_path):
    words = [
        sys.executable,
        "-m",
        "tsrfast",
        "reproduce",
        *FAST,
        "--out",
        str(tmp_path / "out"),
        "--set",
        "teacher_epochs=10000",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        said = [next(running.stderr), next(running.stderr)]
        assert said[0].startswith("data: ")  # the teacher is next
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        out = running.stdout.read()
    assert running.returncode == 130
    assert rest.splitlines()[-1] == "tsrfast: interrupted; the same command goes on from here"
    assert "Traceback" not in rest
    assert out == ""
    assert not (tmp_path / "out" / "results.json").exists()
    again = run_process("reproduce", *FAST, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "results.json").exists()
