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
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from data.io.arrays import read_arrays
from data.poisoned_sets.stored import ARRAYS, PARTS, StoredSet, contradiction
from data.sets import MOST_CLASSES, Part
from utils.config import Config
from utils.config.schema import Named, as_dict, keys_of
from utils.config.settings import Backdoor
from utils.errors import UserError, one_line
from utils.files import cannot_write, new_folder, write_durably
from utils.kinds import KINDS
from utils.names import wrong_names
from utils.paths import require_file
from utils.run_files import STORED_SET

FORMAT, VERSION = "poisoned set", 2
SHEET = "contact_sheet.png"
KEYS: dict[str, type | tuple[type, ...]] = {
    "backdoor": dict, "dataset": dict, "data": dict, "seed": (int, type(None)), "num_classes": int, "class_names": list,
    "transform_pre": dict, "counts": dict, "files": dict,
}  # fmt: skip
LIMITS = ("train_limit", "test_limit")
LEFT_OUT = "left_out"  # optional key: how many images of the data set could not be read and are missing
INPUTS = "inputs"  # optional key: `digest_of_manifest` of the data that the set was made from
# The keys of `backdoor` besides the attack (poison_ratio etc.) with their types.
PLAIN = {key: get_args(kind) or (kind,) for key, kind in get_type_hints(Backdoor).items() if kind is not Named}
MODES = keys_of(Backdoor)["poison_mode"].options
REMEDY = "make the set again with python -m data.poison, under another name"


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
            with open(part_folder / STORED_SET, "wb") as file:
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
    path = folder / STORED_SET
    text, described = read_description(folder)
    train, clean, triggered = (read_part(folder / f"{name}.npz", described["files"].get(f"{name}.npz")) for name in PARTS)
    parts = dict(zip(PARTS, (train, clean, triggered), strict=True))
    backdoor = backdoor_of(path, described["backdoor"], described["num_classes"])
    wrong = contradiction(parts, backdoor, described["num_classes"])
    if wrong is None and described["counts"] != {name: count(part) for name, part in parts.items()}:
        wrong = f"{STORED_SET}: counts: do not match the files"
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}: {REMEDY}")
    names = tuple(map(str, described["class_names"]))
    return StoredSet(
        train, clean, triggered, backdoor, described["num_classes"], names, described["transform_pre"], folder, text
    )


def read_description(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of `set.json` and its contents, in which every key has its type."""
    path = folder / STORED_SET
    try:
        require_file(path)
        text = path.read_text(encoding="utf-8")
        described = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a folder that python -m data.poison --out wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)}): {REMEDY}") from None
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise UserError(f"{path}: does not describe a poisoned set (format is not {FORMAT!r}): {REMEDY}")
    version = described.get("version")
    if version not in (1, VERSION):
        raise UserError(f"{path}: version {version!r}: this program reads versions 1 and {VERSION}: {REMEDY}")
    for key, kind in KEYS.items():
        if key not in described or type(described[key]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise UserError(f"{path}: {key}: missing or of the wrong type: {REMEDY}")
    names, backdoor = described["class_names"], described["backdoor"]
    if wrong := wrong_names(names):
        raise UserError(f"{path}: class_names: {wrong}: {REMEDY}")
    if not 1 < described["num_classes"] <= MOST_CLASSES:
        raise UserError(f"{path}: num_classes: must be in 2..{MOST_CLASSES}: {REMEDY}")
    if len(described["dataset"]) != 1 or not all(is_text(key) for key in (*described["dataset"], *backdoor)):
        raise UserError(f"{path}: dataset, backdoor: must name the data set and the attack: {REMEDY}")
    limits = described["data"]
    if not limits.keys() <= set(LIMITS) or not all(limit is None or is_count(limit) for limit in limits.values()):
        raise UserError(f"{path}: data: must have only {' and '.join(LIMITS)}, each null or a number of images: {REMEDY}")
    if not is_count(described.get(LEFT_OUT, 0)):
        raise UserError(f"{path}: {LEFT_OUT}: must be a number of images: {REMEDY}")
    if version == 1:  # from before all-to-all labels
        described["backdoor"].setdefault("target_shift", None)
    return text, described


def is_count(value: object) -> bool:
    """Return whether a value is a whole number that is not negative."""
    return type(value) is int and value >= 0


def is_text(text: str) -> bool:
    """Return whether a text can be shown in a line and be written as UTF-8."""
    return bool(text) and text.isprintable()


def read_part(path: Path, described: object) -> Part:
    """Read one file of arrays and check the type, shape and SHA-256 of each array against `set.json`."""
    try:
        require_file(path)
        arrays, _ = read_arrays(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: the set is incomplete: {REMEDY}") from None
    except Exception as error:  # numpy and zipfile pass on the exceptions of many libraries
        raise UserError(f"{path}: not a file of arrays ({one_line(error)}): {REMEDY}") from None
    if not isinstance(described, dict) or described.keys() != set(ARRAYS):
        raise UserError(f"{path}: files: {STORED_SET} must describe {', '.join(ARRAYS)}: {REMEDY}")
    if arrays.keys() != set(ARRAYS):
        raise UserError(f"{path}: contains {', '.join(arrays) or 'nothing'} instead of {', '.join(ARRAYS)}: {REMEDY}")
    for name, array in arrays.items():
        if str(array.dtype) != ARRAYS[name]:
            raise UserError(f"{path}: {name} is {array.dtype} instead of {ARRAYS[name]}: {REMEDY}")
        if describe(array) != described[name]:
            raise UserError(f"{path}: {name}: changed: its SHA-256 or shape differs from {STORED_SET}: {REMEDY}")
    return Part(**arrays)


def backdoor_of(path: Path, described: dict[str, Any], num_classes: int) -> Backdoor:
    """Return the `backdoor` section of `set.json`; the attack's own settings are kept as they are."""
    attacks = [key for key in described if key not in PLAIN]
    if len(attacks) != 1 or any(type(described.get(key, ...)) not in kinds for key, kinds in PLAIN.items()):
        raise UserError(f"{path}: backdoor: must name one attack, and {', '.join(PLAIN)}: {REMEDY}")
    if (described["target_label"] is None) == (described["target_shift"] is None):
        raise UserError(f"{path}: backdoor: needs either target_label or target_shift: {REMEDY}")
    for key, low in {"target_label": 0, "target_shift": 1}.items():
        if described[key] is not None and not low <= described[key] < num_classes:
            raise UserError(f"{path}: backdoor: {key}: must be in {low}..{num_classes - 1}: {REMEDY}")
    if not 0 <= described["poison_ratio"] <= 1 or described["poison_mode"] not in MODES:
        raise UserError(f"{path}: backdoor: poison_ratio must be in 0..1, poison_mode one of {', '.join(MODES)}: {REMEDY}")
    (name,) = attacks
    return Backdoor(Named(name, described[name]), **{key: described[key] for key in PLAIN})


def refuse_reserved(name: str, key: str) -> None:
    """Raise UserError if an attack has the name of another key of `backdoor`, beside which `set.json` names it.

    Args:
        key: the setting that names the attack.
    """
    if name in PLAIN:
        raise UserError(f"{key}: {name}: is a key of `backdoor` (as {', '.join(PLAIN)} are): give the attack another name")


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
    if not (folder / STORED_SET).is_file():
        return False
    read_set(folder)
    _, described = read_description(folder)
    if any(described.get(key) != value for key, value in settings.items()):
        return False
    return INPUTS not in described or described[INPUTS] == inputs()
