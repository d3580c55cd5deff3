"""Drop-in for adv-lib 0.2.8 (``adv_lib``): ``from tsrfast.compat.advlib.attacks import pgd_linf, ...``.

======================  ============================================================================================================
`pgd_linf`              same starts; then equal up to rounding (dlr: but where its gradient is zero up to rounding). As there the
                        result is the latest adversarial of the iterates before each step (where the last step leads to is not
                        looked at), else the clean image
`carlini_wagner_l2`     equal up to rounding, but that from 500 steps on each image may end by itself, where the original ends the whole batch
`apgd`                  success, from the same starts: the original halves steps more often, as it compares its best loss to itself.
                        Images that are misclassified as they are, are not attacked, but with `best_loss`
`apgd_targeted`         success: any wrong class ends an image's attack, where the original waits for the one that it is driven to;
                        the loss is the paper's (eq. 7)
`fab`                   equal up to rounding
`df`                    success, as near
======================  ============================================================================================================

Arguments and defaults are the original's, Greek ones included; ε may hold a radius an image; random numbers come from PyTorch's global
generator as there. Different on purpose:

- A module is attacked in eval mode and gets every submodule's mode back; the original takes it as it is, and BatchNorm statistics
  change. A plain function is called as it is.
- Images outside [0, 1], NaN pixels, and labels that are no classes are an `InputError` (a ``ValueError``).
- `callback` (Visdom) must be None.

`pgd_linf` looks at every iterate, which PyTorch's loop can: where a network compiles, `tsrfast.attacks.PGD` is several times as fast.
What is not here raises `NotCovered` (an ``ImportError``) when it is asked for.
"""

from tsrfast.compat._covered import NotCovered as NotCovered
from tsrfast.compat.advlib import attacks as attacks

__version__ = "0.2.8"  # of adv-lib
