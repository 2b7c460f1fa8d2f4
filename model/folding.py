"""Batch normalization folded into the convolutions before it: the same function in eval mode, in fewer passes over memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def conv_bn_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return the names of every convolution whose output goes into a batch normalization, found by watching one forward.

    Args:
        example: (1, 3, H, W), an input of the right size.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    pairs: list[tuple[str, str]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)
        elif id(inputs[0]) in made:
            pairs.append((names[made[id(inputs[0])][0]], names[module]))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


def fold(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy in eval mode with every batch normalization folded into its convolution; the model is not touched.

    Where that would change the function, the copy is left unfolded.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    for conv_name, bn_name in conv_bn_pairs(plain, example):
        conv, bn = folded.get_submodule(conv_name), folded.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        replace(folded, conv_name, fuse_conv_bn_eval(conv, bn))
        replace(folded, bn_name, nn.Identity())
    with torch.no_grad():  # a network may use a convolution twice, or its output beside the normalization
        same = torch.allclose(folded(example), plain(example), rtol=1e-2, atol=1e-2)
    return folded if same else plain


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
