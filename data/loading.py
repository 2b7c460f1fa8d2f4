"""Loading the configured data set: find it, read it, limit its size, decode its images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from data.io.tables import to_raw
from data.poisoned_sets.agreement import refuse_disagreement
from data.poisoned_sets.altered import Altered
from data.poisoned_sets.stored import StoredSet
from data.sets import Listing, RawData
from utils import plugins
from utils.config import Config
from utils.config.schema import Named
from utils.errors import UserError, kind_of
from utils.names import class_text
from utils.paths import is_file, user_path

PACKAGE = "data.datasets"


def load_data(config: Config) -> tuple[RawData, StoredSet | None]:
    """Load the configured data set, limited to `data.train_limit` and `data.test_limit`, and check that the YAML fits it.

    `transform.pre` is applied to raw data; a set that is poisoned already has been through it. Decoded image files are kept
    in `data.cache_dir`.

    Returns:
        the images before any attack of this run, and the stored set if the data set is poisoned already.
    """
    dataset = dataset_of(config)
    module = plugins.load(PACKAGE, dataset.name)
    data: RawData | Listing | StoredSet | Altered = module.load(dataset.settings, config.dataset_dir, config.download)
    check_returned(data, f"data/datasets/{dataset.name}.py")
    if isinstance(data, Altered):
        data = data.over(decode(config, data.clean, [step.settings for step in data.origin.pre]), config.data.placement)
    data = data.cut(config.data.train_limit, config.data.test_limit)
    if isinstance(data, StoredSet):
        refuse_disagreement(config, data)
        return data.raw(), data
    for part, labels in (("train", data.train_labels), ("test", data.test_labels)):
        if len(labels) and labels.max() >= config.num_classes:
            label = class_text(int(labels.max()), data.class_names)
            raise UserError(f"num_classes: {config.num_classes}: the {part} set has the label {label}: raise it")
    return decode(config, data, [step.settings for step in config.transform.pre]), None


def check_returned(data: object, source: str) -> None:
    """Raise `UserError` unless `load` of a data set returned what `data/sets.py` describes.

    Args:
        source: file of the data set.
    """
    if isinstance(data, (StoredSet, Altered)):
        return
    if not isinstance(data, (RawData, Listing)):
        raise UserError(f"{source}: load: returned {type(data).__name__}: return RawData or Listing (data/sets.py)")
    for part in ("train", "test"):
        items = getattr(data, f"{part}_images" if isinstance(data, RawData) else f"{part}_files")
        labels = getattr(data, f"{part}_labels")
        if isinstance(data, RawData) and not is_array(items, 4, np.uint8, 3):
            raise UserError(f"{source}: load: {part}_images: {kind_of(items)}: must be a uint8 array (n, H, W, 3)")
        kind = np.integer if len(items) else np.generic
        if not is_array(labels, 1, kind) or len(labels) != len(items) or (len(labels) and labels.min() < 0):
            raise UserError(
                f"{source}: load: {part}_labels: {kind_of(labels)} for {len(items)} images: must be an integer array (n,) of "
                "labels from 0 on"
            )
    for key, part in (("names", "train"), ("test_names", "test")):
        names, count = getattr(data, key, None), len(getattr(data, f"{part}_labels"))
        if names is not None and len(names) != count:
            raise UserError(f"{source}: load: {key}: {len(names)} for {count} images: give one each")


def is_array(value: object, ndim: int, dtype: type[np.generic], channels: int | None = None) -> bool:
    """Return whether a value is an array of that kind, with that many channels, its last dimension."""
    fits = isinstance(value, np.ndarray) and value.ndim == ndim and np.issubdtype(value.dtype, dtype)
    return fits and (channels is None or value.shape[-1] == channels)  # type: ignore[attr-defined]


def decode(config: Config, data: RawData | Listing, pre: list[Any]) -> RawData:
    """Return the images as arrays after the pre-transforms, tables kept in `data.cache_dir`."""
    cache = config.data.cache_dir
    folder = user_path(cache, "data.cache_dir") if cache else user_path(config.saved_dir, "saved_dir") / "tables"
    return to_raw(data, pre, folder, config.data.placement == "disk")


def load_raw(config: Config) -> RawData:
    """Return the configured data set, which must not be poisoned already."""
    raw, stored = load_data(config)
    if stored:
        name = dataset_of(config).name
        raise UserError(f"dataset: {name}: is poisoned already: give the YAML of the data set that it was made from")
    return raw


def dataset_of(config: Config) -> Named:
    """Return the data set and its settings; if the YAML does not name it, it is recognized by the name of its folder."""
    if config.dataset is not None:
        return config.dataset
    name = name_of_folder(str(config.dataset_dir))
    return Named(name, plugins.settings(PACKAGE, name)())


def name_of_folder(folder: str) -> str:
    """Return the data set that the name of a folder, or of one above it, stands for, as in the authors' code."""
    for name, file in plugins.declared(PACKAGE, "SIGN").items():
        if is_file(user_path(folder, "dataset_dir") / file, "dataset_dir"):
            raise UserError(f"dataset_dir: {folder}: contains a poisoned set: add `dataset: {name}`")
    for part in reversed(Path(folder).parts):
        for name, pattern in plugins.declared(PACKAGE, "FOLDER_NAMES").items():
            if re.search(pattern, part.lower()):
                return name
    last = Path(folder).name.lower()
    known = ", ".join(plugins.names(PACKAGE))
    raise UserError(f"dataset_dir: {last}: data set not recognized by this name: add `dataset: NAME`, one of {known}")
