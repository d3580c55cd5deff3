"""What a drop-in says when it is asked for something of its original that it does not have."""

from __future__ import annotations

from collections.abc import Iterable

from tsrfast import attacks
from tsrfast.errors import InputError


class NotCovered(InputError, ImportError):
    """Something of another attack library that its drop-in does not have."""


def not_covered(library: str, name: str, has: Iterable[str], nearest: str) -> NotCovered:
    """The error to raise.

    Args:
        library: as the drop-in's module is called: ``torchattacks`` for `tsrfast.compat.torchattacks`.
        name: what was asked for, which the original has.
        has: the attacks of the drop-in.
        nearest: what comes nearest, here or in `tsrfast.attacks`.
    """
    kinds = (getattr(attacks, n) for n in attacks.__all__)
    own = sorted(k.__name__ for k in kinds if isinstance(k, type) and issubclass(k, attacks.Attack) and k is not attacks.Attack)
    return NotCovered(
        f"tsrfast.compat.{library}: the attack must be one of {', '.join(has)}, got {name!r}: {library} has it, the drop-in does not "
        f"(nearest here: {nearest}; tsrfast.attacks has {', '.join(own)})"
    )
