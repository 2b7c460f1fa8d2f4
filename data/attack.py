"""The base class of all attacks (how they alter training and test images, and which ones), and their cached assets."""

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
from data.io.arrays import read_arrays
from data.sets import AttackContext, RawData
from utils.errors import UserError
from utils.files import check_writable, locked, remove_leftovers, write_atomically
from utils.manifest import TRAIN

logger = logging.getLogger(__name__)
BATCH = 256  # images that are altered at a time, so that at 224 px they fit into memory as floats
CACHED = 2**17  # pixels at a time for elementwise operations: they stay in the CPU's cache; at 224 px 3 times faster than BATCH
Arrays = dict[str, np.ndarray]


class AttackBase(ABC):
    """An attack: `class Attack(AttackBase)` in `data/attacks/<name>.py`, beside its `Settings`.

    Attributes:
        clean_label: whether the attacker poisons images of the target class and keeps their labels.
        cover_ratio: number of cover images (altered, label kept) per poisoned image.
        cover_target_class: whether images of the target class may become cover images.
        from_training_images: whether the trigger of test images depends on the training images.
        selection_scores: a method that returns a score (N,) for each training image, of which those with the lowest are
            poisoned, ties by index; None: the poisoned images are drawn at random.
    """

    clean_label = False
    cover_ratio = 0.0
    cover_target_class = True
    from_training_images = False
    selection_scores: Callable[[], np.ndarray] | None = None

    @abstractmethod
    def __init__(self, settings: Any, context: AttackContext) -> None:
        """Check the settings against the context. What takes long to make is made when images are altered first."""

    @abstractmethod
    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return altered copies of images, a function of the seed, the image and its index alone.

        Args:
            images: (n, H, W, 3) uint8, must not be modified.
            index: (n,) int64, positions of the images in the training or test set.
            split: "train" or "test".
        """

    def cover(self, images: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return cover images made from training images (n, H, W, 3) uint8; called only if `cover_ratio` > 0."""
        raise NotImplementedError


class NoAttack(AttackBase):
    """What `poison_ratio: 0` means, whichever attack is named: no image is altered, and no asset is made."""

    def __init__(self) -> None:
        """There is nothing to check or to make."""

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return copies of the images (n, H, W, 3) uint8."""
        return images.copy()


def in_batches(
    alter: Callable[[np.ndarray, np.ndarray], np.ndarray], images: np.ndarray, index: np.ndarray, pixels: int | None = None
) -> np.ndarray:
    """Apply `alter(images, index)` to a part of the images at a time; (n, H, W, 3) uint8 in and out.

    Args:
        pixels: how many pixels a part may have (but at least one image); None: `BATCH` images.
    """
    out = np.empty_like(images)
    batch = BATCH if pixels is None else max(1, pixels // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        out[part] = alter(images[part], index[part])
    return out


def fingerprint(raw: RawData) -> str:
    """Return a digest of the training set, for the key of assets that are made from it.

    Pixels enter by the digests of the images, which a table on disk has already, so gigabytes are not read again.
    """
    digest = sha256(repr((raw.train_images.shape, digests_of(raw, TRAIN))).encode())
    digest.update(np.ascontiguousarray(raw.train_labels).data)
    return digest.hexdigest()


def keep_asset(
    context: AttackContext, name: str, depends_on: Mapping[str, Any], make: Callable[[], Arrays], alters: bool = True
) -> Arrays:
    """Return an asset's arrays: those in the assets' folder if they were made with the same inputs, else new ones, saved there.

    The log names the file. A damaged file is detected by its checksum and made again. Of several runs that need the same asset,
    one makes it and the others wait. The same settings can give other arrays on another device, so those that decide how images
    are altered become part of the run's manifest.

    Args:
        name: of the asset, e.g. `iab_mask`; the file is `<name>-<digest of depends_on>.npz`.
        depends_on: all that the arrays depend on: settings, seed, `fingerprint(raw)`; values that JSON can express.
        make: returns new arrays.
        alters: whether the arrays decide how images are altered, rather than what other assets are made with.
    Raises:
        UserError: the run was begun with other arrays, or the file cannot be written.
    """
    key = json.dumps(depends_on, sort_keys=True)
    path = context.assets / f"{name}-{sha256(key.encode()).hexdigest()[:16]}.npz"
    arrays = kept_asset(name, path, key)
    if arrays is None:
        check_writable(path)  # before hours of training
        busy = f"is making {path.name}, which this run needs too: waiting for it"
        with locked(path.with_name(f".{path.name}.lock"), busy, wait=True):
            arrays = kept_asset(name, path, key) or make_asset(context, name, path, key, make)
    return checked(context, name, path, arrays) if alters else arrays


def kept_asset(name: str, path: Path, key: str) -> Arrays | None:
    """Return the arrays of an asset's file; None if there is no such file, or a damaged one."""
    arrays = read_asset(path, key) if path.exists() else None
    if arrays is not None:
        logger.info(f"{name}: using {path}, made earlier with the same settings")
    return arrays


def make_asset(context: AttackContext, name: str, path: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """Make an asset's arrays and write its file."""
    if path.exists():
        logger.info(f"{name}: {path} is damaged: making it again")
    elif context.assets_of_run.digest(name, path.stem) is not None:
        logger.info(f"{name}: {path}, with which this run was begun, is missing: making it again; on another device it differs")
    remove_leftovers(context.assets)
    arrays = make()
    stored = arrays | {"_key": np.array(key), "_sha256": np.array(checksum(arrays))}
    write_atomically(path, lambda file: np.savez(file, **stored))  # type: ignore[arg-type]
    logger.info(f"{name}: made {path}")
    return arrays


def checked(context: AttackContext, name: str, path: Path, arrays: Arrays) -> Arrays:
    """Return the arrays of an asset, whose digest becomes part of the manifest; refuse other arrays than the run's."""
    digest = checksum(arrays)[:16]
    if context.assets_of_run.digest(name, path.stem) not in (None, digest):
        raise UserError(
            f"{path}: is not the file that this run was begun with, so the trigger would be another one: restore that file "
            "(from the computer on which the run was begun), or start a new run: --resume False, or --set run=NAME"
        )
    context.assets_of_run.used[path.stem] = digest
    return arrays


def read_asset(path: Path, key: str) -> Arrays | None:
    """Return the arrays of an asset's file, or None if it is damaged or was written for another key."""
    try:
        arrays, _ = read_arrays(path)
        stored_key, digest = str(arrays.pop("_key")), str(arrays.pop("_sha256"))
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable or move it away") from None
    except Exception as error:  # numpy and zipfile pass on the exceptions of many libraries
        if isinstance(error, MemoryError):
            raise
        return None
    return arrays if stored_key == key and digest == checksum(arrays) else None


def checksum(arrays: Arrays) -> str:
    """Return the digest of named arrays: of their names, types, shapes and contents."""
    digest = sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def weights_of(network: nn.Module) -> Arrays:
    """Return the network's parameters and BN statistics as arrays, to be saved as an asset."""
    return {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
