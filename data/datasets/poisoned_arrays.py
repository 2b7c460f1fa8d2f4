"""A set that was poisoned by other code: one `.npz` file of arrays, named by `dataset_dir`. N training, M test images.

train_images            (N, H, W, 3) uint8, RGB
train_labels            (N,) integers, the labels that the images carry
train_original_labels   (N,) integers, before the attack
train_poisoned          (N,) bool
train_cover             (N,) bool: altered images with an unchanged label, not poisoned; may be left out
test_images             (M, H, W, 3) uint8, without the trigger
test_labels             (M,) integers
triggered_images        (m, H, W, 3) uint8: test images of other classes than the target, with the trigger
triggered_indices       (m,) integers, ascending: their positions in test_images
class_names             (C,) strings; may be left out
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.choice import label_after
from data.io.arrays import read_arrays
from data.poisoned_sets.folder import refuse_reserved
from data.poisoned_sets.origin import Origin
from data.poisoned_sets.stored import PARTS, StoredSet
from data.sets import MOST_CLASSES, Part
from utils import kinds
from utils.config.schema import Named, setting
from utils.config.settings import Backdoor
from utils.errors import UserError, one_line
from utils.names import wrong_names
from utils.paths import require_file, user_path

POISONED = True  # the set has its ground truth
# The array's type: its number of dimensions, numpy's `dtype.kind`s, and their name for messages.
IMAGES, LABELS, MASK, NAMES = (4, "u", "uint8 (n, H, W, 3)"), (1, "iu", "integers"), (1, "b", "bool"), (1, "U", "strings")
ARRAYS = {
    "train_images": IMAGES, "train_labels": LABELS, "train_original_labels": LABELS, "train_poisoned": MASK,
    "train_cover": MASK, "test_images": IMAGES, "test_labels": LABELS, "triggered_images": IMAGES, "triggered_indices": LABELS,
    "class_names": NAMES,
}  # fmt: skip
OPTIONAL = ("train_cover", "class_names")


@dataclass(frozen=True)
class Settings:
    target_label: int | None = setting(None, "the label that the attacker wants; null: see target_shift", low=0)
    target_shift: int | None = setting(None, "all-to-all labels instead of target_label: what is added to a label", low=1)
    attack: str = setting("arrays", "the attack's name in logs and reports")


def load(settings: Settings, dataset_dir: str | None, download: bool) -> StoredSet:
    """Read the file and check it.

    Raises:
        UserError: it is missing, unreadable or inconsistent.
    """
    at = "dataset.poisoned_arrays"
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the .npz file with the arrays")
    if (settings.target_label is None) == (settings.target_shift is None):
        raise UserError(f"{at}: needs either target_label, the label that the attacker wants, or target_shift")
    if not re.fullmatch(r"[\w-]+", settings.attack):
        raise UserError(f"{at}.attack: {settings.attack!r:.80}: must be a plain name, e.g. badnet")
    refuse_reserved(settings.attack, f"{at}.attack")
    path = user_path(dataset_dir, "dataset_dir")
    arrays = read(path)
    names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
    largest, key = max((int(arrays[key].max()), key) for key in ("train_labels", "train_original_labels", "test_labels"))
    if largest >= MOST_CLASSES:
        raise UserError(f"{path}: {key}: the largest is {largest}: must be less than {MOST_CLASSES}")
    classes = len(names) if names is not None else largest + 1
    backdoor = attack_of(settings, arrays)
    wanted = label_after(arrays["test_labels"], settings.target_label, settings.target_shift, classes)
    names = names or tuple(map(str, range(classes)))
    origin = Origin(
        "arrays", Named("poisoned_arrays", settings), backdoor, classes, names, (), path.parent, path.name,
        ("train", "test", "triggered"),
    )  # fmt: skip
    return origin.stored(parts_of(arrays, wanted))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the file's arrays after checking names, types and lengths; nothing in the file can run code."""
    try:
        require_file(path)
        arrays, unknown = read_arrays(path, ARRAYS)
    except FileNotFoundError:
        raise UserError(f"dataset_dir: {path}: no such file: give the .npz file with the arrays") from None
    except Exception as error:  # numpy and zipfile pass on the exceptions of many libraries
        raise UserError(f"{path}: not an .npz file of arrays ({one_line(error)}): write it with numpy.savez") from None
    missing = [name for name in ARRAYS if name not in arrays and name not in OPTIONAL]
    if missing or unknown:
        what = f"has no {missing[0]}" if missing else f"has {unknown[0]!r:.80}, which is unknown"
        raise UserError(f"{path}: {what}: needs {', '.join(name for name in ARRAYS if name not in OPTIONAL)}")
    for name, array in arrays.items():
        dimensions, kinds, text = ARRAYS[name]
        fits = ARRAYS[name] is not IMAGES or (array.dtype == np.uint8 and array.shape[-1:] == (3,))
        if array.ndim != dimensions or array.dtype.kind not in kinds or not fits or not array.size:
            raise UserError(f"{path}: {name}: {array.dtype} {array.shape}: must be {text}, and not empty")
    for name, array in arrays.items():
        images = arrays[f"{name.partition('_')[0]}_images"] if name != "class_names" else array
        if len(array) != len(images):
            raise UserError(f"{path}: {name}: {len(array)} values for {len(images)} images: must be one for each")
    if (arrays["train_poisoned"] & arrays.get("train_cover", False)).any():
        raise UserError(f"{path}: train_cover: marks images that train_poisoned marks too: must be other images")
    chosen = arrays["triggered_indices"]
    if chosen.min() < 0 or chosen.max() >= len(arrays["test_images"]):
        raise UserError(
            f"{path}: triggered_indices: {chosen.min()} to {chosen.max()}: must be positions in test_images, 0 to "
            f"{len(arrays['test_images']) - 1}"
        )
    if np.array_equal(arrays["triggered_images"], arrays["test_images"][chosen]):
        raise UserError(f"{path}: triggered_images: are the test images, without any trigger: they would give no ASR")
    if wrong := "class_names" in arrays and wrong_names(arrays["class_names"].tolist()):
        raise UserError(f"{path}: class_names: {wrong}: give each class a name of its own")
    return arrays


