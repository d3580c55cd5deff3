"""Not covered."""

from tsrfast.compat._covered import not_covered
from tsrfast.compat.cleverhans.torch.attacks import HAS

raise not_covered("cleverhans", "sparse_l1_descent", HAS, "tsrfast.attacks.PGD(norm='l1')")
