"""Not covered."""

from tsrfast.compat._covered import not_covered
from tsrfast.compat.cleverhans.torch.attacks import HAS

raise not_covered("cleverhans", "semantic", HAS, "projected_gradient_descent")
