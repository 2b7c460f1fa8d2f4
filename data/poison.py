"""The attacker: which training images are poisoned, and the three image sets that follow (asd.md sections 1 and 2)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.attack import AttackBase
from data.augment import Pipeline
from data.sets import CLEAN, COVER, POISONED, ImageSet, Oracle, RawData, Scene, to_set
from utils import plugins
from utils.config import Config
from utils.draws import numpy_generator
from utils.errors import UserError
from utils.files import write_atomically

Say = Callable[[str], object]
EXAMPLES = 16  # poisoned images kept for the pictures


@dataclass(frozen=True)
class PoisonedData:
    """The poisoned training set, its ground truth, and pictures of what the attack does."""

    train: ImageSet  # poisoned images and the labels that they carry
    oracle: Oracle  # for seed samples and reports only
    examples: np.ndarray  # (2, n, H, W, 3) uint8: some poisoned images before and after


@dataclass(frozen=True)
class TestSets:
    """The two sets that a model is tested on."""

    clean: ImageSet
    backdoor: ImageSet  # the test images of other classes, triggered, labelled as the target

    def to(self, device: torch.device) -> TestSets:
        """Return both sets on a device."""
        return TestSets(self.clean.to(device), self.backdoor.to(device))


def load_raw(config: Config) -> RawData:
    """Load the configured data set, cut it to `data.train_limit` and `data.test_limit`, apply `transform.pre`."""
    name = config.dataset.name if config.dataset else name_of_folder(str(config.dataset_dir))
    module = plugins.load("data.datasets", name)
    settings = config.dataset.settings if config.dataset else module.Settings()
    raw: RawData = module.load(settings, config.dataset_dir, config.download)
    train, test = slice(config.data.train_limit), slice(config.data.test_limit)
    for part, labels in (("train", raw.train_labels[train]), ("test", raw.test_labels[test])):
        if labels.max() >= config.num_classes:
            raise UserError(f"num_classes: {config.num_classes}: the {part} set has the label {labels.max()}: raise it")
    return RawData(
        pre_transform(raw.train_images[train], config), raw.train_labels[train],
        pre_transform(raw.test_images[test], config), raw.test_labels[test], raw.class_names,
    )  # fmt: skip


def name_of_folder(folder: str) -> str:
    """Return the data set that a folder's name speaks of, as the original does ("cifar" -> cifar10)."""
    last = Path(folder).name.lower()
    if "cifar" in str(folder).lower():
        return "cifar10"
    raise UserError(f"dataset_dir: {last}: does not tell which data set it is: add `dataset: cifar10` or another")


