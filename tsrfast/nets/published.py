"""Weights that others have published, under the names they use, into the nets of this package.

What is known: torchvision (and timm's ResNets), kuangliu/pytorch-cifar and RobustBench's copies of it, TRADES, DeepMind's WideResNets and
PreActResNets, MadryLab/robustness; nested in a training state or not; wrapped by DataParallel, Lightning, torch.compile, or a Sequential that
normalises first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tsrfast.errors import EnvironmentFault, InputError
from tsrfast.nets.classifier import Classifier
from tsrfast.nets.mobilenet_v2 import MobileNetV2
from tsrfast.nets.resnet import PreActResNet, ResNet
from tsrfast.nets.wide_resnet import WideResNet

# Where a training state keeps the network's tensors.
NESTINGS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "last", "best")
# What wrappers put before a name: none of our nets has a part of such a name. "attacker" (MadryLab/robustness) holds the net again.
_WRAPPERS = re.compile(r"^(?:(?:module|model|net|network|backbone|attacker|_orig_mod|\d+)\.)+")
_NORMALISATION = re.compile(r"^(?:(?:normali[sz]er?|normali[sz]ation|norm|preprocess(?:ing)?)\.)?(?:new_)?(mu|mean|sigma|std)$")
_MEAN_STD = {"mu": "mean", "mean": "mean", "sigma": "std", "std": "std"}
_COUNTER = ".num_batches_tracked"  # PyTorch before 0.4.1 had none, and nothing here reads them

# Rules are applied one after the other; names that are ours already pass unchanged.
_RULES: dict[type[Classifier], tuple[tuple[str, str], ...]] = {
    ResNet: ((r"^linear\.", "fc."), (r"\.shortcut\.", ".downsample.")),
    PreActResNet: (
        (r"^fc\.", "linear."),
        (r"\.downsample\.", ".shortcut."),
        # DeepMind's
        (r"^conv_2d\.", "conv1."),
        (r"^layer_0\.", "layer1."),
        (r"^layer_1\.", "layer2."),
        (r"^layer_2\.", "layer3."),
        (r"^layer_3\.", "layer4."),
        (r"\.batchnorm_0\.", ".bn1."),
        (r"\.conv_2d_1\.", ".conv1."),
        (r"\.batchnorm_1\.", ".bn2."),
        (r"\.conv_2d_2\.", ".conv2."),
        (r"\.shortcut\.weight$", ".shortcut.0.weight"),
        (r"^batchnorm\.", "bn."),
        (r"^logits\.", "linear."),
    ),
    WideResNet: (
        (r"^linear\.", "fc."),
        # DeepMind's: see _DEEPMIND
        (r"^init_conv\.", "conv1."),
        (r"^layer\.0\.block\.", "block1.layer."),
        (r"^layer\.1\.block\.", "block2.layer."),
        (r"^layer\.2\.block\.", "block3.layer."),
        (r"\.batchnorm_0\.", ".bn1."),
        (r"\.conv_0\.", ".conv1."),
        (r"\.batchnorm_1\.", ".bn2."),
        (r"\.conv_1\.", ".conv2."),
        (r"\.shortcut\.", ".convShortcut."),
        (r"^batchnorm\.", "bn1."),
        (r"^logits\.", "fc."),
    ),
    MobileNetV2: ((r"^classifier\.(weight|bias)$", r"classifier.1.\1"),),
}
_DEEPMIND = "init_conv.weight"
_UNUSED = "sub_block1."  # of TRADES' WideResNet: a second first group that its forward never calls


@dataclass(frozen=True)
class Published:
    """What `load_published` found, all names without what was nested around them.

    Attributes:
        nesting: keys of the training state that led to the tensors, outermost first.
        renamed: name in the file -> name in the net, where they differ.
        unused: names in the file that have no place in the net and no effect on its logits: a part that is never called, or a tensor
            that is in the file twice.
        filled: names in the net that the file lacks: counters of batches, now 0.
        normalised: the file had mean and std, and the net has them now.
    """

    nesting: tuple[str, ...]
    renamed: Mapping[str, str]
    unused: tuple[str, ...]
    filled: tuple[str, ...]
    normalised: bool

    def __str__(self) -> str:
        lines = [f"taken from {'.'.join(self.nesting)}"] if self.nesting else []
        if self.renamed:
            lines.append(f"{len(self.renamed)} renamed, as {' -> '.join(next(iter(self.renamed.items())))}")
        if self.unused:
            lines.append(f"{len(self.unused)} without use, as {self.unused[0]}")
        if self.filled:
            lines.append(f"{len(self.filled)} counters of batches set to 0")
        lines.append("normalisation from the file" if self.normalised else "no normalisation in the file")
        return "; ".join(lines)


def load_published(net: Classifier, state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> Published:
    """Copy published weights into `net`, in place and rounded to its dtype; mode and device stay.

    Tensors do not say everything. Strides, pooling, activations and paddings are chosen where the net is built, see its class; and so is
    a normalisation that the published code does itself: mean and std of DeepMind's nets are in none of their files, and ``2 * x - 1`` is
    mean = std = 0.5.

    Args:
        net: a `ResNet`, `PreActResNet`, `WideResNet` or `MobileNetV2`.
        state_dict: names and tensors, or a training state that holds them under one of `NESTINGS`; or the path of a ``.safetensors``
            file. Pickles are not opened here: pass what ``torch.load(path, weights_only=True)`` returns.

    Returns:
        What was found and how it was renamed.

    Raises:
        InputError: not such a thing, or several networks; tensors that are missing, superfluous, of another shape, not floating, not
            finite or too large for the net's dtype, all of them in one message; a normalisation in the file that is not the net's (beyond
            rounding). The net is then as before.
        EnvironmentFault: the file cannot be read.
    """
    rules = next((r for kind, r in _RULES.items() if isinstance(net, kind)), None)
    if rules is None:
        allowed = ", ".join(kind.__name__ for kind in _RULES)
        raise InputError(f"tsrfast.load_published: net must be one of {allowed}, got {type(net).__name__}")
    nesting, tensors = _unnested(_read(state_dict))
    names = {name: _our_name(name, rules) for name in tensors}
    values: dict[str, Tensor] = {}
    unused, problems = [], []
    for name, ours in names.items():
        if isinstance(net, WideResNet) and ours.startswith(_UNUSED):
            unused.append(name)
        elif ours not in values:
            values[ours] = tensors[name]
        elif torch.equal(values[ours].flatten(), tensors[name].flatten()):
            unused.append(name)
        else:
            problems.append(f"{name} is one of several tensors for {ours}, and they differ")
    normalisation = values.pop("mean", None), values.pop("std", None)
    problems += _against_normalisation(net, *normalisation)
    wanted = {name: t for name, t in net.state_dict().items() if name not in ("mean", "std")}
    filled = [name for name in wanted if name.endswith(_COUNTER) and name not in values]
    problems += _misfits(wanted, values, set(filled), {ours: name for name, ours in reversed(names.items())})
    if isinstance(net, WideResNet) and net.config["padding"] != "same" and any(n.endswith(_DEEPMIND) for n in names):
        problems.append("DeepMind's names (init_conv, ...) belong to a WideResNet with padding='same'")
    if problems:
        raise InputError(
            f"tsrfast.load_published: state_dict must fit {type(net).__name__}({net.extra_repr()}): " + "; ".join(problems)
        )
    mean, std = normalisation
    if mean is not None and std is not None:
        net.set_normalisation(mean, std)
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(values[name]) if name in values else target.zero_()
    renamed = {name: ours for name, ours in names.items() if name != ours and name not in unused}
    return Published(nesting, renamed, tuple(unused), tuple(filled), mean is not None)


def _read(source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping itself, or what the file holds."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"tsrfast.load_published: state_dict must be a mapping of tensors or the path of a .safetensors file, "
            f"got {type(source).__name__}"
        )
    path = Path(source)
    if path.suffix != ".safetensors":
        raise InputError(
            f"tsrfast.load_published: state_dict must be a mapping of tensors or the path of a .safetensors file, got {str(path)!r} "
            "(a pickle can run code and is not opened here: pass torch.load(path, weights_only=True))"
        )
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        return safetensors.torch.load_file(path)
    except OSError as e:
        raise EnvironmentFault(f"cannot read {path}: {e.strerror or e}") from e
    except safetensors.SafetensorError as e:
        raise InputError(f"{path} is not a complete safetensors file: {e}") from e


def _unnested(document: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The keys that lead to the tensors, and the tensors by name.

    Raises:
        InputError: no tensors, several networks, or something else among the tensors.
    """
    path: list[str] = []
    while inner := [key for key in NESTINGS if isinstance(document.get(key), Mapping)]:
        if len(inner) > 1:
            raise InputError(
                f"tsrfast.load_published: state_dict must hold one network, got {', '.join(inner)}: pass one of them, "
                f"state_dict[{inner[0]!r}]"
            )
        path += inner
        document = document[inner[0]]
    tensors = {str(name): value for name, value in document.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(document):
        others = {str(name): type(value).__name__ for name, value in document.items() if not isinstance(value, Tensor)}
        raise InputError(f"tsrfast.load_published: state_dict must be names and tensors, got {others}")
    return tuple(path), {name: value.detach() for name, value in tensors.items()}


def _our_name(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    name = _WRAPPERS.sub("", name)
    if found := _NORMALISATION.match(name):
        return _MEAN_STD[found[1]]
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _against_normalisation(net: Classifier, mean: Tensor | None, std: Tensor | None) -> list[str]:
    """What speaks against the normalisation in the file; nothing if there is none."""
    if (mean is None) != (std is None):
        return ["of mean and std the file has only one"]
    problems = []
    for name, given, own in (("mean", mean, net.mean), ("std", std, net.std)):
        if given is None or own is None:
            continue
        a, b = given.double().flatten().tolist(), own.double().flatten().tolist()
        # Beyond what rounding to their dtypes explains: somebody is wrong, and it is not for us to say who.
        near = max([1e-6] + [torch.finfo(t.dtype).eps for t in (given, own) if t.is_floating_point()])
        if len(a) != len(b) or max(abs(x - y) for x, y in zip(a, b, strict=True)) > near:
            problems.append(f"{name} must be the net's {b}, got {a}: build the net without mean and std to take the file's")
    return problems


def _misfits(
    wanted: Mapping[str, Tensor], values: Mapping[str, Tensor], filled: set[str], source: Mapping[str, str]
) -> list[str]:
    """What is wrong with `values` for a net of tensors `wanted`; `source` are the names in the file."""
    problems = []
    if missing := [name for name in wanted if name not in values and name not in filled]:
        problems.append(f"missing {', '.join(missing)}")
    if superfluous := [source[name] for name in values if name not in wanted]:
        problems.append(f"superfluous {', '.join(superfluous)}")
    for name, target in wanted.items():
        given = values.get(name)
        if given is None:
            continue
        if given.shape != target.shape:
            problems.append(f"{source[name]} must have shape {list(target.shape)}, got {list(given.shape)}")
        elif target.is_floating_point() and not given.is_floating_point():
            problems.append(f"{source[name]} must be floating, got {given.dtype}")
        elif not torch.isfinite(given).all():
            problems.append(f"{source[name]} must be finite, got NaN or infinity")
        elif not torch.isfinite(given.to(target.dtype)).all():
            problems.append(f"{source[name]} must fit into {target.dtype}, got values up to {given.abs().max():g}")
    return problems
