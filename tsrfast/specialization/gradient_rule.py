"""The recursive gradient rule of two networks: how the gradient couples student nodes with teacher nodes, and with each other.

At an input x, f_l is what hidden layer l returns and V_l(x) = d logits / d f_l, a row for each class. ReLU networks have

    V_{l-1} = V_l D_l W_l        A_l = V_l^T V*_l        B_l = V_l^T V_l

(D_l: the gates; * marks the teacher; batch normalisation folded into W). For bias-free networks the gradient descent direction of
1/2 |f* - f|^2 at layer l is exactly D_l (A_l f*_l - B_l f_l) (Tian 2019, Lemma 1).
Node k learns from teacher node j as A_kj says, and is worth sqrt(B_kk) to the output: the ordinate of the paper's L-shaped curve.

A node of a convolution is a channel: its A and B are sums over positions. The matrix of all units (a channel at a position) is never
made; of its diagonal there is the mean over images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tsrfast.chain import Chain, automatic
from tsrfast.errors import InputError
from tsrfast.ops.chain import ACTIVATIONS, FIELDS, KINDS, chain_gradient, chain_pack
from tsrfast.ops.channel_correlation import channel_correlation

_COUNT = "count"


def hidden_layers(chain: Chain) -> list[int]:
    """The records of `chain` that end in an activation, its logits excepted."""
    activation = chain.plan[:-1, FIELDS.index("activation")]
    layers: list[int] = (activation != ACTIVATIONS["none"]).nonzero().flatten().tolist()
    return layers


def gradient_rows(chain: Chain, x: Tensor, *, precision: str = "float32") -> Iterator[tuple[int, Tensor]]:
    """V_l of every hidden layer, last layer first, each from the one after it: one way back for all of them together.

    Args:
        chain: a compiled network.
        x: as `chain` takes it.
        precision: of the products on the way back (`tsrfast.ops.chain.PRECISIONS`); on the CPU float32.

    Yields:
        (record, V): the layer's record in the plan, and ``[N, classes, C, H, W]`` (``[N, classes, O]`` of a linear layer), float32,
        what ``chain.gradient_rows(x, record)`` gives.

    Raises:
        InputError: as `Chain` and `tsrfast.ops.chain.chain_gradient` do, at the first step.
    """
    layers = hidden_layers(chain)
    activations = chain.activations(x, layers)
    rows = torch.eye(chain.classes, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
    end = len(chain.plan)
    for layer, values in zip(reversed(layers), reversed(activations), strict=True):
        part, end = chain.plan[layer + 1 : end], layer + 1  # a chain of its own, from this layer to the one above
        linear = part[0, FIELDS.index("kind")] == KINDS["linear"]
        entering = values.flatten(1) if linear else values
        packed = chain_pack(part, chain.weights)
        rows = chain_gradient(entering, part, packed, rows.flatten(2).contiguous(), precision=precision)
        rows = rows.reshape(len(x), chain.classes, *values.shape[1:])
        yield layer, rows


class _Sums(NamedTuple):
    """Of one layer over all images so far; float64."""

    a: Tensor
    b_student: Tensor
    b_teacher: Tensor
    units_student: Tensor
    units_teacher: Tensor


@dataclass(frozen=True, eq=False)
class GradientMatrices:
    """Means over images of one layer's A and B; float64, on the CPU.

    Attributes:
        a: ``[Cs, Ct]``, E A_kj = E sum over classes and positions of V_k V*_j.
        b_student, b_teacher: ``[Cs, Cs]``, ``[Ct, Ct]``, E B, symmetric and positive semidefinite.
        units_student, units_teacher: E of V_u^2 summed over classes, for each unit: ``[C, H, W]`` (``[C]`` of a linear layer).
        count: images.
    """

    a: Tensor
    b_student: Tensor
    b_teacher: Tensor
    units_student: Tensor
    units_teacher: Tensor
    count: int

    @property
    def beta_student(self) -> Tensor:
        """``[Cs]``, E beta_kk: the mean square of the student nodes' V, summed over classes and positions."""
        return self.b_student.diagonal()

    @property
    def beta_teacher(self) -> Tensor:
        """``[Ct]``, likewise of the teacher."""
        return self.b_teacher.diagonal()


