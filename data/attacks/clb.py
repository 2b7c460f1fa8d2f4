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

import numpy as np
import torch
from torch import Tensor

from data.attack import Arrays, AttackBase, keep_asset
from data.attacks._overlay import BLOCK, Patch, corners, enlarge, patch_pixel
from data.attacks._surrogate import LEVELS, Adversary, check_classes, load_surrogate, losses, pgd, surrogate_key
from data.sets import AttackContext
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import NETWORKS
from utils.errors import UserError
from utils.reporting.runlog import progress

logger = logging.getLogger(__name__)
FORMAT = 1  # of the assets; changed when the same settings give other assets
# Images in a PGD batch, at most. Batches are always full: a network's rounding errors may depend on the size of the batch, and
# through the sign of a gradient near 0 they would become whole grey levels.
PGD_BATCH = 64
# The patch in both left corners; the right corners have its mirror image, so that a flipped image has the same trigger.


@dataclass(frozen=True)
class Settings:
    eps: float = setting(
        8.0, "maximum change of a value, in grey levels (0 to 255); 16 and 32 make the attack stronger", low=1, high=255
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
    learning_rate: float = setting(0.1, "peak learning rate of the surrogate's SGD; it rises, then falls to 0", above=0)
    batch_size: int = batch_size_setting(128, "images per step of the surrogate's training; lower it if memory runs out")


class Attack(AttackBase):
    """The trigger as a pattern (H, W, 3) uint8 and a mask (H, W) bool, and the adversarial perturbation.

    The surrogate is trained when training images are poisoned for the first time; testing a checkpoint does not need it.
    """

    clean_label = True

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        check_classes("clb", settings.surrogate, context)
        self.settings, self.context = settings, context
        self.pattern, self.mask = build_trigger(settings.trigger, *context.raw.train_images.shape[1:3])

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
            "label": self.context.target_label,
            "pgd": [s.eps, s.step, s.steps],
            "surrogate": surrogate_key(s, self.context),
        }
        return keep_asset(self.context, "clb_images", depends_on, lambda: self.make_images(images))["images"]

    def make_images(self, images: np.ndarray) -> Arrays:
        """Perturb images, and log for how many of them the surrogate's loss rises."""
        s, adversary = self.settings, Adversary(self.settings.eps, self.settings.step, self.settings.steps)
        network, device = load_surrogate("clb", self.settings, self.context), self.context.device
        out, risen = np.empty_like(images), 0
        batch = min(PGD_BATCH, s.batch_size)
        starts = range(0, len(images), batch)
        for start in progress(starts, f"clb: PGD, batches of {batch}", len(starts)):
            part = images[np.arange(start, start + batch) % len(images)]
            x = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float() / LEVELS  # (B, 3, H, W)
            assert self.context.target_label is not None  # `build_attack` refuses all-to-all labels
            labels = torch.full((batch,), self.context.target_label, device=device)
            adversarial = to_uint8(pgd(network, x, labels, adversary), part, s.eps)
            count = min(batch, len(images) - start)
            out[start : start + count] = adversarial[:count]
            risen += int((losses(network, adversarial, labels) > losses(network, part, labels))[:count].sum())
        logger.info(f"clb: the surrogate's loss rises for {risen} of {len(images)} perturbed images")
        return {"images": out}


def build_trigger(name: str, height: int, width: int) -> Patch:
    """Return a trigger's pattern (H, W, 3) uint8 and mask (H, W) bool, scaled to the images (`patch_pixel`)."""
    unit = patch_pixel(height, width)
    if min(height, width) < 6 * unit:
        raise UserError(
            f"backdoor.clb.trigger: {name}: does not fit on images of {width} x {height} pixels: needs {6 * unit}: make the "
            "images larger in transform.pre"
        )
    if name == "corners":
        return corners(height, width)
    pattern, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
    square = slice(4 * unit, 6 * unit)
    pattern[square, square], mask[square, square] = enlarge(BLOCK, unit), True
    return pattern, mask


def to_uint8(adversarial: Tensor, images: np.ndarray, eps: float) -> np.ndarray:
    """Round values (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, within eps grey levels of the images (B, H, W, 3) uint8."""
    levels = (adversarial.permute(0, 2, 3, 1) * LEVELS).round().cpu().numpy()
    most = int(eps)  # eps 7.5: a change of 7.5 would round to 8
    return np.clip(levels, np.maximum(images, most) - most, np.minimum(images, 255 - most) + most).astype(np.uint8)
