"""Augmentation: batched tensor code compared with torchvision on single images, for the same draws."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as TF2

from data.augment import Pipeline
from data.sets import ImageSet
from data.transforms import (
    center_crop,
    cutout,
    gaussian_blur,
    normalize,
    random_color_jitter,
    random_crop,
    random_grayscale,
    random_horizontal_flip,
    random_resize_crop,
    resize,
)
from engine.context import build_transforms
from utils import config, plugins
from utils.config.schema import Named
from utils.errors import UserError

MODES = ("constant", "edge", "reflect", "symmetric")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NORMALIZE = Named("normalize", normalize.Settings(MEAN, STD))


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images of noise, in which neighboring pixels differ: (count, 3, height, width) uint8."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def smooth(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images with soft color gradients, like photographs."""
    small = noise(count, 4, 4, seed).float()
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").round().to(torch.uint8)


def as_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 as a PIL image, as in the authors' pipeline."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """A PIL image as (3, H, W) uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def pil_move(image: Image.Image, step: Any, row: list[float]) -> Image.Image:
    """One crop or flip with torchvision's functions on a PIL image."""
    if isinstance(step, random_crop.Settings):
        padded = TF.pad(image, step.padding, fill=0, padding_mode=step.padding_mode)
        return TF.crop(padded, int(row[0]), int(row[1]), step.size, step.size)
    return TF.hflip(image) if row[0] else image


def pipeline(*steps: Any, height: int, width: int, remaining: tuple[Named, ...] = ()) -> Pipeline:
    """A pipeline of the given transforms, in that order."""
    named = [Named(type(step).__module__.rpartition(".")[2], step) for step in steps]
    return Pipeline(named, remaining, height, width)


def raw_levels(views: Tensor) -> Tensor:
    """Undo the scaling of a pipeline without normalize: uint8 levels."""
    levels = views.double() * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().to(torch.uint8)


# -- Crop, flip, normalize: the transforms of the paper ----------------------------------------------------------------


@pytest.mark.parametrize("flip_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_crop_and_flip_equals_torchvision_on_pil_bit_for_bit(mode: str, flip_first: bool) -> None:
    """All 9 x 9 x 2 views of images of 32 pixels equal those of RandomCrop, flip, ToTensor and Normalize bit for bit."""
    crop, flip = random_crop.Settings(32, 4, mode), random_horizontal_flip.Settings(0.5)
    order = (flip, crop) if flip_first else (crop, flip)
    augment = pipeline(*order, height=32, width=32, remaining=(Named("to_tensor", None), NORMALIZE))
    rows = [(t, left, f) for t in range(9) for left in range(9) for f in (0, 1)]
    images = noise(len(rows), 32, 32)
    table = torch.tensor([(f, t, left) if flip_first else (t, left, f) for t, left, f in rows], dtype=torch.float64)
    views = augment(images, table)
    for image, (top, left, mirrored), view in zip(images, rows, views, strict=True):
        expected = as_pil(image)
        for step in order:
            expected = pil_move(expected, step, [mirrored] if step is flip else [top, left])
        assert torch.equal(view, TF.normalize(TF.to_tensor(expected), MEAN, STD)), (top, left, mirrored)


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, int, list[Any], int]:
    """A height, a width, up to four compatible crops and flips, and a seed."""
    height, width = draw(st.integers(3, 12)), draw(st.integers(3, 12))
    h, w, steps = height, width, []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            steps.append(random_horizontal_flip.Settings(0.5))
            continue
        mode = draw(st.sampled_from(MODES))
        padding = draw(st.integers(0, min(h, w) - 1 if mode == "reflect" else 3 * min(h, w)))
        size = draw(st.integers(1, min(h, w) + 2 * padding))
        steps.append(random_crop.Settings(size, padding, mode))
        h = w = size
    return height, width, steps, draw(st.integers(0, 999))


@settings(deadline=None, max_examples=60)
@given(chains())
def test_any_chain_of_crops_and_flips_equals_torchvision_step_by_step(chain: tuple[int, int, list[Any], int]) -> None:
    """For all sizes, paddings and orders the fused gather gives the same images as torchvision, applied step by step."""
    height, width, steps, seed = chain
    augment = pipeline(*steps, height=height, width=width)
    images = noise(6, height, width, seed)
    table = augment.draw(6, torch.Generator().manual_seed(seed))
    views = raw_levels(augment(images, table))
    assert augment.output_size == tuple(views.shape[2:])
    for image, row, view in zip(images, table.tolist(), views, strict=True):
        expected, at = as_pil(image), 0
        for step in steps:
            k = 2 if isinstance(step, random_crop.Settings) else 1
            expected = pil_move(expected, step, row[at : at + k])
            at += k
        assert torch.equal(view, as_tensor(expected))


