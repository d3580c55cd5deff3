"""The house's rules: one name per operator, who may include or import whom, what an import may load."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tsrfast.ops
import tsrfast.reference

ROOT = Path(__file__).resolve().parent.parent
CSRC, PACKAGE = ROOT / "csrc", ROOT / "tsrfast"

OPS = sorted(h.stem for h in (CSRC / "core").glob("*.h") if re.search(rf"\bvoid {h.stem}_cpu\(", h.read_text()))
OP_FILES = [
    "csrc/core/{}.h", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "csrc/bind/{}.cpp",
    "tsrfast/ops/{}.py", "tsrfast/reference/{}.py", "tests/ops/test_{}.py", "bench/bench_{}.py",
]  # fmt: skip

# Room of the package -> rooms it may import; every room may import itself. What is in OPEN is open to all.
OPEN = {"errors", "_files", "_modes", "_identity", "_progress", "_threads"}
ABOVE_OPS = {"chain", "ops", "_native"}
IMPORTS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "_files": set(),
    "_identity": set(),
    "_machine": {"_native"},
    "_modes": set(),
    "_page": set(),
    "_progress": set(),
    "_threads": set(),
    "_native": set(),
    "errors": set(),
    "reference": set(),
    "ops": {"_native"},
    "chain": {"ops"},
    "attacks": ABOVE_OPS,
    "specialization": ABOVE_OPS,
    "nets": ABOVE_OPS,
    "data": ABOVE_OPS,
    "compat": {"attacks"},
    "training": {"attacks", "chain", "nets", "data"},
    "evaluation": {"attacks", "chain", "nets", "data", "_machine", "_page"},
    "suite": {
        "reference",
        "ops",
        "chain",
        "_native",
        "_machine",
        "_page",
        "attacks",
        "specialization",
        "nets",
        "data",
        "training",
    },
    "cli": {"suite", "attacks", "evaluation", "specialization", "nets", "data", "_machine", "_native"},
}
# Directory of csrc -> patterns of what its files may include.
INCLUDES = {
    "core": r"core/.*|cstdint|cstring|cmath",
    "cpu": r"core/.*|cpu/.*|omp\.h|immintrin\.h|[a-z]+",
    "cuda": r"core/.*|cuda/.*|emu/.*\.h|cuda_[a-z0-9]+\.h|[a-z]+",
    "bind": r"core/.*|cpu/isa\.h|bind/.*|pybind11/.*|[a-z]+",
}
LATE = ["matplotlib", "pyarrow", "PIL", "jinja2", "rich", "typer", "pandas"]


# The operators on chains share their files, and have no CUDA twin yet.
CHAIN_OPS = ["chain_forward", "chain_gradient", "chain_pack", "chain_pgd"]
CHAIN_FILES = [f for f in OP_FILES if "cuda" not in f]


def test_operators_on_chains_share_their_files():
    assert not [f.format("chain") for f in CHAIN_FILES if not (ROOT / f.format("chain")).is_file()]
    header = (CSRC / "core" / "chain.h").read_text()
    for op in CHAIN_OPS:
        assert f"void {op}_cpu(" in header
        assert hasattr(torch.ops.tsrfast, op)
        assert op in (CSRC / "bind" / "chain.cpp").read_text()
        assert f"def test_{op}" in (ROOT / "bench" / "bench_chain.py").read_text()
    # What is compiled for several instruction sets is not shared beyond them: chain_pack.h has formulas only.
    for op in ("chain_forward", "chain_gradient", "chain_pgd"):
        plain = inspect.signature(getattr(tsrfast.reference, op)).parameters
        assert [p for p in plain if p != "weights"] == [
            p for p in inspect.signature(getattr(tsrfast.ops, op)).parameters if p != "packed"
        ]


def test_operators_are_found():
    assert {"pgd_step", "relu_gate", "philox_uniform", "channel_correlation"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_one_name_per_operator(op):
    missing = [f.format(op) for f in OP_FILES if not (ROOT / f.format(op)).is_file()]
    assert not missing
    assert inspect.signature(getattr(tsrfast.ops, op)) == inspect.signature(getattr(tsrfast.reference, op))
    assert hasattr(torch.ops.tsrfast, op), f"no torch operator tsrfast::{op}"


def room(module: str) -> str:
    """tsrfast.attacks.pgd -> attacks; tsrfast.__version__ -> __init__"""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else "__init__"


def imports(source: Path) -> list[tuple[int, str]]:
    """(line, module) of each import at run time; blocks under TYPE_CHECKING are for readers and mypy."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: relative import"
            of_package = node.module == "tsrfast"  # from tsrfast import ops
            found.extend((node.lineno, f"tsrfast.{a.name}" if of_package else str(node.module)) for a in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source.read_text()))
    return found


