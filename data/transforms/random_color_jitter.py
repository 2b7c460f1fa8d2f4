"""Change brightness, contrast, saturation and hue by random amounts, in a random order, with probability p."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms._levels import to_uint8
from utils.config.schema import setting

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

PLACES = ("transform.train.primary",)


@dataclass(frozen=True)
class Settings:
    brightness: float = setting(0.0, "factor from [1 - b, 1 + b]", low=0)
    contrast: float = setting(0.0, "factor from [1 - c, 1 + c]", low=0)
    saturation: float = setting(0.0, "factor from [1 - s, 1 + s]", low=0)
    hue: float = setting(0.0, "shift from [-h, h], in turns of the color circle", low=0, high=0.5)
    p: float = setting(1.0, "probability", low=0, high=1)

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Return (count, 9): 1 if the image is changed, the order of the four changes, their four amounts."""
        act = (torch.rand(count, 1, generator=generator, dtype=torch.float64) < self.p).double()
        order = torch.rand(count, 4, generator=generator, dtype=torch.float64).argsort(1).double()
        unit = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        amounts = []
        for i, spread in enumerate((self.brightness, self.contrast, self.saturation)):
            low = max(0.0, 1 - spread)
            amounts.append(low + unit[:, i] * (1 + spread - low))
        amounts.append((2 * unit[:, 3] - 1) * self.hue)
        return torch.cat([act, order, torch.stack(amounts, 1)], 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change the colors of each image of uint8 (B, 3, H, W) by its own amounts in its own order.

        The hue is the most expensive change and is computed once, for all images: first come the factors that precede an
        image's hue, then the hue, then the factors that follow it. In each group the factors of the other group are 1, which
        changes nothing.
        """
        act, order, amounts = draws.split([1, 4, 4], 1)
        kinds = [i for i, spread in enumerate((self.brightness, self.contrast, self.saturation)) if spread > 0]
        when = order.argsort(1)  # (B, 4), position of each change
        ranks = torch.stack([when[:, i] if i in kinds else when[:, i] + 4 for i in range(4)], 1)  # unused changes come last
        turns = ranks.argsort(1)[:, : len(kinds)]  # (B, n), the factors in each image's order
        factors = amounts.gather(1, turns).masked_fill(act == 0, 1)
        x = images.float()
        if not self.hue:
            return to_uint8(scale_all(x, turns, factors, kinds))
        early = when.gather(1, turns) < when[:, HUE:]
        x = scale_all(x, turns, factors.masked_fill(~early, 1), kinds)
        x = torch.where(act[:, :, None, None] > 0, turn_hue(x, amounts[:, HUE]), x)
        return to_uint8(scale_all(x, turns, factors.masked_fill(early, 1), kinds))


def scale_all(x: Tensor, turns: Tensor, factors: Tensor, kinds: list[int]) -> Tensor:
    """Scale the distance of each image from black (brightness), its mean grey (contrast) or its own grey (saturation).

    Args:
        x: (B, 3, H, W) float32 in whole levels; overwritten.
        turns, factors: (B, n), which of the three changes, and their factors.
        kinds: those of the three changes that occur.
    """
    for kind, factor in zip(turns[:, :, None, None, None].unbind(1), factors[:, :, None, None, None].unbind(1), strict=True):
        toward = grey(x, kind) if kinds != [BRIGHTNESS] else None
        x.mul_(factor.float())
        if toward is not None:
            x.addcmul_(toward, (1 - factor).float())
        x.clamp_(0, 255).floor_()
    return x


def grey(x: Tensor, kind: Tensor) -> Tensor:
    """Return the grey (B, 1, H, W) from which an image's distance is scaled; by the kind of change black, its mean or its own.

    Args:
        x: (B, 3, H, W) float32 in whole levels.
        kind: (B, 1, 1, 1).
    """
    red, green, blue = x.split(1, 1)
    own = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
    # Sums of whole numbers, exact in float32 for a row and in float64 for the image: a view does not depend on its batch.
    total = own.sum(3, keepdim=True).sum(2, keepdim=True, dtype=torch.float64)
    mean = total / (x.shape[2] * x.shape[3]) * (kind == CONTRAST)
    return torch.where(kind == SATURATION, own, mean.float())


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of each image; value and saturation do not change.

    One formula replaces the conversion to HSV and back: a channel has the largest value if the hue is at least 1/3 of a turn
    from the channel's complement, and the smallest value if it is at most 1/6 of a turn from it; in between it is linear.

    Args:
        x: (B, 3, H, W) float32 in whole levels.
        turn: (B,), in turns of the circle.
    """
    red, green, blue = x.unbind(1)
    low, high = x.aminmax(dim=1)
    chroma = high - low  # (B, H, W)
    from_green, from_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = torch.where(high == red, green - blue, torch.where(high == green, from_green, from_blue))
    hue = hue.div_(chroma.clamp(min=1) * 6).add_(turn.float()[:, None, None])  # grey has chroma 0: any hue gives grey
    away = torch.stack([hue + 1 / 2, hue + 1 / 6, hue - 1 / 6], 1)  # from cyan, magenta, yellow, modulo whole turns
    share = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    out = torch.addcmul(high[:, None], share, chroma[:, None], value=-1)
    return out.mul_(255.999 / 255).floor_()  # as torchvision rounds a color in 0..1 to a level
