"""NVIDIA's run-time compiler (NVRTC): finding its library, which is an optional dependency, and one compilation."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tsrfast.errors import EnvironmentFault

# NVRTC has no C library. What csrc asks of these headers is built into it, but for this.
_STANDARD = {
    "cstdint": (
        "using int8_t = signed char; using int16_t = short; using int32_t = int; using int64_t = long;\n"
        "using uint8_t = unsigned char; using uint16_t = unsigned short; using uint32_t = unsigned; using uint64_t = unsigned long;\n"
    ),
    "cstring": "",
    "cmath": "#define INFINITY __int_as_float(0x7f800000)\n#define NAN __int_as_float(0x7fffffff)\n",
}


class Nvrtc:
    """A loaded library.

    Attributes:
        path: of the library.
        version: e.g. ``13.0``.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError if the library cannot be loaded, AttributeError if it is another one."""
        for part in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")):  # which the library asks for by name only
            if ".alt." not in part.name:
                ctypes.CDLL(str(part))
        self.path, self._library = path, ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def compile(self, source: str, headers: dict[str, str], kernel: str, options: list[str]) -> tuple[bytes, str]:
        """Compile one kernel to a cubin.

        Args:
            source: of the translation unit.
            headers: name, as in an #include, to text; files are not looked at.
            kernel: its name as a C++ expression; a template's instance is made.
            options: of NVRTC; with ``--gpu-architecture=sm_...``.

        Returns:
            The cubin, and the kernel's symbol in it.

        Raises:
            EnvironmentFault: it does not compile; the message ends with the compiler's log.
        """
        given = {**_STANDARD, **headers}
        program = ctypes.c_void_p()
        strings = ctypes.c_char_p * len(given)
        texts, names = strings(*(t.encode() for t in given.values())), strings(*(n.encode() for n in given))
        self._check("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", len(given), texts, names)
        try:
            self._check("nvrtcAddNameExpression", program, kernel.encode())
            words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), words)
            if failed:
                log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise EnvironmentFault(
                    f"NVRTC {self.version} ({self.path}) cannot compile {kernel} with {' '.join(options)}: {self._said(failed)}\n{log}"
                )
            symbol = ctypes.c_char_p()
            self._check("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(symbol))
            assert symbol.value is not None
            return self._bytes("CUBIN", program), symbol.value.decode()
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        out = ctypes.create_string_buffer(size.value)
        self._check(f"nvrtcGet{what}", program, out)
        return out.raw

    def _check(self, function: str, *args: object) -> None:
        failed = getattr(self._library, function)(*args)
        if failed:
            raise EnvironmentFault(f"NVRTC ({self.path}): {function}: {self._said(failed)}")

    def _said(self, code: int) -> str:
        text: bytes = self._library.nvrtcGetErrorString(code)
        return text.decode()


def find() -> Nvrtc:
    """The library that TSRFAST_NVRTC names, else the first that loads: of pip's packages, of torch, of a CUDA toolkit, of the system.

    Raises:
        EnvironmentFault: there is none; the message says how to get it.
    """
    failed = []
    for path in dict.fromkeys(_candidates()):
        try:
            return Nvrtc(path)
        except (OSError, AttributeError) as e:
            failed.append(f"{path} ({e})")
    raise EnvironmentFault(
        "compiling a kernel needs NVRTC, NVIDIA's run-time compiler: pip install 'tsrfast[jit]', or name a libnvrtc.so in "
        f"TSRFAST_NVRTC; {'tried ' + ', '.join(failed) if failed else 'none was found'}"
    )


def _candidates() -> Iterator[str]:
    named = os.environ.get("TSRFAST_NVRTC")
    if named:
        yield named
        return
    wheels = [p for folder in sys.path for p in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*")]
    yield from map(str, sorted(wheels, key=_rank))
    bundled = (Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*")
    yield from sorted(str(p) for p in bundled if not re.search(r"builtins|\.alt\.", p.name))
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from map(str, sorted(Path(home).glob("lib64/libnvrtc.so.*"), key=_rank))
    system = ctypes.util.find_library("nvrtc")
    if system:
        yield system


def _rank(path: Path) -> tuple[bool, int]:
    """Torch's own major version of CUDA first, since this machine's driver takes that; then the newest."""
    found = re.search(r"\.so\.(\d+)", path.name)
    major = int(found[1]) if found else 0
    return str(major) != (torch.version.cuda or "").partition(".")[0], -major
