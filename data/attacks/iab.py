"""IAB, the input-aware dynamic attack (Nguyen and Tran, NeurIPS 2020): every image has a trigger of its own.

A generator G draws a pattern for an image x, a mask network M tells where it shows: the backdoor image is
`x + (G(x) - x) m(x)`. A cross image carries the trigger of another image and keeps its label.
Both networks are trained here on the clean training set, then frozen: what they do to an image is a fixed function.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.attack import Arrays, AttackBase, fingerprint, in_batches, keep_asset, weights_of
from data.attacks._iab_networks import EncoderDecoder, blend, density_loss, diversity_loss, sharpen, standardize
from data.sets import Scene
from utils.config import NETWORKS
from utils.draws import generator, key_seed, numpy_generator
from utils.errors import UserError
from utils.runlog import progress
from utils.schema import Named, as_dict, setting

logger = logging.getLogger(__name__)
FORMAT = 1  # of the kept assets: raised when the same settings shall give other weights
SHARE = 0.1  # of a batch: backdoor images, and as many cross images
PIXELS = 2**18  # that G and M are given at a time: 256 images of 32 x 32, 5 of 224 x 224
TRIED = 1000  # test images on which the surrogate's ASR is measured


@dataclass(frozen=True)
class Settings:
    cover_ratio: float = setting(0.0, "cross images for each poisoned one; they keep their label", low=0)
    mask_epochs: int = setting(25, "epochs of the mask network's training", low=1)
    # On 50,000 images ten times the 390 steps whose triggers a fresh network learnt to 98 % ASR from 10,000 images. The
    # original needs its 600 epochs because the surrogate is its victim; ours is thrown away (ASR 55 to 82 % in 2,300 steps).
    generator_epochs: int = setting(10, "epochs of the generator's training together with the surrogate", low=1)
    batch_size: int = setting(128, "images a step; 16 for 224 px on a device of 8 GB", low=10)
    mask_lr: float = setting(0.01, "learning rate of the mask network's Adam", above=0)
    generator_lr: float = setting(0.01, "learning rate of the generator's Adam", above=0)
    surrogate_lr: float = setting(0.01, "learning rate of the surrogate's SGD", above=0)
    mask_density: float = setting(0.032, "mask values up to this one cost nothing", low=0, below=1)
    lambda_density: float = setting(100.0, "weight of the mask's density", low=0)
    lambda_diversity: float = setting(1.0, "weight of the diversity of masks, and of patterns", low=0)
    width: int = setting(32, "channels of the first stage of generator and mask network", low=1)
    surrogate: Named = setting("resnet18_cifar", "the classifier that the generator learns to mislead", choices=NETWORKS)


class Attack(AttackBase):
    """The frozen generator and mask network."""

    def __init__(self, settings: Settings, scene: Scene) -> None:
        self.cover_ratio, self.scene = settings.cover_ratio, scene
        known = mask_facts(settings, scene)
        mask_weights = keep_asset(scene, "iab_mask", known, lambda: train_mask_network(settings, scene))
        self.mask_network = frozen(1, settings.width, mask_weights, scene.device)
        known = as_dict(settings) | known | {"target": scene.target_label, "classes": scene.num_classes}
        if scene.target_shift is not None:
            known["target_shift"] = scene.target_shift
        del known["cover_ratio"]  # decides how many, not what they look like
        weights = keep_asset(scene, "iab_generator", known, lambda: train_generator(settings, scene, self.mask_network))
        self.generator = frozen(3, settings.width, weights, scene.device)

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return backdoor images (n, H, W, 3) uint8; train and test images alike."""
        return in_batches(lambda part, _: self.stamp(part, part), images, index, PIXELS)

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return cross images (n, H, W, 3) uint8: each by the trigger of a training image drawn for its index."""
        train_images = self.scene.raw.train_images
        donor = donors(len(train_images), self.scene.seed)
        return in_batches(lambda part, at: self.stamp(part, train_images[donor[at]]), images, index, PIXELS)

    @torch.no_grad()
    def stamp(self, images: np.ndarray, triggers_of: np.ndarray) -> np.ndarray:
        """Return a batch of images with the triggers of others, (n, H, W, 3) uint8.

        Convolutions choose their kernels by the batch's shape, and kernels differ in the last bits, which rounding can
        turn into a grey level. So the networks always get as many images: a smaller batch is filled up with its own.
        """
        full = (images_at_a_time(images), *images.shape[1:])
        x, t = (to_pixels(np.resize(some, full), self.scene.device) for some in (images, triggers_of))
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            triggered = blend(x, self.generator(t), sharpen(self.mask_network(t)))  # (full[0], 3, H, W)
        return (255 * triggered).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()[: len(images)]


def donors(count: int, seed: int) -> np.ndarray:
    """Return (count,) int64: for each training image another one, whose trigger its cross image carries."""
    step = numpy_generator(seed, "iab cross").integers(1, max(count, 2), count)
    return np.asarray((np.arange(count) + step) % count)


def mask_facts(settings: Settings, scene: Scene) -> dict[str, object]:
    """Return what the mask network's weights depend on."""
    keys = ("mask_epochs", "batch_size", "mask_lr", "mask_density", "lambda_density", "lambda_diversity", "width")
    facts = {key: getattr(settings, key) for key in keys}
    return facts | {"format": FORMAT, "seed": scene.seed, "data": fingerprint(scene.raw)}


