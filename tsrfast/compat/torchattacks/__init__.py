"""Drop-in for torchattacks 3.5.1: ``import tsrfast.compat.torchattacks as torchattacks``, and scripts run unchanged.

=============  =======================================================  ================================================================
Name           Arguments and defaults (as the original)                 Against the original, same seed
=============  =======================================================  ================================================================
`FGSM`         model, eps=8/255                                         same pixels
`BIM`          model, eps=8/255, alpha=2/255, steps=10                  same pixels
`PGD`          model, eps=8/255, alpha=2/255, steps=10,                 same start; then same pixels to one rounding a step (the
               random_start=True                                        original subtracts the image and adds it back, tsrfast clamps)
`PGDL2`        model, eps=1.0, alpha=0.2, steps=10, random_start=True,  same start; then equal up to rounding, and to the original's
               eps_for_division=1e-10                                   `eps_for_division`, which is kept but not used (see below)
`VANILA`       model                                                    same pixels
`GN`           model, std=0.1                                           same pixels
`MultiAttack`  attacks, verbose=False                                   as its attacks
`Attack`       name, model (``torchattacks.attack.Attack``)             base class: override `forward`, `get_logits`
=============  =======================================================  ================================================================

"Same" is exact in PyTorch, but for gradients that are zero up to rounding (tsrfast sums the loss over images, the original averages it).
Networks that `tsrfast.compile` can compile (float32 on the CPU, eval mode, `get_logits` not overridden) run in native code, about five
times as fast: there single pixels differ where a gradient is that small.

Covered of the base class: every public method and attribute of 3.5.1, all writable after construction; attacks held by an attack follow
its modes, device, model and normalisation. Of the modules inside torchattacks there is `attack` alone. Files that `save` writes hold
tensors and names only, and `load` reads nothing else.

Random numbers are drawn from PyTorch's global generator as the original draws them: `torch.manual_seed` has the same effect.

Different on purpose:

- The model gets back the mode of every submodule, also after an error; the original puts the whole model into one mode.
- `PGDL2` steps by g / |g| of each image's own loss; the original takes the mean over the batch and adds 1e-10 to the norm, so that an
  image that the model is sure of moves less the larger the batch. A gradient that is NaN moves nothing instead of making NaN images.
- Images outside [0, 1] (beyond rounding), NaN pixels and labels that are no classes are an `InputError` (a ``ValueError``). The original
  clamps the former, which leaves the ball around the image.
- Attacks work under ``torch.no_grad()`` and ``torch.inference_mode()``.
- `eps` and `alpha` are numbers, alpha >= 0; labels are int64 (or probabilities); `save` takes a path.
- Models are `torch.nn.Module`s and must return logits ``[N, classes]``.

An attack of torchattacks that is not here raises `NotCovered` (an ``ImportError``) when it is asked for.
"""

from __future__ import annotations

from typing import NoReturn

from tsrfast import attacks as own
from tsrfast.compat.torchattacks.attacks import BIM, FGSM, GN, PGD, PGDL2, VANILA, MultiAttack
from tsrfast.errors import InputError

__version__ = "3.5.1"  # of torchattacks: what scripts ask for
__all__ = ["BIM", "FGSM", "GN", "PGD", "PGDL2", "VANILA", "MultiAttack"]

# What is nearest here, by the norm -> what torchattacks has besides.
_MISSING = {
    "PGD": (
        "RFGSM", "EOTPGD", "FFGSM", "TPGD", "MIFGSM", "UPGD", "APGD", "APGDT", "DIFGSM", "TIFGSM", "Jitter", "NIFGSM", "PGDRS",
        "SINIFGSM", "VMIFGSM", "VNIFGSM", "SPSA", "PIFGSM", "PIFGSMPP", "FAB", "AutoAttack", "Square", "LGV",
    ),
    "PGDL2": ("CW", "PGDRSL2", "DeepFool", "EADEN"),
    "tsrfast.attacks.PGD(norm='l1')": ("EADL1", "SparseFool", "OnePixel", "Pixle", "JSMA"),
}  # fmt: skip


class NotCovered(InputError, ImportError):
    """An attack of torchattacks that this drop-in does not have."""


def __getattr__(name: str) -> NoReturn:
    for nearest, originals in _MISSING.items():
        if name in originals:
            kinds = (getattr(own, n) for n in own.__all__)
            has = sorted(k.__name__ for k in kinds if isinstance(k, type) and issubclass(k, own.Attack) and k is not own.Attack)
            raise NotCovered(
                f"tsrfast.compat.torchattacks: the attack must be one of {', '.join(__all__)}, got {name!r}: torchattacks has "
                f"it, the drop-in does not (nearest here: {nearest}; tsrfast.attacks has {', '.join(has)})"
            )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