def attack_of(settings: Settings, arrays: dict[str, np.ndarray]) -> Backdoor:
    """Return the section `backdoor` that the arrays amount to."""
    poisoned, original = arrays["train_poisoned"], arrays["train_original_labels"]
    clean_label = settings.target_label is not None and not (arrays["train_labels"] != original)[poisoned].any()
    among = max(1, int((original == settings.target_label).sum())) if clean_label else len(original)
    ratio = min(1.0, float(poisoned.sum() / among))
    return Backdoor(Named(settings.attack, {}), ratio, settings.target_label, settings.target_shift, "exact")


def parts_of(arrays: dict[str, np.ndarray], wanted: np.ndarray) -> dict[str, Part]:
    """Return the three parts by the names of `PARTS`.

    Args:
        wanted: (M,) the labels that the attacker wants for the test images.
    """
    poisoned, n = arrays["train_poisoned"], len(arrays["train_images"])
    unaltered = np.where(arrays.get("train_cover", False), kinds.COVER, kinds.CLEAN)
    flags = np.where(poisoned, kinds.POISONED, unaltered).astype(np.uint8)
    given, original, labels = (arrays[key].astype(np.int64) for key in ("train_labels", "train_original_labels", "test_labels"))
    at, m = arrays["triggered_indices"].astype(np.int64), len(labels)
    parts = (
        Part(arrays["train_images"], given, original, flags, np.arange(n)),
        Part(arrays["test_images"], labels, labels, np.full(m, kinds.CLEAN, np.uint8), np.arange(m)),
        Part(arrays["triggered_images"], wanted[at], labels[at], np.full(len(at), kinds.POISONED, np.uint8), at),
    )
    return dict(zip(PARTS, parts, strict=True))
