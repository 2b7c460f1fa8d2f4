"""The poisoned training set and the triggered test images (`data/choice.py` draws which images are poisoned)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.attack import BATCH, AttackBase, NoAttack
from data.choice import SelectionScores, choose_poisoned, draw_cover, keep_index, label_after, poison_index
from data.io.table_file import own_copy, read_table
from data.seeds import check_clean_left
from data.sets import AssetDigests, AttackContext, NewClassifier, Part, RawData, TestSets, no_network
from utils import plugins
from utils.config import Config
from utils.config.settings import Backdoor
from utils.errors import UserError
from utils.kinds import CLEAN, COVER, POISONED
from utils.names import class_text
from utils.paths import user_path
from utils.run_files import POISON_INDEX

ATTACKS = "data.attacks"


def build_attack(
    config: Config,
    raw: RawData,
    device: torch.device | None = None,
    new_classifier: NewClassifier = no_network,
    digests: AssetDigests | None = None,
) -> AttackBase:
    """Build the configured attack, or with `poison_ratio: 0` none; its assets are kept in `<saved_dir>/assets`, for all runs.

    Args:
        device: where assets are made; None: the CPU.
        new_classifier: the function of `model.classifier`, for attacks that train a network.
        digests: of the run's assets; None: of a new run.
    Raises:
        UserError: the settings do not fit each other or the data, or the ASR cannot be measured on the test images.
    """
    check_test_images(config, raw)  # first: an attack may train networks for hours
    if not config.attacker.poison_ratio:
        return NoAttack()
    check_target(config, raw)
    module = plugins.load(ATTACKS, config.attack.name)
    folder = user_path(config.saved_dir, "saved_dir") / "assets"
    device = device or torch.device("cpu")
    b, shift = config.attacker, config.attacker.target_shift
    context = AttackContext(
        raw, b.target_label, config.num_classes, config.seed.seed, folder, device, new_classifier,
        digests or AssetDigests(), target_shift=shift,
    )  # fmt: skip
    attack: AttackBase = module.Attack(config.attack.settings, context)
    if attack.clean_label and shift is not None:
        raise UserError(
            f"backdoor.target_shift: {shift}: {config.attack.name} leaves all labels unchanged, so they cannot be "
            "all-to-all: remove the key, or choose an attack that changes labels"
        )
    return attack


def check_test_images(config: Config, raw: RawData) -> None:
    """Raise UserError if there are no test images, or none that the attack could turn into another class."""
    if len(raw.test_labels) == 0:
        raise UserError(f"dataset_dir: {config.dataset_dir}: no test images: add some, or train with backdoor: null")
    if config.attacker.poison_ratio and (raw.test_labels == wanted_labels(config, raw.test_labels)).all():
        target = config.attacker.target_text(raw.class_names)
        raise UserError(
            f"backdoor.target_label: {target}: every test image is of that class, so there is no success "
            "rate: give another class, or add test images of other classes"
        )


def check_target(config: Config, raw: RawData) -> None:
    """Raise UserError if no training image has a label that the attacker gives to images."""
    target, shift = config.attacker.target_label, config.attacker.target_shift
    missing = np.setdiff1d(wanted_labels(config, raw.train_labels), raw.train_labels)
    if len(missing):
        at = f"backdoor.target_shift: {shift}" if shift is not None else f"backdoor.target_label: {target}"
        label = class_text(int(missing[0]), raw.class_names)
        raise UserError(
            f"{at}: no training image is of class {label}: give another value, set num_classes to the number of classes, or "
            "raise data.train_limit"
        )


def poison_training_set(config: Config, raw: RawData, attack: AttackBase, folder: Path, placement: str = "device") -> Part:
    """Return the poisoned training set; which images are poisoned is stored as `poison_idx.npy` in the run's folder.

    Whether enough images are left for seed samples and cover images is checked before any image is altered, which may take
    hours, and before anything is stored.
    """
    path = folder / POISON_INDEX
    index = poison_index(path, raw.train_labels, config, attack.clean_label, scores_of(config, raw, attack))
    labels, flags = mark_images(config, raw, attack, index)
    if config.defense.settings.needs_clean and config.seed_samples is None:
        check_clean_left(labels, flags, config.num_classes, config.global_.seed_num)
    part = alter_images(raw, attack, labels, flags, placement)
    keep_index(path, index)
    return part


def scores_of(config: Config, raw: RawData, attack: AttackBase) -> SelectionScores | None:
    """Return the attack's `selection_scores`, which refuse too many cover images before they are computed."""
    compute = attack.selection_scores
    if compute is None:
        return None

    def scores() -> np.ndarray:
        # How many images may become cover images does not depend on which ones are poisoned, so images drawn at random will do.
        mark_images(config, raw, attack, choose_poisoned(config, raw.train_labels, attack.clean_label))
        return compute()

    return scores


