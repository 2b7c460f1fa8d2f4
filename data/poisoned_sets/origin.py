"""A set that another program has poisoned: what is known of it beside the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.poisoned_sets.folder import description_of, named_settings
from data.poisoned_sets.stored import PARTS, StoredSet, contradiction
from data.sets import Part
from utils.config.schema import Named, as_dict
from utils.config.settings import Backdoor
from utils.errors import UserError


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
        """Return the set with the parts of these names (`PARTS`); settings that are unknown are null in its description.

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
