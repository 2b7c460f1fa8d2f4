"""Refool: the light of a reflection, the draws for an image, the reflected images, and errors in settings."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.attack import BATCH
from data.attacks import refool
from data.attacks.refool import Attack, Settings
from data.sets import AttackContext, RawData
from utils import config
from utils.errors import UserError


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random read-only images of every brightness; pure black and white among them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3)) * rng.uniform(0, 1, (count, 1, 1, 1))
    out = images.astype(np.uint8)
    out[:1], out[1:2] = 0, 255
    out.flags.writeable = False
    return out


def context(images: np.ndarray, labels: np.ndarray | None = None, seed: int = 0) -> AttackContext:
    """A training set of which class 3 is the target."""
    labels = np.zeros(len(images), np.int64) if labels is None else labels
    return AttackContext(RawData(images, labels, images[:1], labels[:1], tuple("abcdefghij")), 3, 10, seed, Path("nowhere"))


def behind(reflection: np.ndarray | int, side: int = 32, width: int = 0, seed: int = 0, **chosen: Any) -> Attack:
    """The attack with one reflection: the given image (H, W, 3), or a constant grey level."""
    shape = (1, side, width or side, 3)
    images = np.full(shape, reflection, np.uint8) if isinstance(reflection, int) else reflection[None]
    return Attack(Settings(source="classes", **chosen), context(images, seed=seed))


def triggered(attack: Attack, images: np.ndarray, split: str = "train") -> np.ndarray:
    """The images, numbered from 0, with the trigger."""
    return attack.apply(images, np.arange(len(images)), split)


# -- The light of a reflection -----------------------------------------------------------------------------------------


def to_light(image: np.ndarray) -> np.ndarray:
    """Convert uint8 to linear light."""
    return (image.astype(np.float64) / 255) ** 2.2


def to_pixels(light: np.ndarray) -> np.ndarray:
    """Convert linear light to levels, not rounded."""
    return np.minimum(np.maximum(light, 0), 1) ** (1 / 2.2) * 255


def resize_linearly(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge (h, w, 3) pixel by pixel, interpolating between pixel centers; border values are repeated."""
    h, w, _ = image.shape
    out = np.zeros((height, width, 3))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            top, left = math.floor(y), math.floor(x)
            low, right = min(top + 1, h - 1), min(left + 1, w - 1)
            p, q = y - top, x - left
            upper = (1 - q) * image[top, left] + q * image[top, right]
            out[i, j] = (1 - p) * upper + p * ((1 - q) * image[low, left] + q * image[low, right])
    return out


def slow_ghost(x: np.ndarray, r: np.ndarray, a: float, down: int, right: int, w: float) -> np.ndarray:
    """The formula on one image, with each copy of the reflection placed on a canvas."""
    h, width, _ = r.shape
    canvas = np.zeros((2, h + down, width + right, 3))
    canvas[0, :h, :width] = to_light(r)
    canvas[1, down:, right:] = to_light(r)
    both = (w * canvas[0] + (1 - w) * canvas[1])[down:h, right:width]  # where the canvases hold both copies
    return to_pixels((1 - a) * resize_linearly(both, h, width) + a * to_light(x))


