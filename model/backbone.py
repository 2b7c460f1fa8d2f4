"""Helpers of the networks in model/networks/: the parts that the virtual model trains, and checks of the image size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError, nearest

CONTAINERS = ("features", "encoder", "layers")  # torchvision's modules that only contain other parts


def finish(
    network: str, backbone: Any, feature_dim: int, last_parts: tuple[str, ...] | None, usual: Sequence[str]
) -> nn.Module:
    """Return the backbone with the attributes `feature_dim` and `last_parts`, which model/classifier.py reads.

    Args:
        network: its name in the YAML, for error messages.
        backbone: maps (B, 3, H, W) to (B, feature_dim).
        last_parts: the setting of that name; None: the `usual` ones.
    Raises:
        UserError: the network has no such part.
    """
    known = list(part_names(backbone))
    for name in last_parts or ():
        if name not in known:
            raise UserError(f"{network}.last_parts: {name!r}: no such part; {nearest_in_order(name, known)}")
    for child in backbone.modules():
        if is_narrow_projection(child):
            child.__class__ = NarrowProjection
    backbone.feature_dim = feature_dim
    backbone.last_parts = tuple(usual if last_parts is None else dict.fromkeys(last_parts))
    module: nn.Module = backbone
    return module


class NarrowProjection(nn.Conv2d):
    """A strided 1 x 1 convolution with few input channels, computed as subsampling and a convolution of stride 1.

    In the strided form, oneDNN's backward pass writes out of bounds for 2 to 7 input channels in channels_last on
    processors without AVX-512 (torch 2.14.1; uxlfoundation/oneDNN issue 6035).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def is_narrow_projection(module: nn.Module) -> bool:
    """Return whether `NarrowProjection` replaces this module."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.padding == (0, 0)
        and module.in_channels // module.groups < 8
    )


def part_names(module: nn.Module) -> Iterator[str]:
    """Yield the names of the parts with weights, from input to output, e.g. `layer4`, `features.norm5`."""
    for name, child in module.named_children():
        if name in CONTAINERS:
            yield from (f"{name}.{inner}" for inner in part_names(child))
        elif any(True for _ in child.parameters()):
            yield name


def nearest_in_order(name: str, known: Sequence[str]) -> str:
    """Return the end of an error line: the nearest part name, and all of them in the network's order."""
    guess = nearest(name, known).partition(" (known")[0]
    return f"{guess} (known: {', '.join(known)})" if guess.startswith("did") else f"known: {', '.join(known)}"


def require_side(network: str, backbone: nn.Module, least: int) -> None:
    """Make the network refuse images with a side of fewer than `least` pixels, which would give empty feature maps."""
    backbone.register_forward_pre_hook(partial(refuse_small, network, least))


def refuse_small(network: str, least: int, backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise `UserError` if the images (B, 3, H, W) are too small."""
    height, width = inputs[0].shape[2:]
    if min(height, width) < least:
        raise UserError(
            f"network: {network}: needs at least {least} x {least} pixels, the images have {height} x {width}: add a resize to "
            "transform.pre, or choose a network for small images"
        )
