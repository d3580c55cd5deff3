"""The class `AutoAttack`: the original's arguments, attributes and log lines on `tsrfast.attacks.run_cascade`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsrfast import attacks
from tsrfast.attacks.autoattack import NAMES, VERSIONS, suited, warn_of_square
from tsrfast.attacks.cascade import CascadeResult, Progress, run_cascade
from tsrfast.compat._covered import NotCovered
from tsrfast.compat._running import as_module
from tsrfast.compat.autoattack.autopgd_base import NORMS, APGDAttack, APGDAttack_targeted, answers
from tsrfast.compat.autoattack.fab_pt import FABAttack_PT
from tsrfast.compat.autoattack.square import SquareAttack
from tsrfast.compat.autoattack.state import EvaluationState
from tsrfast.errors import InputError, unknown

_P = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}


class Logger:
    """Prints lines, and appends them to a file."""

    def __init__(self, log_path: str | Path | None) -> None:
        self.log_path = log_path

    def log(self, line: str) -> None:
        print(line)
        if self.log_path is not None:
            with open(self.log_path, "a") as f:
                f.write(line + "\n")


class AutoAttack:
    """See `tsrfast.attacks.AutoAttack`; arguments, attributes and log lines are those of the original.

    Args:
        model: module or function from images in [0, 1] to logits.
        norm: ``Linf``, ``L2`` or ``L1``.
        eps: radius.
        seed: of the random numbers; None: the time.
        verbose: print lines.
        attacks_to_run: names, with ``version='custom'`` only.
        version: ``standard``, ``plus``, ``rand`` or ``custom``.
        is_tf_model: must be False.
        device: kept; the model's own counts.
        log_path: file for the lines.

    Raises:
        NotCovered: TensorFlow models.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        norm: str = "Linf",
        eps: float = 0.3,
        seed: float | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: Any = "cuda",
        log_path: str | Path | None = None,
    ) -> None:
        if is_tf_model:
            raise NotCovered("tsrfast.compat.autoattack: is_tf_model must be False (PyTorch models only), got True")
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        if version != "custom" and len(attacks_to_run):
            raise ValueError("attacks_to_run will be overridden unless you use version='custom'")
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.attacks_to_run: Sequence[str] = list(attacks_to_run)
        self.version, self.is_tf_model, self.device, self.logger = version, is_tf_model, device, Logger(log_path)
        shared: dict[str, Any] = {"eps": eps, "norm": norm, "seed": seed, "device": device}
        self.apgd = APGDAttack(model, n_restarts=5, logger=self.logger, **shared)
        self.fab = FABAttack_PT(model, n_restarts=5, **shared)
        self.square = SquareAttack(model, resc_schedule=False, **shared)
        self.apgd_targeted = APGDAttack_targeted(model, logger=self.logger, **shared)
        if version != "custom":
            self.set_version(version)

    def get_logits(self, x: Tensor) -> Tensor:
        return self.model(x)

    def get_seed(self) -> float:
        return time.time() if self.seed is None else self.seed

    def set_version(self, version: str = "standard") -> None:
        """Attacks and numbers of ``standard``, ``plus`` or ``rand``."""
        if version not in VERSIONS or version == "custom":
            raise unknown("version", version, [v for v in VERSIONS if v != "custom"])
        if self.verbose:
            print(f"setting parameters for {version} version")
        self.attacks_to_run = list(VERSIONS[version])
        if version == "rand":
            self.apgd.n_restarts, self.apgd.eot_iter = 1, 20
            return
        l1 = self.norm == "L1" and version == "standard"
        if l1:
            self.apgd.use_largereps = self.apgd_targeted.use_largereps = True
        self.apgd.n_restarts = 5 if l1 or version == "plus" else 1
        self.fab.n_restarts = 5 if version == "plus" else 1
        self.apgd_targeted.n_restarts, self.apgd_targeted.n_target_classes = 1, 5 if l1 else 9
        self.fab.n_target_classes, self.square.n_queries = 9, 5000
        if self.verbose and version == "plus" and self.norm == "L1":
            print(f'"{version}" version is used with {self.norm} norm: please check')

    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False, state_path: str | Path | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Adversarial images where one was found, else the images; and the model's answers there, if wanted.

        Raises:
            InputError: images outside [0, 1], bad labels; `state_path` belongs to another call.
        """
        x_adv, y_adv = self._evaluate(x_orig, y_orig, bs, state_path)
        return (x_adv, y_adv) if return_labels else x_adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """`run_standard_evaluation` of each attack alone, by its name."""
        if self.verbose:
            print(f"using {self.version} version including {', '.join(self.attacks_to_run)}")
        chosen, verbose = self.attacks_to_run, self.verbose
        found: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        try:
            for name in chosen:
                began = time.time()
                self.attacks_to_run, self.verbose = [name], False
                x_adv, y_adv = self._evaluate(x_orig, y_orig, bs, None)
                found[name] = (x_adv, y_adv) if return_labels else x_adv
                if verbose:
                    accuracy, space = (y_adv == y_orig).double().mean().item(), "\t \t" if name == "fab" else "\t"
                    self.logger.log(
                        f"robust accuracy by {name.upper()} {space} {accuracy:.2%} \t (time attack: {time.time() - began:.1f} s)"
                    )
        finally:
            self.attacks_to_run, self.verbose = chosen, verbose
        return found

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        accuracy = (answers(as_module(self.model), x_orig, bs) == y_orig).double().mean().item()
        if self.verbose:
            print(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _attack(self, name: str, seed: int) -> attacks.Attack:
        """The attack of that name, as the attributes are now."""
        if name in ("apgd-ce", "apgd-dlr"):
            self.apgd.loss = name.removeprefix("apgd-")
            return self.apgd.attack("first", seed)
        if name in ("fab", "fab-t"):
            self.fab.targeted = name == "fab-t"
            if self.fab.targeted:
                self.fab.n_restarts = 1
            return self.fab.attack("first", seed)
        if name not in NAMES:
            raise ValueError(f"Attack not supported: {name!r} (there are {', '.join(NAMES)})")
        return (self.square if name == "square" else self.apgd_targeted).attack("first", seed)

    def _evaluate(self, x: Tensor, y: Tensor, bs: int, state_path: str | Path | None) -> tuple[Tensor, Tensor]:
        seed = 0 if self.seed is None and state_path is not None else int(self.get_seed())
        members = {name: self._attack(name, seed) for name in self.attacks_to_run}
        if self.verbose:
            print(f"using {self.version} version including {', '.join(members)}.")
        model = as_module(self.model)
        clean = run_cascade(model, x, y, {}, batch_size=bs)  # checks images and labels
        members = suited(model, x[:bs], y, members, random=self.version == "rand")
        if self.verbose:
            self.logger.log(f"initial accuracy: {clean.clean_accuracy:.2%}")
        state = EvaluationState(
            set(members), None if state_path is None else Path(state_path), clean_accuracy=clean.clean_accuracy
        )
        folder = None if state_path is None else Path(f"{state_path}.cascade")
        if (
            state.path is not None
            and state.path.exists()
            and EvaluationState.from_disk(state.path).attacks_to_run != set(members)
        ):
            raise InputError(
                "The state was created with a different set of attacks to run. You are probably using the wrong state file."
            )
        state.to_disk()
        got = run_cascade(model, x, y, members, batch_size=bs, checkpoint=folder, progress=self._lines(len(x), bs, clean))
        warn_of_square(got, individually=False)
        state.run_attacks, state.robust_flags = set(members), got.robust
        state.to_disk()
        if self.verbose and len(x):
            length = torch.linalg.vector_norm((got.x_adv - x).flatten(1), _P[self.norm], dim=1).max()
            self.logger.log(
                f"max {self.norm} perturbation: {length:.5f}, nan in tensor: {got.x_adv.isnan().sum()}, "
                f"max: {got.x_adv.max():.5f}, min: {got.x_adv.min():.5f}"
            )
            self.logger.log(f"robust accuracy: {got.robust_accuracy:.2%}")
        return got.x_adv, answers(model, got.x_adv, bs)

    def _lines(self, images: int, bs: int, clean: CascadeResult) -> Callable[[Progress], None]:
        """Says what the original says after each batch and each attack."""
        began, before = time.time(), {"standing": int(clean.robust.sum()), "done": 0}

        def say(p: Progress) -> None:
            fallen, size = before["standing"] - p.standing, p.done - before["done"]
            before.update(standing=p.standing, done=0 if p.done == p.images else p.done)
            if self.verbose:
                batch, batches = math.ceil(p.done / bs), math.ceil(p.images / bs)
                self.logger.log(f"{p.stage} - {batch}/{batches} - {fallen} out of {size} successfully perturbed")
                if p.done == p.images:
                    self.logger.log(
                        f"robust accuracy after {p.stage.upper()}: {p.standing / images:.2%} (total time {time.time() - began:.1f} s)"
                    )

        return say
