"""ResNet-18 (He et al., CVPR 2016) for 32 x 32 images: a 3 x 3 stem and no max-pool, as in the authors' code."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import finish
from utils.config.schema import setting


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    width: int = setting(64, "channels of the stem; the stages have 1, 2, 4, 8 times as many", low=1)
    blocks: int = setting(2, "basic blocks of each stage; 2 is ResNet-18", low=1, high=1000)
    last_parts: tuple[str, ...] | None = setting(None, "what the virtual model trains; null: layer3, layer4")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BN, and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class ResNetCifar(nn.Module):
    """Stem and four stages, global average pool."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        for stage, stride in enumerate((1, 2, 2, 2)):
            first = BasicBlock(channels[stage], channels[stage + 1], stride)
            others = [BasicBlock(channels[stage + 1], channels[stage + 1], 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *others))
        # After all modules are built, as in the authors' code: the same seed then gives the same initial weights.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to features (B, 8 width)."""
        out = F.relu(self.bn1(self.conv1(x)))  # (B, width, 32, 32)
        for stage in range(1, 5):
            out = self.get_submodule(f"layer{stage}")(out)  # ... (B, 8 width, 4, 4)
        return F.adaptive_avg_pool2d(out, 1).flatten(1)


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 8 width)."""
    backbone = ResNetCifar(settings.width, settings.blocks)
    return finish("resnet18_cifar", backbone, 8 * settings.width, settings.last_parts, ("layer3", "layer4"))
