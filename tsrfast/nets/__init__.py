"""Networks: the suite's conv ReLU family and exact surgery on it, the nets that people attack, and weights on disk."""

from tsrfast.nets.checkpoint import load_checkpoint, save_checkpoint
from tsrfast.nets.classifier import Classifier
from tsrfast.nets.conv_relu import ConvReLU, init_
from tsrfast.nets.mobilenet_v2 import MobileNetV2, mobilenet_v2
from tsrfast.nets.pretrained import PRETRAINED_ORACLE, pretrained_oracle
from tsrfast.nets.published import Published, load_published
from tsrfast.nets.resnet import PreActResNet, ResNet, preact_resnet18, resnet18, resnet34, resnet50
from tsrfast.nets.surgery import apply_masks, fan_out_scores, fold, prune_masks, shrink, student_widths
from tsrfast.nets.wide_resnet import WideResNet, wide_resnet

__all__ = [
    "PRETRAINED_ORACLE",
    "Classifier",
    "ConvReLU",
    "MobileNetV2",
    "PreActResNet",
    "Published",
    "ResNet",
    "WideResNet",
    "apply_masks",
    "fan_out_scores",
    "fold",
    "init_",
    "load_checkpoint",
    "load_published",
    "mobilenet_v2",
    "preact_resnet18",
    "pretrained_oracle",
    "prune_masks",
    "resnet18",
    "resnet34",
    "resnet50",
    "save_checkpoint",
    "shrink",
    "student_widths",
    "wide_resnet",
]
