"""Blend: pixel values, the built-in and the user's trigger image, and errors in its settings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.attack import CACHED
from data.attacks import blend
from data.attacks.blend import Attack, Settings
from data.sets import AttackContext, RawData
from utils import config
from utils.errors import UserError

IMAGE, TRIGGER = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))  # all pairs
ALPHAS = [0, 1e-9, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.54, 0.6, 0.65, 0.7, 0.8, 0.9, 0.99, 1]


def make(settings: Settings, height: int = 32, width: int = 32, seed: int = 0) -> Attack:
    """The attack for images of the given size."""
    images, labels = np.zeros((1, height, width, 3), np.uint8), np.zeros(1, np.int64)
    return Attack(settings, AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, seed, Path("nowhere")))


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random read-only images; pure black and white among them."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0], images[1] = 0, 255
    images.flags.writeable = False
    return images


def save(path: Path, pixels: np.ndarray) -> str:
    """Save pixels as an image file."""
    Image.fromarray(pixels).save(path)
    return str(path)


def with_all_pairs(alpha: float, folder: Path) -> np.ndarray:
    """The result for every value of the image (rows) and every value of the trigger image (columns): (256, 256)."""
    attack = make(Settings(save(folder / "all.png", TRIGGER[..., None].repeat(3, 2)), alpha), 256, 256)
    out = attack.apply(IMAGE[None, ..., None].repeat(3, 3), np.arange(1), "train")[0]
    assert np.array_equal(out, out[:, :, :1].repeat(3, 2))
    return out[:, :, 0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_pairs_of_values_equal_pillow(alpha: float, tmp_path: Path) -> None:
    """For all 65,536 pairs of values the result is that of Pillow's Image.blend, with which published sets were made."""
    expected = np.asarray(Image.blend(Image.fromarray(IMAGE), Image.fromarray(TRIGGER), alpha))
    assert np.array_equal(with_all_pairs(alpha, tmp_path), expected)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1))
def test_any_alpha_equals_pillow(alpha: float) -> None:
    """The same holds for every weight in 0..1."""
    expected = np.asarray(Image.blend(Image.fromarray(IMAGE), Image.fromarray(TRIGGER), alpha))
    assert np.array_equal(blend.blend(IMAGE, TRIGGER, alpha), expected)


@pytest.mark.parametrize("tenths", [0, 1, 2, 3, 5, 9, 10])
def test_the_blend_is_rounded_down(tenths: int, tmp_path: Path) -> None:
    """For whole tenths the result is `(10 - t) x + t P` divided by ten and rounded down, in integers."""
    expected = ((10 - tenths) * IMAGE.astype(int) + tenths * TRIGGER.astype(int)) // 10
    assert np.array_equal(with_all_pairs(tenths / 10, tmp_path), expected)


def test_no_value_moves_by_more_than_26_at_a_tenth(tmp_path: Path) -> None:
    """At the default weight no pixel value changes by more than 26 levels, and some change by 26."""
    assert abs(with_all_pairs(Settings().alpha, tmp_path).astype(int) - IMAGE).max() == 26


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (9, 14)])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.35, 1.0])
def test_the_trigger_covers_the_whole_image(height: int, width: int, alpha: float) -> None:
    """Each pixel is blended with the pixel of P at the same position; alpha 0 changes nothing, alpha 1 shows only P."""
    images, attack = noise(4, height, width), make(Settings(alpha=alpha), height, width, seed=5)
    assert attack.pattern.shape == (height, width, 3) and attack.pattern.dtype == np.uint8
    out = attack.apply(images, np.arange(4), "train")
    assert out.dtype == np.uint8 and out.shape == images.shape and not np.shares_memory(out, images)
    rng = np.random.default_rng(0)
    for n, row, column, c in zip(*(rng.integers(0, side, 2000) for side in images.shape), strict=True):
        x, p = int(images[n, row, column, c]), int(attack.pattern[row, column, c])
        assert out[n, row, column, c] == math.floor((1 - alpha) * x + alpha * p + 1e-9)
    if alpha == 0:
        assert np.array_equal(out, images)
    if alpha == 1:
        assert all(np.array_equal(image, attack.pattern) for image in out)


