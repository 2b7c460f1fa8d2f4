"""Where the images of a run come from: every source gives one `PoisonedData`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from data.attack import AttackBase
from data.digests import manifest_of, with_poisoned
from data.loading import load_data
from data.placement import choose_placement
from data.poisoned_folder import StoredSet, examples_of, keep_with_run
from data.poisoning import build_attack, build_test_sets, clean_images, poison_training_set, test_sets, training_caption
from data.sets import POISONED, NewClassifier, PoisonedData, RawData, TestSets, no_network, to_set
from data.tables import read_table
from utils import manifest
from utils.config import Config

logger = logging.getLogger(__name__)
EXAMPLES = 16  # poisoned images kept for the pictures


def prepare(
    config: Config,
    folder: Path,
    device: torch.device | None = None,
    processes: int = 1,
    new_classifier: NewClassifier = no_network,
) -> PoisonedData:
    """Return the configured data.

    Args:
        folder: the run's, where `poison_idx.npy` is kept, and `set.json` of a set poisoned before.
        device: where an attack makes its assets; none: the CPU.
        processes: of the run, on this computer.
        new_classifier: `model.classifier`'s, for attacks that train a network.
    Raises:
        UserError: also where the run in `folder` was begun with other data.
    """
    raw, stored = load_data(config)
    known = manifest_of(config, raw)
    manifest.check(folder, known)
    placement = place(config, raw, stored, device, processes)
    if stored:
        return poisoned_before(stored, folder, placement, known)
    if config.backdoor is None:
        return unknown_truth(raw, placement, known)
    attack = build_attack(config, raw, device, new_classifier)
    return poisoned_here(config, raw, attack, folder, placement, known)


def prepare_tests(config: Config, device: torch.device | None = None, new_classifier: NewClassifier = no_network) -> TestSets:
    """Return the test sets of `prepare` without the training set; a run's folder stays as it is."""
    raw, stored = load_data(config)
    placement = place(config, raw, stored, device, 1)
    if stored:
        return stored_tests(stored, placement)
    if config.backdoor is None:
        return untriggered(raw, placement)
    return build_test_sets(config, raw, build_attack(config, raw, device, new_classifier), placement)


def place(config: Config, raw: RawData, stored: StoredSet | None, device: torch.device | None, processes: int) -> str:
    """Return where the images are to be (`data.placement`); the backdoor test set counts as large as the clean one."""
    tests = [raw.test_images] if stored or config.backdoor is None else [raw.test_images] * 2
    tests += [stored.backdoor_test.images] if stored else []
    return choose_placement(config.data.placement, raw.train_images, tests, device or torch.device("cpu"), processes)


def poisoned_here(
    config: Config, raw: RawData, attack: AttackBase, folder: Path, placement: str = "device", known: str = ""
) -> PoisonedData:
    """Return raw images that the attack poisons; which ones is kept as `poison_idx.npy` in the run's folder.

    Args:
        known: the manifest so far.
    """
    tests = build_test_sets(config, raw, attack, placement)  # refused before anything is kept with the run
    train = poison_training_set(config, raw, attack, folder, placement)
    poisoned = train.flags == POISONED
    some = np.flatnonzero(poisoned)[:EXAMPLES]
    examples = np.stack([raw.train_images[some], train.images[some]])
    caption = f"{config.attack.name}: {training_caption(config.attacker, attack, raw.class_names)}"
    return PoisonedData(
        train.to_set(placement), tests, raw.class_names, raw.names, with_poisoned(known, poisoned), examples, caption,
        train.ground_truth(), config.attacker,
    )  # fmt: skip


def poisoned_before(stored: StoredSet, folder: Path, placement: str, known: str) -> PoisonedData:
    """Return a set that was poisoned before; the run keeps its `set.json` and which images are poisoned."""
    keep_with_run(folder, stored)
    logger.info(
        f"{stored.folder}: a set poisoned by {stored.backdoor.attack.name}; its files are as {stored.described_by} says"
    )
    train, tests = stored.train, stored_tests(stored, placement)
    return PoisonedData(
        train.to_set(placement), tests, stored.class_names, None, with_poisoned(known, train.flags == POISONED),
        *examples_of(stored, EXAMPLES), train.ground_truth(), stored.backdoor,
    )  # fmt: skip


def stored_tests(stored: StoredSet, placement: str) -> TestSets:
    """Return both test sets of a stored set; the clean one alone where no training image is poisoned."""
    poisoned = (stored.train.flags == POISONED).any()
    return test_sets(stored.clean_test, stored.backdoor_test if poisoned else None, placement)


def unknown_truth(raw: RawData, placement: str, known: str) -> PoisonedData:
    """Return images of which nobody knows whether they are poisoned."""
    images = read_table(raw.train_images) if placement == "host" else raw.train_images
    train, none = to_set(images, raw.train_labels, placement), raw.train_images[None, :0].repeat(2, 0)
    return PoisonedData(train, untriggered(raw, placement), raw.class_names, raw.names, known, none)


def untriggered(raw: RawData, placement: str) -> TestSets:
    """Return the test images as they are, if there are any; of an unknown attack there is no trigger to test with."""
    return TestSets(clean_images(raw, placement).to_set(placement) if len(raw.test_labels) else None)
