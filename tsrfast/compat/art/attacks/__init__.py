"""Attacks of ART: those on inputs (`evasion`)."""

from tsrfast.compat.art.attacks import evasion
from tsrfast.compat.art.attacks.attack import Attack, EvasionAttack

__all__ = ["Attack", "EvasionAttack", "evasion"]
