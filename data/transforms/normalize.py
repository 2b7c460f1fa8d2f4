"""Subtract a mean and divide by a standard deviation per channel. `data.augment.Pipeline` does the work."""

from __future__ import annotations

from dataclasses import dataclass

from utils.config.schema import setting

PLACES = ("transform.train.remaining", "transform.test.remaining")
POSITION = 1


@dataclass(frozen=True)
class Settings:
    mean: tuple[float, ...] = setting((0.4914, 0.4822, 0.4465), "of the three channels, in 0..1", count=3)
    std: tuple[float, ...] = setting((0.2023, 0.1994, 0.2010), "of the three channels, in 0..1", above=0, count=3)
