"""Adaptive-Blend and Adaptive-Patch: pixel values, and the pieces and patches that are drawn for an index."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from data.attack import AttackBase
from data.attacks import adaptive_blend, adaptive_patch
from data.attacks._overlay import mix
from data.sets import AttackContext, RawData
from utils import config
from utils.draws import numpy_generator
from utils.errors import UserError

MODULES = {"adaptive_blend": adaptive_blend, "adaptive_patch": adaptive_patch}


def make(name: str, height: int = 32, width: int = 32, seed: int = 0, **given: Any) -> Any:
    """The attack of that name for images of the given size."""
    images, labels = np.zeros((1, height, width, 3), np.uint8), np.zeros(1, np.int64)
    context = AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, seed, Path("nowhere"))
    module: Any = MODULES[name]
    return module.Attack(module.Settings(**given), context)


def noise(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Random read-only images; pure black and white among them."""
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, : height // 2], images[0, height // 2 :] = 0, 255
    images.flags.writeable = False
    return images


def mixed(x: int, t: int, alpha: str) -> int:
    """`x + alpha (t - x)` in exact arithmetic, halves rounded up."""
    return math.floor(x + Fraction(alpha) * (t - x) + Fraction(1, 2))


# -- Adaptive-Blend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["0", "0.15", "0.2", "0.5", "1"])
def test_all_pairs_of_values_are_mixed_exactly(alpha: str) -> None:
    """For each of the 65,536 pairs the mix is the exact value, rounded, with halves up."""
    x, t = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))
    out = mix(x, t, float(alpha))
    assert out.tolist() == [[mixed(i, j, alpha) for j in range(256)] for i in range(256)]


