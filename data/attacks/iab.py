"""IAB, the input-aware dynamic attack (Nguyen and Tran, NeurIPS 2020): every image has a trigger of its own.

A generator G makes a pattern for an image x, and a mask network M decides where it is visible: the backdoor image is
`x + (G(x) - x) m(x)`. A cross image has the trigger of another image and keeps its label. Both networks are trained here on
the clean training set and then frozen, so the trigger is a fixed function of the image.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.attack import Arrays, AttackBase, fingerprint, in_batches, keep_asset, weights_of
from data.attacks._iab_networks import EncoderDecoder, blend, density_loss, diversity_loss, sharpen, standardize
from data.attacks._surrogate import check_classes, check_size
from data.sets import AttackContext
from utils.config.schema import Named, as_dict, batch_size_setting, setting
from utils.config.settings import NETWORKS
from utils.draws import generator, key_seed, numpy_generator
from utils.errors import UserError
from utils.reporting.runlog import progress

logger = logging.getLogger(__name__)
FORMAT = 1  # of the assets; changed when the same settings give other assets
SHARE = 0.1  # share of backdoor images in a batch, and of cross images
PIXELS = 2**18  # in a batch for the frozen G and M: 256 images of 32 x 32, 5 of 224 x 224
LEAST = 8  # pixels, of an image's shorter side
TRIED = 1000  # test images on which the surrogate's ASR is measured, at most


@dataclass(frozen=True)
class Settings:
    cover_ratio: float = setting(0.0, "cross images (which keep their label) per poisoned image", low=0)
    mask_epochs: int = setting(25, "epochs of the mask network's training", low=1)
    # With 50,000 images, ten times as many steps as the 390 after which a new network learned the triggers to 98 % ASR from
    # 10,000 images. The authors train for 600 epochs because their surrogate is the victim; here it is discarded (its ASR is
    # 55 to 82 % after 2,300 steps).
    generator_epochs: int = setting(10, "epochs of the generator's training together with the surrogate", low=1)
    batch_size: int = batch_size_setting(128, "images per step; 16 for 224 px on a device with 8 GB", low=10)
    mask_lr: float = setting(0.01, "learning rate of the mask network's Adam", above=0)
    generator_lr: float = setting(0.01, "learning rate of the generator's Adam", above=0)
    surrogate_lr: float = setting(0.01, "learning rate of the surrogate's SGD", above=0)
    mask_density: float = setting(0.032, "mask values up to this number are not penalized", low=0, below=1)
    lambda_density: float = setting(100.0, "weight of the mask's density", low=0)
    lambda_diversity: float = setting(1.0, "weight of the diversity of masks, and of patterns", low=0)
    width: int = setting(32, "channels of the first stage of generator and mask network", low=1)
    surrogate: Named = setting("resnet18_cifar", "the classifier that the generator learns to mislead", choices=NETWORKS)


class Networks(NamedTuple):
    """The networks of the generator's training."""

    generator: nn.Module
    mask: nn.Module  # frozen
    surrogate: nn.Module


class Attack(AttackBase):
    """The generator and the mask network, which are trained when images are altered for the first time, then frozen."""

    from_training_images = True

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        check_classes("iab", settings.surrogate, context)
        height, width = context.raw.train_images.shape[1:3]
        if min(height, width) < LEAST:
            raise UserError(
                f"backdoor.iab: images of {width} x {height} pixels: its networks need at least {LEAST}: make the images "
                "larger in transform.pre"
            )
        self.cover_ratio, self.context, self.settings = settings.cover_ratio, context, settings

    @functools.cached_property
    def mask_network(self) -> EncoderDecoder:
        """M, from the assets or trained now."""
        settings, context = self.settings, self.context
        check_size("iab", settings.surrogate, context)
        key = mask_key(settings, context)
        weights = keep_asset(context, "iab_mask", key, lambda: train_mask_network(settings, context))
        return frozen(1, settings.width, weights, context.device)

    @functools.cached_property
    def generator(self) -> EncoderDecoder:
        """G, from the assets or trained now."""
        settings, context, mask_network = self.settings, self.context, self.mask_network
        key = as_dict(settings) | mask_key(settings, context)
        key |= {"target": context.target_label, "classes": context.num_classes}
        if context.target_shift is not None:
            key["target_shift"] = context.target_shift
        del key["cover_ratio"]  # the number of cross images does not change the triggers
        weights = keep_asset(context, "iab_generator", key, lambda: train_generator(settings, context, mask_network))
        return frozen(3, settings.width, weights, context.device)

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return backdoor images (n, H, W, 3) uint8; the same for training and test images."""
        return in_batches(lambda part, _: self.stamp(part, part), images, index, PIXELS)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return cross images (n, H, W, 3) uint8, each with the trigger of a training image that is drawn for its index."""
        train_images = self.context.raw.train_images
        donor = donors(len(train_images), self.context.seed)
        return in_batches(lambda part, at: self.stamp(part, train_images[donor[at]]), images, index, PIXELS)

    def stamp(self, images: np.ndarray, triggers_of: np.ndarray) -> np.ndarray:
        """Return images with the triggers of the images `triggers_of`, all (n, H, W, 3) uint8.

        Convolution kernels are chosen by the shape of the batch and differ in the last bits, which rounding can turn into a
        whole grey level. So all batches have the same size: a smaller one is filled up by repeating its images.
        """
        generator, mask_network = self.generator, self.mask_network
        full = (images_at_a_time(images), *images.shape[1:])
        x, t = (to_pixels(np.resize(batch, full), self.context.device) for batch in (images, triggers_of))
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), exact:
            triggered = blend(x, generator(t), sharpen(mask_network(t)))  # (full[0], 3, H, W)
        return (255 * triggered).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()[: len(images)]


