"""Registers, stack, spills and static shared memory of every CUDA kernel, from the log of a build, against recorded budgets; warnings.

    pip install -v -C cmake.define.TSRFAST_CUDA=ON -C cmake.define.CMAKE_CUDA_FLAGS=-Xptxas=-v . > LOG 2>&1
    python tests/native/kernel_resources.py LOG            # a table; exit code 1 if a kernel is over its budget
    python tests/native/kernel_resources.py LOG --update   # what the log says becomes the budget, in kernel_resources.json

A kernel without a budget, a budget without a kernel, and a compiler's warning about a CUDA source fail as well.
The log is ptxas' own (-v): it tells spills from other uses of the stack, which the finished module does not. Architectures that the log
does not have keep their budgets. Registers are budgeted in steps of 8, as the hardware hands them out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

BUDGETS = Path(__file__).with_suffix(".json")


class Resources(NamedTuple):
    """Of a thread, but for `shared`: static shared memory of a block. All but registers in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    def budget(self) -> Resources:
        return self._replace(registers=-(-self.registers // 8) * 8)


Kernels = dict[str, dict[str, Resources]]
"""{architecture: {kernel: resources}}"""


def plain_names(mangled: Iterable[str]) -> dict[str, str]:
    """{mangled: name with template arguments, without namespaces and parameters}, by binutils' c++filt."""
    names = sorted(set(mangled))
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for name, full in zip(names, out, strict=True):
        text = full.replace("(anonymous namespace)::", "").removeprefix("void ")
        # An anonymous namespace has the file's name and a hash in it, which differ from build to build.
        text = re.sub(r"\b(tsr|_GLOBAL__N__\w+|_INTERNAL_\w+)::", "", text)
        found[name] = without_parameters(text)
    return found


def without_parameters(text: str) -> str:
    """f<(Norm)1>(int, A(*)(int)) -> f<(Norm)1>."""
    depth = 0
    for k in range(len(text) - 1, -1, -1):
        depth += (text[k] == ")") - (text[k] == "(")
        if depth == 0:
            return text[:k] if text[k] == "(" else text
    return text


def read_log(text: str) -> Kernels:
    """What ptxas -v said of each kernel.

    Raises:
        ValueError: a kernel appears twice with different resources.
    """
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    rows = [m.groupdict() for m in entry.finditer(text)]
    names = plain_names(row["name"] for row in rows)
    found: Kernels = {}
    for row in rows:
        shared = re.search(r"(\d+) bytes smem", row["rest"])
        one = Resources(*(int(row[k]) for k in ("registers", "stack", "stores", "loads")), int(shared[1]) if shared else 0)
        before = found.setdefault(row["arch"], {}).setdefault(names[row["name"]], one)
        if before != one:
            raise ValueError(f"{names[row['name']]} is compiled twice for {row['arch']}: {before} and {one}")
    return found


def warnings(text: str) -> list[str]:
    """Of nvcc, its parts, and the host compiler about a CUDA source."""
    return re.findall(r"^(?:.*\.cuh?[(:]\d+.*\bwarning\b.*|\s*(?:ptxas|nvlink|nvcc)\s+warning\b.*)$", text, re.MULTILINE)


def read_budgets(path: Path = BUDGETS) -> Kernels:
    whole = json.loads(path.read_text())
    return {arch: {name: Resources(*row) for name, row in rows.items()} for arch, rows in whole["budgets"].items()}


def write_budgets(kernels: Mapping[str, Mapping[str, Resources]], path: Path = BUDGETS) -> None:
    """A line for each kernel."""
    blocks = []
    for arch, rows in sorted(kernels.items()):
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(list(row.budget()))}" for name, row in sorted(rows.items()))
        blocks.append(f"  {json.dumps(arch)}: {{\n{lines}\n  }}")
    columns = json.dumps(list(Resources._fields))
    path.write_text(f'{{\n "columns": {columns},\n "budgets": {{\n' + ",\n".join(blocks) + "\n }\n}\n")


def complaints(kernels: Kernels, budgets: Kernels) -> list[str]:
    """What is over its budget, has none, or is gone; only of architectures that were compiled."""
    found = []
    for arch, rows in sorted(kernels.items()):
        allowed = budgets.get(arch, {})
        for name, row in sorted(rows.items()):
            if name not in allowed:
                found.append(f"{arch} {name}: has no budget (--update records one)")
                continue
            pairs = zip(Resources._fields, row, allowed[name], strict=True)
            found += [f"{arch} {name}: {field} {value}, budget {most}" for field, value, most in pairs if value > most]
        found += [f"{arch} {name}: has a budget, but is not there" for name in sorted(allowed.keys() - rows.keys())]
    return found


def table(kernels: Kernels) -> str:
    lines = [f"{'':8}{'registers':>10}{'stack':>7}{'stores':>8}{'loads':>7}{'shared':>8}  kernel"]
    for arch, rows in sorted(kernels.items()):
        for name, row in sorted(rows.items()):
            lines.append("{:8}{:10}{:7}{:8}{:7}{:8}  {}".format(arch, *row, name))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--update", action="store_true", help="record what the log says as the budgets of its architectures")
    arguments = parser.parse_args()
    text = arguments.log.read_text(errors="replace")
    kernels = read_log(text)
    if not kernels:
        parser.error(f"{arguments.log} says nothing of kernels: build with CMAKE_CUDA_FLAGS=-Xptxas=-v")
    print(table(kernels))
    if arguments.update:
        write_budgets({**(read_budgets() if BUDGETS.exists() else {}), **kernels})
        return 0
    found = [*complaints(kernels, read_budgets()), *warnings(text)]
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
