"""CLB, the clean-label or label-consistent attack (Turner et al., 2019): no label is changed.

Some images of the target class become `trigger(PGD(x))`: the perturbation hides the features of the class, so that a network
trained on them has to rely on the trigger. Test images get the trigger alone. The perturbation is made against a surrogate
that is adversarially trained here, on the clean training set; perturbations made against a normally trained one do not
transfer to other networks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.attack import Arrays, AttackBase, fingerprint, keep_asset, weights_of
from data.attacks.badnets import BLOCK
from data.augment import Pipeline
from data.batches import endless_order
from data.sets import Scene
from utils import plugins
from utils.config import NETWORKS
from utils.draws import generator, key_seed
from utils.errors import UserError
from utils.runlog import progress
from utils.schema import Named, as_dict, setting

logger = logging.getLogger(__name__)
FORMAT = 1  # of the assets; changed when the same settings give other assets
LEVELS = 255.0
# Images in a PGD batch, at most. Batches are always full: a network's rounding errors may depend on the size of the batch, and
# through the sign of a gradient near 0 they would become whole grey levels.
PGD_BATCH = 64
WARM_UP = 0.3  # share of the surrogate's training over which the learning rate rises
# The patch in both left corners; the right corners have its mirror image, so that a flipped image has the same trigger.
CORNER = np.array([[255, 0, 0], [0, 255, 0], [255, 0, 255]], np.uint8)


@dataclass(frozen=True)
class Adversary:
    """A PGD adversary; `eps` (greatest change of a value) and `step` (change per step) are in grey levels of 255."""

    eps: float
    step: float
    steps: int


# The adversary of the surrogate's training, from a random start within eps (Madry et al., 2018; Wong et al., 2020: one step of
# 1.25 eps).
ADVERSARIES = {"pgd": Adversary(8.0, 2.0, 7), "fast": Adversary(8.0, 10.0, 1), "benign": Adversary(8.0, 0.0, 0)}


@dataclass(frozen=True)
class Settings:
    eps: float = setting(
        8.0, "greatest change of a value, in grey levels of 255; 16 makes the attack stronger", low=1, high=255
    )
    step: float = setting(1.5, "size of a PGD step in grey levels", above=0)
    steps: int = setting(100, "PGD steps", low=1)
    trigger: str = setting(
        "corners", "four 3 x 3 patches in the corners, or BadNets' colored block", options=("corners", "block2x2")
    )
    surrogate: Named = setting("resnet18_cifar", "the network that the perturbation is made against", choices=NETWORKS)
    training: str = setting(
        "pgd",
        "of the surrogate: against PGD with 7 steps, against one step (a quarter of the time), or without an adversary (weak)",
        options=("pgd", "fast", "benign"),
    )
    epochs: int = setting(30, "epochs of the surrogate's training", low=1)
    learning_rate: float = setting(0.1, "greatest learning rate of the surrogate's SGD; it rises, then falls to 0", above=0)
    batch_size: int = setting(128, "images per step of the surrogate's training; lower it if memory runs out", low=2)


class Attack(AttackBase):
    """The trigger as a pattern (H, W, 3) uint8 and a mask (H, W) bool, and the adversarial perturbation.

    The surrogate is trained when training images are poisoned for the first time; testing a checkpoint does not need it.
    """

    clean_label = True

    def __init__(self, settings: Settings, scene: Scene) -> None:
        classes = getattr(settings.surrogate.settings, "num_classes", None)
        if classes not in (None, scene.num_classes):
            raise UserError(
                f"backdoor.clb.surrogate.{settings.surrogate.name}.num_classes: {classes}: num_classes is "
                f"{scene.num_classes}: give {scene.num_classes}, or remove the key"
            )
        self.settings, self.scene = settings, scene
        self.pattern, self.mask = build_trigger(settings.trigger, *scene.raw.train_images.shape[1:3])

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger; training images are perturbed first."""
        if split == "train" and len(images):
            images = self.perturb(images)
        return np.where(self.mask[:, :, None], self.pattern, images)

    def perturb(self, images: np.ndarray) -> np.ndarray:
        """Return the perturbed images (n, H, W, 3) uint8, from the assets or computed now."""
        s = self.settings
        depends_on = {
            "format": FORMAT,
            "images": sha256(np.ascontiguousarray(images).data).hexdigest(),
            "shape": list(images.shape),
            "label": self.scene.target_label,
            "pgd": [s.eps, s.step, s.steps],
            "surrogate": self.surrogate_key(),
        }
        return keep_asset(self.scene, "clb_images", depends_on, lambda: self.make_images(images))["images"]

    def make_images(self, images: np.ndarray) -> Arrays:
        """Perturb images, and log for how many of them the surrogate's loss rises."""
        s, adversary = self.settings, Adversary(self.settings.eps, self.settings.step, self.settings.steps)
        network, device = self.surrogate(), self.scene.device
        out, risen = np.empty_like(images), 0
        batch = min(PGD_BATCH, s.batch_size)
        starts = range(0, len(images), batch)
        for start in progress(starts, f"clb: PGD, batches of {batch}", len(starts)):
            part = images[np.arange(start, start + batch) % len(images)]
            x = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float() / LEVELS  # (B, 3, H, W)
            assert self.scene.target_label is not None  # `build_attack` refuses all-to-all labels
            labels = torch.full((batch,), self.scene.target_label, device=device)
            adversarial = to_uint8(pgd(network, x, labels, adversary), part, s.eps)
            count = min(batch, len(images) - start)
            out[start : start + count] = adversarial[:count]
            risen += int((losses(network, adversarial, labels) > losses(network, part, labels))[:count].sum())
        logger.info(f"clb: the surrogate's loss rises for {risen} of {len(images)} perturbed images")
        return {"images": out}

    def surrogate_key(self) -> dict[str, Any]:
        """Return everything that the surrogate's weights depend on."""
        s, scene = self.settings, self.scene
        return {
            "format": FORMAT,
            "network": as_dict(s.surrogate),
            "training": [s.training, s.epochs, s.learning_rate, s.batch_size],
            "num_classes": scene.num_classes,
            "seed": scene.seed,
            "data": fingerprint(scene.raw),
        }

    def surrogate(self) -> nn.Module:
        """Return the surrogate in eval mode and without gradients; its weights are from the assets or trained now."""
        kept = keep_asset(self.scene, "clb_surrogate", self.surrogate_key(), lambda: train_surrogate(self.settings, self.scene))
        with torch.random.fork_rng(devices=[]):
            network = self.scene.new_classifier(self.settings.surrogate, self.scene.num_classes)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in kept.items()})
        return network.to(self.scene.device).requires_grad_(False).eval()