class GradientRule:
    """Accumulates A and B of every pair of hidden layers over images, with torchmetrics' calls.

    Hidden layers are what ends in a ReLU, paired in order; both networks must have as many, of equal H and W. Batches may be cut in any
    way: sums over images are float64.

    Args:
        student, teacher: chains, or modules that compile to one: in eval mode, as they are at each update, and left as they are.
        batch_size: images at a time; memory is proportional to it (about 6 MB an image for the paper's networks), the result does not
            depend on it (up to rounding, 1e-7).
        precision: as in `gradient_rows`.

    Raises:
        InputError: a batch size below 1.
    """

    def __init__(
        self, student: nn.Module | Chain, teacher: nn.Module | Chain, batch_size: int = 32, *, precision: str = "float32"
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"tsrfast.GradientRule: batch_size must be an integer, at least 1, got {batch_size!r}")
        self.student, self.teacher, self.batch_size, self.precision = student, teacher, batch_size, precision
        self._sums: list[_Sums] = []
        self._count = 0

    def update(self, images: Tensor) -> None:
        """Add images. An update that fails changes nothing.

        Args:
            images: ``[N, C, H, W]`` or ``[N, D]``, float32 or uint8 (divided by 255); moved to the student's device. N may be 0.

        Raises:
            UnsupportedModel: a module that cannot be compiled.
            InputError: images of another shape or dtype or not finite, layers or classes of the networks that do not fit each other, or
                not those of the updates before.
        """
        if not isinstance(images, Tensor) or images.ndim not in (2, 4):
            given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"tsrfast.GradientRule.update: images must be [N, C, H, W] or [N, D], got {given}")
        if not images.isfinite().all():  # it would not show in V: a gate is open or not
            raise InputError("tsrfast.GradientRule.update: images must be finite, got NaN or inf")
        image = tuple(images.shape[1:])
        student, teacher = (net if isinstance(net, Chain) else automatic(net, image) for net in (self.student, self.teacher))
        _check_pair(student, teacher)
        sums = self._sums
        for batch in images.split(self.batch_size) if len(images) else ():
            x = batch.to(student.weights.device)
            x = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x
            rows = (gradient_rows(net, x, precision=self.precision) for net in (student, teacher))
            layers = [_layer_sums(s, t) for (_, s), (_, t) in zip(*rows, strict=True)]
            sums = _joined(sums, layers[::-1])
        self._sums, self._count = sums, self._count + len(images)

    def merge_state(self, other: GradientRule) -> None:
        """Add all that `other` has seen; `other` is left as it is.

        Raises:
            InputError: `other` has seen networks of different layers.
        """
        self._sums = _joined(self._sums, other._sums)
        self._count += other._count

    def reset(self) -> None:
        """Forget all images."""
        self._sums, self._count = [], 0

    def state_dict(self) -> dict[str, Tensor]:
        """What was accumulated, to be kept or sent: the number of images, and the sums of each layer."""
        named = {f"{i}.{name}": t for i, layer in enumerate(self._sums) for name, t in layer._asdict().items()}
        return {_COUNT: torch.tensor(self._count), **named}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`, of the same networks; what was accumulated here is forgotten.

        Raises:
            InputError: not such a state.
        """
        layers = range((len(state) - 1) // len(_Sums._fields))
        names = [[f"{i}.{name}" for name in _Sums._fields] for i in layers]
        if set(state) != {_COUNT, *itertools.chain.from_iterable(names)}:
            raise InputError(f"tsrfast.GradientRule.load_state_dict: state must be of state_dict, got {sorted(state)}")
        self._sums = [_Sums(*(state[name] for name in layer)) for layer in names]
        self._count = int(state[_COUNT])

    def compute(self) -> list[GradientMatrices]:
        """The means over all images so far, first layer first.

        Raises:
            InputError: no images yet, or a V that was not finite (or its square is not, in float32).
        """
        if self._count == 0:
            raise InputError("tsrfast.GradientRule.compute: update must have been given at least one image, got none")
        for layer, sums in enumerate(self._sums):
            for side, b in (("student", sums.b_student), ("teacher", sums.b_teacher)):
                if not b.isfinite().all():
                    raise InputError(
                        f"tsrfast.GradientRule: {side} must have finite gradients (hidden layer {layer}), got others"
                    )
        means = ([(t / self._count).cpu() for t in sums] for sums in self._sums)
        return [GradientMatrices(a, bs, bt, us, ut, self._count) for a, bs, bt, us, ut in means]


def _check_pair(student: Chain, teacher: Chain) -> None:
    if teacher.classes != student.classes:
        raise InputError(f"tsrfast.GradientRule: teacher must have student's {student.classes} classes, got {teacher.classes}")
    sides = [
        chain.plan[hidden_layers(chain)][:, [FIELDS.index("out_height"), FIELDS.index("out_width")]].tolist()
        for chain in (student, teacher)
    ]
    if not sides[0]:
        raise InputError("tsrfast.GradientRule: student must have a hidden layer (one that ends in a ReLU), got none")
    if sides[0] != sides[1]:
        raise InputError(
            f"tsrfast.GradientRule: teacher must have as many hidden layers as student, of its heights and widths {sides[0]}, "
            f"got {sides[1]}"
        )


def _layer_sums(s: Tensor, t: Tensor) -> _Sums:
    return _Sums(_gram(s, t), _gram(s, s), _gram(t, t), _unit_squares(s), _unit_squares(t))


def _gram(s: Tensor, t: Tensor) -> Tensor:
    """Sum over images, classes and positions of V_k V'_j, ``[Cs, Ct]``, from centred moments.

    The centred sum and n mean mean' are both at most |V_k| |V'_j| (Cauchy and Schwarz), so nothing is lost beside the rounding of
    products. A matrix product of PyTorch would round to TF32 or bfloat16 where the user has allowed it.
    """
    moments = channel_correlation(s.flatten(0, 1), t.flatten(0, 1))
    return moments.cross + moments.n * torch.outer(moments.mean_student, moments.mean_teacher)


def _unit_squares(v: Tensor) -> Tensor:
    """Sum over images and classes of V_u^2: float32 over the classes of an image, float64 over images.

    Class by class, so that V is read once and its squares, as large as V, are never in memory.
    """
    squares = torch.zeros_like(v[:, 0])
    for row in v.unbind(1):
        squares.addcmul_(row, row)
    return squares.double().sum(0)


def _joined(a: list[_Sums], b: list[_Sums]) -> list[_Sums]:
    if not a or not b:
        return a or b
    shapes = [[[tuple(t.shape) for t in layer] for layer in sums] for sums in (a, b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "tsrfast.GradientRule: networks must have the layers of the updates before "
            f"{[layer[0] for layer in shapes[0]]} (nodes of student and teacher), got {[layer[0] for layer in shapes[1]]}"
        )
    return [_Sums(*(p + q.to(p.device) for p, q in zip(*layers, strict=True))) for layers in zip(a, b, strict=True)]
