"""A poisoned data set as a folder of its own: the same files poison every method that is compared.

    train.npz  clean_test.npz  backdoor_test.npz   images, labels, original_labels, flags, indices (`data.sets.Part`)
    set.json                                       the settings, counts, and the SHA-256 of every array's bytes
    contact_sheet.png                              what the attack does, for the eye

The arrays are plain `.npy` members in C order, so any program reads them; equal settings give equal bytes. A folder is
untrusted input: nothing in it can run code, and what does not match its own `set.json` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from data.choice import label_after
from data.sets import CLEAN, COVER, POISONED, Part, RawData
from utils.config import Backdoor, Config
from utils.errors import UserError
from utils.files import cannot_write, new_folder, write_atomically, write_durably, write_text
from utils.paths import require_file
from utils.schema import Named, as_dict

FORMAT, VERSION = "poisoned set", 2
DESCRIPTION, SHEET = "set.json", "contact_sheet.png"
PARTS = ("train", "clean_test", "backdoor_test")
ARRAYS = {"images": "uint8", "labels": "int64", "original_labels": "int64", "flags": "uint8", "indices": "int64"}
KINDS = {"clean": CLEAN, "poisoned": POISONED, "cover": COVER}
KEYS: dict[str, type | tuple[type, ...]] = {
    "backdoor": dict, "dataset": dict, "data": dict, "seed": (int, type(None)), "num_classes": int, "class_names": list,
    "transform_pre": dict, "counts": dict, "files": dict,
}  # fmt: skip
# The keys beside the attack, poison_ratio and the like, with their types.
PLAIN = {key: get_args(kind) or (kind,) for key, kind in get_type_hints(Backdoor).items() if kind is not Named}
REMEDY = "make the set again with python -m data.poison, under another name"


@dataclass(frozen=True)
class StoredSet:
    """A poisoned data set that was read from its folder, and what `set.json` says of it."""

    train: Part
    clean_test: Part
    backdoor_test: Part  # test images that are not of the target class, triggered, with the label that the attacker wants
    backdoor: Backdoor
    num_classes: int
    class_names: tuple[str, ...]
    transform_pre: dict[str, Any]
    folder: Path
    description: str  # the text of set.json
    described_by: str = DESCRIPTION  # the file in the folder that says what the set is

    def cut(self, train: int | None, test: int | None) -> StoredSet:
        """Return what comes of the first so many images (None: all) of both parts of the data set; nothing is copied."""
        clean, backdoor = self.clean_test.first(test), self.backdoor_test.first(test)
        return replace(self, train=self.train.first(train), clean_test=clean, backdoor_test=backdoor)

    def raw(self) -> RawData:
        """Return the training images as they are handed over, and the clean test images."""
        train, test = self.train, self.clean_test
        return RawData(train.images, train.labels, test.images, test.labels, self.class_names)


def write_set(out: Path, parts: Mapping[str, Part], settings: Mapping[str, Any], draw_sheet: Callable[[Path], None]) -> None:
    """Write the folder, whole or not at all.

    Args:
        out: absent, or an empty folder.
        parts: by the names of `PARTS`.
        settings: what the set was made with, the `KEYS` but for counts and files; JSON's types.
        draw_sheet: draws the contact sheet into the file that it is given.
    Raises:
        UserError: the folder cannot be written.
    """
    described: dict[str, Any] = {"format": FORMAT, "version": VERSION, **settings, "counts": {}, "files": {}}
    try:
        with new_folder(out) as part_folder:
            for name in PARTS:
                arrays = {key: np.ascontiguousarray(getattr(parts[name], key), dtype) for key, dtype in ARRAYS.items()}
                with open(part_folder / f"{name}.npz", "wb") as file:
                    write_durably(file, partial(np.savez, **arrays))  # type: ignore[arg-type]
                described["counts"][name] = count(parts[name])
                described["files"][f"{name}.npz"] = {key: describe(array) for key, array in arrays.items()}
            draw_sheet(part_folder / SHEET)
            with open(part_folder / DESCRIPTION, "wb") as file:
                write_durably(file, lambda file: file.write((json.dumps(described, indent=2) + "\n").encode()))
    except OSError as error:
        raise cannot_write(f"--out {out}", error) from None


def count(part: Part) -> dict[str, int]:
    """Return how many images of each kind a part has."""
    return {kind: int((part.flags == flag).sum()) for kind, flag in KINDS.items()}


def describe(array: np.ndarray) -> dict[str, Any]:
    """Return what `set.json` says of an array; the SHA-256 is that of its bytes in C order."""
    contents = np.ascontiguousarray(array).data
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": sha256(contents).hexdigest()}


def read_set(folder: Path) -> StoredSet:
    """Read a set's folder and verify all of it.

    Raises:
        UserError: one line with the file and what is wrong: missing, unreadable, of another format, changed since it was
            written (SHA-256), or not what a poisoned set is.
    """
    path = folder / DESCRIPTION
    text, described = read_description(folder)
    train, clean, triggered = (read_part(folder / f"{name}.npz", described["files"].get(f"{name}.npz")) for name in PARTS)
    parts = dict(zip(PARTS, (train, clean, triggered), strict=True))
    backdoor = backdoor_of(path, described["backdoor"])
    complain = contradiction(parts, backdoor, described["num_classes"])
    if complain is None and described["counts"] != {name: count(part) for name, part in parts.items()}:
        complain = f"{DESCRIPTION}: counts: they are not those of the files"
    if complain is not None:
        raise UserError(f"{folder}: {complain}: {REMEDY}")
    names = tuple(map(str, described["class_names"]))
    return StoredSet(
        train, clean, triggered, backdoor, described["num_classes"], names, described["transform_pre"], folder, text
    )


def read_description(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of `set.json` and what it says, every key of its type."""
    path = folder / DESCRIPTION
    try:
        require_file(path)
        text = path.read_text(encoding="utf-8")
        described = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: {folder} is no poisoned set: give the --out of python -m data.poison") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]}): {REMEDY}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f"{path}: describes no poisoned set (format is not {FORMAT!r}): {REMEDY}")
    version = described.get("version")
    if version not in (1, VERSION):
        raise UserError(f"{path}: version {version!r}: this program reads versions 1 and {VERSION}: {REMEDY}")
    for key, kind in KEYS.items():
        if key not in described or type(described[key]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise UserError(f"{path}: {key}: missing or of a wrong type: {REMEDY}")
    if version == 1:  # knows one target class only
        described["backdoor"].setdefault("target_shift", None)
    return text, described


def read_part(path: Path, described: object) -> Part:
    """Read one file of arrays and check each against type, shape and SHA-256 in `set.json`."""
    try:
        require_file(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: the set is not complete: {REMEDY}") from None
    except Exception as error:  # numpy and zipfile raise whatever their parts do
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is no file of arrays ({what}): {REMEDY}") from None
    if not isinstance(described, dict) or arrays.keys() != set(ARRAYS) or described.keys() != set(ARRAYS):
        raise UserError(f"{path}: holds {', '.join(arrays) or 'nothing'} and not {', '.join(ARRAYS)}: {REMEDY}")
    for name, array in arrays.items():
        if str(array.dtype) != ARRAYS[name]:
            raise UserError(f"{path}: {name} is {array.dtype} and not {ARRAYS[name]}: {REMEDY}")
        if describe(array) != described[name]:
            raise UserError(f"{path}: {name}: its SHA-256 or shape is not that of {DESCRIPTION}: it was changed: {REMEDY}")
    return Part(**arrays)


def contradiction(parts: Mapping[str, Part], backdoor: Backdoor, num_classes: int) -> str | None:
    """Return what keeps the arrays from being a poisoned set, or None: matching checksums do not make sense of them."""
    sides = {part.images.shape[1:] for part in parts.values()}
    for name, part in parts.items():
        n = part.images.shape[0] if part.images.ndim == 4 and part.images.shape[3] == 3 else 0
        if n == 0 or len(sides) > 1:
            return f"{name}.npz: images {part.images.shape} are not (n, H, W, 3), n > 0, of one size in all files"
        if any(getattr(part, key).shape != (n,) for key in ARRAYS if key != "images"):
            return f"{name}.npz: not every array has one entry for each of the {n} images"
        if (np.diff(part.indices) <= 0).any() or part.indices[0] < 0:
            return f"{name}.npz: indices: do not ascend from 0 or more"
        for key in ("labels", "original_labels"):
            labels = getattr(part, key)
            if labels.min() < 0 or labels.max() >= num_classes:
                return f"{name}.npz: {key}: {labels.min()} to {labels.max()}: there are {num_classes} classes"
        if part.flags.max() > COVER:
            return f"{name}.npz: flags: {part.flags.max()}: there are 0 clean, 1 poisoned, 2 cover"
        wanted = label_after(part.original_labels, backdoor.target_label, backdoor.target_shift, num_classes)
        if (part.labels != np.where(part.flags == POISONED, wanted, part.original_labels)).any():
            target = backdoor.target_text(())
            return f"{name}.npz: labels: poisoned images do not carry class {target}, or others not their original label"
    clean, triggered = parts["clean_test"], parts["backdoor_test"]
    if (clean.flags != CLEAN).any():
        return "clean_test.npz: flags: holds images that are not clean"
    if (triggered.flags != POISONED).any() or (triggered.labels == triggered.original_labels).any():
        return "backdoor_test.npz: holds images without the trigger or of the target class, which no success rate counts"
    if not np.isin(triggered.indices, clean.indices).all():
        return "backdoor_test.npz: indices: some are not in clean_test.npz"
    return None


def backdoor_of(path: Path, described: dict[str, Any]) -> Backdoor:
    """Return the `backdoor` section of `set.json`; the attack's own settings are kept as they are."""
    attacks = [key for key in described if key not in PLAIN]
    if len(attacks) != 1 or any(type(described.get(key, ...)) not in kinds for key, kinds in PLAIN.items()):
        raise UserError(f"{path}: backdoor: does not name one attack with {', '.join(PLAIN)}: {REMEDY}")
    if (described["target_label"] is None) == (described["target_shift"] is None):
        raise UserError(f"{path}: backdoor: needs either target_label or target_shift: {REMEDY}")
    (name,) = attacks
    return Backdoor(Named(name, described[name]), **{key: described[key] for key in PLAIN})


def disagreement(given: Backdoor, stored: Backdoor) -> str | None:
    """Return `key: value: the set has ...` of the first setting that differs, or None.

    A setting that the set does not know was added to the attack since and says nothing about it.
    """
    if given.attack.name != stored.attack.name:
        return f"backdoor: {given.attack.name}: the set was poisoned by {stored.attack.name}"
    now, then = as_dict(given), as_dict(stored)
    name = given.attack.name
    for key, value in then[name].items() if isinstance(then[name], dict) else ():
        if key in now[name] and now[name][key] != value:
            return f"backdoor.{name}.{key}: {now[name][key]}: the set has {value}"
    for key in PLAIN:
        if now[key] != then[key]:
            return f"backdoor.{key}: {now[key]}: the set has {then[key]}"
    return None


def refuse_disagreement(config: Config, stored: StoredSet) -> None:
    """Refuse a YAML that says of a poisoned set what its `set.json` does not."""
    wrong = disagreement(config.backdoor, stored.backdoor) if config.backdoor else None
    pre = named_settings(config.transform.pre)
    if config.num_classes != stored.num_classes:
        wrong = f"num_classes: {config.num_classes}: the set has {stored.num_classes}"
    elif pre and list(pre.items()) != list(stored.transform_pre.items()):
        wrong = f"transform.pre: {', '.join(pre)}: the set was made with {stored.transform_pre or 'none'}"
    if wrong:
        keys = "leave the key out" if not wrong.startswith("backdoor") else "set backdoor: null, which takes the set's own"
        raise UserError(f"{wrong} ({stored.folder / stored.described_by}): give the same, or {keys}")


def keep_with_run(folder: Path, stored: StoredSet) -> None:
    """Keep `set.json` and `poison_idx.npy` with the run; refuse to go on with other data than it was begun with."""
    path, index = folder / DESCRIPTION, folder / "poison_idx.npy"
    begun = path.read_text(encoding="utf-8") if path.exists() else None
    if not same_arrays(begun, stored.description) and (path.exists() or index.exists()):
        raise UserError(
            f"dataset_dir: {stored.folder}: the run in {folder} was begun with other data: give those, or begin a new run: "
            "with --set run=NAME and without --resume, or with --resume False"
        )
    if begun is None:
        write_text(path, stored.description)  # the first of the two: an index alone is that of a run on raw data
    if not index.exists():
        poisoned = (stored.train.flags == POISONED).astype(np.float64)
        write_atomically(index, lambda file: np.save(file, poisoned, allow_pickle=False))


def same_arrays(one: str | None, other: str) -> bool:
    """Return whether two texts of `set.json` describe equal arrays; what the set was made from, and where, does not count."""
    try:
        return one is not None and json.loads(one)["files"] == json.loads(other)["files"]
    except (ValueError, LookupError, TypeError):
        return False


def examples_of(stored: StoredSet, most: int) -> tuple[np.ndarray, str]:
    """Return up to `most` test images before and after, (2, n, H, W, 3) uint8, and their caption.

    Of its training images a set has the poisoned ones only.
    """
    clean, backdoor = stored.clean_test, stored.backdoor_test
    some = backdoor.indices[:most]
    before = clean.images[np.searchsorted(clean.indices, some)]
    label = stored.backdoor.target_text(stored.class_names)
    caption = f"{stored.backdoor.attack.name}: triggered test images, labeled {label}"
    return np.stack([before, backdoor.images[: len(some)]]), caption


def settings_of_set(config: Config, dataset: Named) -> dict[str, Any]:
    """Return the settings that decide what is in a poisoned set, as `set.json` has them."""
    return {
        "backdoor": as_dict(config.attacker),
        "dataset": as_dict(dataset),
        "data": {"train_limit": config.data.train_limit, "test_limit": config.data.test_limit},
        "seed": config.seed.seed,
        "num_classes": config.num_classes,
        "transform_pre": named_settings(config.transform.pre),
    }


def named_settings(steps: tuple[Named, ...]) -> dict[str, Any]:
    """Return transforms by name, in their order, as JSON has them."""
    return {step.name: as_dict(step.settings) for step in steps}


def holds_same_set(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether a folder is a poisoned set that was made with these settings; a damaged one is a UserError."""
    if not (folder / DESCRIPTION).is_file():
        return False
    read_set(folder)
    _, described = read_description(folder)
    return all(described.get(key) == value for key, value in settings.items())