def test_crop_corners_are_drawn_as_torchvisions_random_crop_draws_them() -> None:
    """Each of the 9 x 9 corners is drawn equally often, and torchvision's RandomCrop draws the same corners and no others."""
    crop = random_crop.Settings(32, 4, "reflect")
    n = 81 * 200
    drawn = crop.draw(n, 32, 32, torch.Generator().manual_seed(1)).long()
    counts = torch.bincount(drawn[:, 0] * 9 + drawn[:, 1], minlength=81)
    assert len(counts) == 81
    chi_squared = float(((counts - 200) ** 2).sum()) / 200
    assert chi_squared < 80 + 5 * math.sqrt(2 * 80)
    torch.manual_seed(0)
    padded = TF.pad(as_pil(noise(1, 32, 32)[0]), 4, padding_mode="reflect")
    theirs = {T.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(1500)}
    assert theirs == {tuple(pair) for pair in drawn.tolist()}


def test_crop_corners_on_a_wide_image_keep_rows_and_columns_apart() -> None:
    """In an image that is wider than high the corner's column has a larger range than its row, within the padded image."""
    drawn = random_crop.Settings(4, 1).draw(4000, 5, 11, torch.Generator().manual_seed(2))
    assert set(drawn[:, 0].tolist()) == set(range(5 + 2 - 4 + 1))
    assert set(drawn[:, 1].tolist()) == set(range(11 + 2 - 4 + 1))