def test_every_room_has_rules():
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert names == set(IMPORTS)


@pytest.mark.parametrize("source", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_downwards(source):
    here = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = []
    for line, module in imports(source):
        to = room(module) if module.split(".")[0] == "tsrfast" else None
        if to in ("_C", "_emu"):
            allowed = here == "_native"
        elif to is not None:
            allowed = to == here or to == "__init__" or to in OPEN or to in IMPORTS[here]
        elif here == "reference":
            allowed = module.split(".")[0] in {"torch", *sys.stdlib_module_names}
        else:
            allowed = True
        if not allowed:
            wrong.append(f"{source.name}:{line}: {here} must not import {module}")
    assert not wrong


def included(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', source.read_text(), re.M)


@pytest.mark.parametrize("directory", INCLUDES)
def test_native_includes(directory):
    sources = sorted((CSRC / directory).iterdir())
    assert sources
    for source in sources:
        wrong = [i for i in included(source) if not re.fullmatch(INCLUDES[directory], i)]
        assert not wrong, f"{source.name} includes {wrong}"
        if any(i.startswith(("emu/", "cuda_")) for i in included(source)):
            assert source.name in ("launch.cuh", "tensor.cuh")


def test_instruction_set_files_share_no_code():
    """An inline function that such a file shares may reach every CPU in its AVX-512 form: the linker keeps any one copy."""
    sources = [*(CSRC / "cpu").glob("*_avx*.cpp"), *(CSRC / "cpu").glob("*_*.h")]
    assert sources
    for source in sources:
        name = re.sub(r"(_avx2|_avx512)?\.cpp$|_[a-z]+\.h$", "", source.name)
        wrong = [
            i for i in included(source) if not re.fullmatch(rf"core/.*|immintrin\.h|omp\.h|cstdint|cpu/{name}_[a-z]+\.h", i)
        ]
        assert not wrong, f"{source.name} includes {wrong}"


def test_imports_are_light():
    drop_ins = [f"tsrfast.compat.{p.name}" for p in sorted((PACKAGE / "compat").iterdir()) if (p / "__init__.py").is_file()]
    assert len(drop_ins) == 6
    modules = ["tsrfast", "tsrfast.ops", "tsrfast.attacks", *drop_ins, "tsrfast.specialization", "tsrfast.nets"]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    print(module, *sorted(set({LATE}) & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:-1] == modules


def tracked() -> list[Path]:
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_files_stand_alone():
    beside, launch = "../" + "shared", "<" * 3
    for path in tracked():
        if path.is_relative_to(ROOT / ".ci"):  # knows its surroundings; not in the sdist
            continue
        text = path.read_bytes().decode(errors="replace")
        assert beside not in text, f"{path.relative_to(ROOT)} points outside of the project"
        if path.suffix in (".cu", ".cuh", ".h", ".cpp") and path.name != "launch.cuh":
            code = re.sub(r"//.*", "", text)
            assert launch not in code, f"{path.relative_to(ROOT)} starts a kernel: only launch.cuh may"