def test_built_in_trigger_is_uniform_noise_drawn_by_the_seed() -> None:
    """By default P is noise over all 256 levels, the same for the same seed and different for another."""
    first, again, other = (make(Settings(), 224, 224, seed).pattern for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.99
    counts = np.bincount(first.ravel(), minlength=256)
    mean = 224 * 224 * 3 / 256
    assert abs(counts - mean).max() < 5 * mean**0.5
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(first[..., 0].ravel(), first[..., 1].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("side", [32, 224])
def test_an_image_alone_equals_the_same_image_among_others(side: int) -> None:
    """The result depends on the image only: not on its index, the other images, their order, or the part of the data set."""
    count = CACHED // side**2 + 3
    images, attack = noise(count, side, side), make(Settings(), side, side)
    out = attack.apply(images, np.arange(count), "train")
    order = np.random.default_rng(3).permutation(count)
    assert np.array_equal(attack.apply(images[order], order, "test"), out[order])
    for i in (0, count - 1):
        assert np.array_equal(attack.apply(images[i : i + 1], np.array([999]), "train")[0], out[i])
    assert attack.apply(images[:0], np.arange(0), "train").shape == (0, side, side, 3)


@pytest.mark.parametrize(("side", "at_most"), [(32, 128), (224, 2), (1024, 1)])
def test_large_images_are_blended_few_at_a_time(side: int, at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images there are, at most 2**17 pixels (but at least one image) are converted to float at a time."""
    seen: list[int] = []
    monkeypatch.setattr(blend, "blend", lambda x, pattern, alpha: seen.append(len(x)) or x)
    images = np.zeros((5 if side > 32 else 300, side, side, 3), np.uint8)
    make(Settings(), side, side).apply(images, np.arange(len(images)), "test")
    assert max(seen) == at_most and sum(seen) == len(images)


# -- The user's trigger image ------------------------------------------------------------------------------------------


def cubic(t: float) -> float:
    """Keys' cubic with a = -0.5."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def resample(line: list[float], size: int) -> list[float]:
    """Resize one line of values with the cubic, which is widened if the line gets shorter and normalized at the borders."""
    scale = len(line) / size
    width = max(scale, 1.0)
    out = []
    for i in range(size):
        middle = (i + 0.5) * scale
        weights = [cubic((j + 0.5 - middle) / width) for j in range(len(line))]
        out.append(sum(w * v for w, v in zip(weights, line, strict=True)) / sum(weights))
    return [min(255.0, max(0.0, value)) for value in out]


def resize_rows(values: np.ndarray) -> np.ndarray:
    """Make each row 24 values long."""
    return np.array([resample(row, 24) for row in values.tolist()])


def resize_columns(values: np.ndarray) -> np.ndarray:
    """Make each column 20 values long."""
    return np.array([resample(column, 20) for column in values.T.tolist()]).T


@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 13), (8, 90)])
def test_a_trigger_of_another_size_is_resized_bicubically(height: int, width: int, tmp_path: Path) -> None:
    """The user's trigger image may have any size: it is enlarged or reduced with the cubic filter."""
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pattern = make(Settings(save(tmp_path / "p.png", pixels)), 20, 24).pattern
    assert pattern.shape == (20, 24, 3)
    wrong = []
    for rows_first in (True, False):  # each pass clips; which is first depends on Pillow's version
        passes = [resize_rows, resize_columns] if rows_first else [resize_columns, resize_rows]
        expected = [passes[1](passes[0](pixels[:, :, c].astype(float))) for c in range(3)]
        wrong.append(abs(pattern - np.stack(expected, 2)).max())
    assert min(wrong) < 2  # and each pass rounds


def test_a_trigger_of_the_images_size_is_not_changed(tmp_path: Path) -> None:
    """A trigger image of the right size is not filtered; a grey one is used for all three channels."""
    pixels = np.array(noise(3)[2])
    assert np.array_equal(make(Settings(save(tmp_path / "p.png", pixels))).pattern, pixels)
    assert np.array_equal(make(Settings(save(tmp_path / "g.png", pixels[:, :, 0]))).pattern, pixels[:, :, :1].repeat(3, 2))


def test_a_trigger_of_16_bits_keeps_its_upper_8(tmp_path: Path) -> None:
    """Grey levels of 16 bits are scaled, like those of a data set's images, and not cut off at 255."""
    levels = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    pattern = make(Settings(save(tmp_path / "deep.png", levels))).pattern
    assert np.array_equal(pattern, (levels >> 8).astype(np.uint8)[:, :, None].repeat(3, 2))


def test_trigger_path_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path starts at the working directory or, if there is no such file, at the project's folder."""
    monkeypatch.chdir(tmp_path)
    shipped = np.asarray(Image.open(REPOSITORY / "data/trigger/cifar_1.png").convert("RGB"))
    assert np.array_equal(make(Settings("./data/trigger/cifar_1.png")).pattern, shipped)
    save(tmp_path / "mine.png", np.array(noise(3)[2]))
    assert np.array_equal(make(Settings("mine.png")).pattern, noise(3)[2])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        (b"", "not a readable image"),
        (b"this is text\nof two lines", "not a readable image"),
        ("cut", "not a readable image"),
        ("folder", "not a readable image"),
    ],
)
def test_an_invalid_trigger_file_is_one_line(content: object, complaint: str, tmp_path: Path) -> None:
    """A trigger file that is missing, damaged or not an image is one line with its name, the setting and a remedy."""
    path = tmp_path / "trigger.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        save(path, np.array(noise(3)[2]))
        path.write_bytes(path.read_bytes()[:-300])
    elif content == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=complaint) as caught:
        make(Settings(str(path)))
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "backdoor.blend.trigger_path" in text and "\n" not in text


@pytest.mark.parametrize("alpha", [-0.01, 1.01])
def test_a_weight_outside_0_to_1_is_refused(alpha: float) -> None:
    """The configuration refuses an invalid weight and names the legal range."""
    with pytest.raises(UserError, match=r"backdoor\.blend\.alpha.*>= 0 and <= 1"):
        config.load(REPOSITORY / "config/blend.yaml", [f"backdoor.blend.alpha={alpha}"])


def test_the_shipped_yaml_is_the_papers() -> None:
    """config/blend.yaml replaces BadNets by Blend at a tenth and keeps the paper's ratio and target."""
    c = config.load(REPOSITORY / "config/blend.yaml")
    assert (c.attack.name, c.attack.settings) == ("blend", Settings())
    assert (c.attack.settings.alpha, c.backdoor.poison_ratio, c.backdoor.target_label) == (0.1, 0.05, 3)