@pytest.mark.parametrize(("height", "width", "pieces"), [(32, 32, 8), (10, 13, 5), (3, 6, 16)])
def test_blended_images_equal_the_formula(height: int, width: int, pieces: int) -> None:
    """Training images show the pieces drawn for their index, with alpha 0.15; test images show all of T, with 0.2."""
    images, index = noise(3, height, width), np.array([7, 0, 123])
    attack = make("adaptive_blend", height, width, seed=5, pieces=pieces)
    trigger = numpy_generator(5, "adaptive_blend", "noise").integers(0, 256, (height, width, 3), dtype=np.uint8)
    for split in ("train", "test"):
        out = attack.apply(images, index, split)
        assert out.dtype == np.uint8
        for n, i in enumerate(index):
            shown = numpy_generator(5, "adaptive_blend", i).permutation(16)[:pieces].tolist()
            for y in range(height):
                for x in range(width):
                    if split == "test" or 4 * (4 * y // height) + 4 * x // width in shown:
                        alpha = "0.15" if split == "train" else "0.2"
                        expected = [mixed(int(images[n, y, x, c]), int(trigger[y, x, c]), alpha) for c in range(3)]
                    else:
                        expected = images[n, y, x].tolist()
                    assert out[n, y, x].tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_the_smooth_trigger_is_8_x_8_colors_enlarged(height: int, width: int) -> None:
    """Its pixels are those of Pillow's bicubic enlargement of the colors that the seed draws."""
    colors = numpy_generator(3, "adaptive_blend", "smooth").integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(make("adaptive_blend", height, width, seed=3, pattern="smooth").pattern, expected)


def test_training_images_show_half_of_the_trigger() -> None:
    """Half of the pixels do not change, no value changes by more than 38 levels, and indices have different pieces."""
    images = np.repeat(noise(1), 40, 0)
    out = make("adaptive_blend").apply(images, np.arange(40), "train")
    changed = (out != images).any(3)
    assert (changed.sum((1, 2)) <= 512).all() and (changed.sum((1, 2)) > 400).all()
    assert abs(out.astype(int) - images).max() <= 38
    assert len(np.unique(changed.reshape(40, -1), axis=0)) > 35
    tested = make("adaptive_blend").apply(images, np.arange(40), "test")
    assert (tested == tested[0]).all()


def test_the_trigger_images(tmp_path: Path) -> None:
    """The smooth trigger varies little from pixel to pixel, a user's file is resized, and giving both is refused."""
    smooth, plain = (make("adaptive_blend", pattern=name).pattern.astype(int) for name in ("smooth", "noise"))
    assert abs(np.diff(smooth, axis=1)).mean() < 0.5 * abs(np.diff(plain, axis=1)).mean()
    assert np.array_equal(plain, make("adaptive_blend").pattern)
    assert not np.array_equal(plain, make("adaptive_blend", seed=1).pattern)
    path = tmp_path / "t.png"
    Image.fromarray(noise(1, 50, 40)[0]).save(path)
    expected = Image.fromarray(noise(1, 50, 40)[0]).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(make("adaptive_blend", trigger_path=str(path)).pattern, np.asarray(expected))
    with pytest.raises(UserError, match=r"backdoor\.adaptive_blend\.pattern: noise: trigger_path is "):
        make("adaptive_blend", trigger_path=str(path), pattern="noise")


# -- Adaptive-Patch ----------------------------------------------------------------------------------------------------


def places(unit: int, side: int) -> list[set[tuple[int, int]]]:
    """The pixels of the four patches and of both test triggers, scaled from their positions in an image of 32 px."""

    def scaled(cells: set[tuple[int, int]], rows_from_end: bool, columns_from_end: bool) -> set[tuple[int, int]]:
        shift = side - 32 * unit
        out = set()
        for y, x in cells:
            for dy in range(unit):
                for dx in range(unit):
                    out.add((y * unit + dy + shift * rows_from_end, x * unit + dx + shift * columns_from_end))
        return out

    def block(y: int, x: int, size: int) -> set[tuple[int, int]]:
        return {(y + dy, x + dx) for dy in range(size) for dx in range(size)}

    square = scaled(block(27, 27, 5), True, True)
    disc = scaled({(y, x) for y, x in block(1, 18, 13) if (y - 7) ** 2 + (x - 24) ** 2 <= 6.5**2}, False, True)
    corners = set().union(*(scaled(block(y, x, 3), y > 0, x > 0) for y in (0, 29) for x in (0, 29)))
    large = scaled(block(21, 21, 8), True, True)
    return [square, disc, corners, large, square | scaled(block(27, 0, 5), True, False) | corners, disc | large]


@pytest.mark.parametrize(("side", "unit"), [(32, 1), (40, 1), (64, 2), (70, 2), (224, 7)])
def test_the_patches_have_the_right_positions(side: int, unit: int) -> None:
    """Each patch covers the pixels of the authors' patch, scaled with the image."""
    expected = places(unit, side)
    attack = make("adaptive_patch", side, side)
    masks = [*(attack.opacities[..., 0] > 0), attack.test_mask, make("adaptive_patch", side, side, test="disc").test_mask]
    for mask, pixels in zip(masks, expected, strict=True):
        assert {(int(y), int(x)) for y, x in np.argwhere(mask)} == pixels


def test_patched_images_equal_the_formula() -> None:
    """A training image has the patch drawn for its index, with the opacity of the patch; a test image has both opaque
    patches."""
    images, index = noise(24), np.arange(100, 124)
    attack = make("adaptive_patch", seed=2)
    out, drawn = attack.apply(images, index, "train"), []
    for image, i, altered in zip(images, index, out, strict=True):
        k = int(numpy_generator(2, "adaptive_patch", i).integers(4))
        drawn.append(k)
        expected = image.copy()
        for y, x in places(1, 32)[k]:
            pattern = attack.patterns[k][y, x]
            expected[y, x] = [
                mixed(int(a), int(b), ["0.5", "0.2", "0.5", "0.3"][k]) for a, b in zip(image[y, x], pattern, strict=True)
            ]
        assert np.array_equal(altered, expected)
    assert set(drawn) == {0, 1, 2, 3}
    tested = attack.apply(images, index, "test")
    inside = np.zeros((32, 32), bool)
    for y, x in places(1, 32)[4]:
        inside[y, x] = True
    assert np.array_equal(tested[:, ~inside], images[:, ~inside])
    assert (tested[:, inside] == tested[0, inside]).all()
    square = attack.patterns[0][27:, 27:]
    for columns in (slice(0, 5), slice(27, 32)):  # the square in both lower corners, under the corner patches
        shown, corner = tested[0, 27:, columns], np.zeros((5, 5), bool)
        corner[2:, :3] = columns.start == 0
        corner[2:, 2:] |= columns.start == 27
        assert np.array_equal(shown[~corner], square[~corner])
    for rows, columns in ((slice(0, 3), slice(0, 3)), (slice(29, 32), slice(29, 32))):
        assert np.array_equal(tested[0, rows, columns], attack.patterns[2][rows, columns])
    rng = numpy_generator(2, "adaptive_patch", "colors")
    small, rings, large = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((5, 5, 3), (3, 3), (8, 8, 3)))
    assert np.array_equal(attack.patterns[0][27:, 27:], small) and np.array_equal(attack.patterns[3][21:29, 21:29], large)
    assert [attack.patterns[1][y, 24].tolist() for y in (7, 10, 13)] == rings.tolist()


