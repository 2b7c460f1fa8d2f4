"""torchvision's ResNets without their head."""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from model.backbone import finish
from utils.errors import UserError


def build_resnet(network: str, bottleneck: bool, blocks: tuple[int, ...], last_parts: tuple[str, ...] | None) -> nn.Module:
    """Return a ResNet with the ImageNet stem (7 x 7, stride 2, max-pool) and fresh weights.

    Args:
        bottleneck: blocks of three convolutions, 1 x 1, 3 x 3, 1 x 1, instead of two of 3 x 3.
        blocks: how many in each of the four stages.
    """
    if len(blocks) != 4:
        raise UserError(f"{network}.blocks: {list(blocks)}: give four numbers, one for each stage")
    backbone = ResNet(Bottleneck if bottleneck else BasicBlock, list(blocks), num_classes=1)
    feature_dim = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return finish(network, backbone, feature_dim, last_parts, ("layer3", "layer4"))
