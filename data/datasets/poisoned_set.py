"""A set that is poisoned already: a folder that `python -m data.poison` wrote. `backdoor` may be null: set.json names it."""

from __future__ import annotations

from dataclasses import dataclass

from data.poisoned_sets.folder import read_set
from data.poisoned_sets.stored import StoredSet
from utils.errors import UserError
from utils.paths import user_path
from utils.run_files import STORED_SET

POISONED = True  # the set has its ground truth
SIGN = STORED_SET


@dataclass(frozen=True)
class Settings:
    """No settings: `dataset: poisoned_set`."""


def load(settings: Settings, dataset_dir: str | None, download: bool) -> StoredSet:
    """Read and verify the folder."""
    if dataset_dir is None:
        raise UserError("dataset_dir: missing: give the folder that python -m data.poison --out wrote")
    return read_set(user_path(dataset_dir, "dataset_dir"))
