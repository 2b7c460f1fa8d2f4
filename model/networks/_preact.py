"""Residual networks whose normalization and activation come before the convolution (He et al., ECCV 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BN, relu, 3 x 3, BN, relu, dropout, 3 x 3, and a shortcut; a projection starts after the first relu."""

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        shortcut = self.shortcut(active) if len(self.shortcut) else x
        out = F.relu(self.bn2(self.conv1(active)))
        out = F.dropout(out, self.dropout, self.training) if self.dropout else out
        branch: Tensor = self.conv2(out)
        return branch + shortcut


class PreActResNet(nn.Module):
    """3 x 3 stem, stages of pre-activation blocks, a last BN and relu, global average pool; for 32 x 32 images.

    The first stage keeps the size of the images, each later one halves it.

    Args:
        stem: channels of the stem.
        channels: of each stage.
        blocks: of each stage.
        dropout: between the two convolutions of a block.
        final_norm: whether there is a last BN and relu; without them the features are means of sums of both signs.
    """

    def __init__(self, stem: int, channels: Sequence[int], blocks: int, dropout: float = 0.0, final_norm: bool = True) -> None:
        super().__init__()
        self.stages = len(channels)
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        before = stem
        for stage, after in enumerate(channels, 1):
            first = PreActBlock(before, after, 1 if stage == 1 else 2, dropout)
            others = [PreActBlock(after, after, 1, dropout) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *others))
            before = after
        self.bn = nn.BatchNorm2d(before) if final_norm else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, channels of the last stage)."""
        out = self.conv1(x)
        for stage in range(1, self.stages + 1):
            out = self.get_submodule(f"layer{stage}")(out)
        out = out if self.bn is None else F.relu(self.bn(out))
        return F.adaptive_avg_pool2d(out, 1).flatten(1)
