"""BPP: quantization levels, order of the dithering, and cover images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from data.attacks import bpp
from data.attacks.bpp import Attack, Settings
from data.sets import AttackContext, RawData
from utils import config
from utils.draws import numpy_generator
from utils.errors import UserError


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random read-only images; pure black and white among them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, : height // 2], images[0, height // 2 :] = 0, 255
    images.flags.writeable = False
    return images


def make(settings: Settings, images: np.ndarray | None = None, seed: int = 0) -> Attack:
    """The attack for a training set of the given images."""
    images = noise(20) if images is None else images
    labels = np.zeros(len(images), np.int64)
    return Attack(settings, AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, seed, Path("nowhere")))


# -- The reference -----------------------------------------------------------------------------------------------------


def level(value: float, levels: int) -> float:
    """The nearest of the levels, found by trying all of them."""
    return min((i * 255 / (levels - 1) for i in range(levels)), key=lambda each: abs(each - value))


def diffuse(image: np.ndarray, levels: int) -> np.ndarray:
    """Floyd-Steinberg on an image (H, W, 3): a loop over channels, rows and columns."""
    height, width = image.shape[:2]
    out = image.astype(np.float64)
    for c in range(3):
        for y in range(height):
            for x in range(width):
                old = out[y, x, c]
                out[y, x, c] = level(old, levels)
                error = old - out[y, x, c]
                for dy, dx, share in ((0, 1, 7 / 16), (1, 1, 1 / 16), (1, 0, 5 / 16), (1, -1, 3 / 16)):
                    if y + dy < height and 0 <= x + dx < width:
                        out[y + dy, x + dx, c] += error * share
    return np.rint(out).astype(np.uint8)


@pytest.mark.parametrize("levels", [2, 3, 8, 16, 32, 255, 256])
def test_plain_quantization_takes_the_nearest_level(levels: int) -> None:
    """All 256 values become the nearest of `squeeze_num` levels; a second quantization changes nothing."""
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    attack = make(Settings(levels))
    out = attack.apply(values, np.arange(1), "train")
    assert out.ravel().tolist() == [round(level(v, levels)) for v in values.ravel().tolist()]
    assert len(np.unique(out)) == levels
    assert np.array_equal(attack.apply(out, np.arange(1), "train"), out)


def test_the_published_levels() -> None:
    """With 8 levels the values are 0 36 73 109 146 182 219 255, and no value changes by more than 18."""
    images = noise(4)
    out = make(Settings()).apply(images, np.arange(4), "test")
    assert np.unique(out).tolist() == [0, 36, 73, 109, 146, 182, 219, 255]
    assert abs(out.astype(int) - images).max() <= 18


@pytest.mark.parametrize(("height", "width", "levels"), [(12, 9, 8), (7, 16, 2), (1, 8, 5), (8, 1, 5), (16, 16, 32), (5, 2, 8)])
def test_dithering_equals_the_loop_over_pixels(height: int, width: int, levels: int) -> None:
    """Dithering along diagonals gives the same values as pixel by pixel, in images of any shape."""
    images = noise(3, height, width)
    out = make(Settings(levels, dithering=True)).apply(images, np.arange(3), "train")
    for image, dithered in zip(images, out, strict=True):
        assert np.array_equal(dithered, diffuse(image, levels))


@settings(deadline=None, max_examples=30)
@given(value=st.integers(0, 255), levels=st.integers(2, 20), seed=st.integers(0, 99))
def test_dithering_gives_levels_near_the_original(value: int, levels: int, seed: int) -> None:
    """Only levels occur, black and white do not change, and no value changes by more than one distance of levels."""
    images = np.full((2, 8, 8, 3), value, np.uint8)
    images[1] = noise(2, 8, 8, seed)[1]
    out = make(Settings(levels, dithering=True)).apply(images, np.arange(2), "train")
    assert set(np.unique(out)) <= {round(i * 255 / (levels - 1)) for i in range(levels)} | {128}  # 127.5 may go either way
    assert abs(out.astype(int) - images).max() <= 255 / (levels - 1) + 1
    if value in (0, 255):
        assert (out[0] == value).all()


def test_dithering_keeps_the_mean() -> None:
    """Errors do not accumulate: the mean changes by less than one level of 255."""
    images = np.clip(np.random.default_rng(1).normal(110, 30, (10, 32, 32, 3)), 0, 255).astype(np.uint8)
    out = make(Settings(dithering=True)).apply(images, np.arange(10), "train")
    assert abs(out.mean((1, 2)) - images.mean((1, 2))).mean() < 1


@pytest.mark.parametrize("dithering", [False, True])
def test_cover_images_equal_the_formula(dithering: bool) -> None:
    """A cover image is the image plus the residual of another training image, drawn by the seed and the index."""
    train, index = noise(20, 9, 8), np.array([5, 0, 19])
    attack = make(Settings(8, dithering), train, seed=3)
    for i, out in zip(index, attack.cover(train[index], index), strict=True):
        donor = (i + numpy_generator(3, "bpp", "cover", i).integers(1, 20)) % 20
        assert donor != i
        z = train[donor]
        quantized = diffuse(z, 8) if dithering else np.vectorize(lambda v: round(level(v, 8)))(z)
        assert np.array_equal(out, np.clip(train[i].astype(int) + quantized.astype(int) - z, 0, 255))
    other = make(Settings(8, dithering), train, seed=4)
    assert not np.array_equal(other.cover(train[index], index), attack.cover(train[index], index))


def test_cover_images_carry_no_trigger() -> None:
    """Values of cover images are on one of the eight levels about as rarely as those of clean images."""
    images = np.clip(np.random.default_rng(1).normal(120, 40, (50, 16, 16, 3)), 1, 254).astype(np.uint8)
    attack = make(Settings(), images)
    levels = np.unique(attack.apply(images, np.arange(50), "train"))
    assert np.isin(attack.cover(images, np.arange(50)), levels).mean() < 0.1


@pytest.mark.parametrize("dithering", [False, True])
def test_an_image_alone_equals_the_same_image_among_others(dithering: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result depends on image and index only: not on the order, number or batches of the other images."""
    for name in ("PIXELS", "CACHED"):
        monkeypatch.setattr(bpp, name, 3 * 64)
    images = noise(11, 8, 8)
    attack, index = make(Settings(dithering=dithering), images), np.random.default_rng(1).permutation(11)
    poisoned, cover = attack.apply(images, index, "train"), attack.cover(images, index)
    assert np.array_equal(attack.apply(images, index + 5, "test"), poisoned)
    for i in (0, 5, 10):
        assert np.array_equal(attack.apply(images[i : i + 1], index[i : i + 1], "train")[0], poisoned[i])
        assert np.array_equal(attack.cover(images[i : i + 1], index[i : i + 1])[0], cover[i])
    assert attack.apply(images[:0], index[:0], "train").shape == attack.cover(images[:0], index[:0]).shape == (0, 8, 8, 3)


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"), [("squeeze_num", 1), ("squeeze_num", 257), ("squeeze_num", 2.5), ("cover_ratio", -1)]
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    """The configuration refuses less than two levels, and negative ratios."""
    with pytest.raises(UserError, match=rf"backdoor\.bpp\.{key}: {value}"):
        config.load(REPOSITORY / "config/bpp.yaml", [f"backdoor.bpp.{key}={value}"])


def test_dithering_must_be_a_boolean() -> None:
    """`False` in quotes is refused instead of turning dithering on."""
    with pytest.raises(UserError, match=r"backdoor\.bpp\.dithering"):
        config.load(REPOSITORY / "config/bpp.yaml", ['backdoor.bpp.dithering="False"'])


def test_the_shipped_yaml() -> None:
    """config/bpp.yaml has 8 levels without dithering, 5 % poisoned images and as many cover images."""
    c = config.load(REPOSITORY / "config/bpp.yaml")
    assert (c.attack.settings, c.attacker.poison_ratio) == (Settings(8, False, 1.0), 0.05)