def test_the_patches_occur_about_equally_often() -> None:
    """Each of the four patches is drawn for about a quarter of the indices, and the disc has three colors."""
    attack = make("adaptive_patch")
    out = attack.apply(np.full((2000, 32, 32, 3), 128, np.uint8), np.arange(2000), "train")
    kinds = np.unique((out != 128).any(3).reshape(2000, -1).sum(1), return_counts=True)[1]
    assert kinds.sum() == 2000 and (abs(np.sort(kinds)[-4:] - 500) < 120).all()
    disc = attack.patterns[1][attack.opacities[1, ..., 0] > 0]
    assert len(np.unique(disc, axis=0)) == 3
    squares = [(y - 6) ** 2 + (x - 6) ** 2 for y in range(13) for x in range(13)]  # distances from the center, squared
    rings = (sum(d <= 4 for d in squares), sum(4 < d <= 18 for d in squares), sum(18 < d <= 6.5**2 for d in squares))
    assert sorted(np.unique(disc, axis=0, return_counts=True)[1].tolist()) == sorted(rings) and sum(rings) == 137
    assert not np.array_equal(attack.patterns[0], make("adaptive_patch", seed=1).patterns[0])


def test_images_that_are_too_small_are_refused() -> None:
    """If the patches do not fit, by height or by width, the error has the images' size."""
    for height, width in ((13, 32), (32, 13)):
        with pytest.raises(UserError, match=rf"backdoor\.adaptive_patch: images of {width} x {height} pixels"):
            make("adaptive_patch", height, width)
    make("adaptive_patch", 14, 14)


# -- Both attacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_an_image_alone_equals_the_same_image_among_others(name: str) -> None:
    """The result depends on seed, image and index only: not on the other images, their order or their number."""
    images, index = noise(140), np.random.default_rng(1).permutation(1000)[:140]
    attack: AttackBase = make(name)
    poisoned = attack.apply(images, index, "train")
    assert np.array_equal(attack.cover(images, index), poisoned)  # the same trigger
    assert np.array_equal(attack.apply(images[::-1], index[::-1], "train")[::-1], poisoned)
    for i in (0, 139):
        assert np.array_equal(make(name).apply(images[i : i + 1], index[i : i + 1], "train")[0], poisoned[i])
    assert np.array_equal(attack.apply(images, index + 1, "test"), attack.apply(images, index, "test"))
    for split in ("train", "test"):
        assert attack.apply(images[:0], index[:0], split).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adaptive_blend.alpha", "1.1"),
        ("adaptive_blend.test_alpha", "-0.1"),
        ("adaptive_blend.pieces", "17"),
        ("adaptive_blend.pieces", "0"),
        ("adaptive_blend.cover_ratio", "-1"),
        ("adaptive_patch.opacities", "[0.5, 0.2, 0.5]"),
        ("adaptive_patch.opacities", "[0.5, 0.2, 0.5, 1.5]"),
        ("adaptive_patch.cover_ratio", "-1"),
        ("adaptive_patch.test", "corners"),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: str) -> None:
    """Opacities are in 0..1, four of them; counts are not negative; there are 16 pieces."""
    with pytest.raises(UserError, match=rf"backdoor\.{key}"):
        config.load(REPOSITORY / f"config/{key.partition('.')[0]}.yaml", [f"backdoor.{key}={value}"])


@pytest.mark.parametrize(("name", "ratio"), [("adaptive_blend", 1), ("adaptive_patch", 2)])
def test_the_shipped_yamls(name: str, ratio: float) -> None:
    """Both poison exactly 150 of 50,000 images and have the authors' share of cover images."""
    c = config.load(REPOSITORY / f"config/{name}.yaml")
    assert (c.attack.name, c.attack.settings.cover_ratio) == (name, ratio)
    assert (int(c.attacker.poison_ratio * 50_000), c.attacker.poison_mode) == (150, "exact")