def slow_blur(r: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian of 2 ceil(2 sigma) + 1 squared taps, summed tap by tap, mirrored about the border's pixels."""
    radius = math.ceil(2 * sigma)
    wide = np.pad(r, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    out, total = np.zeros_like(r), 0.0
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            tap = math.exp(-(i * i + j * j) / (2 * sigma * sigma))
            out += tap * wide[radius + i : radius + i + r.shape[0], radius + j : radius + j + r.shape[1]]
            total += tap
    return out / total


def slow_out_of_focus(x: np.ndarray, r: np.ndarray, a: float, sigma: float, factor: float) -> np.ndarray:
    """The formula on one image, channel by channel."""
    h, width, _ = r.shape
    mirror, light = slow_blur(to_light(r), sigma), to_light(x)
    bell = np.zeros((h, width))
    for i in range(h):
        for j in range(width):
            u, v = 6 * i / (h - 1) - 3, 6 * j / (width - 1) - 3
            bell[i, j] = math.sqrt(math.exp(-u * u / 2) * math.exp(-v * v / 2))
    bell /= bell.max()
    out = np.zeros_like(light)
    for c in range(3):
        total = mirror[:, :, c] + light[:, :, c]
        bright = total[total > 1 + 1e-9]  # a sum of 1 is none of them, whatever the last bit says
        mean = bright.mean() if bright.size else 1.0
        dimmed = np.clip(mirror[:, :, c] - (mean - 1) * factor, 0, 1)
        out[:, :, c] = dimmed * bell * (1 - a / 2) + a * light[:, :, c]
    return to_pixels(out)


CASES = st.tuples(st.integers(0, 10**6), st.sampled_from([(12, 12), (9, 14), (32, 32)]), st.floats(0.05, 0.45))


@settings(deadline=None, max_examples=15)
@given(CASES, st.sampled_from([0.0, 0.1, 0.2]), st.floats(0.15, 0.5))
def test_a_ghost_is_the_formula_pixel_by_pixel(case: tuple[int, tuple[int, int], float], shift: float, weight: float) -> None:
    """Two shifted copies of the reflection, with weights w and 1 - w in either order, are mixed with the image's light."""
    seed, (height, width), taken = case
    images, r = noise(6, height, width, seed), noise(3, height, width, seed + 1)[2]
    attack = behind(
        r, reflectance=(taken, taken), shift=(shift, shift), ghost_weight=(weight, weight), ghost_probability=1.0, seed=seed
    )
    pixels = max(1, round(shift * min(height, width)))
    for x, out in zip(images, triggered(attack, images), strict=True):
        wanted = [slow_ghost(x, r, 1 - taken, pixels, pixels, w) for w in (weight, 1 - weight)]
        assert min(abs(out - w).max() for w in wanted) < 0.5 + 1e-6


@settings(deadline=None, max_examples=15)
@given(CASES, st.sampled_from([0.0, 0.08, 0.13, 0.2]), st.floats(1.08, 1.18))
def test_out_of_focus_is_the_formula_pixel_by_pixel(
    case: tuple[int, tuple[int, int], float], sigma: float, factor: float
) -> None:
    """From the blurred reflection the mean excess is subtracted; it is clipped, fades to the corners and is added to the
    image."""
    seed, (height, width), taken = case
    images, r = noise(6, height, width, seed), noise(3, height, width, seed + 1)[2]
    attack = behind(
        r, reflectance=(taken, taken), sigma=(sigma, sigma), attenuation=(factor, factor), ghost_probability=0.0, seed=seed
    )
    for x, out in zip(images, triggered(attack, images), strict=True):
        wanted = slow_out_of_focus(x, r, 1 - taken, max(1.0, sigma * min(height, width)), factor)
        assert abs(out - wanted).max() < 0.5 + 1e-6


def test_bright_reflections_are_dimmed_before_they_overexpose() -> None:
    """If reflection and image are both white, the reflection is dimmed: the result is not a white disc."""
    plain = behind(255, ghost_probability=0.0, attenuation=(0.0, 0.0))
    dimmed, white = behind(255, ghost_probability=0.0), np.full((50, 32, 32, 3), 255, np.uint8)
    assert (triggered(plain, white)[:, 15, 15] == 255).all()
    darkest, brightest = (round(a ** (1 / 2.2) * 255) for a in (0.55, 0.95))  # of (a x) with nothing added
    assert darkest <= triggered(dimmed, white).min() and triggered(dimmed, white).max() <= brightest


def test_the_shifts_of_a_ghost_along_both_axes_are_independent() -> None:
    """The copies are 1 to 3 px apart along each axis; all nine pairs occur, with weight w on either copy."""
    images, r = noise(150, 10, 14, 4), noise(3, 10, 14, 5)[2]
    attack = behind(r, ghost_probability=1.0, shift=(0.1, 0.3), reflectance=(0.4, 0.4), ghost_weight=(0.2, 0.2))
    seen = set()
    for x, out in zip(images[2:], triggered(attack, images)[2:], strict=True):
        for case in [(down, right, w) for down in (1, 2, 3) for right in (1, 2, 3) for w in (0.2, 0.8)]:
            if abs(out - slow_ghost(x, r, 0.6, *case)).max() < 0.5 + 1e-6:
                seen.add(case)
                break
        else:
            raise AssertionError("no pair of whole shifts gives this image")
    assert len(seen) == 18


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["train", "test"]), st.floats(0, 1))
def test_a_black_reflection_only_darkens(seed: int, split: str, ghosts: float) -> None:
    """With a black reflection the pane only takes light away: no pixel becomes brighter, and bright ones become darker."""
    images = noise(20, seed=seed)
    out = triggered(behind(0, seed=seed, ghost_probability=ghosts), images, split)
    assert (out <= images).all()
    assert (out[images > 60] < images[images > 60]).all()
    a = np.array([image.max() / before.max() for image, before in zip(out, images, strict=True) if before.max() > 200]) ** 2.2
    assert (a > 0.54).all() and (a < 0.96).all()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6), st.sampled_from([0, 1, 254, 255]), st.sampled_from([0, 1, 254, 255]),
    st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)]), st.sampled_from([(0.0, 0.0), (0.25, 0.25)]),
    st.sampled_from([0.0, 9.0]),
)  # fmt: skip
def test_no_light_is_out_of_range(
    seed: int, x: int, r: int, taken: tuple[float, float], sigma: tuple[float, float], factor: float
) -> None:
    """Black and white images and reflections with extreme settings give values in the possible range, never NaN."""
    images = np.full((8, 12, 10, 3), x, np.uint8)
    common: dict[str, Any] = dict(side=12, width=10, seed=seed, reflectance=taken, sigma=sigma, attenuation=(factor, factor))
    with np.errstate(all="raise"):
        ghosts = triggered(behind(r, ghost_probability=1.0, **common), images)
        blurs = triggered(behind(r, ghost_probability=0.0, **common), images)
    assert ghosts.min() >= min(x, r) and ghosts.max() <= max(x, r)
    assert blurs.max() <= (255 if x and r else max(x, r))
    if x == r == 255:
        assert (ghosts == 255).all()


