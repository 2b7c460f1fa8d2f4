"""Pre-activation ResNet-18 (He et al., ECCV 2016) for 32 x 32 images: 3 x 3 stem, no max-pool."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.backbone import finish
from model.networks._preact import PreActResNet
from utils.config.schema import setting

BACKDOORBENCH = "{preact_resnet18: {final_norm: false}}"  # the settings with which its weights fit there


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    width: int = setting(64, "channels of the stem; the stages have 1, 2, 4, 8 times as many", low=1)
    blocks: int = setting(2, "blocks of each stage; 2 is ResNet-18", low=1)
    final_norm: bool = setting(True, "normalization and relu after the last block; false: as in BackdoorBench's network")
    last_parts: tuple[str, ...] | None = setting(
        None, "what the virtual model trains; null: layer3, layer4 and, with final_norm, bn"
    )


def backdoorbench(settings: Settings) -> tuple[str, str] | None:
    """Return the names of the network and of its last layer in BackdoorBench; None: it has no network of these settings."""
    fits = (settings.width, settings.blocks, settings.final_norm) == (64, 2, False)
    return ("preactresnet18", "linear") if fits else None


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, 8 width).

    As in the paper, BN follows the last block; some public implementations omit it (1024 weights).
    """
    width, final = settings.width, settings.final_norm
    backbone = PreActResNet(width, (width, 2 * width, 4 * width, 8 * width), settings.blocks, final_norm=final)
    usual = ("layer3", "layer4", "bn") if final else ("layer3", "layer4")
    return finish("preact_resnet18", backbone, 8 * width, settings.last_parts, usual)