def pre_transform(images: np.ndarray, config: Config, batch: int = 512) -> np.ndarray:
    """Apply `transform.pre` (resize, centre crop) to (N, H, W, 3) uint8 images."""
    if not config.transform.pre:
        return images
    pipeline = Pipeline(config.transform.pre, (), *images.shape[1:3])
    out = []
    for start in range(0, len(images), batch):
        part = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2)
        work = [(step, torch.zeros(len(part), 0)) for step in pipeline.steps]
        out.append(pipeline.move(part, work).permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def draw_poisoned(labels: np.ndarray, target: int, ratio: float, seed: int, mode: str, clean_label: bool = False) -> np.ndarray:
    """Draw which images are poisoned; the same seed gives the same images as the authors' code in mode `bernoulli`.

    Args:
        labels: (N,) int64.
        mode: `bernoulli`: one draw for every image, poisoned if under the ratio and not of the target class;
            `exact`: `int(ratio * N)` images of the other classes.
        clean_label: the images are those of the target class instead, and the ratio is a share of that class.
    Returns:
        (N,) float64 of 0 and 1, the format of `poison_idx.npy`.
    """
    rng = random.Random(seed)
    index = np.zeros(len(labels))
    allowed = (labels == target) == clean_label
    if mode == "bernoulli":
        drawn = np.array([rng.random() < ratio for _ in labels], bool)
        index[drawn & allowed] = 1
        return index
    candidates = np.flatnonzero(allowed).tolist()
    count = int(ratio * (len(candidates) if clean_label else len(labels)))
    if count > len(candidates):
        raise UserError(
            f"backdoor.poison_ratio: {ratio}: {count} images to poison and {len(candidates)} are of other classes: lower it"
        )
    index[rng.sample(candidates, count)] = 1
    return index


def draw_cover(poisoned: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Draw the cover images among those that are not poisoned: `int(ratio * poisoned)` of them.

    Args:
        poisoned: (N,) of 0 and 1.
    Returns:
        (n,) int64, sorted.
    """
    others, count = np.flatnonzero(poisoned == 0), int(ratio * poisoned.sum())
    if count > len(others):
        raise UserError(
            f"backdoor: cover_ratio: {ratio}: {count} cover images and {len(others)} images are not poisoned: lower it"
        )
    return np.sort(numpy_generator(seed, "cover").choice(others, count, replace=False))


def poison_index(path: Path, labels: np.ndarray, config: Config, clean_label: bool = False) -> np.ndarray:
    """Return the run's `poison_idx.npy`, checked against the settings; draw and store it if it is not there."""
    b = config.backdoor
    if not path.exists():
        index = draw_poisoned(labels, b.target_label, b.poison_ratio, config.seed.seed, b.poison_mode, clean_label)
        write_atomically(path, lambda file: np.save(file, index, allow_pickle=False))
        return index
    remedy = "move the file away to draw anew, or start over with --resume False"
    try:
        index = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises whatever its readers of headers and archives do
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is no array of numbers ({what}): {remedy}") from None
    if not isinstance(index, np.ndarray) or index.shape != labels.shape:
        shape = getattr(index, "shape", "no array")
        raise UserError(f"{path}: shape {shape}: the training set has {len(labels)} images: {remedy}")
    if index.dtype.kind not in "fiub" or not np.isin(index, (0, 1)).all():
        raise UserError(f"{path}: holds values other than 0 and 1: {remedy}")
    poisoned = index == 1
    allowed = (labels == b.target_label) == clean_label
    if (poisoned & ~allowed).any():
        which = "other classes than" if clean_label else "the target class"
        raise UserError(f"{path}: poisons images of {which} {b.target_label}: {remedy}")
    candidates = int(allowed.sum())
    if b.poison_mode == "exact":
        expected, slack = float(int(b.poison_ratio * (candidates if clean_label else len(labels)))), 0.0
    else:
        expected = b.poison_ratio * candidates
        slack = 5 * (expected * (1 - b.poison_ratio)) ** 0.5 + 1  # five deviations of a binomial count
    if abs(poisoned.sum() - expected) > slack:
        raise UserError(
            f"{path}: {int(poisoned.sum())} poisoned images, and backdoor.poison_ratio {b.poison_ratio} means about "
            f"{expected:.0f}: {remedy}"
        )
    return index.astype(np.float64)


def build_attack(config: Config, raw: RawData, device: torch.device | None = None, say: Say = print) -> AttackBase:
    """Make the configured attack; assets that it makes are kept in `<saved_dir>/assets`, for all runs there.

    Args:
        device: where assets are made; none: the CPU.
        say: is told, in a line, what is made and what is used again.
    """
    module = plugins.load("data.attacks", config.attack.name)
    folder = Path(config.saved_dir).expanduser() / "assets"
    device = device or torch.device("cpu")
    scene = Scene(raw, config.backdoor.target_label, config.num_classes, config.seed.seed, folder, device, say)
    attack: AttackBase = module.Attack(config.attack.settings, scene)
    return attack


def poison_training_set(config: Config, raw: RawData, attack: AttackBase, folder: Path) -> PoisonedData:
    """Let the attack poison the training set; which images is kept as `poison_idx.npy` in the run's folder."""
    index = poison_index(folder / "poison_idx.npy", raw.train_labels, config, attack.clean_label)
    poisoned, cover = np.flatnonzero(index), draw_cover(index, attack.cover_ratio, config.seed.seed)
    images, labels = raw.train_images.copy(), raw.train_labels.copy()
    flags = np.full(len(labels), CLEAN, np.uint8)
    if len(poisoned):
        images[poisoned] = attack.apply(raw.train_images[poisoned], poisoned, "train")
        labels[poisoned] = config.backdoor.target_label
        flags[poisoned] = POISONED
    if len(cover):
        images[cover] = attack.cover(raw.train_images[cover], cover)
        flags[cover] = COVER
    some = poisoned[:EXAMPLES]
    return PoisonedData(
        train=to_set(images, labels),
        oracle=Oracle(torch.from_numpy(flags), torch.from_numpy(raw.train_labels.astype(np.int64))),
        examples=np.stack([raw.train_images[some], images[some]]),
    )


def build_test_sets(config: Config, raw: RawData, attack: AttackBase) -> TestSets:
    """Return the clean test set and the backdoor test set, which leaves out the images of the target class."""
    target = config.backdoor.target_label
    others = np.flatnonzero(raw.test_labels != target)
    if len(others) == 0:
        raise UserError(f"backdoor.target_label: {target}: every test image is of that class: no success rate can be told")
    backdoor = attack.apply(raw.test_images[others], others, "test")
    return TestSets(to_set(raw.test_images, raw.test_labels), to_set(backdoor, np.full(len(others), target)))
