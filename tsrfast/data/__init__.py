"""Data sets, loaded from a path or generated from a seed: ``load("cifar10:PATH")``, ``load("synthetic:seed=3")``."""

from __future__ import annotations

from pathlib import Path

from tsrfast.data.cifar import load_cifar10
from tsrfast.data.dataset import Dataset, Split, fingerprint
from tsrfast.data.folder import load_folder
from tsrfast.data.synthetic import load_synthetic
from tsrfast.errors import InputError, unknown

__all__ = ["Dataset", "Split", "fingerprint", "load"]

_FORMS = "synthetic, synthetic:seed=S,train=N,test=N, cifar10:PATH or folder:PATH"


def load(spec: str, *, train: int | None = None, test: int | None = None) -> Dataset:
    """Load the data set that `spec` names.

    Args:
        spec: ``synthetic`` or ``synthetic:seed=S,train=N,test=N`` (see `tsrfast.data.synthetic`; every option may be
            left out), ``cifar10:PATH`` (a batches folder, the tar.gz archive or parquet files, see
            `tsrfast.data.cifar`) or ``folder:PATH`` (``PATH/train/<class>/*.png``, see `tsrfast.data.folder`).
            ``~`` in PATH is the home folder.
        train, test: take at most the first so many images of the split (default: all); no others are decoded.

    Raises:
        InputError: unknown kind or option, missing path, or unusable file.
        EnvironmentFault: a file exists but cannot be read.
    """
    for which, wanted in (("train", train), ("test", test)):
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise InputError(f"tsrfast.data.load: {which} must be a positive integer or None, got {wanted!r}")
    if not isinstance(spec, str):
        raise InputError(f"tsrfast.data.load: spec must be a string ({_FORMS}), got {spec!r}")
    kind, colon, rest = spec.partition(":")
    if kind == "synthetic":
        return load_synthetic(_options(rest) if colon else {}, train=train, test=test)
    if kind in ("cifar10", "folder"):
        if not rest:
            raise InputError(f"tsrfast.data.load: spec must name a path, {kind}:PATH, got {spec!r}")
        loader = load_cifar10 if kind == "cifar10" else load_folder
        return loader(rest, train=train, test=test)
    if Path(spec).expanduser().exists():
        forms = f"cifar10:{spec} or folder:{spec}"
        raise InputError(f"tsrfast.data.load: spec must say what the path holds, {forms}, got {spec!r}")
    raise unknown("data set", kind, ("synthetic", "cifar10", "folder"))


def _options(text: str) -> dict[str, int]:
    """``seed=3,train=100`` as a dictionary; which names are allowed is the data set's business."""
    options: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not (value.isascii() and value.isdigit()):
            where = f"{part!r} in {text!r}"
            raise InputError(f"tsrfast.data.load: options must be NAME=INTEGER separated by commas, got {where}")
        if name in options:
            raise InputError(f"tsrfast.data.load: option {name} must be given once, got {text!r}")
        options[name] = int(value)
    return options
