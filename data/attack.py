"""What every attack is: how it alters training and test images, and which images it may take."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data.digests import digests_of
from data.sets import RawData, Scene
from utils.errors import UserError
from utils.files import remove_leftovers, write_atomically
from utils.manifest import TRAIN

logger = logging.getLogger(__name__)
BATCH = 256  # images that are altered at a time, so that 224 px fit into memory as floats
CACHED = 2**17  # pixels at a time where it is mere arithmetic: stays in the cache, at 224 px 3 times faster than BATCH
Arrays = dict[str, np.ndarray]


class AttackBase(ABC):
    """An attack: `class Attack(AttackBase)` in `data/attacks/<name>.py`, beside its `Settings`.

    Attributes:
        clean_label: the attacker takes images of the target class and leaves their labels alone.
        cover_ratio: cover images (altered, label kept) for each poisoned one.
        cover_target_class: whether images of the target class may become cover images.
    """

    clean_label = False
    cover_ratio = 0.0
    cover_target_class = True

    @abstractmethod
    def __init__(self, settings: Any, scene: Scene) -> None:
        """Check the settings against the scene and make, or fetch, what the attack needs."""

    @abstractmethod
    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return altered copies of images: a function of the seed, the image and its index alone.

        Args:
            images: (n, H, W, 3) uint8, not written to.
            index: (n,) int64, their places in the training set or the test set.
            split: "train" or "test".
        """

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return cover images made of training images (n, H, W, 3) uint8; only asked for where `cover_ratio` > 0."""
        raise NotImplementedError


def in_batches(
    alter: Callable[[np.ndarray, np.ndarray], np.ndarray], images: np.ndarray, index: np.ndarray, pixels: int | None = None
) -> np.ndarray:
    """Apply `alter(images, index)` to as many images at a time as have `pixels`, by default to `BATCH` of them.

    (n, H, W, 3) uint8 in and out.
    """
    out = np.empty_like(images)
    batch = BATCH if pixels is None else max(1, pixels // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        out[part] = alter(images[part], index[part])
    return out


def fingerprint(raw: RawData) -> str:
    """Return a text that differs for every training set: what assets that were made from the data depend on.

    Pixels count by their digests, which a table of pictures has: gigabytes are not read again.
    """
    digest = sha256(repr((raw.train_images.shape, digests_of(raw, TRAIN))).encode())
    digest.update(np.ascontiguousarray(raw.train_labels).data)
    return digest.hexdigest()


def keep_asset(scene: Scene, name: str, depends_on: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Return an asset's arrays: those kept in the assets' folder if they were made from the same, else made and kept.

    A line says which. A file that is damaged is noticed by its checksums and made again.

    Args:
        name: of the asset, e.g. `iab`; the file is `<name>-<digest of depends_on>.npz`.
        depends_on: everything that changes the arrays: settings, seed, `fingerprint(raw)`; as JSON has it.
    """
    key = json.dumps(depends_on, sort_keys=True)
    path = scene.assets / f"{name}-{sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        kept = read_asset(path, key)
        if kept is not None:
            logger.info(f"{name}: uses {path}, made before with the same settings")
            return kept
        logger.info(f"{name}: {path} is damaged: it is made again")
    remove_leftovers(scene.assets)
    arrays = make()
    stored = arrays | {"_key": np.array(key), "_sha256": np.array(checksum(arrays))}
    write_atomically(path, lambda file: np.savez(file, **stored))  # type: ignore[arg-type]
    logger.info(f"{name}: made {path}")
    return arrays


def read_asset(path: Path, key: str) -> Arrays | None:
    """Return the arrays of a kept asset, or None if the file is not what was written for that key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stored_key, digest = str(arrays.pop("_key")), str(arrays.pop("_sha256"))
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable or move it away") from None
    except Exception as error:  # numpy and zipfile raise whatever their parts do
        if isinstance(error, MemoryError):
            raise
        return None
    return arrays if stored_key == key and digest == checksum(arrays) else None


def checksum(arrays: Arrays) -> str:
    """Return a digest of named arrays: names, types, shapes and contents."""
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def weights_of(network: nn.Module) -> Arrays:
    """Return the network's parameters and BN statistics as arrays: what is kept of it as an asset."""
    return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
