"""Batch normalization folded into the convolutions before it: the same function in eval mode, in fewer passes over memory."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval


def conv_bn_pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return the names of every convolution whose output goes into a batch normalization and nowhere else.

    Found in the graph of one forward: which module made a tensor is no question of the tensor's identity, for a residual
    added in place has that of the convolution's output, and a pre-activation block also reads it beside its normalization.

    Args:
        example: (1, 3, H, W), an input of the right size.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[Node, nn.Module] = {}  # by which convolution
    read: list[tuple[Node, nn.Module]] = []  # by which normalization
    calls: Counter[nn.Module] = Counter()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d) and output.grad_fn is not None:
            made[output.grad_fn] = module
        elif inputs[0].grad_fn is not None:
            read.append((inputs[0].grad_fn, module))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    try:
        with torch.enable_grad():
            logits = model(example.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    uses = count_uses(logits.grad_fn)
    once = [(made[node], bn) for node, bn in read if node in made and uses[node] == 1]
    return [(names[conv], names[bn]) for conv, bn in once if calls[conv] == calls[bn] == 1]


def count_uses(last: Node | None) -> Counter[Node]:
    """Return how many operations of the graph that ends in `last` read each node's output."""
    uses: Counter[Node] = Counter()
    todo = [last] if last is not None else []
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if uses[node] == 1:
                    todo.append(node)
    return uses


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
