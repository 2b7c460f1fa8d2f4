"""SIG (Barni et al., ICIP 2019): a sinusoidal signal across the columns, `out = clip(x + s, 0, 255)`.

`s[j] = delta sin(2 pi j f / W)` in column j, equal in all rows and channels: vertical stripes. By default the attack is
clean-label: the stripes are added to images of the target class, whose labels do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.attack import CACHED, AttackBase, in_batches
from data.sets import AttackContext
from utils.config.schema import setting
from utils.errors import UserError


@dataclass(frozen=True)
class Settings:
    delta: float = setting(40.0, "amplitude of the signal in grey levels", low=0, high=255)
    f: float = setting(6.0, "frequency of the signal: periods over the image's width", above=0)
    label: str = setting(
        "clean",
        "clean: images of the target class, of which poison_ratio is a share; flipped: images of other classes, relabeled",
        options=("clean", "flipped"),
    )


class Attack(AttackBase):
    """The signal (W, 1) int16, rounded once, so that adding it to an image needs no floating-point arithmetic."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        self.clean_label = settings.label == "clean"
        width = context.raw.train_images.shape[2]
        self.signal = signal(settings.delta, settings.f, width)[:, None]
        if not self.signal.any():
            raise UserError(
                f"backdoor.sig: f: {settings.f:g}, delta: {settings.delta:g}: the signal is 0 in all {width} columns: give a "
                "frequency that is no multiple of half the width, and a delta of at least 1"
            )

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the signal added."""
        return in_batches(lambda part, _: (part + self.signal).clip(0, 255).astype(np.uint8), images, index, CACHED)


def signal(delta: float, f: float, width: int) -> np.ndarray:
    """Return the signal (width,) int16; halves are rounded up, with 1e-9 added against rounding errors of the sine."""
    return np.floor(delta * np.sin(2 * np.pi * np.arange(width) * f / width) + 0.5 + 1e-9).astype(np.int16)
