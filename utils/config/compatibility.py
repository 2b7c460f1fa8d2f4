"""Whether a run may resume from a checkpoint: its data must be the same, and its settings, except those that change nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from utils.config import Config
from utils.config.layers import is_below
from utils.config.reader import Reader
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.manifest import differences, other_data

# Settings that may differ between the run that wrote a checkpoint and the run that resumes from it.
FREE = (
    "run", "saved_dir", "storage_dir", "dataset_dir", "download", "prefetch", "num_epochs", "global.epoch_third", "runtime",
    "sync_bn", "criterion", "seed.deterministic", "seed.benchmark", "loader.num_workers", "loader.pin_memory",
    "semi.loader.num_workers", "semi.loader.pin_memory", "data.placement", "data.cache_dir", "evidence",
)  # fmt: skip


def refuse_other_settings(path: Path, saved: dict[str, Any], config: dict[str, Any], stand_ins: Collection[str] = ()) -> None:
    """Refuse a checkpoint with a different configuration; the authors' checkpoints store none, so they are accepted for ASD.

    The settings in `FREE`, and those that the defense does not read, may differ.

    Args:
        saved: contents of the checkpoint.
        stand_ins: settings that name files which the manifest compares by content (`utils.config.schema.stand_ins`). They are
            compared as text if the checkpoint, being of an earlier version, has no manifest.
    """
    wanted = read_config(config)
    if not isinstance(saved.get("config"), dict):
        if not wanted.defense.settings.resumes_without_settings:
            raise UserError(
                f"{path}: has no settings, as a checkpoint of the authors' code, which has no defense but ASD: `defense: "
                f"{wanted.defense.name}` cannot be resumed from it: start a new run, with --set run=NAME"
            )
        return
    try:
        written = read_config(saved["config"])
    except UserError:  # it has a setting that no longer exists: the comparison names it
        written = None
    then, now = flatten(as_dict(written) if written else saved["config"]), flatten(config)
    done = saved.get("epoch")
    free = [*FREE, *wanted.defense.settings.unread, *(stand_ins if saved.get("data") else ())]
    fixed = why_length_is_fixed(written, saved.get("epoch"), wanted)
    if fixed:
        free.remove("num_epochs")
    for key in [*now, *(k for k in then if k not in now)]:
        if any(is_below(key, f) for f in free) or then.get(key) == now.get(key):
            continue
        key, before, after = chosen_differently(key, then, now) or (key, then.get(key), now.get(key))
        reason = f", and {fixed}" if key == "num_epochs" else ""
        raise UserError(
            f"{path}: was written with {key}: {before!r}, but the configuration has {after!r}{reason}: set it back, or "
            "start a new run: --resume False, or --set run=NAME without --resume"
        )
    if isinstance(done, int) and done >= wanted.epochs:
        raise UserError(
            f"{path}: has {done + 1} epochs, but the configuration only {wanted.epochs}: set num_epochs back, resume from an "
            "earlier checkpoint, or start a new run: --resume False, or --set run=NAME without --resume"
        )


TESTED = ("backdoor", "seed.seed", "transform.pre", "transform.test")  # settings that decide what test images look like
# Settings that decide the poisoned set, besides the files.
POISONED_SET = (
    "dataset", "num_classes", "data.train_limit", "data.test_limit", "transform.pre", "backdoor", "seed.seed",
)  # fmt: skip


def other_tests(saved: dict[str, Any], config: dict[str, Any], stand_ins: Collection[str] = ()) -> list[str]:
    """Return lines on the settings of the test images that differ from those with which a checkpoint was trained.

    To test with another trigger is legitimate, but must not go unnoticed. Checkpoints of the authors store no settings.

    Args:
        stand_ins: settings that name files, as in `refuse_other_settings`; `utils.manifest.other_trigger` compares the files.
    """
    if not isinstance(saved.get("config"), dict):
        return []
    try:
        then = flatten(as_dict(read_config(saved["config"])))
    except UserError:  # of an earlier version
        return []
    by_content = stand_ins if saved.get("data") else ()
    return [f"{at}: {after}, in training {before}" for at, before, after in changes(then, flatten(config), TESTED, by_content)]


def refuse_other_set(key: str, written: Config, wanted: Config) -> None:
    """Refuse weights that were trained on another poisoned set, as far as the settings tell.

    Args:
        key: what names the checkpoint, e.g. an option with its value; for the error message.
        written: its configuration.
    """
    for at, before, after in changes(flatten(as_dict(written)), flatten(as_dict(wanted)), POISONED_SET):
        raise UserError(
            f"{key}: was trained with {at}: {before}, but the set has {after}: give a checkpoint of a run on this set"
        )


def changes(
    then: dict[str, Any], now: dict[str, Any], sections: Collection[str], without: Collection[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Return each setting below one of the sections that differs, with both values; a section of another choice, once."""
    found = {}
    for key in dict.fromkeys((*then, *now)):
        if key in without or not any(is_below(key, section) for section in sections):
            continue
        if (then.get(key) or None) != (now.get(key) or None):
            at, *values = chosen_differently(key, then, now) or (key, then.get(key), now.get(key))
            found[at] = (at, *values)
    return list(found.values())