def altered(attack: AttackBase, images: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Return images that an attack has altered, if they have the dtype and shape of those that it was given."""
    if images.dtype != like.dtype or images.shape != like.shape:
        name = type(attack).__module__.replace(".", "/")
        raise UserError(
            f"{name}.py: returned altered images of dtype {images.dtype} and shape {images.shape}: must be {like.dtype}, "
            f"{like.shape}"
        )
    return images


def alter_images(raw: RawData, attack: AttackBase, labels: np.ndarray, flags: np.ndarray, placement: str = "device") -> Part:
    """Return the training set as the attacker leaves it; the raw images are not changed.

    Args:
        labels, flags: as `mark_images` returns them.
    """
    poisoned, cover = np.flatnonzero(flags == POISONED), np.flatnonzero(flags == COVER)
    images = own_copy(raw.train_images, placement)
    if len(poisoned):
        before = raw.train_images[poisoned]
        images[poisoned] = altered(attack, attack.apply(before, poisoned, "train"), before)
    if len(cover):
        before = raw.train_images[cover]
        images[cover] = altered(attack, attack.cover(before, cover), before)
    return Part(images, labels, raw.train_labels.astype(np.int64), flags, np.arange(len(labels)))


def mark_images(config: Config, raw: RawData, attack: AttackBase, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (N,) int64 of the poisoned training set and its flags (N,) uint8: CLEAN, POISONED or COVER.

    Args:
        index: (N,) of 0 and 1, which images are poisoned; cover images are drawn among the others.
    Raises:
        UserError: there are too few images for the cover images.
    """
    wanted, poisoned = wanted_labels(config, raw.train_labels), index == 1
    flags = np.where(poisoned, POISONED, CLEAN).astype(np.uint8)
    allowed = None if attack.cover_target_class else raw.train_labels != wanted
    flags[draw_cover(index, attack.cover_ratio, config.seed.seed, allowed)] = COVER
    return np.where(poisoned, wanted, raw.train_labels).astype(np.int64), flags


def wanted_labels(config: Config, labels: np.ndarray) -> np.ndarray:
    """Return the labels (n,) int64 that the attacker gives to images with the labels (n,)."""
    return label_after(labels, config.attacker.target_label, config.attacker.target_shift, config.num_classes)


def build_test_sets(config: Config, raw: RawData, attack: AttackBase, placement: str = "device") -> TestSets:
    """Return the clean test set and the backdoor test set.

    The backdoor test set consists of new images: with placement `disk` it is in host memory. With `poison_ratio: 0` there is
    none, since there is no success rate without an attack.
    """
    triggered = trigger_images(config, raw, attack) if config.attacker.poison_ratio else None
    return test_sets(clean_images(raw, placement), triggered, placement)


def test_sets(clean: Part, backdoor: Part | None, placement: str) -> TestSets:
    """Return both test sets, and the position of each backdoor test image in the clean test set."""
    if backdoor is None:
        return TestSets(clean.to_set(placement))
    origin = torch.from_numpy(np.searchsorted(clean.indices, backdoor.indices))
    return TestSets(clean.to_set(placement), backdoor.to_set(placement), origin)


def clean_images(raw: RawData, placement: str = "device") -> Part:
    """Return the test images, unaltered."""
    labels, n = raw.test_labels.astype(np.int64), len(raw.test_labels)
    images = read_table(raw.test_images) if placement == "host" else raw.test_images
    return Part(images, labels, labels, np.full(n, CLEAN, np.uint8), np.arange(n))


def trigger_images(config: Config, raw: RawData, attack: AttackBase) -> Part:
    """Return the triggered test images with the labels that the attacker wants.

    Images of the target class are left out; with all-to-all labels, none is.
    """
    wanted = wanted_labels(config, raw.test_labels)
    others = np.flatnonzero(raw.test_labels != wanted)
    n = len(others)
    images = np.empty((n, *raw.test_images.shape[1:]), np.uint8)
    for start in range(0, n, BATCH):  # not all at once, which would copy the whole test set
        part = others[start : start + BATCH]
        before = raw.test_images[part]
        images[start : start + BATCH] = altered(attack, attack.apply(before, part, "test"), before)
    originals = raw.test_labels[others].astype(np.int64)
    return Part(images, wanted[others], originals, np.full(n, POISONED, np.uint8), others)


def training_caption(backdoor: Backdoor, attack: AttackBase, class_names: tuple[str, ...]) -> str:
    """Return a caption for poisoned training images, with the label that they carry."""
    label = backdoor.target_text(class_names)
    if attack.clean_label:
        return f"poisoned training images of class {label}, their labels unchanged"
    return f"poisoned training images, labeled {label}"
