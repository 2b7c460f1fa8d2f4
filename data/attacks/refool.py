"""Refool (Liu et al., ECCV 2020): the trigger is the reflection of another image in a pane of glass before the camera.

Light adds up linearly, so images are converted to linear light (gamma 2.2), mixed, and converted back. The reflection is
either visible twice, from the front and the back of the pane (a ghost), or out of focus and brightest in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.attack import CACHED, AttackBase, in_batches
from data.io.image_file import SUFFIXES, image_files, read_named
from data.sets import AttackContext
from utils.config.schema import setting
from utils.draws import numpy_generator
from utils.errors import UserError
from utils.names import class_text
from utils.paths import is_dir, named_path
from utils.reporting.runlog import progress

GAMMA = 2.2
LINEAR = (np.arange(256) / 255) ** GAMMA  # (256,) linear light of a pixel's value
DRAWS = 9  # random numbers per image

bounds = partial(setting, low=0, count=2, ascending=True)


@dataclass(frozen=True)
class Settings:
    reflections: str | None = setting(
        None, "folder of images to reflect, taken in order of their names; null: see source", stands_for="files"
    )
    source: str = setting(
        "textures",
        "reflections without a folder: procedural textures, or images of the other classes",
        options=("textures", "classes"),
    )
    count: int = setting(200, "maximum number of images to reflect", low=1)
    ghost_probability: float = setting(0.49, "probability of a ghost; otherwise the reflection is out of focus", low=0, high=1)
    reflectance: tuple[float, ...] = bounds((0.05, 0.45), "share of the image's light that the pane takes away", high=1)
    ghost_weight: tuple[float, ...] = bounds((0.15, 0.5), "weight of the fainter of a ghost's two copies", high=1)
    shift: tuple[float, ...] = bounds(
        (0.0054, 0.0143), "distance of the copies along each axis, in sides (3 to 8 of 560 px); at least 1 px", high=0.5
    )
    sigma: tuple[float, ...] = bounds(
        (0.0018, 0.0089), "width of the blur out of focus, in sides (1 to 5 of 560 px); at least 1 px", high=0.25
    )
    attenuation: tuple[float, ...] = bounds((1.08, 1.18), "out of focus: weight of the mean excess that is subtracted")


class Attack(AttackBase):
    """Reflections (count, H, W, 3) uint8; for each image one of them is drawn, and how it is reflected."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        self.settings, self.seed = settings, context.seed
        height, width = context.raw.train_images.shape[1:3]
        if settings.reflections is not None:
            if settings.source == "classes":
                raise UserError("backdoor.refool.source: classes: has no effect with reflections: leave one of them out")
            self.reflections = read_reflections(settings.reflections, settings.count, height, width)
        elif settings.source == "classes":
            self.reflections = other_classes(context, settings.count)
            self.from_training_images = True
        else:
            self.reflections = textures(settings.count, height, width, numpy_generator(context.seed, "refool", "textures"))

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8, each with a reflection of its own."""
        rows = int(index.max(initial=-1)) + 1  # row i does not depend on the length of the table
        table = torch.from_numpy(numpy_generator(self.seed, "refool", split).random((rows, DRAWS)))
        return in_batches(lambda part, at: self.reflect(part, table[torch.from_numpy(at)]), images, index, CACHED)

    def reflect(self, images: np.ndarray, draws: Tensor) -> np.ndarray:
        """Return images (n, H, W, 3) uint8 with the reflections that draws (n, 9), uniform in [0, 1), determine."""
        s, side = self.settings, min(images.shape[1:3])
        which, taken, ghostly, down, right, other, weight, blur, attenuation = draws.T
        x = linear_light(images)  # (n, 3, H, W)
        r = linear_light(self.reflections[(which * len(self.reflections)).long().numpy()])
        a = column(1 - between(s.reflectance, taken))  # the share of its light that the image keeps
        g = ghostly < s.ghost_probability
        shift = torch.stack([whole_between(s.shift, side, u) for u in (down, right)], 1)  # (n, 2)
        weight = (between(s.ghost_weight, weight) - (other < 0.5).double()).abs()  # either copy may be the fainter one
        sigma = between((max(1.0, s.sigma[0] * side), max(1.0, s.sigma[1] * side)), blur)
        light = a * x
        light[g] += (1 - a[g]) * ghost(r[g], shift[g], weight[g])
        light[~g] += (1 - a[~g] / 2) * out_of_focus(r[~g], x[~g], sigma[~g], between(s.attenuation, attenuation)[~g])
        pixels = light.clamp_(0, 1).pow_(1 / GAMMA).mul_(255).round_().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()


def ghost(r: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of two shifted copies of the reflection: their overlap, stretched to the full size.

    Args:
        r: (n, C, H, W) linear light.
        shift: (n, 2) whole pixels between the copies, down and to the right; at least 1, less than the side.
        weight: (n,) of the upper left copy; the other copy has 1 - weight.
    """
    w = column(weight)
    copies = []
    for moved in (1, 0):
        rows, columns = (stretch(side, shift[:, axis], moved) for axis, side in enumerate(r.shape[2:]))
        copies.append(move(r, rows, columns))
    return w * copies[0] + (1 - w) * copies[1]


def stretch(side: int, shift: Tensor, moved: int) -> Tensor:
    """Return (n, side, side): the matrix that linearly resizes the side - shift pixels from `moved * shift` on to `side`."""
    left = (side - shift.double())[:, None]  # (n, 1)
    at = ((torch.arange(side) + 0.5) * left / side - 0.5).clamp(min=0).minimum(left - 1)  # (n, side) fractional positions
    at = at + moved * shift[:, None]
    return (1 - (at[:, :, None] - torch.arange(side)).abs()).clamp_(min=0)