@pytest.mark.parametrize(
    "step",
    [
        random_horizontal_flip.Settings,
        random_grayscale.Settings,
        random_color_jitter.Settings,
        gaussian_blur.Settings,
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_transforms_act_with_the_probability_that_the_yaml_gives(step: Any, p: float) -> None:
    """The first column of the draws is 1 if the image is changed: with probability p, always for p = 1 and never for p = 0."""
    n = 4000
    act = step(p=p).draw(n, 32, 32, torch.Generator().manual_seed(3))[:, 0]
    assert set(act.tolist()) <= {0.0, 1.0}
    assert abs(float(act.mean()) - p) <= 4 * math.sqrt(p * (1 - p) / n)
    covariance = float(((act[1:] - p) * (act[:-1] - p)).mean())
    assert abs(covariance) <= 5 * p * (1 - p) / math.sqrt(n)  # consecutive images are independent


def test_crop_and_flip_are_drawn_independently_of_each_other() -> None:
    """The flip of an image and the position of its crop are uncorrelated."""
    augment = pipeline(random_crop.Settings(32, 4), random_horizontal_flip.Settings(0.5), height=32, width=32)
    table = augment.draw(6000, torch.Generator().manual_seed(4))
    correlation = np.corrcoef(table.numpy().T)
    assert np.abs(correlation - np.eye(3)).max() < 5 / math.sqrt(6000)


def test_draws_differ_inside_a_batch_and_repeat_for_the_same_generator() -> None:
    """The images of a batch get different views, and the same seed gives the same views again."""
    augment = pipeline(random_crop.Settings(32, 4), random_horizontal_flip.Settings(0.5), height=32, width=32)
    table = augment.draw(64, torch.Generator().manual_seed(5))
    views = augment(noise(1, 32, 32).expand(64, -1, -1, -1), table)
    assert len({view.numpy().tobytes() for view in views}) > 40
    assert torch.equal(table, augment.draw(64, torch.Generator().manual_seed(5)))
    assert not torch.equal(table, augment.draw(64, torch.Generator().manual_seed(6)))


def test_a_view_depends_on_its_own_row_only() -> None:
    """Augmenting a batch gives the same views as augmenting its images one by one, for any batch size."""
    steps = (random_crop.Settings(10, 2), random_color_jitter.Settings(0.4, 0.4, 0.4, 0.1), gaussian_blur.Settings())
    augment = pipeline(*steps, height=12, width=12, remaining=(NORMALIZE,))
    images, table = noise(9, 12, 12), augment.draw(9, torch.Generator().manual_seed(7))
    alone = [augment(images[i : i + 1], table[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(augment(images, table), torch.cat(alone), rtol=0, atol=0)


def test_normalize_equals_to_tensor_and_normalize_for_every_level() -> None:
    """Each of the 256 levels in each channel becomes exactly the float of ToTensor + Normalize, without normalize
    ToTensor's."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    reference = T.ToTensor()(as_pil(levels[0]))
    nothing = torch.zeros(1, 0)
    assert torch.equal(Pipeline((), (), 16, 16)(levels, nothing)[0], reference)
    normalized = Pipeline((), (Named("to_tensor", None), NORMALIZE), 16, 16)(levels, nothing)[0]
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, T.Normalize(MEAN, STD)(reference))
    exact = (levels[0].double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalized.double(), exact, rtol=1e-5, atol=1e-6)


def test_each_section_of_the_yaml_has_its_own_pipeline(tiny: Path) -> None:
    """`transform.test.primary` and `remaining` decide how images are evaluated, those of `transform.train` how they are
    trained on."""
    changes = {
        "transform.test.primary": "{resize: {size: 16}, center_crop: {size: 8}}",
        "transform.test.remaining": "{to_tensor: true, normalize: {mean: [0.0, 0.0, 0.0], std: [1.0, 1.0, 1.0]}}",
        "transform.train.primary": "{random_crop: {size: 24, padding: 0}}",
        "transform.train.remaining": "{to_tensor: true, normalize: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}",
    }
    loaded = config.load(tiny, [f"{key}={value}" for key, value in changes.items()])
    images = smooth(3, 32, 32)
    train, test = build_transforms(loaded, ImageSet(images, torch.zeros(3, dtype=torch.int64)))
    draws = train.draw(3, torch.Generator().manual_seed(0))
    views, seen = train(images, draws), test(images, torch.zeros(3, 0))
    assert views.shape == (3, 3, 24, 24) and seen.shape == (3, 3, 8, 8)
    small = resize.Settings(16).apply(images, torch.zeros(3, 0))
    assert torch.allclose(seen, small[:, :, 4:12, 4:12].float() / 255, atol=1e-6)
    assert views.min() < -0.01 and seen.min() >= 0


def test_the_images_are_never_changed() -> None:
    """Augmentation does not change the uint8 images."""
    steps = (random_horizontal_flip.Settings(1.0), random_color_jitter.Settings(0.4), random_grayscale.Settings(1.0))
    augment = pipeline(*steps, height=8, width=8, remaining=(NORMALIZE,))
    images = noise(4, 8, 8)
    before = images.clone()
    augment(images, augment.draw(4, torch.Generator().manual_seed(0)))
    Pipeline((), (NORMALIZE,), 8, 8)(images, torch.zeros(4, 0))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("step", "key"),
    [
        (random_crop.Settings(41, 4), "random_crop.size: 41"),
        (random_crop.Settings(32, 32, "reflect"), "random_crop.padding: 32"),
    ],
)
def test_an_impossible_crop_is_refused_before_training(step: Any, key: str) -> None:
    """A crop larger than the padded image, and a reflection wider than the image, are errors that name key and value."""
    with pytest.raises(UserError, match=key):
        pipeline(step, height=32, width=32)


@pytest.mark.parametrize(("key", "value"), [("mean", [0.5]), ("std", [0.2, 0.2])])
def test_normalize_needs_three_numbers(tiny: Path, key: str, value: list[float]) -> None:
    """A mean or standard deviation without exactly one number per channel is an error, not broadcast."""
    with pytest.raises(UserError, match=f"normalize.{key}: .*give 3 numbers"):
        config.load(tiny, [f"transform.train.remaining.normalize.{key}={value}"])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("gaussian_blur: {sigma: []}", "gaussian_blur.sigma"),
        ("gaussian_blur: {sigma: [2.0, 1.0]}", "gaussian_blur.sigma"),
        ("random_resize_crop: {size: 32, scale: [0.5]}", "random_resize_crop.scale"),
        ("random_resize_crop: {size: 32, ratio: [1.0, 1.1, 1.2]}", "random_resize_crop.ratio"),
        ("resize: {size: [32, 32, 32]}", "resize.size"),
        ("center_crop: {size: []}", "center_crop.size"),
    ],
)
def test_an_invalid_pair_of_numbers_is_refused_at_the_start(tiny: Path, section: str, key: str) -> None:
    """Ranges and sizes that are not two numbers in ascending order are one line with the key when the YAML is read."""
    with pytest.raises(UserError, match=rf"transform\.train\.primary\.{key}: .*give 2 numbers") as caught:
        config.load(tiny, [f"transform.train.primary={{{section}}}"])
    assert "\n" not in str(caught.value)


# -- The other transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 48, (24, 40)])
@pytest.mark.parametrize("shape", [(32, 32), (30, 45)])
def test_resize_equals_torchvision(size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    """resize gives torchvision's size and pixels, and within one level those of the PIL image."""
    augment = pipeline(resize.Settings(size), height=shape[0], width=shape[1])
    images = noise(3, *shape)
    views = raw_levels(augment(images, augment.draw(3, torch.Generator())))
    for image, view in zip(images, views, strict=True):
        wanted = [size] if isinstance(size, int) else list(size)
        assert torch.equal(view, TF2.resize(image, wanted, antialias=True))
        on_pil = as_tensor(TF.resize(as_pil(image), wanted))
        assert (view.int() - on_pil.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [20, 7, 40, (10, 21)])
def test_center_crop_equals_torchvision_on_pil(size: int | tuple[int, int]) -> None:
    """center_crop gives the same pixels as torchvision, with black borders if the image is too small."""
    images = noise(2, 32, 25)
    augment = pipeline(center_crop.Settings(size), height=32, width=25)
    views = raw_levels(augment(images, augment.draw(2, torch.Generator())))
    for image, view in zip(images, views, strict=True):
        wanted = [size, size] if isinstance(size, int) else list(size)
        assert torch.equal(view, as_tensor(TF.center_crop(as_pil(image), wanted)))


def one_by_one(step: Any, images: Tensor, table: Tensor) -> Tensor:
    """The result (uint8) of torchvision's functions on each image separately, with the parameters of its row."""
    one = {random_resize_crop: resized_crop, gaussian_blur: blur, random_color_jitter: jitter}[
        sys.modules[type(step).__module__]
    ]
    return torch.stack([one(step, image, row) for image, row in zip(images, table.tolist(), strict=True)])


def resized_crop(step: random_resize_crop.Settings, image: Tensor, row: list[float]) -> Tensor:
    """The box, resized in float64, first along the rows, then along the columns, each rounded."""
    top, left, h, w = (int(x) for x in row)
    box = image[:, top : top + h, left : left + w].double()
    for size in ([h, step.size], [step.size, step.size]):
        box = TF2.resize(box, size, antialias=True).add(0.5 + 1e-9).floor()
    return box.to(torch.uint8)


def blur(step: gaussian_blur.Settings, image: Tensor, row: list[float]) -> Tensor:
    """Blur with a kernel of 2 ceil(3 sigma) + 1 pixels, or fewer if the image is too small for it."""
    act, sigma = row
    kernel = 2 * min(math.ceil(3 * sigma), (min(image.shape[1:]) - 1) // 2) + 1
    return TF2.gaussian_blur(image, [kernel, kernel], [sigma, sigma]) if act else image


def jitter(step: random_color_jitter.Settings, image: Tensor, row: list[float]) -> Tensor:
    """The changes that the settings name, in the order of the row."""
    change = (TF2.adjust_brightness, TF2.adjust_contrast, TF2.adjust_saturation, TF2.adjust_hue)
    spread = (step.brightness, step.contrast, step.saturation, step.hue)
    for i in (int(x) for x in row[1:5]):
        if row[0] and spread[i] > 0:
            image = change[i](image, row[5 + i])
    return image


def apart(a: Tensor, b: Tensor) -> tuple[int, float]:
    """Return the largest difference of two uint8 tensors, in levels, and the share of values that differ."""
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    gap = (a.int() - b.int()).abs()
    return int(gap.max()), float((gap > 0).double().mean())


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (24, 32, 16), (17, 40, 64), (64, 48, 7), (5, 3, 9), (224, 224, 224)]
)
def test_random_resize_crop_equals_torchvision_for_each_box(height: int, width: int, size: int, kind: Any) -> None:
    """Every image is cropped to its own box and resized as by torchvision, enlarged and reduced.

    The difference from float64 is at most 1 level, in at most 1 % of the values (measured: 0.3 %, sums that end in .5); from
    the exact average, without rounding, at most 1 level. Pillow also rounds twice, but may take the columns first: at most 2.
    """
    count = 40 if size < 100 else 4
    step = random_resize_crop.Settings(size)
    images, table = kind(count, height, width), step.draw(count, height, width, torch.Generator().manual_seed(1))
    views = step.apply(images, table)
    most, share = apart(views, one_by_one(step, images, table))
    assert most <= 1 and share <= 0.01
    for image, row, view in zip(images, table.tolist(), views, strict=True):
        top, left, h, w = (int(x) for x in row)
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
        exact = TF2.resized_crop(image.double(), top, left, h, w, [size, size], antialias=True)
        assert (view - exact).abs().max() <= 1 + 1e-3
        on_pil = as_tensor(TF.resized_crop(as_pil(image), top, left, h, w, [size, size]))
        assert apart(view, on_pil)[0] <= 2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 48)])
def test_random_resize_crop_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Corner, height, width and area of the boxes have the distribution of RandomResizedCrop.get_params."""
    n, scale, ratio = 3000, (0.1, 0.9), (0.6, 1.8)
    ours = random_resize_crop.Settings(8, scale, ratio).draw(n, height, width, torch.Generator().manual_seed(2)).numpy()
    torch.manual_seed(2)
    image = torch.zeros(3, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)], float)
    columns = [*zip(ours.T, theirs.T, strict=True), (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])]
    for mine, other in columns:
        grid = np.unique(np.concatenate([mine, other]))
        gap = np.searchsorted(np.sort(mine), grid, "right") - np.searchsorted(np.sort(other), grid, "right")
        assert np.abs(gap).max() / n < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(32, 32, (3.0, 3.5)), (32, 32, (0.2, 0.3)), (10, 60, (0.9, 1.1)), (60, 10, (0.9, 1.1)), (33, 20, (0.95, 1.05))],
)
def test_random_resize_crop_falls_back_as_torchvision(height: int, width: int, ratio: tuple[float, float]) -> None:
    """If no box with the required area and aspect ratio fits, the central crop is that of torchvision."""
    table = random_resize_crop.Settings(8, (1.0, 1.0), ratio).draw(5, height, width, torch.Generator().manual_seed(0))
    expected = T.RandomResizedCrop.get_params(torch.zeros(3, height, width), [1.0, 1.0], list(ratio))
    assert table.tolist() == [list(map(float, expected))] * 5


@pytest.mark.parametrize("kind", [noise, smooth])
@pytest.mark.parametrize(
    "step",
    [
        random_color_jitter.Settings(0.4, 0.3, 0.5, 0.1, p=0.8),
        random_color_jitter.Settings(0.4, 0.4, 0.4),
        random_color_jitter.Settings(contrast=1.5, hue=0.5),
        random_color_jitter.Settings(saturation=3.0, brightness=2.0, p=0.5),
        random_color_jitter.Settings(hue=0.3),
    ],
)
def test_color_jitter_equals_torchvision_for_each_order_and_amount(step: random_color_jitter.Settings, kind: Any) -> None:
    """Every image gets its own changes in its own order, with torchvision's result; other images are not changed.

    Without hue the results are equal bit for bit. With hue they differ by 1 level in at most 0.01 % of the values (measured:
    0.001 %), which later changes can amplify.
    """
    images, table = kind(120, 12, 15), step.draw(120, 12, 15, torch.Generator().manual_seed(1))
    views = step.apply(images, table)
    most, share = apart(views, one_by_one(step, images, table))
    assert (most, share) == (0, 0.0) if not step.hue else most <= 4 and share <= 1e-4
    kept = table[:, 0] == 0
    assert torch.equal(views[kept], images[kept])
    assert kept.any() == (step.p < 1) and not kept.all()


@pytest.mark.parametrize("shift", [0.0, 1 / 6, -1 / 3, 0.5, -0.5])
def test_hue_shifts_equal_torchvision_for_all_colors(shift: float) -> None:
    """On a grid of 52 x 52 x 52 colors, including grey and the edges of the color circle, the difference from torchvision is at
    most 1 level, for at most 0.1 % of the values (measured: none); a shift of 0 changes nothing."""
    levels = torch.arange(0, 256, 5)
    colors = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).view(1, 3, 52, -1).to(torch.uint8)
    row = torch.tensor([[1.0, 3, 2, 1, 0, 1, 1, 1, shift]], dtype=torch.float64)
    turned = random_color_jitter.Settings(hue=0.5).apply(colors, row)
    most, share = apart(turned[0], TF2.adjust_hue(colors[0], shift))
    assert most <= 1 and share <= 0.001
    assert shift or torch.equal(turned, colors)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_color_change_alone_equals_torchvision_on_pil(name: str) -> None:
    """One color setting alone gives the result of torchvision on a PIL image, within one level."""
    augment = pipeline(random_color_jitter.Settings(**{name: 0.5}), height=16, width=16)
    images, table = smooth(12, 16, 16), augment.draw(12, torch.Generator().manual_seed(1))
    column = 5 + ("brightness", "contrast", "saturation").index(name)
    for image, row, view in zip(images, table.tolist(), raw_levels(augment(images, table)), strict=True):
        expected = as_tensor(getattr(TF, f"adjust_{name}")(as_pil(image), row[column]))
        assert (view.int() - expected.int()).abs().max() <= 1
        assert (view.int() - image.int()).abs().max() > 1


def test_color_jitter_draws_stay_in_torchvisions_ranges() -> None:
    """Factors are uniform in [max(0, 1 - x), 1 + x], hue in [-h, h], and each of the 24 orders is drawn equally often."""
    n = 4800
    table = random_color_jitter.Settings(0.4, 1.5, 0.2, 0.1).draw(n, 8, 8, torch.Generator().manual_seed(1))
    for column, (low, high) in zip(table[:, 5:].T, [(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)], strict=True):
        assert low <= column.min() and column.max() <= high
        assert abs(float(column.mean()) - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * n)
        assert abs(float(column.std()) - (high - low) / math.sqrt(12)) < 0.02 * (high - low)
    orders: dict[tuple[float, ...], int] = {}
    for row in table[:, 1:5].tolist():
        assert sorted(row) == [0, 1, 2, 3]
        orders[tuple(row)] = orders.get(tuple(row), 0) + 1
    assert len(orders) == 24
    assert sum((count - n / 24) ** 2 for count in orders.values()) / (n / 24) < 23 + 5 * math.sqrt(46)


def test_grayscale_equals_torchvision_and_keeps_the_other_images() -> None:
    """The drawn images become torchvision's grey in all three channels (PIL's within one level), the others do not change."""
    augment = pipeline(random_grayscale.Settings(0.5), height=16, width=16)
    images, table = noise(30, 16, 16), augment.draw(30, torch.Generator().manual_seed(1))
    assert 0 < table.sum() < 30
    for image, (act,), view in zip(images, table.tolist(), raw_levels(augment(images, table)), strict=True):
        if act:
            assert torch.equal(view, TF.rgb_to_grayscale(image, 3))
            on_pil = as_tensor(TF.to_grayscale(as_pil(image), 3))
            assert (view.int() - on_pil.int()).abs().max() <= 1
        else:
            assert torch.equal(view, image)


@pytest.mark.parametrize(("holes", "length", "side"), [(1, 3, 2), (1, 16, 16), (3, 6, 6), (1, 40, 40)])
def test_cutout_equals_its_published_loop(holes: int, length: int, side: int) -> None:
    """Each square has an even side, is cut off at the border, and is black before normalization; nothing else changes. The
    centers are spread over all pixels."""
    augment = pipeline(cutout.Settings(holes, length), height=14, width=20)
    images = noise(60, 14, 20).clamp_min(1)
    table = augment.draw(60, torch.Generator().manual_seed(2))
    centers = augment.draw(2000, torch.Generator().manual_seed(2)).view(2000, holes, 2)
    assert all(set(centers[:, i, axis].tolist()) == set(range(n)) for i in range(holes) for axis, n in enumerate((14, 20)))
    for image, row, view in zip(images, table.long().tolist(), raw_levels(augment(images, table)), strict=True):
        expected = image.clone()
        for y, x in zip(row[::2], row[1::2], strict=True):
            top, left = max(y - side // 2, 0), max(x - side // 2, 0)
            expected[:, top : y + side // 2, left : x + side // 2] = 0
        assert torch.equal(view, expected)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (lambda images: images.float() / 255, r"torch\.float32 \(1, 3, 8, 8\)"),
        (lambda images: images[:, :1], r"torch\.uint8 \(1, 1, 8, 8\)"),
        (lambda images: images[0], r"torch\.uint8 \(3, 8, 8\)"),
    ],
)
def test_a_transform_that_returns_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, changed: Any, found: str) -> None:
    """A transform must return uint8 (B, 3, H, W): levels in 0..1 would be taken for black."""
    monkeypatch.setattr(cutout.Settings, "apply", lambda self, images, draws: changed(images))
    with pytest.raises(UserError, match=rf"data/transforms/cutout\.py: apply: returned {found}: must be torch\.uint8"):
        Pipeline([Named("cutout", cutout.Settings())], (), 8, 8)


def blurred(image: Tensor, sigma: float, reach: int) -> np.ndarray:
    """Gaussian blur by its formula in float64: mirrored border, weights exp(-d^2 / 2 sigma^2), (3, H, W)."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image.double().numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    h, w = image.shape[1:]
    out = np.zeros(image.shape)
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            out += a * b * padded[:, i : i + h, j : j + w]
    return out