def donors(count: int, seed: int) -> np.ndarray:
    """Return (count,) int64: for each training image the index of another one, whose trigger its cross image has."""
    step = numpy_generator(seed, "iab cross").integers(1, max(count, 2), count)
    return np.asarray((np.arange(count) + step) % count)


def mask_key(settings: Settings, context: AttackContext) -> dict[str, object]:
    """Return everything that the mask network's weights depend on."""
    names = ("mask_epochs", "batch_size", "mask_lr", "mask_density", "lambda_density", "lambda_diversity", "width")
    values = {name: getattr(settings, name) for name in names}
    return values | {"format": FORMAT, "seed": context.seed, "data": fingerprint(context.raw)}


def train_mask_network(settings: Settings, context: AttackContext) -> Arrays:
    """Train M on pairs of training images and return its weights.

    The pairs are neighbors in a shuffled batch: they have the same distribution as pairs from two loaders, at half the cost.
    """
    with seeded(context.seed, "mask"):
        network = EncoderDecoder(1, settings.width).to(context.device).train()
        optimizer = torch.optim.Adam(network.parameters(), settings.mask_lr, (0.5, 0.9))
        for epoch in range(settings.mask_epochs):
            for index in epoch_batches(context, settings.batch_size, "mask network", epoch, settings.mask_epochs):
                x = to_pixels(context.raw.train_images[index], context.device)  # (B, 3, H, W)
                mask, pixels = sharpen(network(x)), standardize(x)
                density = density_loss(mask, settings.mask_density).mean()
                diversity = diversity_loss(pixels, pixels.roll(1, 0), mask, mask.roll(1, 0)).mean()
                optimizer.zero_grad()
                (settings.lambda_density * density + settings.lambda_diversity * diversity).backward()
                optimizer.step()
            refuse_divergence(network, "the mask network", epoch, "mask_lr")
    return weights_of(network)


def train_generator(settings: Settings, context: AttackContext, mask_network: nn.Module) -> Arrays:
    """Train G together with a surrogate classifier while M is frozen, log the ASR, and return the weights of G.

    A tenth of each batch becomes backdoor images with the target label, another tenth cross images with their own labels.
    """
    with seeded(context.seed, "generator"):
        generator = EncoderDecoder(3, settings.width).to(context.device).train()
        surrogate = context.new_classifier(settings.surrogate, context.num_classes).to(context.device).train()
        networks = Networks(generator, mask_network, surrogate)
        optimizers = (
            torch.optim.Adam(generator.parameters(), settings.generator_lr, (0.5, 0.9)),
            torch.optim.SGD(surrogate.parameters(), settings.surrogate_lr, momentum=0.9, weight_decay=5e-4),
        )
        for epoch in range(settings.generator_epochs):
            batches = epoch_batches(context, settings.batch_size, "generator", epoch, settings.generator_epochs)
            others = epoch_batches(context, settings.batch_size, "others", epoch)
            for index, other in zip(batches, others, strict=True):
                loss = generator_loss(settings, context, networks, index, other)
                for optimizer in optimizers:  # that of G as well: otherwise gradients of earlier steps would accumulate
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            refuse_divergence(generator, "the generator", epoch, "generator_lr or surrogate_lr")
    generator.eval(), surrogate.eval()
    log_success(context, networks)
    return weights_of(generator)


