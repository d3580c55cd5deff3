"""Drop-in for autoattack (fra31/auto-attack): ``from tsrfast.compat.autoattack import AutoAttack``, and scripts run unchanged.

======================================  ==========================================================================================
Name                                    Against the original, same seed
======================================  ==========================================================================================
`AutoAttack`                            same to rounding by APGD; Square, and restarts of FAB, draw other random numbers
`autopgd_base.APGDAttack`,              same pixels in PyTorch for Linf; to rounding for L2 and L1, and in native code
`autopgd_base.APGDAttack_targeted`
`fab_pt.FABAttack_PT`                   the first run follows the original's to rounding; further restarts begin elsewhere
`square.SquareAttack`                   other random numbers, same success and queries on average
`state.EvaluationState`                 what is written to `state_path`, to be read by `from_disk`
======================================  ==========================================================================================

Attributes may be set after construction (``adversary.apgd.n_restarts = 1``, ``adversary.attacks_to_run = [...]``), also those of an
attack that the original reads only when it is made. `epsilon` and `norm` go to the attacks when `AutoAttack` is made, as there.

Different on purpose:

- The model is attacked in eval mode, and gets back the mode of every submodule; the original takes it as it is.
- Images and batches are moved to the model's device, whatever `device` says. PyTorch's random state is left alone.
- In `AutoAttack` an image that falls is done, and its first adversarial iterate is returned (the original goes on, and returns the last).
  What counts as fallen is what the model confirms, inside of ball and box.
- `state_path`: besides that file, which says what has been run, ``<state_path>.cascade`` holds the work itself: the same call goes on
  in the middle of an attack and returns all adversarial images; another call is refused.
- ``seed=None`` is the time, as there; with `state_path` it is 0, so that the same call can go on.
- Networks with fewer than 4 classes: attacks by the DLR loss are left out, with a warning (the original fails). Warnings are Python's.
- Images outside [0, 1], NaN, and labels that are no classes are an `InputError` (a ``ValueError``).
- TensorFlow models are not supported.
"""

from tsrfast.compat.autoattack import autopgd_base, fab_pt, square, state
from tsrfast.compat.autoattack.autoattack import AutoAttack

__all__ = ["AutoAttack", "autopgd_base", "fab_pt", "square", "state"]
