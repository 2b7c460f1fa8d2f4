"""Export of a poisoned set for use with any other defense: the set is made and written into a folder of its own."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.attack import AttackBase
from data.choice import choose_poisoned
from data.contact_sheet import Group, columns, draw_contact_sheet
from data.digests import digest_of_manifest
from data.loading import dataset_of, load_data, load_raw
from data.poisoned_sets.agreement import same_arrays
from data.poisoned_sets.folder import (
    INPUTS,
    KEYS,
    LEFT_OUT,
    count,
    description_of,
    holds_same_set,
    read_set,
    settings_of_set,
    write_set,
)
from data.poisoned_sets.stored import PARTS, StoredSet
from data.poisoning import alter_images, build_attack, clean_images, mark_images, scores_of, training_caption, trigger_images
from data.sets import NewClassifier, Part, RawData, no_network
from utils.config import Config
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.files import check_folder_writable
from utils.kinds import COVER, POISONED
from utils.names import class_name
from utils.paths import exists, is_dir
from utils.reporting.best_effort import BestEffort
from utils.run_files import STORED_SET

logger = logging.getLogger(__name__)
Shown = tuple[str, Part, Part, int, str]  # title, images, what they were made of, flag of those to show, name of the row


@dataclass(frozen=True)
class Made:
    """A poisoned set and what describes it."""

    parts: dict[str, Part]  # by the names of `PARTS`
    settings: dict[str, Any]  # as set.json has them
    groups: list[Group]  # of the contact sheet
    left_out: int = 0  # images of the data set that cannot be read


def write_arrays(out: Path, made: Made) -> None:
    """Write a set as arrays (`data/poisoned_sets/folder.py`)."""

    def draw_sheet(path: Path) -> None:
        if made.groups:
            BestEffort().attempt(path.name, draw_contact_sheet, path, made.groups)

    write_set(out, made.parts, made.settings, draw_sheet)


def export(
    config: Config,
    out: Path,
    device: torch.device,
    new_classifier: NewClassifier = no_network,
    write: Callable[[Path, Made], None] = write_arrays,
) -> None:
    """Write the poisoned set into a folder of its own; if it contains the arrays of the same set already, verify them.

    Raises:
        UserError: the folder contains something else.
    """
    started, converts = time.monotonic(), config.poisoned_already and config.backdoor is None
    if exists(out, "--out") and (not is_dir(out, "--out") or any(out.iterdir())):
        known = write is write_arrays and not config.poisoned_already
        settings = settings_of_set(config, dataset_of(config)) if known else {}
        if known and holds_same_set(out, settings, lambda: digest_of_manifest(config, load_raw(config))):
            logger.info(f"{out}: contains this set already, made with the same settings; its files match set.json")
            return
        if write is write_arrays and converts and holds_parts(out, convert(config)):
            logger.info(f"{out}: contains this set already; its files match set.json")
            return
        raise UserError(f"--out {out}: not empty, and not a set made with the same settings and data: give another name")
    check_folder_writable(out.parent, f"--out {out}")  # before an attack trains networks for hours
    made = convert(config) if converts else make(config, device, new_classifier)
    write(out, made)
    counts = count(made.parts["train"])
    logger.info(
        f"{out}: {counts['clean']} clean, {counts['poisoned']} poisoned and {counts['cover']} cover training images, "
        f"{len(made.parts['clean_test'])} clean and {len(made.parts['backdoor_test'])} triggered test images; "
        f"{time.monotonic() - started:.1f} s"
    )


def holds_parts(folder: Path, made: Made) -> bool:
    """Return whether a folder is a poisoned set with these very arrays.

    Raises:
        UserError: the set is damaged.
    """
    if not (folder / STORED_SET).is_file():
        return False
    return same_arrays(read_set(folder).description, description_of(made.parts, made.settings))


def make(config: Config, device: torch.device, new_classifier: NewClassifier) -> Made:
    """Return the configured data set, poisoned by the configured attack."""
    raw = load_raw(config)
    attack = build_attack(config, raw, device, new_classifier)
    index = choose_poisoned(config, raw.train_labels, attack.clean_label, scores_of(config, raw, attack))
    clean = clean_images(raw)
    parts = {
        "train": alter_images(raw, attack, *mark_images(config, raw, attack, index)),
        "clean_test": clean,
        "backdoor_test": trigger_images(config, raw, attack) if config.attacker.poison_ratio else clean.first(0),
    }
    settings = settings_of_set(config, dataset_of(config))
    settings |= {"class_names": list(raw.class_names), INPUTS: digest_of_manifest(config, raw)}
    if raw.left_out:
        settings[LEFT_OUT] = raw.left_out
    return Made(parts, settings, sheet_groups(config, raw, attack, parts["train"], parts["backdoor_test"]), raw.left_out)


def convert(config: Config) -> Made:
    """Return a set that was poisoned before, unchanged."""
    _, stored = load_data(config)
    assert isinstance(stored, StoredSet)
    parts = {name: getattr(stored, name) for name in PARTS}
    described = json.loads(stored.description)
    settings = {
        key: described[key]
        for key in (*KEYS, "source", INPUTS, LEFT_OUT)
        if key in described and key not in ("counts", "files")
    }
    settings["backdoor"] = as_dict(stored.backdoor)  # set.json of version 1 lacks target_shift
    limits = {"train_limit": config.data.train_limit, "test_limit": config.data.test_limit}
    given = {key: least(limit, settings["data"].get(key)) for key, limit in limits.items() if limit is not None}
    if given:
        settings["data"] |= given
        settings.pop(INPUTS, None)  # the set was made from more images
    clean, title = stored.clean_test, f"triggered test images, labeled {stored.backdoor.target_text(stored.class_names)}"
    shown = [(title, stored.backdoor_test, clean, POISONED, "triggered")]
    left_out = settings.get(LEFT_OUT, 0)
    return Made(parts, settings, groups_of(stored.backdoor.attack.name, stored.class_names, shown), left_out)


def least(limit: int, stored: int | None) -> int:
    """Return the smaller of the limit that is given and the one that the set was made with (None: all images)."""
    return limit if stored is None else min(limit, stored)


def sheet_groups(config: Config, raw: RawData, attack: AttackBase, train: Part, backdoor_test: Part) -> list[Group]:
    """Return the groups of the contact sheet: poisoned training images, triggered test images, cover images."""
    target = config.attacker.target_text(raw.class_names)
    before = replace(train, images=raw.train_images)
    shown = [
        (training_caption(config.attacker, attack, raw.class_names), train, before, POISONED, "triggered"),
        (f"triggered test images, labeled {target}", backdoor_test, clean_images(raw), POISONED, "triggered"),
        ("cover images, their labels unchanged", train, before, COVER, "cover"),
    ]
    return groups_of(config.attack.name, raw.class_names, shown)


def groups_of(name: str, class_names: Sequence[str], shown: Sequence[Shown]) -> list[Group]:
    """Return the groups of a contact sheet, each of images from all over its part.

    Args:
        name: of the attack.
    """
    groups = []
    for title, part, before, flag, row in shown:
        at = np.flatnonzero(part.flags == flag)
        if len(at):
            n = min(len(at), columns(max(part.images.shape[1:3])))
            at = at[np.arange(n) * len(at) // n]  # spread over the set
            place = part.indices[at]
            names = [class_name(label, class_names) for label in part.original_labels[at].tolist()]
            captions = [f"{i} {text}" for i, text in zip(place, names, strict=True)]
            originals = before.images[np.searchsorted(before.indices, place)]
            groups.append(Group(f"{name}: {title}", row, originals, part.images[at], captions))
    return groups
