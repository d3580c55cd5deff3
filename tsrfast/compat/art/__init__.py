"""Drop-in for the evasion attacks of the Adversarial Robustness Toolbox (ART) 1.20.1 on PyTorch.

``from tsrfast.compat.art.attacks.evasion import ProjectedGradientDescent`` and
``from tsrfast.compat.art.estimators.classification import PyTorchClassifier``; the rest of a script stays.

==============================================  ======================================================================================
Names (arguments and defaults as the original)  Against the original, same seed of NumPy
==============================================  ======================================================================================
`PyTorchClassifier`                             same `predict`, `loss_gradient`, `class_gradient`, `compute_loss`; no `fit`
`FastGradientMethod` (also `minimal`),          linf: same start, same pixels to one rounding a step. l2: same start and success; where
`ProjectedGradientDescent` (``...PyTorch``,     pixels sit at the ends of the range, ART clips to it before the ball, tsrfast after.
``...Numpy``), `BasicIterativeMethod`,          l1: tsrfast's steps of many pixels and exact projection, stronger than ART's single
`MomentumIterativeMethod`                       pixels
`DeepFool`                                      same norms to a part in a hundred, and all images fall (ART's stop at the boundary itself)
`CarliniL2Method`                               Adam instead of a line search: at least the success, no longer changes
`ElasticNet`                                    `tsrfast.attacks.EAD`: at least the success
`AutoProjectedGradientDescent`,                 `tsrfast.attacks.APGD` and `Square` with a seed drawn from NumPy: other random numbers,
`SquareAttack`                                  success alike
`AutoAttack`                                    ART's list of attacks (no FAB), or any of yours; `best_attacks`
==============================================  ======================================================================================

Images are NumPy arrays (float32 inside and in the result), `y` labels or one-hot, None: what the model says. `mask` goes with the gradient
attacks. `eps` and `eps_step` are numbers or arrays with one an image, ``[N, 1, 1, 1]``. `set_params`, `attack_params`, `targeted` and
`repr` as in ART; networks that `tsrfast.compile` can compile run natively.

Different on purpose:

- The model gets back the mode of every submodule; the original leaves it in eval mode. Parameters get no ``.grad``.
- Losses are taken image by image: an l2 step does not depend on the batch. `batch_size` bounds memory alone, and is 64 at least where ART's
  default is 1.
- Of several random starts an image keeps one that fooled the model with respect to `y`; the original compares with the model's own answer,
  so that a wrong answer may be "attacked" to the right one. `FastGradientMethod` chooses image by image, ART the best start for all.
- Images outside `clip_values`, NaN, labels that are no classes: an `InputError` (a ``ValueError``). ART leaves the range, or the ball.
- A mean and std of as many numbers as there are channels belong to the channels, also where images are as wide as they have channels.
- No progress bars, no TensorBoard (`summary_writer` must be False), no `random_eps`, no soft labels, norms 1, 2 and inf alone, and no
  processes of AutoAttack's own.

Other attacks and classifiers of ART raise `NotCovered` (an ``ImportError``) when they are asked for. What has nothing to do with attacks
(``art.utils``, ``art.defences``, ``art.metrics``) is to be imported from ART itself.
"""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import NotCovered
from tsrfast.compat.art import attacks, estimators

__version__ = "1.20.1"  # of ART: what scripts ask for
__all__ = ["attacks", "estimators"]


def __getattr__(name: str) -> NoReturn:
    if name in (
        "config", "data_generators", "defences", "evaluations", "exceptions", "experimental", "metrics", "optimizers",
        "preprocessing", "summary_writer", "utils", "visualization",
    ):  # fmt: skip
        raise NotCovered(f"tsrfast.compat.art: {name!r} must be imported from art, the drop-in has its attacks alone")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
