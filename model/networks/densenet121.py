"""DenseNet-121 (Huang et al., CVPR 2017) from torchvision: ImageNet stem, for 224 x 224 images; at least 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchvision.models.densenet import DenseNet

from model.backbone import finish, require_side
from utils.config.schema import setting
from utils.errors import UserError

# As in a ResNet, the last two of the four stages, here with the transitions before them.
LAST = tuple(f"features.{name}" for name in ("transition2", "denseblock3", "transition3", "denseblock4", "norm5"))


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    growth: int = setting(32, "channels that each layer adds; the stem has twice as many", low=1)
    blocks: tuple[int, ...] = setting((6, 12, 24, 16), "layers of the four dense blocks", low=1)
    last_parts: tuple[str, ...] | None = setting(
        None, "what the virtual model trains; null: features.transition2 to features.norm5, two of the four dense blocks"
    )


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 1024)."""
    if len(settings.blocks) != 4:
        raise UserError(f"densenet121.blocks: {list(settings.blocks)}: give four numbers, one for each dense block")
    stem = 2 * settings.growth
    backbone = DenseNet(settings.growth, settings.blocks, stem, num_classes=1)
    feature_dim = backbone.classifier.in_features
    backbone.classifier = nn.Identity()
    require_side("densenet121", backbone, 32)
    return finish("densenet121", backbone, feature_dim, settings.last_parts, LAST)
