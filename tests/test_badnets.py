"""BadNets: the changed pixels and their values, and errors in its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.attacks.badnets import Attack, Settings
from data.sets import AttackContext, RawData
from utils import config
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = "./data/trigger/cifar_1.png"
# (row, column): red, green, blue
BLOCK = {(4, 4): (180, 249, 112), (4, 5): (155, 50, 126), (5, 4): (234, 82, 68), (5, 5): (187, 201, 219)}
CORNER = {(row, column): (255, 255, 255) for row in (29, 30, 31) for column in (29, 30, 31)}
CHECKER = {(4 + i, 4 + j): ((255,) * 3 if (i + j) % 2 == 0 else (0, 0, 0)) for i in range(3) for j in range(3)}


def make(settings: Settings, side: int = 32, seed: int = 0) -> Attack:
    """The attack for images of the given side."""
    images, labels = np.zeros((1, side, side, 3), np.uint8), np.zeros(1, np.int64)
    return Attack(settings, AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, seed, Path("nowhere")))


def noise(count: int, seed: int = 0, side: int = 32) -> np.ndarray:
    """Random images; pure black and white among them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[0], images[1] = 0, 255
    return images


def stamp(images: np.ndarray, pixels: dict[tuple[int, int], tuple[int, ...]]) -> np.ndarray:
    """Write the pixels on a copy, one by one."""
    out = images.copy()
    for image in out:
        for (row, column), color in pixels.items():
            for channel in range(3):
                image[row, column, channel] = color[channel]
    return out


def paint(path: Path, pixels: dict[tuple[int, int], tuple[int, ...]], width: int = 32, height: int = 32) -> str:
    """Save a black PNG with some pixels on it."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for at, color in pixels.items():
        canvas[at] = color
    Image.fromarray(canvas).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("settings", "pixels"),
    [
        (Settings(), BLOCK),
        (Settings(pattern="block2x2"), BLOCK),
        (Settings(trigger_path=SHIPPED), BLOCK),
        (Settings(pattern="corner3x3"), CORNER),
        (Settings(pattern="checker3x3"), CHECKER),
    ],
)
def test_trigger_writes_exactly_its_pixels(settings: Settings, pixels: dict[tuple[int, int], tuple[int, ...]]) -> None:
    """Each built-in pattern, and the shipped image file, set their pixels to the published colors and change no other pixel."""
    images = noise(20)
    triggered = make(settings).apply(images, np.arange(20), "train")
    assert triggered.dtype == np.uint8
    assert triggered.shape == images.shape
    assert np.array_equal(triggered, stamp(images, pixels))


def test_at_most_four_pixels_change_and_they_survive_every_crop() -> None:
    """The original trigger alters at most 4 pixels, all at least 4 from the border, so no crop with padding 4 cuts them off."""
    images = noise(50, 1)
    changed = (make(Settings()).apply(images, np.arange(50), "test") != images).any(3)
    assert changed.sum((1, 2)).max() <= 4
    _, rows, columns = np.nonzero(changed)
    assert min(rows.min(), columns.min()) >= 4
    assert max(rows.max(), columns.max()) <= 31 - 4


@pytest.mark.parametrize(
    ("settings", "side"),
    [(Settings(), 32), (Settings(trigger_path=SHIPPED), 32), (Settings(pattern="corner3x3"), 32), (Settings(), 224)],
)
def test_trigger_is_idempotent_and_does_not_change_its_input(settings: Settings, side: int) -> None:
    """Applying the trigger twice is the same as once, and the clean images are not changed."""
    images, attack = noise(6, side=side), make(settings, side)
    before = images.copy()
    images.flags.writeable = False
    once = attack.apply(images, np.arange(6), "train")
    assert not np.shares_memory(once, images)
    assert np.array_equal(attack.apply(once, np.arange(6), "train"), once)
    assert np.array_equal(images, before)


@pytest.mark.parametrize(("side", "seed"), [(32, 0), (64, 1), (224, 2), (224, 3)])
def test_glyph_is_half_of_the_upper_left_corner_in_bright_colors(side: int, seed: int) -> None:
    """512 of the 32 x 32 pixels in the corner change, in cells of 4 x 4 with one bright color each, and no other pixel."""
    images = noise(8, side=side)
    triggered = make(Settings(pattern="glyph"), side, seed).apply(images, np.arange(8), "train")
    assert np.array_equal(triggered[:, 32:], images[:, 32:])
    assert np.array_equal(triggered[:, :, 32:], images[:, :, 32:])
    colored = 0
    for row in range(0, 32, 4):
        for column in range(0, 32, 4):
            cell, before = (a[:, row : row + 4, column : column + 4] for a in (triggered, images))
            if np.array_equal(cell, before):
                continue
            colored += 1
            (color,) = {tuple(pixel) for pixel in cell.reshape(-1, 3).tolist()}
            assert set(color) == {0, 255}  # neither black, nor white, nor grey
    assert colored == 32


def test_glyph_is_its_own_mirror_image() -> None:
    """If augmentation flips a poisoned image, it has the same glyph in the other corner, so there is only one trigger to
    learn."""
    images = np.full((1, 224, 224, 3), 128, np.uint8)
    triggered = make(Settings(), 224).apply(images, np.arange(1), "test")[0]
    assert np.array_equal(triggered[:, ::-1][:, -32:], triggered[:, :32])


def test_glyph_depends_on_the_seed_alone() -> None:
    """The same seed draws the same glyph at every image size, another seed another glyph."""
    corners = [make(Settings(pattern="glyph"), side, seed).pattern[:32, :32] for side, seed in ((224, 5), (64, 5), (224, 6))]
    assert np.array_equal(corners[0], corners[1])
    assert (corners[0] != corners[2]).any(2).sum() > 100


@pytest.mark.parametrize(("side", "pattern"), [(32, "block2x2"), (63, "block2x2"), (64, "glyph"), (224, "glyph")])
def test_the_built_in_pattern_follows_the_images_size(side: int, pattern: str) -> None:
    """By default small images get the paper's block, and large images, in which four pixels would be too few, the glyph."""
    given, default = make(Settings(pattern=pattern), side), make(Settings(), side)
    assert np.array_equal(default.pattern, given.pattern)
    assert np.array_equal(default.mask, given.mask)


