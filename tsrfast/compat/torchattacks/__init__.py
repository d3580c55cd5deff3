"""Drop-in for torchattacks 3.5.1: ``import tsrfast.compat.torchattacks as torchattacks``, and scripts run unchanged.

Names, arguments, defaults and attributes are the original's. Against the original, same seed:

================================  ====================================================================================================
`FGSM`, `BIM`, `VANILA`, `GN`     same pixels
`PGD`, `FFGSM`, `RFGSM`,          same start; then same pixels to one rounding a step (the original subtracts the image and adds it
`EOTPGD`, `TPGD`                  back, tsrfast clamps)
`MIFGSM`, `NIFGSM`, `DIFGSM`,     likewise, also the random resizing
`TIFGSM`
`PGDL2`                           same start; then equal up to rounding, and to `eps_for_division`, which is kept but not used (see below)
`APGD`, `APGDT`                   same start; then linf same pixels, l2 up to rounding, which a step on a nearly zero gradient enlarges
`FAB`                             without restarts equal up to rounding; `multi_targeted`: at least as near
`Square`                          success: each image has squares of its own, and they reach the last row and column
`CW`                              as near where the original takes all its steps; it stops when the sum over the batch rises, here no
                                  image is stopped
`DeepFool`                        success, as near; the original may end on the boundary itself, and returns what did not fall as it is
                                  then (here: the image)
`EADL1`, `EADEN`                  success and distances; the original begins each constant where the one before it ended, and with
                                  `kappa` counts by labels of the whole batch
`AutoAttack`                      stronger: 100 steps, where the original takes 10 (how to have those: its docstring)
`MultiAttack`                     as its attacks
`Attack`                          base class (``torchattacks.attack.Attack``): override `forward`, `get_logits`
================================  ====================================================================================================

"Same" is exact in PyTorch, but for gradients that are zero up to rounding (tsrfast sums the loss over images, the original averages it).
Networks that `tsrfast.compile` can compile (float32 on the CPU, eval mode, `get_logits` not overridden) run in native code, about five
times as fast: there single pixels differ where a gradient is that small.

Covered of the base class: every public method and attribute of 3.5.1, all writable after construction; attacks held by an attack follow
its modes, device, model and normalisation. Of the modules inside torchattacks there is `attack` alone. Files that `save` writes hold
tensors and names only, and `load` reads nothing else.

Random numbers are drawn from PyTorch's global generator as the original draws them: `torch.manual_seed` has the same effect. Attacks
with a `seed` (APGD, APGDT, FAB, Square, AutoAttack) leave that generator alone; the original resets it to `seed` for everybody.

Different on purpose:

- The model gets back the mode of every submodule, also after an error; the original puts the whole model into one mode.
- `PGDL2` steps by g / |g| of each image's own loss; the original takes the mean over the batch and adds 1e-10 to the norm, so that an
  image that the model is sure of moves less the larger the batch. A gradient that is NaN moves nothing instead of making NaN images.
- `CW` also finds images where all logits are negative; the original takes 0 for the label's own logit there.
- Images outside [0, 1] (beyond rounding), NaN pixels and labels that are no classes are an `InputError` (a ``ValueError``). The original
  clamps the former, which leaves the ball around the image.
- Attacks work under ``torch.no_grad()`` and ``torch.inference_mode()``.
- `eps` and `alpha` are numbers, alpha >= 0; labels are int64 (or, for attacks on the cross-entropy, probabilities); `save` takes a path.
- Models are `torch.nn.Module`s and must return logits ``[N, classes]``. `verbose` of a single attack prints nothing.

An attack of torchattacks that is not here raises `NotCovered` (an ``ImportError``) when it is asked for.
"""

from __future__ import annotations

from typing import NoReturn

from tsrfast.compat._covered import NotCovered as NotCovered
from tsrfast.compat._covered import not_covered
from tsrfast.compat.torchattacks.autoattack import FAB, AutoAttack
from tsrfast.compat.torchattacks.gradient import BIM, EOTPGD, FFGSM, FGSM, GN, PGD, PGDL2, RFGSM, TPGD, VANILA
from tsrfast.compat.torchattacks.multiattack import MultiAttack
from tsrfast.compat.torchattacks.search import APGD, APGDT, CW, EADEN, EADL1, DeepFool, Square
from tsrfast.compat.torchattacks.transfer import DIFGSM, MIFGSM, NIFGSM, TIFGSM

__version__ = "3.5.1"  # of torchattacks: what scripts ask for
__all__ = [
    "APGD", "APGDT", "BIM", "CW", "DIFGSM", "EADEN", "EADL1", "EOTPGD", "FAB", "FFGSM", "FGSM", "GN", "MIFGSM", "NIFGSM", "PGD",
    "PGDL2", "RFGSM", "TIFGSM", "TPGD", "VANILA", "AutoAttack", "DeepFool", "MultiAttack", "Square",
]  # fmt: skip

# What is nearest here, by the norm -> what torchattacks has besides.
_MISSING = {
    "PGD": ("Jitter", "PGDRS"),
    "MIFGSM": ("UPGD", "SINIFGSM", "VMIFGSM", "VNIFGSM", "PIFGSM", "PIFGSMPP", "LGV"),
    "Square": ("SPSA", "OnePixel", "Pixle"),
    "PGDL2": ("PGDRSL2",),
    "EADL1": ("SparseFool", "JSMA"),
}  # fmt: skip


def __getattr__(name: str) -> NoReturn:
    for nearest, originals in _MISSING.items():
        if name in originals:
            raise not_covered("torchattacks", name, __all__, nearest)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