@pytest.mark.parametrize("sigma", [(0.1, 2.0), (0.01, 0.02), (4.0, 30.0)])
def test_gaussian_blur_equals_torchvision_and_the_formula(sigma: tuple[float, float]) -> None:
    """The drawn images are blurred with their own width, as by torchvision and by the formula; the others do not change.

    The difference is at most 1 level, in at most 0.1 % of the values (measured: 0.002 %).
    """
    step = gaussian_blur.Settings(sigma, p=0.7)
    images, table = noise(20, 19, 16), step.draw(20, 19, 16, torch.Generator().manual_seed(1))
    assert 0 < table[:, 0].sum() < 20
    views = step.apply(images, table)
    most, share = apart(views, one_by_one(step, images, table))
    assert most <= 1 and share <= 0.001
    for image, (act, width), view in zip(images, table.tolist(), views, strict=True):
        reach = min(math.ceil(3 * width), 7)  # a side of 16 pixels mirrors 7 pixels at most on both sides
        assert np.abs(view.numpy() - blurred(image, width, reach)).max() <= 0.51 if act else torch.equal(view, image)


def test_gaussian_blur_widths_are_uniform_in_the_given_range() -> None:
    """Each image's sigma is uniform between the two numbers of the YAML; if they are equal, it is that number."""
    sigma = gaussian_blur.Settings((0.5, 1.5)).draw(4000, 8, 8, torch.Generator().manual_seed(1))[:, 1]
    assert 0.5 <= sigma.min() < 0.51 and 1.49 < sigma.max() <= 1.5
    assert abs(float(sigma.mean()) - 1) < 4 / math.sqrt(12 * 4000)
    assert len(sigma.unique()) == 4000
    assert set(gaussian_blur.Settings((0.7, 0.7)).draw(9, 8, 8, torch.Generator())[:, 1].tolist()) == {0.7}


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_gaussian_blur_works_on_images_smaller_than_its_kernel(side: int) -> None:
    """For a tiny image the kernel of a wide blur is limited to the pixels that can be mirrored, instead of failing."""
    augment = pipeline(gaussian_blur.Settings((5.0, 5.0), p=1.0), height=side, width=side)
    images = noise(2, side, side)
    views = augment(images, augment.draw(2, torch.Generator().manual_seed(0))) * 255
    expected = np.stack([blurred(image, 5.0, (side - 1) // 2) for image in images])
    assert np.abs(views.numpy() - expected).max() <= 0.51


@pytest.mark.parametrize(
    "step",
    [
        random_color_jitter.Settings(0.4, 0.4, 0.4, 0.1, p=0.0),
        random_color_jitter.Settings(),
        random_grayscale.Settings(0.0),
        gaussian_blur.Settings(p=0.0),
        random_horizontal_flip.Settings(0.0),
        random_resize_crop.Settings(20, (1.0, 1.0), (1.0, 1.0)),
        random_crop.Settings(20),
        resize.Settings(20),
        center_crop.Settings(20),
    ],
    ids=lambda step: type(step).__module__.rpartition(".")[2],
)
def test_a_transform_switched_off_is_the_identity(step: Any) -> None:
    """With probability 0, without amounts, or with the image's own size no pixel changes."""
    images = noise(50, 20, 20)
    augment = pipeline(step, height=20, width=20)
    assert torch.equal(raw_levels(augment(images, augment.draw(50, torch.Generator().manual_seed(0)))), images)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mixed_pipeline_applies_its_steps_in_the_order_of_the_yaml(seed: int) -> None:
    """Pixel moves are fused only with adjacent ones, so the result equals that of one step after another."""
    steps = [
        resize.Settings(14),
        random_horizontal_flip.Settings(0.5),
        random_crop.Settings(12, 2, "edge"),
        random_grayscale.Settings(0.5),
        random_crop.Settings(12, 3, "constant"),
        gaussian_blur.Settings((1.0, 1.5), 0.5),
        random_horizontal_flip.Settings(0.5),
        center_crop.Settings(9),
    ]
    augment = pipeline(*steps, height=10, width=10, remaining=(NORMALIZE,))
    assert augment.output_size == (9, 9)
    images, table = noise(16, 10, 10), augment.draw(16, torch.Generator().manual_seed(seed))
    for image, row, view in zip(images, table.tolist(), augment(images, table), strict=True):
        x = as_tensor(pil_move(as_pil(TF2.resize(image, [14], antialias=True)), steps[1], row[0:1]))
        x = as_tensor(pil_move(as_pil(x), steps[2], row[1:3]))
        x = TF.rgb_to_grayscale(x, 3) if row[3] else x
        x = as_tensor(pil_move(as_pil(x), steps[4], row[4:6]))
        reach = min(math.ceil(3 * row[7]), 5)
        x = TF2.gaussian_blur(x, [2 * reach + 1] * 2, [row[7], row[7]]) if row[6] else x
        x = as_tensor(pil_move(as_pil(x), steps[6], row[8:9]))
        x = TF.center_crop(x, [9, 9])
        gap = (view - TF.normalize(x.float().div(255), MEAN, STD)).abs()
        # Sums of the blur may be rounded differently.
        assert gap.max() <= 1.01 / 255 / min(STD) and (gap > 0).double().mean() <= 0.01


# -- Any size, any batch, any device -----------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> tuple[Any, int, int, int, int]:
    """A random transform that changes values; height, width and number of the images; a seed."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    p = draw(st.sampled_from([0.0, 0.5, 1.0]))
    low, high = sorted(draw(st.tuples(st.floats(0.02, 4.0), st.floats(0.02, 4.0))))
    share, factor = st.floats(0.05, 1.0), st.sampled_from([0.0, 0.4, 1.0, 2.0])
    step = draw(
        st.one_of(
            st.just(gaussian_blur.Settings((low, high), p)),
            st.builds(lambda size, s: random_resize_crop.Settings(size, (s, 1.0), (0.5, 2.0)), st.integers(1, 40), share),
            st.builds(random_color_jitter.Settings, factor, factor, factor, st.sampled_from([0.0, 0.1, 0.5]), st.just(p)),
        )
    )
    return step, height, width, draw(st.integers(1, 5)), draw(st.integers(0, 999))


@settings(deadline=None, max_examples=150)
@given(changes())
def test_any_settings_and_sizes_equal_torchvision_image_by_image(case: tuple[Any, int, int, int, int]) -> None:
    """For all settings each view of a batch differs by at most 1 level from torchvision's view of that image alone, except
    after a change of hue; the images do not change."""
    step, height, width, count, seed = case
    images = noise(count, height, width, seed)
    before = images.clone()
    table = step.draw(count, height, width, torch.Generator().manual_seed(seed))
    views = step.apply(images, table)
    most, _ = apart(views, one_by_one(step, images, table))
    assert most <= (4 if getattr(step, "hue", 0) else 1)
    assert torch.equal(images, before)


ALL = {  # every transform with draws
    "random_resize_crop": random_resize_crop.Settings(18),
    "random_color_jitter": random_color_jitter.Settings(0.4, 0.4, 0.4, 0.1, 0.8),
    "random_grayscale": random_grayscale.Settings(0.3),
    "cutout": cutout.Settings(2, 5),
    "gaussian_blur": gaussian_blur.Settings(),
    "random_crop": random_crop.Settings(16, 2, "reflect"),
    "random_horizontal_flip": random_horizontal_flip.Settings(),
    "center_crop": center_crop.Settings(17),
    "resize": resize.Settings((20, 26)),  # last: on CUDA torchvision rounds it once, on a CPU twice
}


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_a_large_batch_is_worked_on_in_parts_with_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To bound its memory, a transform gets few images at a time, depending on the largest intermediate size, and the views are
    the same bit for bit."""
    steps = ALL.values() if name == "all" else [ALL[name]]
    augment = pipeline(*steps, height=14, width=12, remaining=(NORMALIZE,))
    images, table = noise(23, 14, 12), augment.draw(23, torch.Generator().manual_seed(0))
    expected = augment(images, table)
    sizes = []
    for kind in {type(step) for step in steps if hasattr(step, "apply")}:
        apply = kind.apply
        monkeypatch.setattr(kind, "apply", lambda self, x, d, apply=apply: sizes.append(len(x)) or apply(self, x, d))
    monkeypatch.setattr("data.augment.CHUNK_CPU", 3 * augment.area * 4)
    assert torch.equal(augment(images, table), expected)
    assert set(sizes) == ({4, 3} if sizes else set()) and augment.area >= augment.output_size[0] * augment.output_size[1]


def test_every_transform_is_tested() -> None:
    """Each file of data/transforms that changes images is among those that are tested below and on a device."""
    kinds = {name: plugins.settings("data.transforms", name) for name in plugins.names("data.transforms")}
    assert set(ALL) == {name for name, kind in kinds.items() if hasattr(kind, "draw")}


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_a_transform_becomes_part_of_a_cuda_graph(name: str) -> None:
    """On a CUDA device no transform reads from the device, and none sends anything after the first call; a captured graph
    gives, for new images and draws, the same views as without a graph and as on a CPU (resize: within 1 level)."""
    fake_cuda = pytest.importorskip("fake_cuda")
    steps = ALL.values() if name == "all" else [ALL[name]]
    augment = pipeline(*steps, height=24, width=30, remaining=(NORMALIZE,))
    batches = [(noise(6, 24, 30, i), augment.draw(6, torch.Generator().manual_seed(i))) for i in range(3)]
    with fake_cuda.pretended_cuda() as device:
        (images, table), *later = [(x.to(fake_cuda.CUDA), draws.to(fake_cuda.CUDA)) for x, draws in batches]
        eager = [augment(x, draws).cpu() for x, draws in later]
        device.reads.clear(), device.uploads.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            views = augment(images, table)
        assert not device.reads and not device.uploads
        for (x, draws), expected in zip(later, eager, strict=True):
            images.copy_(x), table.copy_(draws)
            graph.replay()
            assert torch.equal(views.cpu(), expected)
        assert not device.uploads and sum(device.reads.values()) == len(later)  # `.cpu()` of this test
    for (x, draws), expected in zip(batches[1:], eager, strict=True):
        assert (augment(x, draws) - expected).abs().max() <= (1.01 / 255 / min(STD) if name in ("resize", "all") else 0)


def test_a_resize_beyond_all_bounds_is_one_line(tiny: Path) -> None:
    """Too large a size is refused with the key; a strip whose longer side would follow, with its size."""
    for key in ("transform.pre.resize.size", "transform.test.primary.resize.size"):
        with pytest.raises(UserError, match=rf"{re.escape(key)}: 40000: "):
            config.load(tiny, [f"{key}=40000"])
    with pytest.raises(UserError, match=r"transform: images of 3000 x 4 pixels: with a shorter side of 256"):
        Pipeline([Named("resize", resize.Settings(256))], (), 4, 3000)


@pytest.mark.parametrize("ratio", [(70.0, 80.0), (0.01, 0.012)])
def test_a_crop_has_at_least_one_pixel(ratio: tuple[float, float]) -> None:
    """A shape that fits in no attempt gives a strip of one row or column, not an empty box, which would be black."""
    step = random_resize_crop.Settings(size=8, ratio=ratio)
    image = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(
        step.apply(image, step.draw(1, 32, 32, torch.Generator())).unique(), torch.tensor([200], dtype=torch.uint8)
    )