def why_length_is_fixed(written: Config | None, epoch: Any, wanted: Config) -> str:
    """Return why a run may not resume from a checkpoint if its `num_epochs` is another one; "": it may.

    Its learning rates must not follow the length, and the finished epochs must belong to the same stages.

    Args:
        written: the configuration of the checkpoint; None: it has settings that no longer exist.
        epoch: 0-based, of the last epoch that is finished; None: all are.
    """
    for stage in wanted.stages:
        if stage.lr_scheduler and stage.lr_scheduler.settings.follows_length:
            return f"the learning rate schedule {stage.lr_scheduler.name} depends on it"
    if written is None:
        return ""
    done = epoch + 1 if isinstance(epoch, int) else written.epochs
    done = min(done, written.epochs, wanted.epochs)
    return "" if stage_ends(written, done) == stage_ends(wanted, done) else "finished epochs would be of another stage"


def stage_ends(config: Config, done: int) -> list[tuple[str, int]]:
    """Return the stages of the first `done` epochs, each with the number of epochs up to its end."""
    ends: list[tuple[str, int]] = []
    total = 0
    for stage in config.stages:
        if stage.epochs and total < done:
            total += stage.epochs
            ends.append((stage.name, min(total, done)))
    return ends


def chosen_differently(key: str, then: dict[str, Any], now: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return the section above a key, and the names chosen there, if it chooses another name (an optimizer, a defense)."""
    section = key
    while section:
        before, after = (names_below(section, settings) for settings in (then, now))
        if before - after and after - before:
            return section, ", ".join(sorted(before - after)), ", ".join(sorted(after - before))
        section = section.rpartition(".")[0]
    return None


def names_below(section: str, settings: dict[str, Any]) -> set[str]:
    """Return the names of the keys of a section; of a choice without settings, the name that is chosen."""
    if section in settings:
        return {settings[section]} if isinstance(settings[section], str) else set()
    return {key[len(section) + 1 :].split(".")[0] for key in settings if key.startswith(section + ".")}


def read_config(config: dict[str, Any]) -> Config:
    """Return a stored configuration, with the defaults of settings that were added since it was written."""
    read: Config = Reader(lambda key: "").section(Config, config)
    return read


def refuse_other_data(path: Path, saved: dict[str, Any], data: str, whole: bool = True) -> None:
    """Refuse a checkpoint of other data. Checkpoints of earlier versions and of the authors have no manifest.

    Args:
        data: the manifest of this run.
        whole: refuse inputs that only one of the two has as well, e.g. seed samples.
    """
    known = saved.get("data")
    changed = differences(known, data, whole) if isinstance(known, str) and known and data else []
    if changed:
        raise other_data(str(path), "was written", changed)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return {"a.b": value} for nested dictionaries; an empty dictionary is a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            out |= flatten(value, at)
        else:
            out[at] = value
    return out