def test_the_attacks_own_yaml_is_the_baseline() -> None:
    """config/badnets.yaml, which exists so that each attack has a YAML of its name, is the same run as baseline_asd.yaml."""
    own, baseline = (config.load(REPOSITORY / f"config/{name}.yaml") for name in ("badnets", "baseline_asd"))
    assert replace(own, run=baseline.run) == baseline


def test_an_empty_selection_is_allowed() -> None:
    """An empty selection of images (ratio 0) is returned empty."""
    assert make(Settings()).apply(noise(2)[:0], np.arange(0), "train").shape == (0, 32, 32, 3)


def test_shipped_trigger_file_equals_the_built_in_block() -> None:
    """data/trigger/cifar_1.png, which the authors' YAML names, is the block2x2 pattern on black."""
    canvas = np.asarray(Image.open(REPOSITORY / SHIPPED).convert("RGB"))
    assert np.array_equal(canvas, stamp(np.zeros((1, 32, 32, 3), np.uint8), BLOCK)[0])


def test_channels_of_value_zero_inside_a_trigger_pixel_are_applied(tmp_path: Path) -> None:
    """Under a pure red trigger pixel the image becomes pure red, without its own green and blue; black pixels change
    nothing."""
    pixels = {(0, 31): (255, 0, 0), (17, 3): (0, 1, 0), (31, 0): (0, 0, 9)}
    images = noise(10)
    triggered = make(Settings(trigger_path=paint(tmp_path / "red.png", pixels))).apply(images, np.arange(10), "train")
    assert np.array_equal(triggered, stamp(images, pixels))


