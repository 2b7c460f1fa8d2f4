"""Wide ResNet (Zagoruyko and Komodakis, BMVC 2016) for 32 x 32 images: WRN-28-10 by default, WRN-16-1 and the like."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.backbone import finish
from model.networks._preact import PreActResNet
from utils.config.schema import setting
from utils.errors import UserError


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    depth: int = setting(28, "6 n + 4: convolutions, of n blocks in each of three stages", low=10)
    widen_factor: int = setting(10, "factor on the 16, 32, 64 channels of the stages", low=1)
    dropout: float = setting(0.0, "share set to 0 between a block's convolutions in training", low=0, below=1)
    last_parts: tuple[str, ...] | None = setting(None, "what the virtual model trains; null: layer2, layer3, bn")


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 64 widen_factor)."""
    if settings.depth % 6 != 4:
        raise UserError(f"wide_resnet.depth: {settings.depth}: must be 6 n + 4, e.g. 10, 16, 22, 28 or 40")
    k = settings.widen_factor
    backbone = PreActResNet(16, (16 * k, 32 * k, 64 * k), (settings.depth - 4) // 6, settings.dropout)
    return finish("wide_resnet", backbone, 64 * k, settings.last_parts, ("layer2", "layer3", "bn"))
