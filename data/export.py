"""Export of a poisoned set for use with any other defense: the set is made and written into a folder of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from data.attack import AttackBase
from data.choice import draw_poisoned, may_be_poisoned
from data.contact_sheet import Group, columns, draw_contact_sheet
from data.loading import dataset_of, load_raw
from data.poisoned_folder import count, holds_same_set, settings_of_set, write_set
from data.poisoning import build_attack, clean_images, poison_images, training_caption, trigger_images
from data.sets import COVER, POISONED, NewClassifier, Part, RawData, no_network
from utils.best_effort import BestEffort
from utils.config import Config
from utils.errors import UserError
from utils.paths import exists, is_dir

logger = logging.getLogger(__name__)


def export(config: Config, out: Path, device: torch.device, new_classifier: NewClassifier = no_network) -> None:
    """Write the poisoned set into a folder (`data/poisoned_folder.py`), or verify the set if it is there already.

    Raises:
        UserError: the folder contains something else.
    """
    started = time.monotonic()
    settings = settings_of_set(config, dataset_of(config))
    if exists(out, "--out") and (not is_dir(out, "--out") or any(out.iterdir())):
        if holds_same_set(out, settings):
            logger.info(f"{out}: contains this set already, made with the same settings; its files match set.json")
            return
        raise UserError(f"--out {out}: not empty, and not a set made with the same settings: give another name")
    raw = load_raw(config)
    attack = build_attack(config, raw, device, new_classifier)
    b = config.attacker
    allowed = may_be_poisoned(config, raw.train_labels, attack.clean_label)
    index = draw_poisoned(allowed, b.poison_ratio, config.seed.seed, b.poison_mode, attack.clean_label)
    parts = {
        "train": poison_images(config, raw, attack, index),
        "clean_test": clean_images(raw),
        "backdoor_test": trigger_images(config, raw, attack),
    }
    groups = sheet_groups(config, raw, attack, parts)
    class_names = {"class_names": list(raw.class_names)}

    def draw_sheet(path: Path) -> None:
        BestEffort().attempt(path.name, draw_contact_sheet, path, groups)

    write_set(out, parts, settings | class_names, draw_sheet)
    counts = count(parts["train"])
    logger.info(
        f"{out}: {counts['clean']} clean, {counts['poisoned']} poisoned and {counts['cover']} cover training images, "
        f"{len(parts['clean_test'])} clean and {len(parts['backdoor_test'])} triggered test images; "
        f"{time.monotonic() - started:.1f} s"
    )


def sheet_groups(config: Config, raw: RawData, attack: AttackBase, parts: Mapping[str, Part]) -> list[Group]:
    """Return the groups of the contact sheet: poisoned training images, triggered test images, cover images."""
    name, target = config.attack.name, config.attacker.target_text(raw.class_names)
    shown = (
        (training_caption(config.attacker, attack, raw.class_names), parts["train"], raw.train_images, POISONED, "triggered"),
        (f"triggered test images, labeled {target}", parts["backdoor_test"], raw.test_images, POISONED, "triggered"),
        ("cover images, their labels unchanged", parts["train"], raw.train_images, COVER, "cover"),
    )
    groups = []
    for title, part, originals, flag, row in shown:
        at = np.flatnonzero(part.flags == flag)
        if len(at):
            n = min(len(at), columns(max(part.images.shape[1:3])))
            at = at[np.arange(n) * len(at) // n]  # spread over the set
            place = part.indices[at]
            names = [raw.class_names[label] for label in part.original_labels[at]]
            captions = [f"{i} {text}" for i, text in zip(place, names, strict=True)]
            groups.append(Group(f"{name}: {title}", row, originals[place], part.images[at], captions))
    return groups