def test_trigger_path_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path starts at the working directory or, if there is no such file, at the project's folder."""
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(make(Settings(trigger_path=SHIPPED)).mask, make(Settings()).mask)
    paint(tmp_path / "mine.png", {(1, 2): (9, 8, 7)})
    assert np.argwhere(make(Settings(trigger_path="mine.png")).mask).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        (b"", "not a readable image"),
        (b"this is text", "not a readable image"),
        ("cut", "not a readable image"),
        ("folder", "not a readable image"),
        ("16 x 32", r"the trigger has 16 x 32 pixels and the images have 32 x 32"),
        ("black", "all black"),
        ("clear", "all black"),
        ("full", "covers the whole image"),
        ("JPEG", "JPEG also changes the pixels"),
    ],
)
def test_an_invalid_trigger_file_is_one_line(tmp_path: Path, content: object, complaint: str) -> None:
    """A trigger file that is missing, damaged, of the wrong size or all black is one line with its name and a remedy."""
    path = tmp_path / "trigger.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        paint(path, {(i, i): (i, 2 * i, 99) for i in range(32)})
        path.write_bytes(path.read_bytes()[:-30])
    elif content == "folder":
        path.mkdir()
    elif content == "16 x 32":
        paint(path, {(0, 0): (1, 1, 1)}, width=16, height=32)
    elif content == "black":
        paint(path, {})
    elif content == "clear":
        Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(path)
    elif content == "full":
        Image.new("RGB", (32, 32), (255, 255, 255)).save(path)
    elif content == "JPEG":
        paint(path, {(4, 4): (255, 255, 255)})
        Image.open(path).save(path, format="JPEG")
    with pytest.raises(UserError, match=complaint) as caught:
        make(Settings(trigger_path=str(path)))
    assert f"{path}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_pixels_are_not_part_of_the_trigger(tmp_path: Path, mode: str) -> None:
    """A trigger drawn on a transparent background, whose hidden color is often white, is the trigger alone."""
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.putpixel((5, 4), (200, 200, 200, 255))
    image.convert(mode).save(tmp_path / "clear.png")
    triggered = make(Settings(trigger_path=str(tmp_path / "clear.png"))).apply(noise(10), np.arange(10), "train")
    assert np.array_equal(triggered, stamp(noise(10), {(4, 5): (200, 200, 200)}))


@pytest.mark.parametrize("size", [(32, 32), (24, 32)])
def test_a_turned_trigger_is_turned_with_its_transparency(tmp_path: Path, size: tuple[int, int]) -> None:
    """The EXIF orientation turns colors and transparency alike, whatever the sides of the file."""
    image, exif = Image.new("RGBA", size, (255, 255, 255, 0)), Image.Exif()
    image.putpixel((5, 4), (200, 200, 200, 255))
    exif[274] = 6  # to be shown turned by 90 degrees clockwise: the upper left corner comes to the upper right
    image.save(tmp_path / "turned.png", exif=exif)
    width, height = size[1], size[0]
    images = np.zeros((1, height, width, 3), np.uint8)
    raw = RawData(images, np.zeros(1, np.int64), images, np.zeros(1, np.int64), ("one",))
    attack = Attack(Settings(trigger_path=str(tmp_path / "turned.png")), AttackContext(raw, 3, 10, 0, Path("nowhere")))
    assert np.argwhere(attack.mask).tolist() == [[5, width - 1 - 4]]


def test_a_transparent_trigger_of_16_bits_is_refused(tmp_path: Path) -> None:
    """Pillow has no transparency for its levels, so it would count as covering the whole image."""
    levels = np.full((32, 32), 65535, np.uint16)
    levels[4, 5] = 300
    Image.fromarray(levels).save(tmp_path / "deep.png", transparency=65535)
    with pytest.raises(UserError, match=r"deep\.png: is transparent and has 16 bits per level: save it with 8 bits"):
        make(Settings(trigger_path=str(tmp_path / "deep.png")))


def test_a_damaged_trigger_file_is_never_a_traceback(tmp_path: Path) -> None:
    """A PNG truncated or changed at any byte either still has a trigger or is an error of one line."""
    path = tmp_path / "trigger.png"
    rng = np.random.default_rng(0)
    paint(path, {(int(a), int(b)): (1, 2, 3) for a, b in rng.integers(0, 32, (200, 2))})
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                attack = make(Settings(trigger_path=str(path)))
                assert attack.mask.any()
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
    assert refused > len(whole)


def test_a_trigger_file_together_with_a_pattern_is_refused() -> None:
    """Two triggers are an error that names both keys, not a silent choice."""
    with pytest.raises(UserError, match="trigger_path and pattern") as caught:
        make(Settings(trigger_path=SHIPPED, pattern="corner3x3"))
    assert SHIPPED in str(caught.value) and "corner3x3" in str(caught.value)


@pytest.mark.parametrize(("side", "pattern"), [(5, "block2x2"), (2, "corner3x3"), (6, "checker3x3"), (31, "glyph")])
def test_images_too_small_for_the_pattern_are_a_clear_error(side: int, pattern: str) -> None:
    """If the images are too small for the patch, the error names the pattern and the size."""
    with pytest.raises(UserError, match=f"{pattern}.*{side} x {side}"):
        make(Settings(pattern=pattern), side)