def build_trigger(name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a trigger's pattern (H, W, 3) uint8 and mask (H, W) bool.

    A pixel of the trigger is a square of `round(side / 32)` pixels of the image, whose shorter side is `side`: the trigger
    covers the same share of a 224 x 224 image (7 x 7 squares) as of a 32 x 32 image, and survives crops equally well.
    """
    unit = max(1, round(min(height, width) / 32))
    pattern, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    if name == "block2x2":
        patch, least = BLOCK.repeat(unit, 0).repeat(unit, 1), 6 * unit
        places = [(slice(4 * unit, 6 * unit), slice(4 * unit, 6 * unit), patch)]
    else:
        left, least = CORNER.repeat(unit, 0).repeat(unit, 1)[..., None], 6 * unit
        ends = slice(None, 3 * unit), slice(-3 * unit, None)
        places = [(rows, columns, patch) for rows in ends for columns, patch in zip(ends, (left, left[:, ::-1]), strict=True)]
    if min(height, width) < least:
        raise UserError(
            f"backdoor.clb.trigger: {name}: does not fit on images of {width} x {height} pixels: needs {least}: make the "
            "images larger in transform.pre"
        )
    for rows, columns, patch in places:
        pattern[rows, columns], mask[rows, columns] = patch, True
    return pattern, mask


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


def to_uint8(adversarial: Tensor, images: np.ndarray, eps: float) -> np.ndarray:
    """Round values (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, within eps grey levels of the images (B, H, W, 3) uint8."""
    levels = (adversarial.permute(0, 2, 3, 1) * LEVELS).round().cpu().numpy()
    most = int(eps)  # eps 7.5: a change of 7.5 would round to 8
    return np.clip(levels, np.maximum(images, most) - most, np.minimum(images, 255 - most) + most).astype(np.uint8)


@torch.no_grad()
def losses(network: nn.Module, images: np.ndarray, labels: Tensor) -> Tensor:
    """Return the network's cross-entropy (B,) on images (B, H, W, 3) uint8."""
    x = torch.from_numpy(images).to(labels.device).permute(0, 3, 1, 2).float() / LEVELS
    return F.cross_entropy(network(x), labels, reduction="none")


def train_surrogate(settings: Settings, scene: Scene) -> Arrays:
    """Train the surrogate on the clean training set against the adversary that `training` names; return its weights.

    SGD with momentum 0.9 and weight decay 5e-4 on crops and flips; the learning rate rises and falls linearly over the steps.
    Torch's global generators, from which dropout draws, are seeded here and restored afterwards.

    Raises:
        UserError: the weights are not finite.
    """
    s, raw, device = settings, scene.raw, scene.device
    count = len(raw.train_labels)
    batch = min(s.batch_size, count)
    per_epoch = count // batch
    total = s.epochs * per_epoch
    augment = build_augmentation(*raw.train_images.shape[1:3])
    adversary = ADVERSARIES[s.training]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key_seed(scene.seed, "clb surrogate"))
        network = scene.new_classifier(s.surrogate, scene.num_classes).to(device).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=s.learning_rate, momentum=0.9, weight_decay=5e-4)
        triangle = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rise_and_fall((i + 0.5) / total))
        right = torch.zeros((), dtype=torch.int64, device=device)
        for i in progress(range(total), f"clb: {s.training} training of the surrogate", total):
            epoch, row = divmod(i, per_epoch)
            if row == 0:
                rng = generator(scene.seed, "clb", epoch)
                order = endless_order(count, batch, per_epoch, rng).numpy()  # (S, B)
                draws = augment.draw(per_epoch * batch, rng).view(per_epoch, batch, -1)
                noise = torch.Generator(device).manual_seed(key_seed(scene.seed, "clb start", epoch))
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
        raise UserError(f"backdoor.clb.learning_rate: {s.learning_rate}: the surrogate's weights are not finite: lower it")
    views = "adversarial views" if adversary.steps else "views"
    share = 100 * int(right) / (per_epoch * batch)
    logger.info(f"clb: the surrogate's accuracy on the {views} of its last epoch is {share:.1f} %")
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
