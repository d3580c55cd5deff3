"""Networks of the suite: the conv ReLU family, exact surgery on it, and weights on disk."""

from tsrfast.nets.checkpoint import load_checkpoint, save_checkpoint
from tsrfast.nets.conv_relu import ConvReLU, init_
from tsrfast.nets.surgery import apply_masks, fan_out_scores, fold, prune_masks, shrink, student_widths

__all__ = [
    "ConvReLU",
    "apply_masks",
    "fan_out_scores",
    "fold",
    "init_",
    "load_checkpoint",
    "prune_masks",
    "save_checkpoint",
    "shrink",
    "student_widths",
]