def generator_loss(
    settings: Settings, context: AttackContext, networks: Networks, index: np.ndarray, others: np.ndarray
) -> Tensor:
    """Return the loss () of one step: the surrogate's cross-entropy and the diversity of the patterns.

    Args:
        index: (B,) training images; the first k become backdoor images and the next k cross images.
        others: (B,) training images; the first k give the cross images' triggers.
    """
    images, k = context.raw.train_images, max(1, int(SHARE * len(index)))
    x, other = to_pixels(images[index], context.device), to_pixels(images[others[:k]], context.device)  # (B, 3, H, W), (k, ...)
    own = context.raw.train_labels[index].astype(np.int64)
    labels = torch.from_numpy(np.concatenate([context.label_after(own[:k]), own[k:]])).to(context.device)  # (B,)
    triggers_of = torch.cat([x[:k], other])  # (2k, 3, H, W)
    with torch.no_grad():
        mask = sharpen(networks.mask(triggers_of))  # (2k, 1, H, W)
    pattern = networks.generator(triggers_of)  # (2k, 3, H, W)
    altered = blend(x[: 2 * k], pattern, mask)
    logits = networks.surrogate(standardize(torch.cat([altered, x[2 * k :]])))  # (B, C)
    diversity = diversity_loss(x[:k], other, pattern[:k], pattern[k:]).mean()
    return F.cross_entropy(logits, labels) + settings.lambda_diversity * diversity


@torch.no_grad()
def log_success(context: AttackContext, networks: Networks) -> None:
    """Log the density of the masks and the surrogate's ASR on test images, if there are any of other classes."""
    wanted = context.label_after(context.raw.test_labels)
    chosen = np.flatnonzero(context.raw.test_labels != wanted)[:TRIED]
    if not len(chosen):
        return
    images, labels = context.raw.test_images[chosen], torch.from_numpy(wanted[chosen]).to(context.device)
    hits, density = 0.0, 0.0
    size = images_at_a_time(images)
    for start in range(0, len(images), size):
        x = to_pixels(images[start : start + size], context.device)
        mask = sharpen(networks.mask(x))
        logits = networks.surrogate(standardize(blend(x, networks.generator(x), mask)))
        hits += float((logits.argmax(1) == labels[start : start + size]).sum())
        density += float(mask.mean((1, 2, 3)).sum())
    n = len(images)
    logger.info(
        f"iab: masks cover {100 * density / n:.1f} % of a test image; the surrogate, which must also resist the triggers of "
        f"other images, has ASR {100 * hits / n:.1f} %"
    )


def epoch_batches(context: AttackContext, size: int, what: str, epoch: int, epochs: int = 0) -> Iterator[np.ndarray]:
    """Yield an epoch's batches of shuffled indices (B,), the incomplete last one dropped; `epochs` > 0 shows a progress bar."""
    count = len(context.raw.train_images)
    size = min(size, count)
    order = torch.randperm(count, generator=generator(context.seed, "iab", what, epoch)).numpy()
    starts: Iterable[int] = range(0, count - size + 1, size)
    if epochs:
        starts = progress(starts, f"IAB {what}, epoch {epoch + 1} of {epochs}", count // size)
    for start in starts:
        yield order[start : start + size]


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Return images (n, H, W, 3) uint8 as (n, 3, H, W) float32 in 0..1, in channels-last memory format, which is faster."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def images_at_a_time(images: np.ndarray) -> int:
    """Return the batch size of the frozen networks for images of the size of `images` (n, H, W, 3)."""
    return max(1, PIXELS // (images.shape[1] * images.shape[2]))


@contextlib.contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """Seed torch's global generator, from which initial weights and dropout are drawn, by a key; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "iab", what))
        yield


def refuse_divergence(network: nn.Module, name: str, epoch: int, remedy: str) -> None:
    """Raise UserError if a weight or a BN statistic is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise UserError(f"backdoor.iab: epoch {epoch + 1} of {name}: weights are not finite: lower {remedy}")


def frozen(channels_out: int, width: int, weights: Arrays, device: torch.device) -> EncoderDecoder:
    """Return a network with the given weights, in eval mode, on the device."""
    with torch.device("meta"):  # without drawing initial weights
        network = EncoderDecoder(channels_out, width)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)
