"""A poisoned data set as a folder, so that all methods in a comparison train on the same files.

    train.npz  clean_test.npz  backdoor_test.npz   images, labels, original_labels, flags, indices (`data.sets.Part`)
    set.json                                       the settings, counts, and the SHA-256 of every array's bytes
    contact_sheet.png                              an image that shows what the attack does

The arrays are plain `.npy` members in C order, so any program can read them; equal settings give equal bytes. A folder is
untrusted input: nothing in it can run code, and files that do not match `set.json` are refused.
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
from utils.config import Config
from utils.errors import UserError
from utils.files import cannot_write, new_folder, write_atomically, write_durably, write_text
from utils.paths import require_file
from utils.schema import Named, as_dict
from utils.settings import Backdoor

FORMAT, VERSION = "poisoned set", 2
DESCRIPTION, SHEET = "set.json", "contact_sheet.png"
PARTS = ("train", "clean_test", "backdoor_test")
FILES = {name: f"{name}.npz" for name in PARTS}
ARRAYS = {"images": "uint8", "labels": "int64", "original_labels": "int64", "flags": "uint8", "indices": "int64"}
KINDS = {"clean": CLEAN, "poisoned": POISONED, "cover": COVER}
KEYS: dict[str, type | tuple[type, ...]] = {
    "backdoor": dict, "dataset": dict, "data": dict, "seed": (int, type(None)), "num_classes": int, "class_names": list,
    "transform_pre": dict, "counts": dict, "files": dict,
}  # fmt: skip
INPUTS = "inputs"  # optional key: `digest_of_manifest` of the data that the set was made from
# The keys of `backdoor` besides the attack (poison_ratio etc.) with their types.
PLAIN = {key: get_args(kind) or (kind,) for key, kind in get_type_hints(Backdoor).items() if kind is not Named}
REMEDY = "make the set again with python -m data.poison, under another name"


@dataclass(frozen=True)
class StoredSet:
    """A poisoned data set that was read from its folder, with the contents of `set.json`."""

    train: Part
    clean_test: Part
    # Triggered test images of other classes than the target, with the label that the attacker wants; may be empty if no
    # training image is poisoned.
    backdoor_test: Part
    backdoor: Backdoor
    num_classes: int
    class_names: tuple[str, ...]
    transform_pre: dict[str, Any]
    folder: Path
    description: str  # the text of set.json
    described_by: str = DESCRIPTION  # the file in the folder that says what the set is

    def cut(self, train: int | None, test: int | None) -> StoredSet:
        """Return the images that come from the data set's first `train` and `test` images (None: all); nothing is copied.

        Raises:
            UserError: a limit leaves none of the training, clean test or triggered test images.
        """

        def kept(part: Part, key: str, limit: int | None, kind: str) -> Part:
            few = part.first(limit)
            if len(part) and not len(few):
                least = part.indices[0] + 1
                raise UserError(f"data.{key}: {limit}: keeps no {kind} image of {self.folder}: must be at least {least}")
            return few

        return replace(
            self,
            train=kept(self.train, "train_limit", train, "training"),
            clean_test=kept(self.clean_test, "test_limit", test, "clean test"),
            backdoor_test=kept(self.backdoor_test, "test_limit", test, "triggered test"),
        )

    def raw(self) -> RawData:
        """Return the training images as the attacker left them, and the clean test images."""
        train, test = self.train, self.clean_test
        return RawData(train.images, train.labels, test.images, test.labels, self.class_names)


@dataclass(frozen=True)
class Origin:
    """What is known, beside the images, of a set that another program has poisoned."""

    source: str  # what wrote it, for set.json
    dataset: Named  # its name and settings
    backdoor: Backdoor
    num_classes: int
    class_names: tuple[str, ...]
    pre: tuple[Named, ...]  # the transforms that brought its images to their size
    folder: Path
    described_by: str  # the file in the folder that says what the set is
    called: tuple[str, ...]  # what the parts of the names `PARTS` are called there

    def stored(self, parts: Mapping[str, Part]) -> StoredSet:
        """Return the set with the parts of these names (`PARTS`); what nobody knows is null in its description.

        Raises:
            UserError: the parts are inconsistent, e.g. an image that the ASR must not count is among the triggered ones.
        """
        wrong = contradiction(parts, self.backdoor, self.num_classes, dict(zip(PARTS, self.called, strict=True)))
        if wrong is not None:
            raise UserError(f"{self.folder / self.described_by}: {wrong}: write the set again")
        settings = {
            "source": self.source, "backdoor": as_dict(self.backdoor), "dataset": as_dict(self.dataset),
            "data": {"train_limit": None, "test_limit": None}, "seed": None, "num_classes": self.num_classes,
            "transform_pre": named_settings(self.pre), "class_names": list(self.class_names),
        }  # fmt: skip
        train, test, triggered = (parts[name] for name in PARTS)
        return StoredSet(
            train, test, triggered, self.backdoor, self.num_classes, self.class_names, named_settings(self.pre),
            self.folder, description_of(parts, settings), self.described_by,
        )  # fmt: skip


def write_set(out: Path, parts: Mapping[str, Part], settings: Mapping[str, Any], draw_sheet: Callable[[Path], None]) -> None:
    """Write the folder, whole or not at all.

    Args:
        out: absent, or an empty folder.
        parts: by the names of `PARTS`.
        settings: those that the set was made with, the `KEYS` except for counts and files, and `INPUTS`; JSON's types.
        draw_sheet: draws the contact sheet into the given file.
    Raises:
        UserError: the folder cannot be written.
    """
    try:
        with new_folder(out) as part_folder:
            for name in PARTS:
                with open(part_folder / f"{name}.npz", "wb") as file:
                    write_durably(file, partial(np.savez, **arrays_of(parts[name])))  # type: ignore[arg-type]
            draw_sheet(part_folder / SHEET)
            with open(part_folder / DESCRIPTION, "wb") as file:
                write_durably(file, lambda file: file.write(description_of(parts, settings).encode()))
    except OSError as error:
        raise cannot_write(f"--out {out}", error) from None


def description_of(parts: Mapping[str, Part], settings: Mapping[str, Any]) -> str:
    """Return the text of `set.json`.

    Args:
        parts, settings: as in `write_set`.
    """
    files = {f"{name}.npz": {key: describe(array) for key, array in arrays_of(parts[name]).items()} for name in PARTS}
    counts = {name: count(parts[name]) for name in PARTS}
    return json.dumps({"format": FORMAT, "version": VERSION, **settings, "counts": counts, "files": files}, indent=2) + "\n"


def arrays_of(part: Part) -> dict[str, np.ndarray]:
    """Return the arrays of a part with the types of `ARRAYS`, in C order."""
    return {key: np.ascontiguousarray(getattr(part, key), dtype) for key, dtype in ARRAYS.items()}


def count(part: Part) -> dict[str, int]:
    """Return how many images of each kind a part has."""
    return {kind: int((part.flags == flag).sum()) for kind, flag in KINDS.items()}


def describe(array: np.ndarray) -> dict[str, Any]:
    """Return an array's entry in `set.json`; the SHA-256 is that of its bytes in C order."""
    contents = np.ascontiguousarray(array).data
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": sha256(contents).hexdigest()}


