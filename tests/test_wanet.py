"""WaNet: sampling positions of the pixels, cover images, and defaults by image size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from data.attack import CACHED
from data.attacks.wanet import Attack, Settings
from data.sets import AttackContext, RawData
from utils import config
from utils.draws import numpy_generator
from utils.errors import UserError


def make(settings: Settings, height: int = 32, width: int = 32, seed: int = 0) -> Attack:
    """The attack for images of the given size."""
    images, labels = np.zeros((1, height, width, 3), np.uint8), np.zeros(1, np.int64)
    return Attack(settings, AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, seed, Path("nowhere")))


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random read-only images."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images.flags.writeable = False
    return images


# -- The reference: loops over pixels, in pixel coordinates ------------------------------------------------------------


def cubic(t: float) -> float:
    """The cubic of bicubic interpolation, a = -0.75."""
    t, a = abs(t), -0.75
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def enlarge(line: list[float], size: int) -> list[float]:
    """Enlarge a line so that its ends are kept; beyond the ends the last values are repeated."""
    out = []
    for i in range(size):
        at = i * (len(line) - 1) / (size - 1)
        start = math.floor(at)
        taps = [(line[min(max(j, 0), len(line) - 1)], cubic(at - j)) for j in range(start - 1, start + 3)]
        out.append(sum(value * weight for value, weight in taps))
    return out


def places(height: int, width: int, k: int, s: float, seed: int) -> np.ndarray:
    """The position (column, row) at which each pixel is sampled, in pixels: (H, W, 2)."""
    shifts = numpy_generator(seed, "wanet").uniform(-1, 1, (2, k, k))
    shifts = shifts / np.mean([abs(value) for value in shifts.ravel()])
    out = np.zeros((height, width, 2))
    for axis, side in enumerate((width, height)):
        across = [enlarge(row, width) for row in shifts[axis].tolist()]
        field = np.array([enlarge(list(column), height) for column in zip(*across, strict=True)]).T  # (H, W)
        for row in range(height):
            for column in range(width):
                place = (column, row)[axis] + s * field[row, column] / side * (side - 1) / 2
                out[row, column, axis] = min(max(place, 0), side - 1)
    return out


def sample(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Sample an image (H, W, 3) at the positions (H, W, 2), bilinearly between four pixels."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = at[row, column]
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            u, v = x - left, y - top
            for c in range(3):
                a, b = float(image[top, left, c]), float(image[top, left + 1, c])
                d, e = float(image[top + 1, left, c]), float(image[top + 1, left + 1, c])
                out[row, column, c] = round((1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * d + u * e))
    return out


@pytest.mark.parametrize(
    ("height", "width", "k", "s", "seed"), [(32, 32, 4, 0.5, 0), (32, 32, 4, 0.5, 7), (14, 23, 5, 3.0, 1), (9, 8, 1, 1.0, 2)]
)
def test_poisoned_images_equal_the_formulas(height: int, width: int, k: int, s: float, seed: int) -> None:
    """Every value follows the paper: control points of mean 1, bicubic field, clamped grid, bilinear sampling, rounding."""
    images, attack = noise(3, height, width), make(Settings(k, s), height, width, seed)
    at = places(height, width, k, s, seed)
    out = attack.apply(images, np.arange(3), "train")
    assert out.dtype == np.uint8 and out.shape == images.shape and not np.shares_memory(out, images)
    for image, warped in zip(images, out, strict=True):
        assert np.array_equal(warped, sample(image, at))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (14, 23)])
def test_cover_images_equal_the_formulas(height: int, width: int) -> None:
    """A cover image is sampled like a poisoned one, at positions shifted by up to half a pixel, drawn for its index."""
    images, index, attack = noise(3, height, width), np.array([5, 0, 77]), make(Settings(4, 0.5), height, width, 3)
    at = places(height, width, 4, 0.5, 3)
    half = np.array([(width - 1) / width, (height - 1) / height]) / 2
    for image, i, out in zip(images, index, attack.cover(images, index), strict=True):
        jitter = numpy_generator(3, "wanet", "cover", i).uniform(-1, 1, at.shape) * half
        assert 0.4 < abs(jitter).max() < 0.5
        assert np.array_equal(out, sample(image, (at + jitter).clip(0, [width - 1, height - 1])))


# -- Properties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 224])
def test_strength_0_is_the_identity(side: int) -> None:
    """With s 0 every pixel is sampled at its own position, so the images do not change."""
    images = noise(3, side, side)
    assert np.array_equal(make(Settings(s=0.0), side, side).apply(images, np.arange(3), "train"), images)


@settings(deadline=None, max_examples=25)
@given(level=st.integers(0, 255), s=st.floats(0, 20), k=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_an_image_of_one_color_does_not_change(level: int, s: float, k: int, seed: int) -> None:
    """Nothing outside of the image is sampled: a constant image does not change, poisoned or cover, at any strength."""
    images, attack = np.full((2, 32, 32, 3), level, np.uint8), make(Settings(k, s), seed=seed)
    assert np.array_equal(attack.apply(images, np.arange(2), "test"), images)
    assert np.array_equal(attack.cover(images, np.arange(2)), images)


@settings(deadline=None, max_examples=25)
@given(low=st.integers(0, 255), high=st.integers(0, 255), s=st.floats(0, 20), seed=st.integers(0, 2**32 - 1))
def test_no_value_leaves_its_channels_range(low: int, high: int, s: float, seed: int) -> None:
    """Sampling between pixels never overshoots: the range of each channel is within that of the image."""
    low, high = min(low, high), max(low, high)
    images = np.random.default_rng(seed).integers(low, high + 1, (2, 32, 32, 3)).astype(np.uint8)
    images[..., 1] //= 2
    attack = make(Settings(s=s), seed=seed)
    for out in (attack.apply(images, np.arange(2), "train"), attack.cover(images, np.arange(2))):
        assert (out.max((1, 2)) <= images.max((1, 2))).all() and (out.min((1, 2)) >= images.min((1, 2))).all()


def shifts_of(attack: Attack) -> np.ndarray:
    """The shift of every pixel along each axis, in pixels: (2, H, W)."""
    height, width = attack.grid.shape[:2]
    x, y = (attack.grid.numpy() + 1).transpose(2, 0, 1) / 2 * np.array([width - 1, height - 1])[:, None, None]
    rows, columns = np.mgrid[:height, :width]
    return np.stack([x - columns, y - rows])


def test_pixels_move_by_a_fifth_of_a_pixel() -> None:
    """With the defaults at 32 px a pixel is sampled 0.18 px away on average and always less than 1 px, whatever the seed."""
    moved = np.array([abs(shifts_of(make(Settings(), seed=seed))) for seed in range(100)])
    assert abs(moved.mean() - 0.18) < 0.01
    assert moved.mean((1, 2, 3)).min() > 0.12
    assert moved.max() < 1


def test_a_ramp_shows_the_warp() -> None:
    """In an image whose brightness grows by 8 levels per pixel, the warp changes it by 8 levels times the shift."""
    ramp = np.broadcast_to((np.arange(32) * 8)[None, None, :, None], (1, 32, 32, 3)).astype(np.uint8)
    attack = make(Settings(), seed=4)
    change = attack.apply(ramp, np.arange(1), "test").astype(float) - ramp
    assert abs(change[0, ..., 0] - 8 * shifts_of(attack)[0]).max() <= 0.5 + 1e-9
    assert abs(change).max() >= 2


def test_the_defaults_follow_the_images_size() -> None:
    """null means k 4, s 0.5 for small images and k 32, s 1 from 128 px on; each of them may be given alone."""
    for side, k, s in ((32, 4, 0.5), (127, 4, 0.5), (128, 32, 1.0), (224, 32, 1.0)):
        grid = make(Settings(), side, side).grid
        assert np.array_equal(grid, make(Settings(k, s), side, side).grid)
        assert np.array_equal(grid, make(Settings(k=k), side, side).grid)
        assert np.array_equal(grid, make(Settings(s=s), side, side).grid)
        assert not np.array_equal(grid, make(Settings(k=k + 1), side, side).grid)


def test_the_warp_is_the_same_for_all_images_of_a_run() -> None:
    """Training and test images, in this process and in the next, are sampled with one grid, which depends on the seed only."""
    images = noise(2)
    out = make(Settings(), seed=1).apply(images, np.arange(2), "train")
    assert np.array_equal(make(Settings(), seed=1).apply(images, np.array([50, 8]), "test"), out)
    assert (make(Settings(), seed=2).apply(images, np.arange(2), "train") != out).mean() > 0.5


@pytest.mark.parametrize("side", [32, 224])
def test_an_image_alone_equals_the_same_image_among_others(side: int) -> None:
    """The result depends on image and index only: not on the other images, their order or their number."""
    count = CACHED // side**2 + 3
    images, attack = noise(count, side, side), make(Settings(), side, side)
    index = np.random.default_rng(1).permutation(1000)[:count]
    poisoned, cover = attack.apply(images, index, "train"), attack.cover(images, index)
    order = np.random.default_rng(2).permutation(count)
    assert np.array_equal(attack.apply(images[order], index[order], "train"), poisoned[order])
    assert np.array_equal(attack.cover(images[order], index[order]), cover[order])
    for i in (0, count - 1):
        assert np.array_equal(attack.cover(images[i : i + 1], index[i : i + 1])[0], cover[i])
    assert attack.apply(images[:0], index[:0], "train").shape == (0, side, side, 3)


def test_cover_images_have_a_jitter_of_their_own() -> None:
    """The same image gives another cover image for another index or seed, and each of them differs from the poisoned image."""
    image, attack = noise(1, seed=9), make(Settings())
    kinds = [attack.apply(image, np.arange(1), "train"), attack.cover(image, np.array([0])), attack.cover(image, np.array([1]))]
    kinds.append(make(Settings(), seed=1).cover(image, np.array([0])))
    for i, one in enumerate(kinds):
        assert all((one != other).mean() > 0.5 for other in kinds[:i])


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("k", 0), ("k", 1.5), ("s", -0.1), ("cover_ratio", -1)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    """The configuration refuses negative strengths and invalid counts."""
    with pytest.raises(UserError, match=rf"backdoor\.wanet\.{key}: {value}"):
        config.load(REPOSITORY / "config/wanet.yaml", [f"backdoor.wanet.{key}={value}"])


@pytest.mark.parametrize(("name", "ratio"), [("wanet", 0), ("wanet_cover", 2)])
def test_the_shipped_yamls_replace_the_base_s_attack(name: str, ratio: float) -> None:
    """config/wanet.yaml and wanet_cover.yaml keep the paper's ratio and target and differ in their cover images only."""
    c = config.load(REPOSITORY / f"config/{name}.yaml")
    assert (c.attack.name, c.attack.settings) == ("wanet", Settings(cover_ratio=ratio))
    assert (c.backdoor.poison_ratio, c.backdoor.target_label) == (0.05, 3)
