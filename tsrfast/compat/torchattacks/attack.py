"""The base class of torchattacks 3.5.1: what an attack object remembers, and what happens around its `forward`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tsrfast._files import atomic_path
from tsrfast._modes import evaluating
from tsrfast.errors import InputError

TargetMap = Callable[[Tensor, Tensor], Tensor]


def _with_held(method: Callable[..., None]) -> Callable[..., None]:
    """Afterwards also for the attacks that this one holds."""

    @functools.wraps(method)
    def call(self: Attack, *args: Any, **kwargs: Any) -> None:
        method(self, *args, **kwargs)
        for attack in self._held():
            getattr(attack, method.__name__)(*args, **kwargs)

    return call


class Attack:
    """Base of all attacks; users' own attacks override `forward`.

    Args:
        name: shown by ``repr``.
        model: network from images to logits.

    Attributes:
        attack, model, model_name, device, attack_mode, supported_mode, targeted, normalization_used: as in torchattacks; to be read and
            written at any time.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.attack = name
        self.set_model(model)
        self.device: torch.device | None
        try:
            self.device = next(model.parameters()).device
        except Exception:  # whatever a thing that is no module raises: as the original
            self.device = None
            print("Failed to set device automatically, please try set_device() manual.")
        self.attack_mode = "default"
        self.supported_mode = ["default"]
        self.targeted = False
        self._target_map_function: TargetMap | None = None
        self.normalization_used: dict[str, Tensor] | None = None
        self._normalization_applied: bool | None = None  # False: `forward` sees pixels, and `get_logits` normalises them
        if type(model).__name__ == "RobModel":  # of MAIR, which carries its normalisation
            mean, std = (getattr(model, k, None) for k in ("mean", "std"))
            if mean is not None and std is not None:
                mean, std = (torch.as_tensor(v).detach().cpu() for v in (mean, std))
                if bool((mean != 0).all() or (std != 1).all()):
                    self.set_normalization_used(mean, std)
        self._model_training = False
        self._batchnorm_training = False
        self._dropout_training = False

    def _held(self) -> list[Attack]:
        """Attacks among the attributes' values, in lists and dicts too; each once."""
        found: dict[int, Attack] = {}

        def search(value: object) -> None:
            if isinstance(value, Attack):
                found[id(value)] = value
            elif isinstance(value, dict):
                for v in value.values():
                    search(v)
            elif isinstance(value, list):
                for v in value:
                    search(v)

        for value in vars(self).values():
            search(value)
        return list(found.values())

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Adversarial images; every subclass defines it."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`forward` with the model in eval mode (see `set_model_training_mode`), on pixels in [0, 1].

        Args:
            inputs: images ``[N, C, H, W]`` in [0, 1], or normalised as `set_normalization_used` was told.
            labels: int64 ``[N]``; targeted: what the mode makes targets of.

        Returns:
            Images as `inputs` (normalised again), on the model's device.
        """
        with ExitStack() as modes:
            for attack in (self, *self._held()):
                modes.enter_context(attack._mode())
            if self._normalization_applied is not True:
                return self.forward(inputs, labels, *args, **kwargs)
            inputs = self.inverse_normalize(inputs)
            self._set_normalization_applied(False)
            try:
                return self.normalize(self.forward(inputs, labels, *args, **kwargs))
            finally:
                self._set_normalization_applied(True)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with evaluating(self.model):
            if self._model_training:
                self.model.train()
                for m in self.model.modules():
                    kind = type(m).__name__
                    if ("BatchNorm" in kind and not self._batchnorm_training) or (
                        "Dropout" in kind and not self._dropout_training
                    ):
                        m.eval()
            yield

    # The model and its inputs

    @_with_held
    def set_model(self, model: nn.Module) -> None:
        self.model = model
        self.model_name = type(model).__name__

    @_with_held
    def set_device(self, device: torch.device | str) -> None:
        """Where images and labels are moved to: the model's device, unless said otherwise here."""
        self.device = device  # type: ignore[assignment]  # kept as given, as the original does

    @_with_held
    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in train mode, with or without its BatchNorm and Dropout modules."""
        self._model_training = model_training
        self._batchnorm_training = batchnorm_training
        self._dropout_training = dropout_training

    @_with_held
    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """From now on inputs and results are ``(pixels - mean) / std``; `mean` and `std` have a number a channel."""
        self.normalization_used = {
            k: torch.as_tensor(v).detach().clone().reshape(1, -1, 1, 1) for k, v in (("mean", mean), ("std", std))
        }
        self._set_normalization_applied(True)

    @_with_held
    def _set_normalization_applied(self, flag: bool) -> None:
        self._normalization_applied = flag

    def _normalization(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalization_used is None:
            raise InputError("tsrfast.compat.torchattacks: set_normalization_used must be called first, got no mean and std")
        return self.normalization_used["mean"].to(like), self.normalization_used["std"].to(like)

    def normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalization(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalization(inputs)
        return inputs * std + mean

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """What the model says; attacks see it through this method, so that a subclass can change it."""
        if self._normalization_applied is False:
            inputs = self.normalize(inputs)
        logits: Tensor = self.model(inputs)
        return logits

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            return self.get_logits(inputs)

    # Targets

    def get_mode(self) -> str:
        return self.attack_mode

    @_with_held
    def set_mode_default(self) -> None:
        """Away from the labels."""
        self.attack_mode = "default"
        self.targeted = False
        print("Attack mode is changed to 'default.'")

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError("Targeted mode is not supported.")
        self.targeted = True
        self.attack_mode = mode
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    @_with_held
    def set_mode_targeted_by_function(self, target_map_function: TargetMap, quiet: bool = False) -> None:
        """Towards ``target_map_function(images, labels)``, images being pixels."""
        self._set_mode_targeted("targeted(custom)", quiet)
        self._target_map_function = target_map_function

    @_with_held
    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Towards a random other class."""
        self._set_mode_targeted("targeted(random)", quiet)
        self._target_map_function = self.get_random_target_label

    @_with_held
    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Towards the other class with the `kth_min`-th smallest logit."""
        self._set_mode_targeted("targeted(least-likely)", quiet)
        assert kth_min > 0
        self._kth_min = kth_min
        self._target_map_function = self.get_least_likely_label

    @_with_held
    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Towards the labels of the call."""
        self._set_mode_targeted("targeted(label)", quiet)
        self._target_map_function = _labels

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """The targets of the current mode.

        Raises:
            ValueError: no targeted mode was set.
        """
        if self._target_map_function is None:
            raise ValueError("target_map_function is not initialized by set_mode_targeted.")
        return self._target_map_function(inputs, labels)  # type: ignore[arg-type]  # users' functions may do without

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.get_output_with_eval_nograd(inputs)
        others = _others(logits, labels)
        kth = logits.gather(1, others).kthvalue(self._kth_min, 1).indices
        return others.gather(1, kth[:, None]).squeeze(1)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        others = _others(self.get_output_with_eval_nograd(inputs), labels)
        drawn = (others.shape[1] * torch.rand(len(others))).long()  # the numbers that one draw an image gives
        return others.gather(1, drawn[:, None].to(others.device)).squeeze(1)

    # Files

    def save(
        self,
        data_loader: DataLoader,
        save_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> tuple[float, float, float] | None:
        """Attack all batches of a loader, and write the results to a file, once all are there.

        Args:
            save_path: the file, of tensors and names only; None writes nothing.
            verbose: print a line a batch.
            return_verbose: return (robust accuracy in percent, mean l2 distance of successful attacks, seconds of the last batch).
            save_predictions, save_clean_inputs: write these too.
            save_type: ``float``, or ``int`` for 0..255.
        """
        kept: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": [], "preds": [], "clean_inputs": []}
        names = ["adv_inputs", "labels", *["preds"] * save_predictions, *["clean_inputs"] * save_clean_inputs]
        correct = total = 0
        rob_acc = l2 = elapsed = float("nan")
        distances: list[Tensor] = []
        for step, (inputs, labels) in enumerate(data_loader):
            begun = time.time()
            adv_inputs = self(inputs, labels)
            preds = self.get_output_with_eval_nograd(adv_inputs).argmax(1)
            right = preds == labels.to(preds.device)
            correct, total = correct + int(right.sum()), total + len(labels)
            rob_acc = 100 * correct / total
            distances.append((adv_inputs - inputs.to(adv_inputs.device))[~right].flatten(1).norm(dim=1))
            l2 = torch.cat(distances).mean().item()
            elapsed = time.time() - begun
            if verbose:
                self._save_print((step + 1) / len(data_loader) * 100, rob_acc, l2, elapsed, end="\r")
            if save_path is not None:
                batch = {"adv_inputs": adv_inputs, "labels": labels, "preds": preds, "clean_inputs": inputs}
                for name in names:
                    kept[name].append(batch[name].detach().cpu())
        if verbose:
            self._save_print(100.0, rob_acc, l2, elapsed, end="\n")
        if save_path is not None:
            content: dict[str, Tensor | str] = {}
            for name in names:
                value = torch.cat(kept[name])
                if name in ("adv_inputs", "clean_inputs"):
                    value = value if self.normalization_used is None else self.inverse_normalize(value)
                    value = self.to_type(value, "int") if save_type == "int" else value
                content[name] = value
            content["save_type"] = save_type
            with atomic_path(save_path) as path:
                torch.save(content, path)
        return (rob_acc, l2, elapsed) if return_verbose else None

    @staticmethod
    def load(
        load_path: str | os.PathLike[str],
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: Mapping[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader:
        """A loader of what `save` wrote: (adversarial images, labels, predictions, clean images), the last two if asked for.

        Args:
            normalize: ``mean`` and ``std`` of a channel, by which images are normalised.

        Raises:
            pickle.UnpicklingError: the file holds more than tensors and names; nothing in it is run.
        """
        content = torch.load(load_path, weights_only=True)
        names = ["adv_inputs", "labels", *["preds"] * load_predictions, *["clean_inputs"] * load_clean_inputs]
        for name in ("adv_inputs", *["clean_inputs"] * load_clean_inputs):
            if content["save_type"] == "int":
                content[name] = content[name].float() / 255
            if normalize is not None:
                mean, std = (torch.as_tensor(normalize[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
                content[name] = (content[name] - mean) / std
        print(f"Data is loaded in the following order: [{', '.join(names)}]")
        return DataLoader(TensorDataset(*[content[name] for name in names]), batch_size=batch_size, shuffle=shuffle)

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """float32 in [0, 1] as uint8 (``int``), or back (``float``); anything else as it is.

        Raises:
            ValueError: another type.
        """
        if type not in ("int", "float"):
            raise ValueError(type + " is not a valid type. [Options: float, int]")
        if type == "int" and inputs.dtype == torch.float32:
            return (inputs * 255).type(torch.uint8)
        if type == "float" and inputs.dtype == torch.uint8:
            return inputs.float() / 255
        return inputs

    @staticmethod
    def _save_print(progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        print(
            f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / L2: {l2:1.5f} ({elapsed_time:2.3f} it/s) \t",
            end=end,
        )

    def __repr__(self) -> str:
        hidden = ("model", "attack", "supported_mode")
        info = {k: v for k, v in vars(self).items() if k not in hidden and not k.startswith("_")}
        info["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{k}={v}' for k, v in info.items())})"


def _labels(images: Tensor, labels: Tensor) -> Tensor:
    return labels


def _others(logits: Tensor, labels: Tensor | None) -> Tensor:
    """int64 ``[N, classes - 1]``: all classes but the label (None: the predicted one), in order."""
    classes = logits.shape[-1]
    here = logits.argmax(1) if labels is None else labels.to(logits.device)
    if here.numel() and not bool(((here >= 0) & (here < classes)).all()):
        raise InputError(f"tsrfast.compat.torchattacks: labels must be in 0..{classes - 1}, got {here.tolist()}")
    others = torch.arange(classes - 1, device=logits.device).expand(len(logits), -1)
    return others + (others >= here[:, None])