# -- The draws for an image --------------------------------------------------------------------------------------------


def test_the_published_ranges_are_drawn() -> None:
    """49 % of the images have a ghost, and images keep 55 to 95 % of their light, uniformly distributed."""
    # Black images and a white reflection: the result is the weight of the reflection.
    out = triggered(behind(255), np.zeros((3000, 32, 32, 3), np.uint8))[..., 0] / 255.0
    ghost = out[:, 0, 0] == out[:, 15, 15]  # the other kind fades to the corners
    assert abs(ghost.mean() - 0.49) < 0.03
    light = out[:, 15, 15] ** 2.2
    taken = np.where(ghost, light, 2 * light - 1)  # 1 - a, from 1 - a and from 1 - a / 2
    for kind in (ghost, ~ghost):
        assert abs(taken[kind].min() - 0.05) < 0.01 and abs(taken[kind].max() - 0.45) < 0.01
        assert abs(taken[kind].mean() - 0.25) < 0.01
    corner, middle = out[~ghost][:, 0, 0] ** 2.2, light[~ghost]
    assert abs(corner / middle - math.exp(-4.5)).max() < 0.002  # about 0.01


def test_either_copy_of_a_ghost_may_be_the_fainter_one() -> None:
    """The left copy of an edge has a weight in 0.15 to 0.5 as often as one in 0.5 to 0.85."""
    edge = np.zeros((32, 32, 3), np.uint8)
    edge[:, 16:] = 255
    attack = behind(edge, ghost_probability=1.0, reflectance=(1.0, 1.0))  # the image itself is not visible
    out = triggered(attack, np.zeros((2000, 32, 32, 3), np.uint8))[..., 16, 0].astype(float)
    # 31 columns stretched to 32: the center of column 16 is at 15.484; one copy is bright from 16 on, the other from 15.
    at = 16.5 * 31 / 32 - 0.5
    part = at - math.floor(at)
    brighter = ((out[:, 10] / 255) ** 2.2 - part) / (1 - part)  # weight of the copy that is bright at column 15
    assert brighter.min() > 0.14 and brighter.max() < 0.86
    assert abs(brighter.mean() - 0.5) < 0.03 and abs((brighter < 0.5).mean() - 0.5) < 0.04


