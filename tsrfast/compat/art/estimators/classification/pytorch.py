"""ART's classifier around a PyTorch module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tsrfast._modes import evaluating
from tsrfast.attacks import CrossEntropy, Loss
from tsrfast.compat._covered import NotCovered
from tsrfast.compat._preprocessing import Preprocessed
from tsrfast.errors import InputError


class PyTorchClassifier:
    """A module with its loss, its range of pixels and its preprocessing. NumPy arrays in and out.

    Args:
        model: from preprocessed images to logits ``[N, nb_classes]``; moved to the device. It keeps its mode: everything here runs in eval
            mode, and puts back what was.
        loss: from logits and labels; labels are one-hot unless it is `CrossEntropyLoss`, `NLLLoss` or `MultiMarginLoss`. Attacks use it
            image by image: with a `reduction` it is set to ``none``, otherwise it is to be a sum or a mean over images.
        input_shape: of one image.
        nb_classes: number of classes.
        optimizer, opt_level, loss_scale: kept; nothing is trained here.
        use_amp: False.
        channels_first: whether images are ``[C, H, W]``.
        clip_values: least and greatest pixel, None: any.
        preprocessing_defences, postprocessing_defences: None.
        preprocessing: (mean, std): numbers, arrays with a number a channel, or what broadcasts; or None.
        device_type: ``gpu`` takes the current CUDA device if there is one; ``cpu``.

    Raises:
        NotCovered: defences, mixed precision, other preprocessing.
        InputError: a value that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        input_shape: tuple[int, ...],
        nb_classes: int,
        optimizer: torch.optim.Optimizer | None = None,
        use_amp: bool = False,
        opt_level: str = "O1",
        loss_scale: float | str | None = "dynamic",
        channels_first: bool = True,
        clip_values: tuple[Any, Any] | None = None,
        preprocessing_defences: Any = None,
        postprocessing_defences: Any = None,
        preprocessing: Any = (0.0, 1.0),
        device_type: str = "gpu",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"tsrfast.compat.art: model must be an nn.Module, got {type(model).__name__}")
        if use_amp:
            raise NotCovered("tsrfast.compat.art: use_amp must be False: the drop-in computes in the precision of the network")
        for name, value in (("preprocessing", preprocessing_defences), ("postprocessing", postprocessing_defences)):
            if value is not None and value != []:
                raise NotCovered(f"tsrfast.compat.art: {name}_defences must be None, got {value!r}")
        self.nb_classes = nb_classes
        self.channels_first = channels_first
        self.preprocessing = preprocessing
        self.device_type = device_type
        cuda = device_type != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.model = model.to(self.device)
        self.loss = loss
        self.input_shape = tuple(input_shape)
        self.optimizer = optimizer
        self.use_amp = use_amp
        self.opt_level = opt_level
        self.loss_scale = loss_scale
        # An array of float32, as in ART, whose scripts do arithmetic with it.
        self.clip_values: np.ndarray | None = None if clip_values is None else _range(clip_values)
        mean_std = self._mean_std(preprocessing)
        # Made once, so that it is compiled once.
        self._network = self.model if mean_std is None else Preprocessed(self.model, *mean_std)

    def _mean_std(self, preprocessing: Any) -> tuple[Tensor, Tensor] | None:
        if preprocessing is None:
            return None
        if not isinstance(preprocessing, tuple) or len(preprocessing) != 2:
            raise NotCovered(
                f"tsrfast.compat.art: preprocessing must be (mean, std) or None, got {type(preprocessing).__name__}"
            )
        mean, std = (torch.as_tensor(np.asarray(v, dtype=np.float32), device=self.device) for v in preprocessing)
        if mean.shape != std.shape:
            raise InputError(
                f"tsrfast.compat.art: preprocessing must be of one shape, got {tuple(mean.shape)}, {tuple(std.shape)}"
            )
        if bool((mean == 0).all() and (std == 1).all()):
            return None
        if self.channels_first and mean.shape == self.input_shape[:1]:
            shape = (-1, *[1] * (len(self.input_shape) - 1))
            return mean.reshape(shape), std.reshape(shape)
        return mean, std

    @property
    def box(self) -> tuple[float, float]:
        """Least and greatest pixel; infinite without `clip_values`."""
        if self.clip_values is None:
            return -np.inf, np.inf
        ends = [np.unique(v) for v in self.clip_values]
        if any(len(e) != 1 for e in ends):
            raise NotCovered("tsrfast.compat.art: clip_values must be two numbers, the same for all pixels")
        return float(ends[0][0]), float(ends[1][0])

    def predict(self, x: Any, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """float32 logits ``[N, nb_classes]``; `training_mode`: with the module in train mode."""
        rows = []
        with _mode(self.model, training_mode), torch.inference_mode(False), torch.no_grad():
            for part in self.images(x).split(batch_size):
                out = self._network(part).float().cpu().numpy()
                rows.append(out if out.ndim > 1 else out[:, None])
        return np.concatenate(rows)

    def images(self, x: Any) -> Tensor:
        """float32 on the device: a copy."""
        return torch.from_numpy(np.array(np.asarray(x), dtype=np.float32)).to(self.device)

    def labels(self, y: Any, n: int, name: str = "y") -> Tensor:
        """int64 ``[n]`` from labels ``[n]``, ``[n, 1]``, or one-hot ``[n, classes]``; `name`: of the argument.

        Raises:
            InputError: anything else.
            NotCovered: probabilities.
        """
        a = np.asarray(y)
        if a.ndim == 2 and a.shape[1] > 1 and len(a) == n:
            if a.shape[1] != self.nb_classes:
                raise InputError(f"tsrfast.compat.art: {name} must have {self.nb_classes} columns, got {a.shape[1]}")
            if not np.array_equal(a, a == 1) or not (a.sum(1) == 1).all():
                raise NotCovered(f"tsrfast.compat.art: {name} must be labels or one-hot, got probabilities")
            a = a.argmax(1)
        if a.shape not in ((n,), (n, 1)) or a.dtype.kind not in "iuf" or not np.array_equal(a, np.floor(a)):
            raise InputError(f"tsrfast.compat.art: {name} must be {n} labels, or one-hot, got {a.dtype} of shape {a.shape}")
        a = a.reshape(n).astype(np.int64)
        wrong = a[(a < 0) | (a >= self.nb_classes)]
        if len(wrong):
            raise InputError(f"tsrfast.compat.art: {name} must be in 0..{self.nb_classes - 1}, got {wrong[0]}")
        return torch.from_numpy(a).to(self.device)

    def attack_loss(self) -> Loss:
        """The loss as attacks take it: one value an image, labels int64."""
        plain = nn.CrossEntropyLoss()
        if type(self.loss) is nn.CrossEntropyLoss and all(
            getattr(self.loss, k) == getattr(plain, k) for k in ("weight", "ignore_index", "label_smoothing")
        ):
            return CrossEntropy()
        return _Given(self.reduced("none"), self._one_hot)

    @property
    def _one_hot(self) -> bool:
        return not isinstance(self.loss, (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss))

    def reduced(self, reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss with another reduction, where it has one."""
        if not hasattr(self.loss, "reduction"):
            return self.loss
        loss = copy.copy(self.loss)
        loss.reduction = reduction
        return loss

    def compute_loss(self, x: Any, y: Any, reduction: str = "none", **kwargs: Any) -> np.ndarray:
        """The loss at `x`: ``[N]``, or its ``mean`` or ``sum``."""
        loss = self._loss_at(self.images(x), y, reduction)
        return loss.detach().cpu().numpy()

    def loss_gradient(self, x: Any, y: Any, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """Of the loss, as its own reduction has it, with respect to `x`; like x. Parameters get none."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.images(x).requires_grad_()
            loss = self._loss_at(leaf, y, getattr(self.loss, "reduction", "mean"), training_mode)
            return torch.autograd.grad(loss.sum(), leaf)[0].cpu().numpy()

    def _loss_at(self, x: Tensor, y: Any, reduction: str, training: bool = False) -> Tensor:
        labels = self.labels(y, len(x))
        with _mode(self.model, training):
            logits = self._network(x)
        target = F.one_hot(labels, self.nb_classes).to(logits.dtype) if self._one_hot else labels
        return self.reduced(reduction)(logits, target)

    def class_gradient(self, x: Any, label: Any = None, training_mode: bool = False, **kwargs: Any) -> np.ndarray:
        """Of logits with respect to `x`: ``[N, nb_classes, ...]``; of one class, or one an image: ``[N, 1, ...]``."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self.images(x).requires_grad_()
            with _mode(self.model, training_mode):
                logits = self._network(leaf)
            wanted = range(self.nb_classes)
            if label is not None:
                given = self.labels(np.broadcast_to(label, len(leaf)) if np.ndim(label) == 0 else label, len(leaf), "label")
                logits, wanted = logits.gather(1, given[:, None]), range(1)
            rows = [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in wanted]
        return torch.stack(rows, 1).cpu().numpy()

    def fit(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Training is no attack."""
        raise NotCovered(
            "tsrfast.compat.art: fit must be done in PyTorch, on `classifier.model`: the drop-in has attacks, no training"
        )

    fit_generator = fit

    def __repr__(self) -> str:
        shown = ("model", "loss", "input_shape", "nb_classes", "channels_first", "clip_values", "preprocessing", "device_type")
        return f"{type(self).__name__}({', '.join(f'{k}={getattr(self, k)!r}' for k in shown)})"


def _range(clip_values: Any) -> np.ndarray:
    """Least and greatest pixels, as float32 holds them (so do the images): ``[2, ...]``.

    Raises:
        InputError: they are not two, or not in order.
    """
    ends = np.array(np.broadcast_arrays(*clip_values), dtype=np.float32)
    if len(ends) != 2 or not (ends[0] < ends[1]).all():
        raise InputError(f"tsrfast.compat.art: clip_values must be least and greatest pixel, got {clip_values!r}")
    return ends


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside the block; afterwards what was."""
    with evaluating(model):
        if training:
            model.train()
        yield


@dataclass(frozen=True, eq=False)
class _Given(Loss):
    """A user's loss."""

    name: ClassVar[str] = "given"
    needs_labels: ClassVar[bool] = True

    loss: Callable[[Tensor, Tensor], Tensor]
    one_hot: bool

    def __call__(self, x: Tensor, logits: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None  # checked
        value = self.loss(logits, F.one_hot(y, logits.shape[1]).to(logits.dtype) if self.one_hot else y)
        if not value.ndim:  # of all images: each gets its share
            value = value.expand(len(x)) / len(x)
        return value.reshape(len(x), -1).sum(1), y
