"""VGG-16 (Simonyan and Zisserman, ICLR 2015) with BN and torchvision's names; for images of at least 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import finish, require_side
from utils.config.schema import setting

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))  # channels as multiples of the first stage's, convolutions
# The last two of the five stages and the hidden layers: convolutions and normalizations 24 to 41.
LAST = (*(f"features.{i + j}" for i in (24, 27, 30, 34, 37, 40) for j in (0, 1)), "classifier")


@dataclass(frozen=True)
class Settings:
    num_classes: int | None = setting(None, "must equal the top-level num_classes; null: the same", low=1)
    width: int = setting(64, "channels of the first stage; the others have 2, 4, 8, 8 times as many", low=1)
    pool: int = setting(7, "side of the last feature map after adaptive pooling; 1 suits 32 x 32 images", low=1)
    hidden: int = setting(4096, "units of each of the two hidden linear layers", low=1)
    dropout: float = setting(0.5, "share of the hidden units set to 0 in training", low=0, below=1)
    last_parts: tuple[str, ...] | None = setting(
        None, "what the virtual model trains; null: features.24 to features.41 (two of five stages) and classifier"
    )


class VGG(nn.Module):
    """Thirteen convolutions in five stages, each followed by a max-pool, and two hidden linear layers.

    torchvision's class has fixed sizes of 7 x 7 and 4096: 103 million weights that a network for small images does not need.
    """

    def __init__(self, width: int, pool: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        channels = 3
        for factor, count in STAGES:
            for _ in range(count):
                convolution = nn.Conv2d(channels, factor * width, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
                channels = factor * width
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential()
        for inputs in (channels * pool * pool, hidden):
            linear = nn.Linear(inputs, hidden)
            nn.init.normal_(linear.weight, 0, 0.01)
            nn.init.zeros_(linear.bias)
            self.classifier.extend([linear, nn.ReLU(inplace=True), nn.Dropout(dropout)])

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, hidden)."""
        out: Tensor = self.classifier(adaptive_pool(self.features(x), self.pool).flatten(1))
        return out


def adaptive_pool(maps: Tensor, side: int) -> Tensor:
    """Return maps (B, c, h, w) pooled to (B, c, side, side).

    CUDA's backward pass of adaptive pooling is not repeatable. Images of 32 px, whose maps have one pixel, and of 224 px need
    none: a pixel is copied, and maps of 7 x 7 stay as they are.
    """
    if maps.shape[2:] == (side, side):
        return maps
    if maps.shape[2:] == (1, 1):
        return maps.expand(-1, -1, side, side)
    return F.adaptive_avg_pool2d(maps, side)


def build(settings: Settings) -> nn.Module:
    """Return the backbone with fresh weights: (B, 3, H, W) to (B, hidden)."""
    backbone = VGG(settings.width, settings.pool, settings.hidden, settings.dropout)
    require_side("vgg16_bn", backbone, 32)
    return finish("vgg16_bn", backbone, settings.hidden, settings.last_parts, LAST)
