"""Whether a poisoned set is the one that the configuration describes, and the one that the run was begun with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data.poisoned_sets.folder import PLAIN, named_settings
from data.poisoned_sets.stored import StoredSet
from utils.config import Config
from utils.config.schema import as_dict
from utils.config.settings import Backdoor
from utils.errors import UserError
from utils.files import write_atomically, write_text
from utils.kinds import POISONED
from utils.run_files import POISON_INDEX, STORED_SET


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


def keep_with_run(folder: Path, stored: StoredSet) -> None:
    """Save `set.json` and `poison_idx.npy` with the run; raise UserError if it was begun with other data."""
    path, index = folder / STORED_SET, folder / POISON_INDEX
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
