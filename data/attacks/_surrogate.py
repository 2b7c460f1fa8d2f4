"""A surrogate: the classifier that an attacker trains on the clean training set, to attack networks that they do not know."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.attack import Arrays, fingerprint, keep_asset, weights_of
from data.augment import Pipeline
from data.batches import endless_order
from data.sets import AttackContext
from utils import plugins
from utils.config.schema import Named, as_dict
from utils.draws import generator, key_seed
from utils.errors import UserError
from utils.reporting.runlog import progress

logger = logging.getLogger(__name__)
FORMAT = 1  # of the weights; changed when the same settings give other weights
LEVELS = 255.0
WARM_UP = 0.3  # share of the surrogate's training over which the learning rate rises


@dataclass(frozen=True)
class Adversary:
    """A PGD adversary; `eps` (maximum change of a value) and `step` (change per step) are in grey levels (0 to 255)."""

    eps: float
    step: float
    steps: int


# The adversary of the surrogate's training, from a random start within eps (Madry et al., 2018; Wong et al., 2020: one step of
# 1.25 eps).
ADVERSARIES = {"pgd": Adversary(8.0, 2.0, 7), "fast": Adversary(8.0, 10.0, 1), "benign": Adversary(8.0, 0.0, 0)}


class SurrogateSettings(Protocol):
    """The settings of an attack that trains a surrogate."""

    @property
    def surrogate(self) -> Named:
        """The network."""

    @property
    def training(self) -> str:
        """A name in `ADVERSARIES`."""

    @property
    def epochs(self) -> int:
        """Epochs of the training."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate of SGD; it rises, then falls to 0."""

    @property
    def batch_size(self) -> int:
        """Images per step."""


def check_classes(name: str, surrogate: Named, context: AttackContext) -> None:
    """Refuse a surrogate of the attack `name` with another number of classes than the data set has."""
    classes = getattr(surrogate.settings, "num_classes", None)
    if classes not in (None, context.num_classes):
        raise UserError(
            f"backdoor.{name}.surrogate.{surrogate.name}.num_classes: {classes}: num_classes is "
            f"{context.num_classes}: give {context.num_classes}, or remove the key"
        )


def check_size(name: str, surrogate: Named, context: AttackContext) -> None:
    """Refuse a surrogate of the attack `name` that cannot take images of the data set's size, before anything is trained."""
    height, width = context.raw.train_images.shape[1:3]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # without weights
        network = context.new_classifier(surrogate, context.num_classes).eval()
        try:
            network(torch.empty(1, 3, height, width))
        except UserError as error:  # `network: ...` or `network.NAME.KEY: ...`
            raise UserError(f"backdoor.{name}.surrogate{str(error).removeprefix('network')}") from None


def surrogate_key(settings: SurrogateSettings, context: AttackContext) -> dict[str, Any]:
    """Return everything that the surrogate's weights depend on."""
    s = settings
    return {
        "format": FORMAT,
        "network": as_dict(s.surrogate),
        "training": [s.training, s.epochs, s.learning_rate, s.batch_size],
        "num_classes": context.num_classes,
        "seed": context.seed,
        "data": fingerprint(context.raw),
    }


def load_surrogate(name: str, settings: SurrogateSettings, context: AttackContext) -> nn.Module:
    """Return the surrogate in eval mode and without gradients; its weights are from the assets or trained now.

    Args:
        name: of the attack.
    """
    check_size(name, settings.surrogate, context)
    key = surrogate_key(settings, context)
    kept = keep_asset(context, f"{name}_surrogate", key, lambda: train_surrogate(name, settings, context), False)
    with torch.random.fork_rng(devices=[]):
        network = context.new_classifier(settings.surrogate, context.num_classes)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in kept.items()})
    return network.to(context.device).requires_grad_(False).eval()