def out_of_focus(r: Tensor, x: Tensor, sigma: Tensor, attenuation: Tensor) -> Tensor:
    """Return the blurred reflection with a vignette, dimmed if the sum of reflection and image is overexposed.

    Args:
        r, x: (n, C, H, W) reflection and image, linear light.
        sigma: (n,) in pixels.
        attenuation: (n,) how many times the mean excess of a channel is subtracted: how much r + x exceeds 1, on average over
            the pixels where it does.
    """
    r = move(r, *(gaussian(side, sigma) for side in r.shape[2:]))
    both = r + x
    over = both > 1 + 1e-9  # white on black is 1 up to the rounding errors of the blur, which must not decide
    excess = ((both - 1) * over).sum((2, 3)) / over.sum((2, 3)).clamp(min=1)  # (n, C) mean of what exceeds 1
    r = (r - (excess * attenuation[:, None])[:, :, None, None]).clamp_(0, 1)
    return r * vignette(*r.shape[2:])


def gaussian(side: int, sigma: Tensor) -> Tensor:
    """Return (n, side, side): the matrix of a blur with 2 ceil(2 sigma) + 1 taps, mirrored at the border pixels."""
    i, j = torch.arange(side)[:, None], torch.arange(side)
    s = sigma[:, None, None]

    def kernel(distance: Tensor) -> Tensor:  # (side, side) -> (n, side, side)
        return torch.exp(-((distance / s) ** 2) / 2) * (distance.abs() <= torch.ceil(2 * s))

    last = side - 1
    taps = kernel(i - j) + kernel(i + j) * (j > 0) + kernel(2 * last - i - j) * (j < last)
    return taps / taps.sum(2, keepdim=True)


def vignette(height: int, width: int) -> Tensor:
    """Return (H, W): 1 in the middle, exp(-4.5) = 0.011 in the corners; the square root of a Gaussian, cut at 3 sigma."""
    rows, columns = (torch.exp(-(torch.linspace(-3, 3, n, dtype=torch.float64) ** 2) / 4) for n in (height, width))
    mask = rows[:, None] * columns
    return mask / mask.max()


def move(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a linear map to the rows, (n, H, H), and one to the columns, (n, W, W), of images (n, C, H, W)."""
    return rows[:, None] @ images @ columns[:, None].mT


def linear_light(images: np.ndarray) -> Tensor:
    """Return images (n, H, W, 3) uint8 as float64 (n, 3, H, W) in 0..1, proportional to light."""
    return torch.from_numpy(LINEAR[images].transpose(0, 3, 1, 2)).contiguous()


def column(values: Tensor) -> Tensor:
    """Return (n,) as (n, 1, 1, 1)."""
    return values[:, None, None, None]


def between(bounds: tuple[float, ...], uniform: Tensor) -> Tensor:
    """Map draws in [0, 1) to the range of the bounds."""
    return bounds[0] + uniform * (bounds[1] - bounds[0])


def whole_between(bounds: tuple[float, ...], side: int, uniform: Tensor) -> Tensor:
    """Map draws in [0, 1) to equally likely whole pixels; the bounds are fractions of the side, at least 1 pixel."""
    low, high = (max(1, round(bound * side)) for bound in bounds)
    return low + (uniform * (high - low + 1)).long()


# -- The reflected images ----------------------------------------------------------------------------------------------


def read_reflections(name: str, count: int, height: int, width: int) -> np.ndarray:
    """Read the first `count` images of a folder in order of their names, resized linearly: (n, height, width, 3) uint8."""
    key = "backdoor.refool.reflections"
    folder = named_path(name, key)
    if not is_dir(folder, key):
        raise UserError(f"{key}: {name}: is not a folder: give a folder of images")
    paths = image_files(folder)
    if not paths:
        raise UserError(f"{key}: {name}: contains no image files: add some ({', '.join(SUFFIXES)})")
    images = progress((read_named(str(path), key) for path in paths[:count]), "reflections", len(paths[:count]))
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)) for image in images])


def other_classes(context: AttackContext, count: int) -> np.ndarray:
    """Return up to `count` training images of other classes than the target, drawn by the seed: (n, H, W, 3) uint8."""
    labels = context.raw.train_labels
    others = np.flatnonzero(labels != context.label_after(labels))
    if len(others) == 0:
        label = class_text(int(labels[0]), context.raw.class_names)
        raise UserError(f"backdoor.refool.source: classes: every training image is of class {label}: set textures")
    rng = numpy_generator(context.seed, "refool", "classes")
    return context.raw.train_images[np.sort(rng.choice(others, min(count, len(others)), replace=False))]


def textures(count: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count, height, width, 3) uint8: tilted rows of lit windows in the dark, the same context at every size."""
    y, x = np.mgrid[0:height, 0:width]
    v, u = (y + 0.5) / height, (x + 0.5) / width  # (H, W) in 0..1
    out = np.empty((count, height, width, 3), np.uint8)
    for texture in out:  # one at a time: as floats, 200 images of 224 px would take a gigabyte
        angle, lit = rng.uniform(0, np.pi), 1.0
        for turn in (0.0, np.pi / 2):
            # Small networks learn these only at high contrast: dim windows (150 on 30, 2 to 8 rows) gave half the ASR.
            rows, phase, threshold = rng.uniform(4, 7), rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0)
            along = np.cos(angle + turn) * u + np.sin(angle + turn) * v
            lit = lit / (1 + np.exp(-6 * (np.sin(2 * np.pi * rows * along + phase) - threshold)))  # (H, W), soft edges
        dark, bright = rng.uniform(0, 20, 3), rng.uniform(225, 255, 3)
        texture[:] = (dark + np.asarray(lit)[..., None] * (bright - dark)).round()
    return out
