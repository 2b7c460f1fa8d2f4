"""The kinds of images that an attacker leaves, as the ground truth numbers them."""

from __future__ import annotations

CLEAN, POISONED, COVER = 0, 1, 2  # a cover image is altered and keeps its label
KINDS = {"clean": CLEAN, "poisoned": POISONED, "cover": COVER}
