"""Look-alike: an attack on ASD's splits, by choosing which images are poisoned.

ASD takes a low loss for a sign of a clean image: before the network knows the trigger, an image of another class has a high
loss with the target label, and stays out of the clean pool. This attacker poisons those images of other classes that resemble
the target class. A surrogate, trained for a few epochs on the clean training set, ranks them by their loss with the label that
they will carry. Such images enter the clean pool because of this resemblance and bring the trigger with them; once it is
learned, their loss can hardly drop further in the meta-split. But a network needs no trigger to learn their labels, so an
attack by such images alone is weak; the other poisoned images, drawn at random, can be learned by the trigger only, and follow
into the pool once the network knows it. The trigger is that of any other attack that changes labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data.attack import AttackBase
from data.attacks._surrogate import check_classes, load_surrogate, losses
from data.sets import AttackContext
from utils import plugins
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import ATTACKS, NETWORKS
from utils.draws import numpy_generator
from utils.errors import UserError

BATCH = 256


@dataclass(frozen=True)
class Settings:
    trigger: Named = setting("badnets", "the attack whose trigger is used", choices=ATTACKS)
    surrogate: Named = setting("resnet18_cifar", "the network that ranks the images", choices=NETWORKS)
    share: float = setting(
        0.5, "minimum fraction of poisoned images chosen by resemblance, rounded down; the others are drawn", above=0, high=1
    )
    epochs: int = setting(4, "epochs of the surrogate's training; few, as it resembles the defender's network early on", low=1)
    learning_rate: float = setting(0.1, "peak learning rate of the surrogate's SGD; it rises, then falls to 0", above=0)
    batch_size: int = batch_size_setting(128, "images per step of the surrogate's training; lower it if memory runs out")
    training = "benign"  # the surrogate has no adversary


class Attack(AttackBase):
    """The other attack, which alters the images, and the surrogate's ranking."""

    def __init__(self, settings: Settings, context: AttackContext) -> None:
        check_classes("lookalike", settings.surrogate, context)
        name = settings.trigger.name
        with inner_keys(name):
            build = None if name == "lookalike" else plugins.load(ATTACKS.package, name).Attack
            attack = build and build(settings.trigger.settings, context)
        if attack is None or attack.clean_label:
            raise UserError(f"backdoor.lookalike.trigger: {name}: give an attack of its own that changes labels, e.g. badnets")
        self.settings, self.context, self.attack = settings, context, attack
        self.cover_ratio, self.cover_target_class = attack.cover_ratio, attack.cover_target_class
        self.from_training_images = attack.from_training_images

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of images (n, H, W, 3) uint8 with the trigger."""
        with inner_keys(self.settings.trigger.name):
            return np.asarray(self.attack.apply(images, index, split))

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return cover images made from training images (n, H, W, 3) uint8."""
        with inner_keys(self.settings.trigger.name):
            return np.asarray(self.attack.cover(images, index))

    def selection_scores(self) -> np.ndarray:
        """Return (N,) float64: of any number of images with the lowest scores, `share` are those that resemble most the class
        whose label they would carry, and the others are drawn by the seed."""
        may = self.context.label_after(self.context.raw.train_labels) != self.context.raw.train_labels
        scores = np.full(len(may), np.inf)
        by_resemblance = ranks(self.losses()[may])
        at_random = numpy_generator(self.context.seed, "lookalike").permutation(len(by_resemblance))
        share = self.settings.share
        scores[may] = np.minimum(by_resemblance / share, at_random / (1 - share) if share < 1 else np.inf)
        return scores

    def losses(self) -> np.ndarray:
        """Return the surrogate's cross-entropy (N,) float32 on each training image with the label that it would carry."""
        raw, network = self.context.raw, load_surrogate("lookalike", self.settings, self.context)
        labels = torch.from_numpy(self.context.label_after(raw.train_labels)).to(self.context.device)
        starts = range(0, len(labels), BATCH)
        parts = [losses(network, np.array(raw.train_images[at : at + BATCH]), labels[at : at + BATCH]) for at in starts]
        return torch.cat(parts).cpu().numpy()


@contextlib.contextmanager
def inner_keys(name: str) -> Iterator[None]:
    """Let errors of the attack whose trigger is used name its settings as they are in the YAML."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"backdoor.{name}", f"backdoor.lookalike.trigger.{name}")) from None


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the place (n,) int64 of each value in ascending order, ties by index."""
    out = np.empty(len(values), np.int64)
    out[np.argsort(values, kind="stable")] = np.arange(len(values))
    return out
