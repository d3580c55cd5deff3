"""Drop-in for foolbox 3.3.4 on PyTorch: ``import tsrfast.compat.foolbox as fb``, and scripts run unchanged.

===================================================  =================================================================================
Names (arguments and defaults as the original)       Against the original, same seed
===================================================  =================================================================================
`LinfPGD`, `LinfBasicIterativeAttack`, `FGSM`        same start; same pixels to one rounding a step (the original subtracts the image and
                                                     adds it back, tsrfast clamps)
`L2PGD`, `L2BasicIterativeAttack`, `FGM`             same start; equal up to rounding
`L1PGD`, `L1BasicIterativeAttack`,                   equal up to rounding: foolbox's own l1 steps, which are weaker than those of
`L1FastGradientAttack`                               ``tsrfast.attacks.PGD(norm="l1")``
MI-FGSM in linf, l2, l1; PGD and `Linf...Basic...`   equal up to rounding
with Adam
`L2DeepFoolAttack`                                   equal up to rounding
`L2CarliniWagnerAttack`, `EADAttack`                 same success, norms to a few parts in a thousand: from 500 steps on each image has its
                                                     own early abort, foolbox ends the whole batch
===================================================  =================================================================================

Besides: `PyTorchModel`, `accuracy`, `Misclassification`, `TargetedMisclassification`, raw labels, criteria joined by `&`, ``attack.run``,
``attack.repeat(n)``, the long names, and own subclasses: those that override `get_loss_fn`, `get_optimizer`, `value_and_grad`, `normalize`
or `project` run through a loop that asks them; all others natively where the network compiles (see `tsrfast.compile`), which moves single
pixels whose gradient is zero up to rounding. Hooks get eagerpy tensors if that package is installed, else PyTorch's; results are of the
kind of the inputs.

Random numbers are drawn from PyTorch's global generator as the original draws them.

Different on purpose:

- Where `L2CarliniWagnerAttack` and `EADAttack` find nothing, the image comes back as it was. The original returns a black image, and
  calls most of those adversarial. So it does for `L2DeepFoolAttack`, where the original returns the last, not adversarial, iterate.
- A model in train mode is run in eval mode and keeps its mode: batch statistics do not move. Parameters get no ``.grad``.
- A NaN gradient moves nothing; the original makes NaN images in l2. Clipped images never leave the bounds by a rounding.
- `L1AdamBasicIterativeAttack` and `L2AdamBasicIterativeAttack` step with Adam (the original's are without).
- Images beyond the bounds are the original's AssertionError, with a message; labels that are not int64 ``[N]`` an `InputError`.
- An empty batch comes back empty. Attacks work under ``torch.no_grad()`` and ``torch.inference_mode()``.
- DeepFool takes `Misclassification` alone; `repeat` keeps the first run that was successful, as the original means to.

Anything else of foolbox raises `NotCovered` (an ``ImportError``) when it is asked for, `samples` when it is called.
"""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import NotCovered
from tsrfast.compat.foolbox import attacks, criteria, distances, models, types, utils
from tsrfast.compat.foolbox.attacks import Attack
from tsrfast.compat.foolbox.criteria import Criterion, Misclassification, TargetedMisclassification
from tsrfast.compat.foolbox.distances import Distance
from tsrfast.compat.foolbox.models import Model, PyTorchModel
from tsrfast.compat.foolbox.utils import accuracy, samples

__version__ = "3.3.4"  # of foolbox: what scripts ask for
__all__ = [
    "Attack", "Criterion", "Distance", "Misclassification", "Model", "PyTorchModel", "TargetedMisclassification", "accuracy", "attacks",
    "criteria", "distances", "models", "samples", "types", "utils",
]  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    if name in ("JAXModel", "NumPyModel", "TensorFlowModel"):
        raise NotCovered(f"tsrfast.compat.foolbox: models must be PyTorch's (PyTorchModel), got {name!r}")
    if name in ("devutils", "gradient_estimators", "plot", "tensorboard", "zoo"):
        raise NotCovered(f"tsrfast.compat.foolbox: {name!r} must be imported from foolbox, it has nothing to do with attacks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