@pytest.mark.parametrize(("side", "pixels"), [(560, {3, 4, 5, 6, 7, 8}), (224, {1, 2, 3}), (32, {1}), (8, {1})])
def test_shifts_are_whole_pixels_in_proportion_to_the_image(side: int, pixels: set[int]) -> None:
    """At 560 px the copies are 3 to 8 px apart, with equal probability; in smaller images proportionally less, at least 1."""
    drawn = refool.whole_between(Settings().shift, side, torch.arange(6000, dtype=torch.float64) / 6000)
    values, counts = np.unique(drawn.numpy(), return_counts=True)
    assert set(values.tolist()) == pixels
    assert counts.max() - counts.min() <= 1


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_an_image_depends_on_seed_split_and_index_alone(seed: int, random: Any) -> None:
    """Each image gets the same pixels, whichever images are altered together and in whatever order."""
    images = noise(12, seed=seed % 1000)
    attack = Attack(Settings(source="classes", count=5), context(noise(9, seed=1), seed=seed))
    index = np.array([0, 1, 2, 3, 5, 8, 13, 400, 1000, 40_000, 41_000, 49_999])
    whole = attack.apply(images, index, "train")
    order = random.sample(range(12), 12)
    assert np.array_equal(attack.apply(images[order], index[order], "train"), whole[order])
    for i in random.sample(range(12), 3):
        assert np.array_equal(attack.apply(images[i : i + 1], index[i : i + 1], "train")[0], whole[i])
    again = Attack(Settings(source="classes", count=5), context(noise(9, seed=1), seed=seed))
    torch.manual_seed(5)
    assert np.array_equal(again.apply(images, index, "train"), whole)


@pytest.mark.parametrize("source", ["classes", "textures"])
def test_seed_split_and_index_each_change_the_reflection(source: str) -> None:
    """The same image with another index, in the test set or with another seed has another reflection."""
    images = np.repeat(noise(5)[4:], 40, 0)
    out, other = (triggered(Attack(Settings(source=source), context(noise(60, seed=1), seed=seed)), images) for seed in (0, 1))
    assert len({image.tobytes() for image in out}) == 40
    assert (other != out).any((1, 2, 3)).all()
    one, two = behind(200), behind(200, seed=1)  # a single reflection: only the way of reflecting is drawn
    assert (triggered(one, images) != triggered(two, images)).any((1, 2, 3)).all()
    assert (triggered(one, images) != triggered(one, images, "test")).any((1, 2, 3)).all()


def test_every_reflection_is_used_about_equally_often() -> None:
    """All reflections are drawn equally often."""
    pool = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(12, 1).repeat(12, 2).repeat(3, 3) * 50
    attack = Attack(
        Settings(source="classes", ghost_probability=1.0, reflectance=(1.0, 1.0)),  # only the reflection is visible
        context(pool),
    )
    out = triggered(attack, np.zeros((2000, 12, 12, 3), np.uint8))
    levels, counts = np.unique(out[:, 6, 6, 0], return_counts=True)
    assert levels.tolist() == [50, 100, 150, 200, 250]
    assert (abs(counts - 400) < 90).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (20, 48), (2, 2)])