def train_surrogate(name: str, settings: SurrogateSettings, context: AttackContext) -> Arrays:
    """Train the surrogate on the clean training set against the adversary that `training` names; return its weights.

    SGD with momentum 0.9 and weight decay 5e-4 on crops and flips; the learning rate rises and falls linearly over the steps.
    Torch's global generators, from which dropout draws, are seeded here and restored afterwards.

    Raises:
        UserError: the weights are not finite.
    """
    s, raw, device = settings, context.raw, context.device
    count = len(raw.train_labels)
    batch = min(s.batch_size, count)
    per_epoch = count // batch
    total = s.epochs * per_epoch
    augment = build_augmentation(*raw.train_images.shape[1:3])
    adversary = ADVERSARIES[s.training]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key_seed(context.seed, f"{name} surrogate"))
        network = context.new_classifier(s.surrogate, context.num_classes).to(device).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=s.learning_rate, momentum=0.9, weight_decay=5e-4)
        triangle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rise_and_fall((i + 0.5) / total))
        right = torch.zeros((), dtype=torch.int64, device=device)
        for i in progress(range(total), f"{name}: {s.training} training of the surrogate", total):
            epoch, row = divmod(i, per_epoch)
            if row == 0:
                rng = generator(context.seed, name, epoch)
                order = endless_order(count, batch, per_epoch, rng).numpy()  # (S, B)
                draws = augment.draw(per_epoch * batch, rng).view(per_epoch, batch, -1)
                noise = torch.Generator(device).manual_seed(key_seed(context.seed, f"{name} start", epoch))
                right.zero_()
            pixels = torch.from_numpy(raw.train_images[order[row]]).to(device)
            labels = torch.from_numpy(raw.train_labels[order[row]].astype(np.int64)).to(device)
            x = augment(pixels.permute(0, 3, 1, 2), draws[row].to(device))  # (B, 3, H, W) in [0, 1]
            if adversary.steps:
                start = (2 * torch.rand(x.shape, generator=noise, device=device) - 1) * (adversary.eps / LEVELS)
                x = pgd(network, x, labels, adversary, start)
            logits = network(x)  # (B, C)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            triangle.step()
            right += (logits.detach().argmax(1) == labels).sum()
    weights = weights_of(network)
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise UserError(f"backdoor.{name}.learning_rate: {s.learning_rate}: the surrogate's weights are not finite: lower it")
    views = "adversarial views" if adversary.steps else "views"
    share = 100 * int(right) / (per_epoch * batch)
    logger.info(f"{name}: the surrogate's accuracy on the {views} of its last epoch is {share:.1f} %")
    return weights


def rise_and_fall(done: float) -> float:
    """Return the learning rate, relative to the greatest one, after a share of the training: up to 1, then down to 0."""
    return min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


def build_augmentation(height: int, width: int) -> Pipeline:
    """Return the surrogate's augmentation: square crops, padded by an eighth of the shorter side, and flips; in [0, 1]."""
    side = min(height, width)
    crop = plugins.settings("data.transforms", "random_crop")(size=side, padding=side // 8, padding_mode="reflect")
    flip = plugins.settings("data.transforms", "random_horizontal_flip")()
    return Pipeline((Named("random_crop", crop), Named("random_horizontal_flip", flip)), (), height, width)


def pgd(network: nn.Module, images: Tensor, labels: Tensor, adversary: Adversary, start: Tensor | None = None) -> Tensor:
    """Return images near the given ones on which the network's cross-entropy is higher (untargeted PGD, L-infinity).

    Args:
        images: (B, 3, H, W) in [0, 1].
        labels: (B,) int64, for the loss.
        start: (B, 3, H, W) initial change, within eps, on the scale of the images; None: 0.
    Returns:
        (B, 3, H, W), every value in [0, 1] and within eps of that of the image.
    """
    eps, step = adversary.eps / LEVELS, adversary.step / LEVELS
    adversarial = images if start is None else (images + start).clamp(0, 1)
    for _ in range(adversary.steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(network(adversarial), labels, reduction="sum")  # a sum: the batch size scales no gradient
        (gradient,) = torch.autograd.grad(loss, adversarial)
        change = (adversarial.detach() + step * gradient.sign() - images).clamp(-eps, eps)
        adversarial = (images + change).clamp(0, 1)
    return adversarial.detach()


@torch.no_grad()
def losses(network: nn.Module, images: np.ndarray, labels: Tensor) -> Tensor:
    """Return the network's cross-entropy (B,) on images (B, H, W, 3) uint8 with labels (B,) int64, on the device."""
    x = torch.from_numpy(images).to(labels.device).permute(0, 3, 1, 2).float() / LEVELS
    return F.cross_entropy(network(x), labels, reduction="none")
