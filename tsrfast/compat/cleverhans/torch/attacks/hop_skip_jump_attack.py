"""Not covered."""

from tsrfast.compat._covered import not_covered
from tsrfast.compat.cleverhans.torch.attacks import HAS

raise not_covered("cleverhans", "hop_skip_jump_attack", HAS, "tsrfast.attacks.Square")