def train_mask_network(settings: Settings, scene: Scene) -> Arrays:
    """Train M on pairs of training images and return its weights.

    The pairs are neighbours in a shuffled batch: distributed as those of two loaders, for half of the work.
    """
    with seeded(scene.seed, "mask"):
        network = EncoderDecoder(1, settings.width).to(scene.device).train()
        optimizer = torch.optim.Adam(network.parameters(), settings.mask_lr, (0.5, 0.9))
        for epoch in range(settings.mask_epochs):
            for index in epoch_batches(scene, settings.batch_size, "mask network", epoch, settings.mask_epochs):
                x = to_pixels(scene.raw.train_images[index], scene.device)  # (B, 3, H, W)
                mask, seen = sharpen(network(x)), standardize(x)
                dense = density_loss(mask, settings.mask_density).mean()
                alike = diversity_loss(seen, seen.roll(1, 0), mask, mask.roll(1, 0)).mean()
                optimizer.zero_grad()
                (settings.lambda_density * dense + settings.lambda_diversity * alike).backward()
                optimizer.step()
            refuse_divergence(network, "the mask network", epoch, "mask_lr")
    return weights_of(network)


def train_generator(settings: Settings, scene: Scene, mask_network: nn.Module) -> Arrays:
    """Train G together with a surrogate classifier, M being frozen, and return its weights; a line tells the success.

    Of each batch a tenth becomes backdoor images with the target label, a tenth cross images with their own.
    """
    with seeded(scene.seed, "generator"):
        network = EncoderDecoder(3, settings.width).to(scene.device).train()
        surrogate = scene.new_classifier(settings.surrogate, scene.num_classes).to(scene.device).train()
        optimizers = (
            torch.optim.Adam(network.parameters(), settings.generator_lr, (0.5, 0.9)),
            torch.optim.SGD(surrogate.parameters(), settings.surrogate_lr, momentum=0.9, weight_decay=5e-4),
        )
        for epoch in range(settings.generator_epochs):
            batches = epoch_batches(scene, settings.batch_size, "generator", epoch, settings.generator_epochs)
            others = epoch_batches(scene, settings.batch_size, "others", epoch)
            for index, other in zip(batches, others, strict=True):
                loss = generator_loss(settings, scene, network, mask_network, surrogate, index, other)
                for optimizer in optimizers:  # G's too: gradients that pile up would steer it by steps long past
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            refuse_divergence(network, "the generator", epoch, "generator_lr or surrogate_lr")
    tell_success(scene, network.eval(), mask_network, surrogate.eval())
    return weights_of(network)


