"""The sources of a run's images: an attack, a stored poisoned set, or data of unknown origin. Each gives a `PoisonedData`."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from data.attack import AttackBase
from data.digests import manifest_of, with_poisoned
from data.io.placement import choose_placement
from data.io.table_file import read_table
from data.loading import load_data
from data.poisoned_sets.agreement import keep_with_run
from data.poisoned_sets.stored import StoredSet, examples_of
from data.poisoning import build_attack, build_test_sets, clean_images, poison_training_set, test_sets, training_caption
from data.sets import AssetDigests, NewClassifier, PoisonedData, RawData, TestSets, no_network, to_set
from utils import manifest
from utils.config import Config
from utils.errors import UserError, printable
from utils.kinds import POISONED
from utils.runtime.machine import Machine

logger = logging.getLogger(__name__)
EXAMPLES = 16  # poisoned images kept for plots


def prepare(
    config: Config,
    folder: Path,
    machine: Machine | None = None,
    new_classifier: NewClassifier = no_network,
    known: str = "",
) -> PoisonedData:
    """Return the configured data.

    Args:
        folder: the run's folder, where `poison_idx.npy` is kept, and `set.json` of a stored poisoned set.
        machine: its device makes the assets of an attack; None: the CPU, one process.
        new_classifier: the function of `model.classifier`, for attacks that train a network.
        known: the manifest of the checkpoint that the run is resumed from; empty: there is none.
    Raises:
        UserError: among others, the run in `folder` was begun with other data.
    """
    device, processes = (machine.device, machine.world_size) if machine else (torch.device("cpu"), 1)
    raw, stored = load_data(config)
    inputs = manifest_of(config, raw)
    manifest.check(folder, inputs)
    placement, assets = place(config, raw, stored, device, processes), dict[str, str]()
    if stored:
        data = from_stored_set(stored, folder, placement)
    elif config.backdoor is None:
        data = from_unknown_origin(raw, placement)
    else:
        begun = AssetDigests(manifest.assets_of(known or manifest.kept(folder) or ""))
        data = from_attack(config, raw, build_attack(config, raw, device, new_classifier, begun), folder, placement)
        assets = begun.used
    if data.ground_truth is not None:
        inputs = with_poisoned(inputs, data.ground_truth.poisoned().numpy())
    for name, digest in sorted(assets.items()):
        inputs = manifest.with_input(inputs, f"{manifest.ASSETS}{name}", digest)
    return replace(data, manifest=inputs, pre=raw.pre or tuple(step.settings for step in config.transform.pre))


def prepare_tests(
    config: Config,
    device: torch.device | None = None,
    new_classifier: NewClassifier = no_network,
    known: str = "",
    class_names: tuple[str, ...] = (),
) -> tuple[TestSets, list[str]]:
    """Return the test sets of `prepare` without the training set; nothing is written into a run's folder.

    Also returned are lines on what the trigger is made from and that differs from the data of the checkpoint.

    Args:
        known: the manifest of the tested checkpoint; empty: it has none.
        class_names: those of the checkpoint, in order; empty: it has none.
    Raises:
        UserError: among others, the data set numbers other classes.
    """
    raw, stored = load_data(config)
    if class_names and raw.class_names != class_names:
        pairs = zip_longest(class_names, raw.class_names)
        label, (then, now) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        was, is_now = (f"{printable(name)!r}" if name else "none" for name in (then, now))
        raise UserError(
            f"dataset_dir: {config.dataset_dir}: has other classes than the checkpoint: class {label} was {was}, is {is_now}: "
            "give test images in class folders of the same names as in training"
        )
    placement = place(config, raw, stored, device, 1)
    if stored:
        return stored_tests(stored, placement), []
    if config.backdoor is None:
        return untriggered(raw, placement), []
    attack = build_attack(config, raw, device, new_classifier, AssetDigests(manifest.assets_of(known)))
    others = manifest.other_trigger(known, manifest_of(config, raw), attack.from_training_images) if known else []
    return build_test_sets(config, raw, attack, placement), others


def place(config: Config, raw: RawData, stored: StoredSet | None, device: torch.device | None, processes: int) -> str:
    """Choose the placement of the images; the backdoor test set is assumed to be as large as the clean one."""
    tests = [raw.test_images] if stored or config.backdoor is None else [raw.test_images] * 2
    tests += [stored.backdoor_test.images] if stored else []
    return choose_placement(config.data.placement, raw.train_images, tests, device or torch.device("cpu"), processes)


def from_attack(config: Config, raw: RawData, attack: AttackBase, folder: Path, placement: str = "device") -> PoisonedData:
    """Return raw images, poisoned by the attack; which ones are poisoned is stored as `poison_idx.npy` in the run's folder."""
    train = poison_training_set(config, raw, attack, folder, placement)
    tests = build_test_sets(config, raw, attack, placement)
    some = np.flatnonzero(train.flags == POISONED)[:EXAMPLES]
    examples = np.stack([raw.train_images[some], train.images[some]])
    caption = f"{config.attack.name}: {training_caption(config.attacker, attack, raw.class_names)}"
    return PoisonedData(
        train.to_set(placement), tests, raw.class_names, raw.names, examples, caption, train.ground_truth(), config.attacker
    )


def from_stored_set(stored: StoredSet, folder: Path, placement: str) -> PoisonedData:
    """Return a stored poisoned set; its `set.json` and `poison_idx.npy` are saved in the run's folder."""
    keep_with_run(folder, stored)
    logger.info(f"{stored.folder}: a set poisoned by {stored.backdoor.attack.name}; its files match {stored.described_by}")
    train, tests = stored.train, stored_tests(stored, placement)
    return PoisonedData(
        train.to_set(placement), tests, stored.class_names, None, *examples_of(stored, EXAMPLES), train.ground_truth(),
        stored.backdoor,
    )  # fmt: skip


def stored_tests(stored: StoredSet, placement: str) -> TestSets:
    """Return the test sets of a stored set; without a backdoor test set if no training image is poisoned."""
    poisoned = (stored.train.flags == POISONED).any()
    return test_sets(stored.clean_test, stored.backdoor_test if poisoned else None, placement)


def from_unknown_origin(raw: RawData, placement: str) -> PoisonedData:
    """Return images without ground truth: it is unknown whether, and which, images are poisoned."""
    images = read_table(raw.train_images) if placement == "host" else raw.train_images
    train, none = to_set(images, raw.train_labels, placement), raw.train_images[None, :0].repeat(2, 0)
    return PoisonedData(train, untriggered(raw, placement), raw.class_names, raw.names, none)


def untriggered(raw: RawData, placement: str) -> TestSets:
    """Return the clean test set, if there are test images; the trigger of an unknown attack cannot be tested."""
    return TestSets(clean_images(raw, placement).to_set(placement) if len(raw.test_labels) else None)
