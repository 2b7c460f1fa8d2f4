"""ResNet-34 (He et al., CVPR 2016) with the ImageNet stem, from torchvision: for 224 x 224 images; any size works."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.networks._resnet import build_resnet
from utils.config.schema import setting


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    blocks: tuple[int, ...] = setting((3, 4, 6, 3), "basic blocks of the four stages", low=1)
    last_parts: tuple[str, ...] | None = setting(None, "what the virtual model trains; null: layer3, layer4")


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 512)."""
    return build_resnet("resnet34", bottleneck=False, blocks=settings.blocks, last_parts=settings.last_parts)