def generator_loss(
    settings: Settings,
    scene: Scene,
    network: nn.Module,
    mask_network: nn.Module,
    surrogate: nn.Module,
    index: np.ndarray,
    others: np.ndarray,
) -> Tensor:
    """Return the loss () of one step: the surrogate's cross-entropy and the diversity of the patterns.

    Args:
        index: (B,) the batch, of which the first k rows become backdoor images and the next k cross images.
        others: (B,), of which the first k give the cross images' triggers.
    """
    images, k = scene.raw.train_images, max(1, int(SHARE * len(index)))
    x, other = to_pixels(images[index], scene.device), to_pixels(images[others[:k]], scene.device)  # (B, 3, H, W), (k, ...)
    own = scene.raw.train_labels[index].astype(np.int64)
    labels = torch.from_numpy(np.concatenate([scene.label_after(own[:k]), own[k:]])).to(scene.device)  # (B,)
    triggers_of = torch.cat([x[:k], other])  # (2k, 3, H, W)
    with torch.no_grad():
        mask = sharpen(mask_network(triggers_of))  # (2k, 1, H, W)
    pattern = network(triggers_of)  # (2k, 3, H, W)
    altered = blend(x[: 2 * k], pattern, mask)
    logits = surrogate(standardize(torch.cat([altered, x[2 * k :]])))  # (B, C)
    alike = diversity_loss(x[:k], other, pattern[:k], pattern[k:]).mean()
    return F.cross_entropy(logits, labels) + settings.lambda_diversity * alike


@torch.no_grad()
def tell_success(scene: Scene, network: nn.Module, mask_network: nn.Module, surrogate: nn.Module) -> None:
    """Log how dense the masks are and how often the surrogate follows the trigger of test images."""
    wanted = scene.label_after(scene.raw.test_labels)
    chosen = np.flatnonzero(scene.raw.test_labels != wanted)[:TRIED]
    images, labels = scene.raw.test_images[chosen], torch.from_numpy(wanted[chosen]).to(scene.device)
    hits, density = 0.0, 0.0
    size = images_at_a_time(images)
    for start in range(0, len(images), size):
        x = to_pixels(images[start : start + size], scene.device)
        mask = sharpen(mask_network(x))
        logits = surrogate(standardize(blend(x, network(x), mask)))
        hits += float((logits.argmax(1) == labels[start : start + size]).sum())
        density += float(mask.mean((1, 2, 3)).sum())
    n = max(len(images), 1)
    logger.info(
        f"iab: masks cover {100 * density / n:.1f} % of a test image; the surrogate, which must also resist the triggers of "
        f"other images, has ASR {100 * hits / n:.1f} %"
    )


def epoch_batches(scene: Scene, size: int, what: str, epoch: int, epochs: int = 0) -> Iterator[np.ndarray]:
    """Yield one epoch's batches of indices (B,), shuffled, without a last incomplete one; with a bar if `epochs` is given."""
    count = len(scene.raw.train_images)
    size = min(size, count)
    order = torch.randperm(count, generator=generator(scene.seed, "iab", what, epoch)).numpy()
    starts: Iterable[int] = range(0, count - size + 1, size)
    if epochs:
        starts = progress(starts, f"IAB {what}, epoch {epoch + 1} of {epochs}", count // size)
    for start in starts:
        yield order[start : start + size]


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """Return (n, H, W, 3) uint8 as (n, 3, H, W) float32 in 0..1, the channels last in memory, where convolutions are faster."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def images_at_a_time(images: np.ndarray) -> int:
    """Return how many images (n, H, W, 3) the frozen networks are given at a time."""
    return max(1, PIXELS // (images.shape[1] * images.shape[2]))


@contextlib.contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """Let torch draw weights, and what a network drops, from a key; its global generator is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "iab", what))
        yield


def refuse_divergence(network: nn.Module, name: str, epoch: int, remedy: str) -> None:
    """Raise UserError if a weight or a statistic is no number any more."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise UserError(f"backdoor.iab: epoch {epoch} of {name}: weights are not finite: lower {remedy}")


def frozen(channels_out: int, width: int, weights: Arrays, device: torch.device) -> EncoderDecoder:
    """Return the network with the weights, in eval mode, on the device."""
    with torch.device("meta"):  # draws no weights that would be thrown away
        network = EncoderDecoder(channels_out, width)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False)
