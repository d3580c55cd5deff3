"""The oracle that comes with the package: the paper's 45-32-32-20 net, trained on CIFAR-10 by `tsrfast oracle`."""

from __future__ import annotations

from pathlib import Path

from tsrfast.nets.checkpoint import load_checkpoint
from tsrfast.nets.conv_relu import ConvReLU

PRETRAINED_ORACLE = Path(__file__).with_name("oracle_cifar10.safetensors")
"""The weights. The record of their training lies beside: the same name, .json."""


def pretrained_oracle() -> ConvReLU:
    """A teacher to begin with: pixels [N, 3, 32, 32] in [0, 1] to logits [N, 10], on the CPU, float32, in eval mode.

    A teacher of 64-64-64-64 channels, pruned to 45-32-32-20 by fan-out, fine-tuned, batch normalisation and the input's folded into its weights
    (Yang et al., AISTATS 2021, section 5.1): convolutions, ReLUs and one linear layer are left, which native code runs. Its test accuracy, and
    how it was trained, is in the record; ``tsrfast reproduce --set oracle=pretrained`` trains students of it.
    """
    net: ConvReLU = load_checkpoint(PRETRAINED_ORACLE)[0]
    return net
