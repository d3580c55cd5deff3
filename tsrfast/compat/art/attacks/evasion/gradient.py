"""ART's gradient attacks: the loop of `tsrfast.attacks` from starts that NumPy's generator draws as ART draws them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tsrfast import attacks
from tsrfast._modes import evaluating
from tsrfast.compat._covered import NotCovered
from tsrfast.compat._running import Function, ascend
from tsrfast.compat.art.attacks.attack import EvasionAttack, check, named_norm, no_more
from tsrfast.compat.art.estimators.classification import PyTorchClassifier
from tsrfast.errors import InputError

Size = float | np.ndarray


class FastGradientMethod(EvasionAttack):
    """One step of the gradient (Goodfellow et al. 2015).

    Args:
        estimator: the classifier.
        norm: ``np.inf``, ``"inf"``, 1 or 2.
        eps: length of the step: a number, or one an image ``[N, 1, 1, 1]``.
        eps_step: `minimal`: lengths are multiples of it.
        targeted: `y` are targets.
        num_random_init: random starts; 0: the images themselves. Of several each image keeps the last that was successful.
        batch_size: images at a time.
        minimal: the shortest of the lengths ``eps_step, 2 eps_step, ...`` up to eps that is successful, else the longest.
        summary_writer: False.
    """

    attack_params: ClassVar[list[str]] = [
        "norm", "eps", "eps_step", "targeted", "num_random_init", "batch_size", "minimal", "summary_writer",
    ]  # fmt: skip

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        eps: Size = 0.3,
        eps_step: Size = 0.1,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        minimal: bool = False,
        summary_writer: Any = False,
    ) -> None:
        super().__init__(estimator, summary_writer)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self._targeted = targeted
        self.num_random_init = num_random_init
        self.batch_size = batch_size
        self.minimal = minimal
        self._check_params()

    def _check_params(self) -> None:
        named_norm(self.norm)
        _check_sizes(self)
        check(isinstance(self.minimal, bool), "The flag `minimal` has to be of type bool.")

    def generate(self, x: Any, y: Any = None, mask: Any = None, **kwargs: Any) -> np.ndarray:
        no_more(kwargs, "x, y and mask")
        images, labels = self._given(x, y)
        where, eps = _mask(mask, images), _size("eps", self.eps, images)
        if self.minimal:
            return self._shortest(images, labels, where, eps).cpu().numpy()
        # ART draws for all images at once here, and batch by batch in PGD.
        starts = [_start(images, eps, self.norm, where, self.estimator) for _ in range(self.num_random_init)]
        out = images.clone()
        for part in self._parts(len(images)):
            for k, start in enumerate([s[part] for s in starts] or [images[part]]):
                got = _ascend(self, images[part], labels[part], _of(where, part), start, _of(eps, part), _of(eps, part), 1)
                out[part] = got if not k else _won(self, got, labels[part], out[part])
        return out.cpu().numpy()

    def _shortest(self, x: Tensor, y: Tensor, where: Tensor | None, eps: float | Tensor) -> Tensor:
        step = _size("eps_step", self.eps_step, x)
        out, length, standing = x.clone(), step, torch.arange(len(x), device=x.device)
        while len(standing) and bool(torch.as_tensor(length <= eps).all()):
            for part in standing.split(self.batch_size):
                out[part] = _ascend(self, x[part], y[part], _of(where, part), x[part], _of(eps, part), _of(length, part), 1)
            standing = standing[~_success(self, out[standing], y[standing])]
            length = length + step
        return out


class ProjectedGradientDescent(EvasionAttack):
    """Projected gradient descent (Madry et al. 2018).

    Args:
        estimator, norm, targeted, batch_size, summary_writer: as in `FastGradientMethod`.
        eps: radius: a number, or one an image ``[N, 1, 1, 1]``.
        eps_step: length of a step, likewise.
        decay: of a momentum of gradients divided by their l1 norms; None: none.
        max_iter: number of steps.
        num_random_init: random starts; 0: the images themselves. Of several each image keeps the last that was successful.
        random_eps: False.
        verbose: no bars are drawn.
    """

    attack_params: ClassVar[list[str]] = [
        "norm", "eps", "eps_step", "decay", "targeted", "num_random_init", "batch_size", "max_iter", "random_eps",
        "summary_writer", "verbose",
    ]  # fmt: skip

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        eps: Size = 0.3,
        eps_step: Size = 0.1,
        decay: float | None = None,
        max_iter: int = 100,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        random_eps: bool = False,
        summary_writer: Any = False,
        verbose: bool = True,
    ) -> None:
        super().__init__(estimator, summary_writer)
        self.norm = norm
        self.eps = eps
        self.eps_step = eps_step
        self.decay = decay
        self.max_iter = max_iter
        self._targeted = targeted
        self.num_random_init = num_random_init
        self.batch_size = batch_size
        self.random_eps = random_eps
        self.verbose = verbose
        self._check_params()

    def _check_params(self) -> None:
        named_norm(self.norm)
        _check_sizes(self)
        check(self.max_iter >= 0, "The number of iterations `max_iter` has to be a nonnegative integer.")
        check(self.decay is None or self.decay >= 0, "The decay factor `decay` has to be a nonnegative float.")
        check(isinstance(self.verbose, bool), "The verbose has to be a Boolean.")
        if self.random_eps:
            raise NotCovered("tsrfast.compat.art: random_eps must be False: draw eps yourself, one an image, [N, 1, 1, 1]")

    def generate(self, x: Any, y: Any = None, mask: Any = None, **kwargs: Any) -> np.ndarray:
        no_more(kwargs, "x, y and mask")
        images, labels = self._given(x, y)
        where, eps, step = _mask(mask, images), _size("eps", self.eps, images), _size("eps_step", self.eps_step, images)
        out = images.clone()
        for part in self._parts(len(images)):
            x0, y0, where0, eps0 = images[part], labels[part], _of(where, part), _of(eps, part)
            for k in range(max(1, self.num_random_init)):
                start = _start(x0, eps0, self.norm, where0, self.estimator) if self.num_random_init else x0
                got = _ascend(self, x0, y0, where0, start, eps0, _of(step, part), self.max_iter, self.decay)
                out[part] = got if not k else _won(self, got, y0, out[part])
        return out.cpu().numpy()


class ProjectedGradientDescentPyTorch(ProjectedGradientDescent):
    """`ProjectedGradientDescent` by ART's other name."""


