"""A record of BackdoorBench over the clean data set in `dataset_dir`: a set that is poisoned already, as `poisoned_set` is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data.poisoned_sets.altered import Altered
from data.poisoned_sets.folder import refuse_reserved
from data.poisoned_sets.origin import Origin
from data.poisoned_sets.record_read import TEST, TRAIN, Hints, Record, read_record
from data.sets import Listing, RawData
from data.transforms import resize
from utils import plugins
from utils.config.schema import REQUIRED, Choices, Named, setting
from utils.errors import UserError
from utils.paths import is_dir, user_path

POISONED = True  # and knows which of its images are
PACKAGE = "data.datasets"
COVER_ATTACKS = ("wanet", "inputaware", "bpp")  # BackdoorBench's names


@dataclass(frozen=True)
class Settings:
    record: str = setting(REQUIRED, "the record's folder, with attack_result.pt, bd_train_dataset and bd_test_dataset")
    attack: str = setting(REQUIRED, "BackdoorBench's name of the attack, e.g. badnet")
    clean: Named = setting(REQUIRED, "the clean data set, in dataset_dir", choices=Choices(kind="datasets"))
    unchanged: str = setting(
        "auto",
        "altered images with an unchanged label: poisoned, cover images, or by their place in blocks of 128 images; auto: "
        "blocks for wanet, inputaware and bpp, else poisoned",
        options=("auto", "poisoned", "cover", "blocks"),
    )
    target_label: int | None = setting(None, "target class of a record without attack_result.pt", low=0)
    poison_ratio: float | None = setting(
        None, "BackdoorBench's pratio, for the last block; null: from the other blocks", low=0, high=1
    )


def load(settings: Settings, dataset_dir: str | None, download: bool) -> Altered:
    """Read the record, and list the clean data set."""
    at = "dataset.backdoorbench_record"
    if not re.fullmatch(r"[\w-]+", settings.attack):
        raise UserError(f"{at}.attack: {settings.attack!r:.80}: must be a plain name, e.g. badnet")
    refuse_reserved(settings.attack, f"{at}.attack")
    folder = user_path(settings.record, f"{at}.record")
    if not is_dir(folder, f"{at}.record"):
        raise UserError(f"{at}.record: {settings.record}: no such folder: give the one that holds attack_result.pt")
    module = plugins.load(PACKAGE, settings.clean.name)
    clean = module.load(settings.clean.settings, dataset_dir, download)
    if not isinstance(clean, (RawData, Listing)):
        raise UserError(f"{at}.clean: {settings.clean.name}: is poisoned already: name the clean data set")
    record = read(settings, folder, clean)
    size = record.train.images.shape[1:3]
    fits = isinstance(clean, RawData) and clean.train_images.shape[1:3] == size
    # Listed images are resized as BackdoorBench resizes them: another way would tell clean images from altered ones.
    pre = () if fits else (Named("resize", resize.Settings(size)),)
    origin = Origin(
        "BackdoorBench record", settings.clean, record.backdoor, record.num_classes, clean.class_names, pre, folder,
        record.source, (TRAIN, "clean test images", TEST),
    )  # fmt: skip
    return Altered(clean, record.train, record.test, origin)


def read(settings: Settings, folder: Path, clean: RawData | Listing) -> Record:
    """Return the record, checked against the labels of the clean data set."""
    by_attack = "blocks" if settings.attack in COVER_ATTACKS else "poisoned"
    unchanged = by_attack if settings.unchanged == "auto" else settings.unchanged
    hints = Hints(settings.attack, unchanged, settings.target_label, settings.poison_ratio)
    return read_record(folder, hints, (clean.train_labels, clean.test_labels), len(clean.class_names))
