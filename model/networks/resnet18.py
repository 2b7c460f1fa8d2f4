"""ResNet-18 (He et al., CVPR 2016) with the ImageNet stem, from torchvision: for 224 x 224 images; any size works."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.networks._resnet import build_resnet
from utils.config.schema import setting

BACKDOORBENCH = "{resnet18: {}}"  # the settings with which its weights fit there


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    blocks: tuple[int, ...] = setting((2, 2, 2, 2), "basic blocks of the four stages", low=1)
    last_parts: tuple[str, ...] | None = setting(None, "what the virtual model trains; null: layer3, layer4")


def backdoorbench(settings: Settings) -> tuple[str, str] | None:
    """Return the names of the network and of its last layer in BackdoorBench; None: it has no network of these settings."""
    return ("resnet18", "fc") if settings.blocks == (2, 2, 2, 2) else None


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 512)."""
    return build_resnet("resnet18", bottleneck=False, blocks=settings.blocks, last_parts=settings.last_parts)
