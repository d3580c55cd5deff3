"""The two kinds of failure a user can meet, and the wording they share.

`InputError`: what was given is wrong (exit code 2 on the command line). `EnvironmentFault`: the machine cannot do it (exit code 1).
Anything else that escapes is a fault of tsrfast and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, option or file has a value that cannot be used; the message names it and what is allowed."""


class UnsupportedModel(InputError):
    """A network that cannot be compiled to a chain; the message names the module and why. Attacks run it through PyTorch instead."""


class EnvironmentFault(RuntimeError):
    """The machine lacks what the call needs: a CUDA device, disk space, permission, a compiled backend."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that does not exist, with the nearest one that does: ``unknown loss 'cros_entropy' ...``."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {given!r}{hint} (allowed: {', '.join(names)})")