class ProjectedGradientDescentNumpy(ProjectedGradientDescent):
    """`ProjectedGradientDescent` by ART's other name."""


class BasicIterativeMethod(ProjectedGradientDescent):
    """Signed steps from the images themselves (Kurakin et al. 2017)."""

    def __init__(
        self,
        estimator: PyTorchClassifier,
        eps: Size = 0.3,
        eps_step: Size = 0.1,
        max_iter: int = 100,
        targeted: bool = False,
        batch_size: int = 32,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            estimator, eps=eps, eps_step=eps_step, max_iter=max_iter, targeted=targeted, batch_size=batch_size, verbose=verbose
        )


class MomentumIterativeMethod(ProjectedGradientDescent):
    """MI-FGSM (Dong et al. 2018)."""

    def __init__(
        self,
        estimator: PyTorchClassifier,
        norm: float | str = np.inf,
        eps: Size = 0.3,
        eps_step: Size = 0.1,
        decay: float = 1.0,
        max_iter: int = 100,
        targeted: bool = False,
        batch_size: int = 32,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            estimator, norm=norm, eps=eps, eps_step=eps_step, decay=decay, max_iter=max_iter, targeted=targeted,
            batch_size=batch_size, verbose=verbose,
        )  # fmt: skip


Gradient = FastGradientMethod | ProjectedGradientDescent


def _check_sizes(attack: Gradient) -> None:
    """What ART checks of both, in its words."""
    eps, step = attack.eps, attack.eps_step
    arrays = isinstance(eps, np.ndarray), isinstance(step, np.ndarray)
    numbers = isinstance(eps, (int, float)), isinstance(step, (int, float))
    check(
        all(arrays) or all(numbers),
        "The perturbation size `eps` and the perturbation step-size `eps_step` must have the same type of `int`, `float`, or "
        "`np.ndarray`.",
        TypeError,
    )
    check(bool(np.all(np.asarray(eps) >= 0)), "The perturbation size `eps` has to be nonnegative.")
    check(bool(np.all(np.asarray(step) > 0)), "The perturbation step-size `eps_step` has to be positive.")
    check(
        np.shape(eps) == np.shape(step),
        "The perturbation size `eps` and the perturbation step-size `eps_step` must have the same shape.",
    )
    check(isinstance(attack.targeted, bool), "The flag `targeted` has to be of type bool.")
    check(isinstance(attack.num_random_init, int), "The number of random initialisations has to be of type integer.", TypeError)
    check(
        attack.num_random_init >= 0,
        "The number of random initialisations `random_init` has to be greater than or equal to 0.",
    )
    check(attack.batch_size > 0, "The batch size `batch_size` has to be positive.")


