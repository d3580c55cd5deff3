"""What an evaluation has run so far, in a file as the original writes it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tsrfast._files import atomic_write
from tsrfast.errors import InputError


@dataclass
class EvaluationState:
    """Attacks to run, attacks run, and which images stand (None before any result)."""

    attacks_to_run: set[str]
    path: Path | None = None
    run_attacks: set[str] = field(default_factory=set)
    robust_flags: Tensor | None = None
    clean_accuracy: float = float("nan")

    def to_disk(self, force: bool = True) -> None:
        """Write it, if it has a path."""
        if self.path is not None:
            text = {
                "_attacks_to_run": sorted(self.attacks_to_run),
                "path": str(self.path),
                "_run_attacks": sorted(self.run_attacks),
                "_robust_flags": None if self.robust_flags is None else self.robust_flags.tolist(),
                "_clean_accuracy": self.clean_accuracy,
            }
            atomic_write(self.path, json.dumps(text))

    @classmethod
    def from_disk(cls, path: Path) -> EvaluationState:
        """What `to_disk` wrote.

        Raises:
            InputError: the file is something else.
        """
        try:
            held = json.loads(Path(path).read_text())
            flags = held["_robust_flags"]
            state = cls(set(held["_attacks_to_run"]), Path(held["path"]), set(held["_run_attacks"]))
            state.robust_flags = None if flags is None else torch.tensor(flags, dtype=torch.bool)
            state.clean_accuracy = float(held["_clean_accuracy"])
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"tsrfast.compat.autoattack: path must be a state file, got {path} ({e})") from e
        if state.path != Path(path):
            warnings.warn("The given path is different from the one found in the state file.", stacklevel=2)
        return state

    @property
    def robust_accuracy(self) -> float:
        if self.robust_flags is None:
            raise ValueError("robust_flags is not set yet. Start the attack first.")
        if self.attacks_to_run - self.run_attacks:
            warnings.warn("You are checking `robust_accuracy` before all the attacks have been run.", stacklevel=2)
        return self.robust_flags.double().mean().item()
