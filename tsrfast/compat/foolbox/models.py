"""The model as foolbox sees it: pixels within bounds, preprocessing inside."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tsrfast._modes import evaluating
from tsrfast.compat._covered import NotCovered
from tsrfast.compat._preprocessing import Preprocessed
from tsrfast.compat._running import Function
from tsrfast.compat.foolbox._tensors import like, raw, shown
from tsrfast.compat.foolbox.types import Bounds, BoundsInput, Preprocessing


class Model:
    """Base of all models; users' own define `bounds` and ``__call__`` (images to logits)."""

    @property
    def bounds(self) -> Bounds:
        raise NotImplementedError

    def __call__(self, inputs: Any) -> Any:
        raise NotImplementedError

    def transform_bounds(self, bounds: BoundsInput) -> Model:
        """The same model for images scaled to other bounds."""
        return TransformBoundsWrapper(self, bounds)


class TransformBoundsWrapper(Model):
    """`model` for images within `bounds`."""

    def __init__(self, model: Model, bounds: BoundsInput) -> None:
        self._model = model
        self._bounds = Bounds(*bounds)

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    @property
    def data_format(self) -> Any:
        return self._model.data_format  # type: ignore[attr-defined]  # as in foolbox: if the model has one

    def __call__(self, inputs: Any) -> Any:
        (a, b), (c, d) = self.bounds, self._model.bounds
        return self._model(inputs if self.bounds == self._model.bounds else (inputs - a) / (b - a) * (d - c) + c)

    def transform_bounds(self, bounds: BoundsInput, inplace: bool = False) -> Model:
        if not inplace:
            return TransformBoundsWrapper(self._model, bounds)
        self._bounds = Bounds(*bounds)
        return self


class PyTorchModel(Model):
    """A module with its bounds and preprocessing.

    Args:
        model: from preprocessed images to logits; moved to `device`. Run in eval mode, whatever its mode is, which it keeps.
        bounds: least and greatest pixel.
        device: None: ``cuda:0`` if there is one.
        preprocessing: ``mean``, ``std`` (numbers a channel with ``axis=-3``, or what broadcasts), ``axis``, ``flip_axis``: the module gets
            ``(flipped images - mean) / std``.

    Raises:
        ValueError: `model` is no module, or a preprocessing that foolbox does not know either.
    """

    data_format = "channels_first"

    def __init__(self, model: nn.Module, bounds: BoundsInput, device: Any = None, preprocessing: Preprocessing = None) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError("expected model to be a torch.nn.Module instance")
        if model.training:
            warnings.warn(
                "The PyTorch model is in training mode: it is run and attacked in evaluation mode nonetheless, and keeps its mode.",
                stacklevel=2,
            )
        default = "cuda:0" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self._bounds = Bounds(*bounds)
        self._plain = model.to(self.device)
        self._mean, self._std, self._flip_axis = _parsed(preprocessing or {}, self.device)
        self._build()

    def _build(self) -> None:
        """What attacks run, made once: it is compiled once."""
        bare = self._mean is None and self._std is None and self._flip_axis is None
        self._network = self._plain if bare else Preprocessed(self._plain, self._mean, self._std, self._flip_axis)

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    @property
    def dummy(self) -> Any:
        """An empty tensor on `device`, for ``ep.from_numpy(fmodel.dummy, array)``."""
        return shown(torch.zeros(0, device=self.device))

    def __call__(self, inputs: Any) -> Any:
        """Logits for images within the bounds; they require grad if the images do."""
        x = raw(inputs)
        with evaluating(self._network), torch.set_grad_enabled(x.requires_grad):
            return like(self._network(x), inputs)

    def transform_bounds(self, bounds: BoundsInput, inplace: bool = False, wrapper: bool = False) -> Model:
        """The same model for images scaled to other bounds; `wrapper`: around this one, instead of with another preprocessing."""
        if wrapper:
            if inplace:
                raise ValueError("inplace and wrapper cannot both be True")
            return super().transform_bounds(bounds)
        model = self if inplace else copy.copy(self)
        if self.bounds != bounds:
            (a, b), (c, d) = self.bounds, bounds
            f = (d - c) / (b - a)
            mean, std = (torch.tensor([float(v)], device=self.device) for v in (0, 1))
            model._mean = f * ((mean if self._mean is None else self._mean) - a) + c
            model._std = f * (std if self._std is None else self._std)
            model._bounds = Bounds(*bounds)
            model._build()
        return model


def __getattr__(name: str) -> NoReturn:
    if name in ("ExpectationOverTransformationWrapper", "ThresholdingWrapper", "JAXModel", "NumPyModel", "TensorFlowModel"):
        raise NotCovered(f"tsrfast.compat.foolbox: models must be PyTorchModel or a subclass of Model, got {name!r}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def network_of(model: Model) -> tuple[nn.Module, str]:
    """What `tsrfast.attacks` is to attack, and its engine: own models, and calls that are overridden, are asked as they are."""
    if isinstance(model, PyTorchModel) and type(model).__call__ is PyTorchModel.__call__:
        return model._network, "auto"
    return Function(lambda x: raw(model(shown(x)))), "eager"


def _parsed(preprocessing: dict[str, Any], device: torch.device) -> tuple[Tensor | None, Tensor | None, Any]:
    """mean, std, flip_axis."""
    unsupported = set(preprocessing) - {"mean", "std", "axis", "flip_axis"}
    if unsupported:
        raise ValueError(f"unknown preprocessing key: {unsupported.pop()}")
    axis = preprocessing.get("axis")

    def broadcast(value: Any) -> Tensor | None:
        if value is None:
            return None
        t = torch.as_tensor(getattr(value, "raw", value)).to(device)
        if axis is None:
            return t
        if t.ndim != 1:
            raise ValueError(f"non-None axis requires a 1D tensor, got {t.ndim}D")
        if axis >= 0:
            raise ValueError("expected axis to be None or negative, -1 refers to the last axis")
        return t.reshape(-1, *[1] * (-axis - 1))

    return broadcast(preprocessing.get("mean")), broadcast(preprocessing.get("std")), preprocessing.get("flip_axis")