def _size(name: str, value: Size, x: Tensor) -> float | Tensor:
    """A number, or float32 ``[N]``."""
    a = np.asarray(value, dtype=np.float32)
    if not isinstance(value, np.ndarray) or a.size == 1:
        return float(a.item()) if isinstance(value, np.ndarray) else float(value)
    if a.shape != (len(x), *[1] * (x.ndim - 1)):
        raise InputError(
            f"tsrfast.compat.art: {name} must be a number or one an image, ({', '.join(['N', *['1'] * (x.ndim - 1)])}), got {a.shape}"
        )
    return torch.from_numpy(a.reshape(-1)).to(x.device)


def _mask(mask: Any, x: Tensor) -> Tensor | None:
    """Broadcast to the images.

    Raises:
        ValueError: negative, of another type or shape.
    """
    if mask is None:
        return None
    a = np.asarray(mask)
    check(a.dtype == bool or np.issubdtype(a.dtype, np.floating), f"The `mask` has to be of floats or bool, got {a.dtype}.")
    check(bool((a >= 0).all()), "The `mask` requires all elements to be either zero or positive values.")
    try:
        return torch.from_numpy(np.broadcast_to(a, tuple(x.shape)).astype(np.float32)).to(x.device)
    except ValueError as e:
        raise InputError(f"tsrfast.compat.art: mask must be broadcastable to x of shape {tuple(x.shape)}, got {a.shape}") from e


def _of(value: Any, part: slice | Tensor) -> Any:
    """Of these images, where there is one value an image."""
    return value[part] if isinstance(value, Tensor) else value


def _start(x: Tensor, eps: float | Tensor, norm: float | str, where: Tensor | None, estimator: PyTorchClassifier) -> Tensor:
    """A random point of the ball, from ART's draws on NumPy's generator, float64."""
    n, d = len(x), x[0].numel() if len(x) else 0
    kind = named_norm(norm)
    radius = eps.cpu().double().numpy()[:, None] if isinstance(eps, Tensor) else eps
    if kind == "linf":
        offset = np.random.uniform(-radius, radius, (n, d))
    elif kind == "l2":
        a = np.random.randn(n, d)
        squares = np.sum(a**2, axis=1, keepdims=True)
        # Its share of the normal distribution's mass is uniform: the d-th root is the radius in a ball.
        mass = torch.special.gammainc(torch.tensor(d / 2, dtype=torch.float64), torch.from_numpy(squares / 2)).numpy()
        offset = a * (mass ** (1 / max(d, 1)) * radius / np.sqrt(squares))
    else:
        v = np.sort(np.random.uniform(size=(n, d)))
        gaps = v - np.concatenate([np.zeros((n, 1)), v[:, : d - 1]], axis=-1)
        offset = radius * gaps * np.random.choice([-1, 1], (n, d))
    delta = torch.from_numpy(offset.astype(np.float32)).to(x.device).reshape(x.shape)
    return (x + (delta if where is None else delta * where)).clamp(*estimator.box)


def _ascend(
    attack: Gradient,
    x: Tensor,
    y: Tensor,
    where: Tensor | None,
    start: Tensor,
    eps: float | Tensor,
    step: float | Tensor,
    steps: int,
    decay: float | None = None,
) -> Tensor:
    """The loop of `tsrfast.attacks`."""
    estimator = attack.estimator
    lo, hi = estimator.box
    fields: dict[str, Any] = {
        "norm": named_norm(attack.norm), "eps": eps, "step_size": step, "steps": int(steps), "loss": estimator.attack_loss(),
        "random_start": False, "targeted": attack.targeted, "lo": lo, "hi": hi, "engine": "auto" if where is None else "eager",
    }  # fmt: skip
    own = attacks.PGD(**fields) if decay is None else attacks.MIM(**fields, momentum=decay)
    network = estimator._network
    if where is not None:
        # What the model does not see has no gradient, and pixels without one stay.
        network = Function(lambda at: estimator._network(torch.where(where == 0, x, at)))
    with evaluating(estimator.model):
        return ascend(own, network, x, y, lambda _: start).x


def _success(attack: Gradient, x: Tensor, y: Tensor) -> Tensor:
    """bool ``[N]``: wrong (targeted: the target)."""
    return (attack._answers(x) != y) ^ attack.targeted


def _won(attack: Gradient, got: Tensor, y: Tensor, held: Tensor) -> Tensor:
    """What is successful, else what is held."""
    return torch.where(_success(attack, got, y).reshape(-1, *[1] * (got.ndim - 1)), got, held)