def read_set(folder: Path) -> StoredSet:
    """Read a set's folder and verify all of it.

    Raises:
        UserError: a file is missing, unreadable, of another format, changed since it was written (SHA-256) or inconsistent.
    """
    path = folder / DESCRIPTION
    text, described = read_description(folder)
    train, clean, triggered = (read_part(folder / f"{name}.npz", described["files"].get(f"{name}.npz")) for name in PARTS)
    parts = dict(zip(PARTS, (train, clean, triggered), strict=True))
    backdoor = backdoor_of(path, described["backdoor"])
    wrong = contradiction(parts, backdoor, described["num_classes"])
    if wrong is None and described["counts"] != {name: count(part) for name, part in parts.items()}:
        wrong = f"{DESCRIPTION}: counts: do not match the files"
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}: {REMEDY}")
    names = tuple(map(str, described["class_names"]))
    return StoredSet(
        train, clean, triggered, backdoor, described["num_classes"], names, described["transform_pre"], folder, text
    )


def read_description(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of `set.json` and its contents, in which every key has its type."""
    path = folder / DESCRIPTION
    try:
        require_file(path)
        text = path.read_text(encoding="utf-8")
        described = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a folder that python -m data.poison --out wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]}): {REMEDY}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f"{path}: does not describe a poisoned set (format is not {FORMAT!r}): {REMEDY}")
    version = described.get("version")
    if version not in (1, VERSION):
        raise UserError(f"{path}: version {version!r}: this program reads versions 1 and {VERSION}: {REMEDY}")
    for key, kind in KEYS.items():
        if key not in described or type(described[key]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise UserError(f"{path}: {key}: missing or of the wrong type: {REMEDY}")
    if version == 1:  # from before all-to-all labels
        described["backdoor"].setdefault("target_shift", None)
    return text, described


def read_part(path: Path, described: object) -> Part:
    """Read one file of arrays and check the type, shape and SHA-256 of each array against `set.json`."""
    try:
        require_file(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: the set is incomplete: {REMEDY}") from None
    except Exception as error:  # numpy and zipfile pass on the exceptions of many libraries
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a file of arrays ({what}): {REMEDY}") from None
    if not isinstance(described, dict) or arrays.keys() != set(ARRAYS) or described.keys() != set(ARRAYS):
        raise UserError(f"{path}: contains {', '.join(arrays) or 'nothing'} instead of {', '.join(ARRAYS)}: {REMEDY}")
    for name, array in arrays.items():
        if str(array.dtype) != ARRAYS[name]:
            raise UserError(f"{path}: {name} is {array.dtype} instead of {ARRAYS[name]}: {REMEDY}")
        if describe(array) != described[name]:
            raise UserError(f"{path}: {name}: changed: its SHA-256 or shape differs from {DESCRIPTION}: {REMEDY}")
    return Part(**arrays)


def contradiction(
    parts: Mapping[str, Part], backdoor: Backdoor, num_classes: int, called: Mapping[str, str] = FILES
) -> str | None:
    """Return what makes the arrays inconsistent, or None: checksums that match do not mean that the contents make sense.

    Args:
        called: what the parts are called in messages.
    """
    sides = {part.images.shape[1:] for part in parts.values()}
    attacked = (parts["train"].flags == POISONED).any()
    for key, part in parts.items():
        name = called[key]
        n = part.images.shape[0] if part.images.ndim == 4 and part.images.shape[3] == 3 else -1
        least = 0 if key == "backdoor_test" and not attacked else 1
        if n < least or len(sides) > 1:
            return f"{name}: images {part.images.shape}: must be (n, H, W, 3), n >= {least}, with one size in all parts"
        if any(getattr(part, key).shape != (n,) for key in ARRAYS if key != "images"):
            return f"{name}: not every array has one entry for each of the {n} images"
        if n == 0:
            continue
        if (np.diff(part.indices) <= 0).any() or part.indices[0] < 0:
            return f"{name}: indices: must ascend and not be negative"
        for array in ("labels", "original_labels"):
            labels = getattr(part, array)
            if labels.min() < 0 or labels.max() >= num_classes:
                return f"{name}: {array}: {labels.min()} to {labels.max()}: there are {num_classes} classes"
        if part.flags.max() > COVER:
            return f"{name}: flags: {part.flags.max()}: must be 0 clean, 1 poisoned or 2 cover"
        wanted = label_after(part.original_labels, backdoor.target_label, backdoor.target_shift, num_classes)
        if (part.labels != np.where(part.flags == POISONED, wanted, part.original_labels)).any():
            target = backdoor.target_text(())
            return f"{name}: labels: poisoned images do not carry class {target}, or others lack their original label"
    clean, triggered = parts["clean_test"], parts["backdoor_test"]
    if (clean.flags != CLEAN).any():
        return f"{called['clean_test']}: flags: contains images that are not clean"
    if (triggered.flags != POISONED).any() or (triggered.labels == triggered.original_labels).any():
        what = "contains images without the trigger or of the target class, which the ASR must not count"
        return f"{called['backdoor_test']}: {what}"
    if not np.isin(triggered.indices, clean.indices).all():
        return f"{called['backdoor_test']}: indices: some are not in {called['clean_test']}"
    return None


def refuse_reserved(name: str, key: str) -> None:
    """Raise UserError if an attack has the name of another key of `backdoor`, beside which `set.json` names it.

    Args:
        key: the setting that names the attack.
    """
    if name in PLAIN:
        raise UserError(f"{key}: {name}: is a key of `backdoor` (as {', '.join(PLAIN)} are): give the attack another name")


def backdoor_of(path: Path, described: dict[str, Any]) -> Backdoor:
    """Return the `backdoor` section of `set.json`; the attack's own settings are kept as they are."""
    attacks = [key for key in described if key not in PLAIN]
    if len(attacks) != 1 or any(type(described.get(key, ...)) not in kinds for key, kinds in PLAIN.items()):
        raise UserError(f"{path}: backdoor: must name one attack, and {', '.join(PLAIN)}: {REMEDY}")
    if (described["target_label"] is None) == (described["target_shift"] is None):
        raise UserError(f"{path}: backdoor: needs either target_label or target_shift: {REMEDY}")
    (name,) = attacks
    return Backdoor(Named(name, described[name]), **{key: described[key] for key in PLAIN})


def disagreement(given: Backdoor, stored: Backdoor) -> str | None:
    """Return `key: value: the set has ...` of the first setting that differs, or None.

    A setting of the attack that the set lacks was added after it was made, and is ignored.
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
    """Raise UserError if the YAML contradicts the `set.json` of the poisoned set."""
    wrong = disagreement(config.backdoor, stored.backdoor) if config.backdoor else None
    pre = named_settings(config.transform.pre)
    if config.num_classes != stored.num_classes:
        wrong = f"num_classes: {config.num_classes}: the set has {stored.num_classes}"
    elif pre and list(pre.items()) != list(stored.transform_pre.items()):
        wrong = f"transform.pre: {', '.join(pre)}: the set was made with {stored.transform_pre or 'none'}"
    if wrong:
        keys = "leave the key out" if not wrong.startswith("backdoor") else "set backdoor: null, to use the set's own"
        raise UserError(f"{wrong} ({stored.folder / stored.described_by}): give the same value, or {keys}")


def keep_with_run(folder: Path, stored: StoredSet) -> None:
    """Save `set.json` and `poison_idx.npy` with the run; raise UserError if it was begun with other data."""
    path, index = folder / DESCRIPTION, folder / "poison_idx.npy"
    begun = path.read_text(encoding="utf-8") if path.exists() else None
    if not same_arrays(begun, stored.description) and (path.exists() or index.exists()):
        raise UserError(
            f"dataset_dir: {stored.folder}: the run in {folder} was begun with other data: give that data, or start a new run "
            "with --set run=NAME and without --resume, or with --resume False"
        )
    if begun is None:
        write_text(path, stored.description)  # before the index: an index alone means a run on raw data
    if not index.exists():
        poisoned = (stored.train.flags == POISONED).astype(np.float64)
        write_atomically(index, lambda file: np.save(file, poisoned, allow_pickle=False))


def same_arrays(one: str | None, other: str) -> bool:
    """Return whether two texts of `set.json` describe equal arrays, whatever their settings."""
    try:
        return one is not None and json.loads(one)["files"] == json.loads(other)["files"]
    except (ValueError, LookupError, TypeError):
        return False


def examples_of(stored: StoredSet, most: int) -> tuple[np.ndarray, str]:
    """Return up to `most` test images before and after the attack, (2, n, H, W, 3) uint8, and their caption.

    Training images cannot be shown: a stored set lacks their originals.
    """
    clean, backdoor = stored.clean_test, stored.backdoor_test
    some = backdoor.indices[:most]
    before = clean.images[np.searchsorted(clean.indices, some)]
    label = stored.backdoor.target_text(stored.class_names)
    caption = f"{stored.backdoor.attack.name}: triggered test images, labeled {label}"
    return np.stack([before, backdoor.images[: len(some)]]), caption


def settings_of_set(config: Config, dataset: Named) -> dict[str, Any]:
    """Return the settings that determine a poisoned set, in the form of `set.json`."""
    return {
        "backdoor": as_dict(config.attacker),
        "dataset": as_dict(dataset),
        "data": {"train_limit": config.data.train_limit, "test_limit": config.data.test_limit},
        "seed": config.seed.seed,
        "num_classes": config.num_classes,
        "transform_pre": named_settings(config.transform.pre),
    }


def named_settings(steps: tuple[Named, ...]) -> dict[str, Any]:
    """Return the settings of transforms by name, in their order, as values of JSON."""
    return {step.name: as_dict(step.settings) for step in steps}


def holds_same_set(folder: Path, settings: dict[str, Any], inputs: Callable[[], str]) -> bool:
    """Return whether a folder contains a poisoned set that was made with these settings, from the same data.

    Args:
        inputs: returns the value of `INPUTS`; called only if the settings are equal and the set has one.
    Raises:
        UserError: the set is damaged.
    """
    if not (folder / DESCRIPTION).is_file():
        return False
    read_set(folder)
    _, described = read_description(folder)
    if any(described.get(key) != value for key, value in settings.items()):
        return False
    return INPUTS not in described or described[INPUTS] == inputs()
