"""The contact sheet of a poisoned set: an image that shows what the attack does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# All in pixels.
CELL = 96  # least side of an image
WIDTH = 1100  # of a row, at most
GAP = 6  # between images
LINE = 14  # height of a line of text
MARGIN = 96  # width of the column with the rows' names
LETTER = 6  # approximate width of a letter of Pillow's default font


@dataclass(frozen=True)
class Group:
    """Images of one kind before and after the attack, under a title."""

    title: str
    row: str  # name of the row of altered images
    before: np.ndarray  # (n, H, W, 3) uint8
    after: np.ndarray  # (n, H, W, 3) uint8
    captions: Sequence[str]


def columns(side: int) -> int:
    """Return how many images of `side` pixels a row has."""
    return max(4, min(10, WIDTH // (enlargement(side) * side + GAP)))


def enlargement(side: int) -> int:
    """Return the integer factor by which images are enlarged; every pixel stays a square."""
    return max(1, CELL // side)


def draw_contact_sheet(path: Path, groups: Sequence[Group]) -> None:
    """Draw three rows per group: original images, altered images, and ten times their difference."""
    height, width = groups[0].before.shape[1:3]
    scale, n = enlargement(max(height, width)), columns(max(height, width))
    high, wide = scale * height, scale * width
    block = 2 * LINE + 3 * (high + GAP) + LINE
    sheet = Image.new("RGB", (MARGIN + n * (wide + GAP) + GAP, len(groups) * block + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for g, group in enumerate(groups):
        top = g * block + GAP
        pen.text((GAP, top), plain(group.title), "black", font)
        before, after = group.before[:n].astype(int), group.after[:n].astype(int)
        rows = (("original", before), (group.row, after), ("difference x 10", abs(after - before) * 10))
        for r, (name, images) in enumerate(rows):
            y = top + 2 * LINE + r * (high + GAP)
            pen.text((GAP, y + high // 2 - LINE // 2), name, "black", font)
            for column, image in enumerate(images.clip(0, 255).astype(np.uint8)):
                x = MARGIN + column * (wide + GAP)
                sheet.paste(Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)), (x, y))
        for column, caption in enumerate(group.captions[:n]):
            pen.text((MARGIN + column * (wide + GAP), top + LINE), plain(caption)[: wide // LETTER], "dimgray", font)
    sheet.save(path, format="PNG")


def plain(text: str) -> str:
    """Return the text with all characters that Pillow's default font lacks as escapes."""
    return text.encode("ascii", "backslashreplace").decode()