def test_images_of_any_size_and_number(height: int, width: int) -> None:
    """Batches at 32 and 224 px, images that are not square, and empty batches are returned as uint8 of the same shape,
    altered."""
    images = np.random.default_rng(0).integers(60, 250, (BATCH + 3 if height == 32 else 3, height, width, 3), dtype=np.uint8)
    for source in ("classes", "textures"):
        attack = Attack(Settings(source=source, count=4), context(noise(4, height, width, 1)))
        out = triggered(attack, images)
        assert out.dtype == np.uint8 and out.shape == images.shape
        assert not np.shares_memory(out, images)
        assert (out != images).any((1, 2, 3)).all()
        assert attack.apply(images[:0], np.arange(0), "test").shape == (0, height, width, 3)


# -- The reflected images ----------------------------------------------------------------------------------------------


def paint(path: Path, pixels: np.ndarray) -> Path:
    """Save pixels as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_is_read_by_name_and_resized_linearly(tmp_path: Path) -> None:
    """The first `count` images in order of their names are used, whatever their size, kind and date; other and hidden
    files are ignored."""
    images = noise(5, 40, 50, 3)
    for name, pixels in zip(("d.png", "a.PNG", "c.bmp", "b.ppm", "e.webp"), images, strict=True):
        paint(tmp_path / name, pixels)
    paint(tmp_path / "inside" / "0.png", images[0])
    (tmp_path / "README.txt").write_text("not an image")
    (tmp_path / "._a.png").write_text("not an image: macOS leaves such files on other disks")
    kept = Attack(Settings(reflections=str(tmp_path), count=4), context(noise(3, 16, 24))).reflections
    wanted = [Image.fromarray(images[i]).resize((24, 16), Image.Resampling.BILINEAR) for i in (1, 3, 2, 0)]
    assert np.array_equal(kept, np.stack([np.asarray(image) for image in wanted]))
    assert len(Attack(Settings(reflections=str(tmp_path)), context(noise(3, 16, 24))).reflections) == 5


def test_grey_and_transparent_images_are_read_as_colors(tmp_path: Path) -> None:
    """Grey, paletted and transparent images are reflected with their colors."""
    level = np.full((9, 9), 77, np.uint8)
    Image.fromarray(level).save(tmp_path / "a.png")
    Image.fromarray(level).convert("P").save(tmp_path / "b.png")
    Image.fromarray(np.dstack([level] * 4)).save(tmp_path / "c.png")
    kept = Attack(Settings(reflections=str(tmp_path)), context(noise(1, 9, 9))).reflections
    assert np.array_equal(kept, np.full((3, 9, 9, 3), 77))


@pytest.mark.parametrize("broken", ["missing", "file", "empty", "text only", "cut", "text", "a folder"])
def test_an_invalid_folder_is_one_line_with_the_remedy(tmp_path: Path, broken: str) -> None:
    """A folder that is missing or without images, and an image that cannot be read, are each named in one line."""
    folder = tmp_path / "mirror"
    named = folder
    if broken == "file":
        folder.write_text("x")
    elif broken != "missing":
        folder.mkdir()
        if broken != "empty":
            (folder / "notes.txt").write_text("x")
        if broken in ("cut", "text", "a folder"):
            paint(folder / "a.png", noise(3)[2])
            named = folder / "b.png"
        if broken == "cut":
            named.write_bytes((folder / "a.png").read_bytes()[:-300])
        elif broken == "text":
            named.write_text("x")
        elif broken == "a folder":
            named.mkdir()
    with pytest.raises(UserError) as caught:
        Attack(Settings(reflections=str(folder)), context(noise(1)))
    text = str(caught.value)
    assert str(named) in text and "backdoor.refool.reflections" in text and "\n" not in text
    assert any(remedy in text for remedy in ("give a folder", "correct backdoor", "add some", "another file, e.g. a PNG"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    """The error for a folder without read permission says so."""
    tmp_path.chmod(0)
    with pytest.raises(UserError, match="Permission"):
        Attack(Settings(reflections=str(tmp_path)), context(noise(1)))
    tmp_path.chmod(0o700)


def test_reflections_of_other_classes_are_drawn_by_the_seed() -> None:
    """200 different training images are drawn, none of the target class; the same ones for the same seed."""
    images = np.zeros((500, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(500) // 256, np.arange(500) % 256
    labels = np.arange(500) % 10

    def drawn(seed: int) -> list[int]:
        kept = Attack(Settings(source="classes"), context(images, labels, seed)).reflections.astype(int)
        return [int(i) for i in kept[:, 0, 0, 0] * 256 + kept[:, 0, 0, 1]]

    assert len(set(drawn(0))) == 200
    assert {int(labels[i]) for i in drawn(0)} == set(range(10)) - {3}
    assert drawn(0) == drawn(0) != drawn(1)
    small = Attack(Settings(source="classes"), context(images[:50], labels[:50])).reflections
    assert len(small) == 45  # a small set gives all that it has


def test_a_set_of_the_target_class_only_cannot_be_reflected() -> None:
    """If there are no images of other classes, the error names the setting and the remedy."""
    with pytest.raises(UserError, match=r"backdoor\.refool\.source: classes: .*class 3 \(d\): set textures"):
        Attack(Settings(source="classes"), context(noise(4), np.full(4, 3)))


def test_a_source_beside_a_folder_is_refused(tmp_path: Path) -> None:
    """With a folder of reflections, `source: classes` would have no effect."""
    with pytest.raises(UserError, match=r"backdoor\.refool\.source: classes: has no effect with reflections"):
        Attack(Settings(reflections=str(tmp_path), source="classes"), context(noise(4)))


def test_textures_are_drawn_by_the_seed_and_alike_at_every_size() -> None:
    """Procedural textures differ from one another and by seed, have contrast, and show the same context at 32 and at 224 px."""

    def drawn(seed: int, side: int) -> np.ndarray:
        return Attack(Settings(source="textures", count=20), context(noise(1, side, side), seed=seed)).reflections

    small, large = drawn(0, 32), drawn(0, 224)
    more = Attack(Settings(source="textures", count=25), context(noise(1))).reflections
    assert np.array_equal(more[:20], small)  # asking for more keeps the first ones
    assert np.array_equal(small, drawn(0, 32)) and (small != drawn(1, 32)).any((1, 2, 3)).all()
    assert len({texture.tobytes() for texture in small}) == 20
    assert (small.max((1, 2)) >= 220).all() and (small.min((1, 2)) <= 25).all()  # of each channel: networks need the contrast
    assert abs(large[:, 3::7, 3::7].astype(int) - small).max() <= 1  # the middle pixel of each 7 x 7


# -- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reflectance", "ghost_weight", "shift", "sigma", "attenuation"])
@pytest.mark.parametrize("value", [(), (0.1,), (0.2, 0.1), (0.1, 0.2, 0.2)])
def test_a_range_is_two_numbers_in_order(name: str, value: tuple[float, ...]) -> None:
    """An invalid range is one line with its key and value."""
    with pytest.raises(UserError, match=rf"backdoor\.refool\.{name}: .*2 numbers in ascending order$") as caught:
        config.load(REPOSITORY / "config/refool.yaml", [f"backdoor.refool.{name}={list(value)}"])
    assert str(list(value)) in str(caught.value)


def test_the_shipped_configuration_names_refool_alone() -> None:
    """config/refool.yaml replaces BadNets by Refool with the published ranges, and keeps ratio and target."""
    backdoor = config.load(REPOSITORY / "config/refool.yaml").backdoor
    assert (backdoor.attack.name, backdoor.poison_ratio, backdoor.target_label) == ("refool", 0.05, 3)
    assert backdoor.attack.settings == Settings()
    assert (Settings().count, Settings().ghost_probability, Settings().reflectance) == (200, 0.49, (0.05, 0.45))
