"""MobileNetV2 (Sandler et al., CVPR 2018) from torchvision: for 224 x 224 images; any size works."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchvision.models.mobilenetv2 import MobileNetV2

from model.backbone import finish
from utils.config.schema import setting

# The blocks at 1/16 and 1/32 of the image size, like layer3 and layer4 of a ResNet, and the last convolution.
LAST = tuple(f"features.{i}" for i in range(7, 19))


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    width: float = setting(1.0, "factor on the number of channels", above=0)
    dropout: float = setting(0.2, "share of the features set to 0 in training", low=0, below=1)
    last_parts: tuple[str, ...] | None = setting(None, "what the virtual model trains; null: features.7 to features.18")


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 1280); dropout is its last layer."""
    backbone = MobileNetV2(num_classes=1, width_mult=settings.width, dropout=settings.dropout)
    backbone.classifier = backbone.classifier[:-1]
    return finish("mobilenet_v2", backbone, backbone.last_channel, settings.last_parts, LAST)
