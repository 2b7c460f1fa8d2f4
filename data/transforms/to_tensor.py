"""Convert uint8 0..255 to floating point 0..1. `data.augment.Pipeline` does this together with `normalize`."""

from __future__ import annotations

from dataclasses import dataclass

PLACES = ("transform.train.remaining", "transform.test.remaining")
POSITION = 0


@dataclass(frozen=True)
class Settings:
    """No settings: `to_tensor: true`."""
