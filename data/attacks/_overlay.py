"""Patches and patterns that several attacks lay over images."""

from __future__ import annotations

import numpy as np

Patch = tuple[np.ndarray, np.ndarray]  # pattern (H, W, 3) uint8 and mask (H, W) bool
BLOCK = np.array([[[180, 249, 112], [155, 50, 126]], [[234, 82, 68], [187, 201, 219]]], np.uint8)  # of the authors of ASD
CORNER = np.array([[255, 0, 0], [0, 255, 0], [255, 0, 255]], np.uint8)


def patch_pixel(height: int, width: int) -> int:
    """Return the side, in pixels of the image, of one pixel of a patch: `round(side / 32)`, where `side` is the shorter side.

    A patch covers the same share of a 224 x 224 image (7 x 7 squares) as of a 32 x 32 image, and survives crops equally well.
    """
    return max(1, round(min(height, width) / 32))


def enlarge(patch: np.ndarray, unit: int) -> np.ndarray:
    """Return a patch (h, w, ...) in which every pixel has become a square of `unit` x `unit` pixels."""
    return patch.repeat(unit, 0).repeat(unit, 1)


def corners(height: int, width: int) -> Patch:
    """Return CLB's trigger: a pattern of 3 x 3 patch pixels in each corner, mirrored on the right side."""
    unit = patch_pixel(height, width)
    pattern, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    left = enlarge(CORNER, unit)[..., None]
    first, last = slice(None, 3 * unit), slice(-3 * unit, None)
    for rows in (first, last):
        pattern[rows, first], pattern[rows, last] = left, left[:, ::-1]
        mask[rows, first] = mask[rows, last] = True
    return pattern, mask


def mix(images: np.ndarray, pattern: np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    """Return `x + opacity (T - x)`, rounded to uint8, for uint8 arrays and an opacity that broadcast.

    Halves are rounded up; 1e-9 is added so that rounding errors do not decide.
    """
    x = images.astype(np.float64)
    return np.floor(x + opacity * (pattern - x) + 0.5 + 1e-9).astype(np.uint8)
