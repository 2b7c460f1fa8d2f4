"""A poisoned set written as a record of BackdoorBench (`data/poisoned_sets/record_read.py`), for its defenses.

It has what BackdoorBench loads: `attack_result.pt` with all eight keys, and the altered images as PNG files. Cover images
count as altered and carry their own label. Arrays are pickled as a call of numpy.array on a list, which every numpy reads;
numpy 2 would name a module that older ones do not have.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from data.poisoned_sets.export import Made
from data.poisoned_sets.record_read import KEYS, RESULT, TEST, TRAIN
from data.sets import Part
from utils import plugins
from utils.errors import UserError
from utils.files import cannot_write, new_folder, write_durably
from utils.kinds import CLEAN, POISONED

logger = logging.getLogger(__name__)
Model = tuple[str, Mapping[str, torch.Tensor]]  # BackdoorBench's name of a network, and weights by its names


class Portable:
    """An array of one dimension that is pickled as `numpy.array(list, dtype)`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Any, ...]:
        return np.array, (self.values.tolist(), str(self.values.dtype))


def write_record(out: Path, made: Made, model: Model) -> None:
    """Write the record's folder, whole or not at all.

    Args:
        out: absent, or an empty folder. The paths in the record are `./record/<its name>/...`.
    Raises:
        UserError: the set is a part of a data set or has no poisoned images, or the folder cannot be written.
    """
    for key, limit in made.settings["data"].items():
        if limit is not None:
            raise UserError(f"data.{key}: {limit}: a record counts images by their place in the whole data set: leave it out")
    if made.left_out:
        raise UserError(
            f"dataset_dir: {made.left_out} images cannot be read and are left out, but a record counts images by their place "
            "in the whole data set: repair them"
        )
    if not (made.parts["train"].flags == POISONED).any():
        ratio = made.settings["backdoor"]["poison_ratio"]
        raise UserError(f"backdoor.poison_ratio: {ratio}: no training image is poisoned, and a record must have some: raise it")
    clean_data = name_of_data(made)
    train, test = made.parts["train"], made.parts["backdoor_test"]
    altered = train.flags != CLEAN
    path = f"./record/{out.name}"
    result = {
        "model_name": model[0],
        "num_classes": made.settings["num_classes"],
        "model": OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in model[1].items()),
        "data_path": f"./data/{clean_data}",
        "img_size": tuple(train.images.shape[1:]),
        "clean_data": clean_data,
        "bd_train": state_of(train, altered, len(train), f"{path}/{TRAIN}"),
        "bd_test": state_of(test, np.ones(len(test), bool), len(made.parts["clean_test"]), f"{path}/{TEST}")
        | {"original_index_array": Portable(test.indices)},
    }
    assert tuple(result) == KEYS
    try:
        with new_folder(out) as folder:
            write_images(folder / TRAIN, train, altered)
            write_images(folder / TEST, test, np.ones(len(test), bool))
            if hasattr(os, "sync"):
                os.sync()  # once, instead of for each image
            with open(folder / RESULT, "wb") as file:
                write_durably(file, partial(save, result))
    except OSError as error:
        raise cannot_write(f"--out {out}", error) from None


def save(result: dict[str, Any], file: IO[bytes]) -> None:
    """Write an attack result as torch.save does; protocol 2 is what its versions from 2020 on read."""
    torch.save(result, file, pickle_protocol=2)


def name_of_data(made: Made) -> str:
    """Return BackdoorBench's name of the data set, as its file declares it; log a warning if there is none."""
    (name,) = made.settings["dataset"]
    known: Mapping[str, str] = plugins.declared("data.datasets", "BACKDOORBENCH")
    if name not in known:
        logger.warning(f"warning: dataset: {name}: BackdoorBench has no such data set ({', '.join(sorted(known.values()))})")
    return known.get(name, str(name))


def state_of(part: Part, altered: np.ndarray, count: int, path: str) -> dict[str, Any]:
    """Return what a record has of one part.

    Args:
        altered: (n,) bool, of the part's images.
        count: of all images of the data set's part.
        path: of the folder of its images, as the record has it.
    """
    indicator = np.zeros(count)
    indicator[part.indices[altered]] = 1
    rows = zip(*(getattr(part, key)[altered].tolist() for key in ("indices", "labels", "original_labels")), strict=True)
    items = {i: {"path": f"{path}/{original}/{i}.png", "other_info": [carried, original]} for i, carried, original in rows}
    return {
        "bd_data_container": {"save_folder_path": path, "data_dict": items, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": Portable(np.arange(count)),
        "poison_indicator": Portable(indicator),
        "save_folder_path": path,
    }


def write_images(folder: Path, part: Part, altered: np.ndarray) -> None:
    """Write the altered images as `<original label>/<index>.png`."""
    for row in np.flatnonzero(altered):
        place = folder / str(part.original_labels[row])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(part.images[row]).save(place / f"{part.indices[row]}.png", format="PNG")
