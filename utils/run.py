"""The folders of a run: records, logs and checkpoints, the lock on them, and the archives of earlier runs."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils import checkpoint, manifest, metrics
from utils.checkpoint import State
from utils.config import Config, to_yaml
from utils.config.compatibility import refuse_other_settings
from utils.config.layers import read_yaml
from utils.config.schema import as_dict, stand_ins
from utils.errors import UserError
from utils.files import cannot_write, link, locked, remove_leftovers, write_atomically, write_text
from utils.metrics import read_rows
from utils.paths import exists, is_file, user_path
from utils.reporting import confusion, evidence, page, suspects
from utils.run_files import POISON_INDEX, SEED_SAMPLES, STORED_SET
from utils.runtime.machine import Machine

logger = logging.getLogger(__name__)
SUSPECTS = (suspects.CSV, suspects.PICTURE, suspects.QUALITY, evidence.FILE)
FACTS = (manifest.FILE, POISON_INDEX, STORED_SET, SEED_SAMPLES, *SUSPECTS)
OWN = (*FACTS, "log")  # the files of a run, together with its YAML and `config.yaml`
YAMLS = (".yaml", ".yml")
LATEST, BEST = "latest_model.pt", "best_model.pt"


@dataclass(frozen=True)
class Run:
    """`<saved_dir>/<run>/` with the YAML, `poison_idx.npy` and `log/`, and `<storage_dir>/<run>/checkpoint/`."""

    name: str
    saved: Path
    checkpoints: Path
    yaml: Path | None = None  # the configuration file; None: not copied into the run's folder

    @property
    def log(self) -> Path:
        """Folder of logs, metrics and plots."""
        return self.saved / "log"

    def checkpoint(self, name: str) -> Path:
        """Return the file that `--resume NAME` means.

        A name without a folder is searched for among the run's checkpoints, then in the current folder; a path is first
        taken as it is, then relative to the run's checkpoints.

        Raises:
            UserError: no such file.
        """
        given, own = user_path(name, "--resume"), self.checkpoints / name
        for path in (given, own) if Path(name).name != name else (own, given):
            if is_file(path, "--resume"):
                return path
        if name.lower() == "false":
            raise UserError(f"--resume {name}: no such checkpoint: did you mean False (with a capital letter)?")
        found = ", ".join(sorted(p.name for p in self.checkpoints.glob("*.pt"))) or "none: train first, without --resume"
        raise UserError(f"--resume {name}: no such checkpoint: {self.checkpoints} has {found}")

    def resume(self, name: str) -> Path | None:
        """Return the checkpoint to resume from: the named one, or, for an empty name, the latest one if there is any."""
        latest = self.checkpoints / LATEST
        if name:
            return self.checkpoint(name)
        return latest if exists(latest, "--resume") else None


def locate(config: Config, yaml: Path | None = None) -> Run:
    """Return the run's folders; creates nothing."""
    name = str(config.run)
    saved, storage = user_path(config.saved_dir, "saved_dir"), user_path(config.storage_dir, "storage_dir")
    return Run(name, saved / name, storage / name / "checkpoint", yaml)


@contextlib.contextmanager
def open_run(run: Run, config: Config, fresh: bool) -> Iterator[None]:
    """Create the run's folders and lock the run for the block. A run that ended before its first epoch, begun with other
    settings, is moved aside.

    A new run also gets copies of its configuration. A run that has checkpoints keeps its earlier copies until `make_ready`,
    because this command may yet be refused.

    Args:
        fresh: `--resume False`: move an earlier run aside first.
    """
    try:
        run.log.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be created ({error.strerror}): change saved_dir, storage_dir or run"
        ) from None
    with lock_run(run):
        for folder in (run.saved, run.log, run.checkpoints):
            remove_leftovers(folder)
        if fresh or begun_otherwise(run, config):
            archive(run)
            run.log.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        if not any(run.checkpoints.glob("*.pt")):
            keep_settings(run, config)
        yield


def begun_otherwise(run: Run, config: Config) -> bool:
    """Return whether the run ended before its first checkpoint, with settings from which no run with these could resume.

    Its `poison_idx.npy` may then be that of another attack.
    """
    path = run.saved / "config.yaml"
    if any(run.checkpoints.glob("*.pt")) or not is_file(path, "saved_dir"):
        return False
    try:
        begun = {"config": read_yaml(path).tree, "epoch": -1, "data": manifest.kept(run.saved)}
        refuse_other_settings(path, begun, as_dict(config), {key for key, _, _ in stand_ins(config)})
    except UserError:
        return True
    return False


def make_ready(run: Run, config: Config, loaded: Path, state: State, machine: Machine) -> bool:
    """Prepare the run's files for the epochs after those of the checkpoint `loaded`, which has been accepted.

    Args:
        loaded: if there is no such file, the run starts with its first epoch.
        machine: rank 0 alone changes files, once all ranks have examined them and so come to the same decision.
    Returns:
        False if the checkpoint has all configured epochs while the run's folder holds later ones; nothing is changed then.
    """
    finished, count = state.epoch >= config.epochs, epochs_of(run, loaded)
    own, first = is_own(run, loaded), machine.rank == 0
    foreign = loaded.exists() and count > 0 and not own
    machine.barrier()
    if finished and (count > state.epoch or foreign):
        logger.info(f"{loaded} has all {config.epochs} epochs: nothing to do; {run.saved} has {count} and is unchanged")
        return False
    if first and finished and loaded.exists() and not own:
        replace(run.checkpoints / LATEST, loaded)  # a new run, from the last checkpoint of another one
    if first and not finished:
        if count > state.epoch or foreign:
            folders = archive_later_epochs(run, loaded, state)
            step = f"going back from epoch {count} to epoch" if count > state.epoch else f"going on from {loaded} after epoch"
            logger.info(f"{step} {state.epoch}: the run as it was has been copied to {folders}")
        (run.log / page.FILE).unlink(missing_ok=True)  # written last: without it the results of the last epoch are due
        keep_settings(run, config)
    if first and loaded.exists() and state.best_epoch and not (run.checkpoints / BEST).exists():
        replace(run.checkpoints / BEST, loaded)  # the best of which the run has the weights
        if state.history:
            state.best_acc, state.best_epoch = float(state.history[-1]["clean_accuracy"] or 0), state.epoch
    return True


def keep_settings(run: Run, config: Config) -> None:
    """Write the configuration into the run's folder: a copy of the YAML, and `config.yaml` with every setting."""
    write_text(run.saved / "config.yaml", to_yaml(config))
    yaml = run.yaml
    if yaml is None or not yaml.is_file():  # a pipe can be read only once
        return
    if yaml.name != "config.yaml" and yaml.resolve() != (run.saved / yaml.name).resolve():
        write_text(run.saved / yaml.name, yaml.read_text(encoding="utf-8"))


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Lock the run for the block, in both of its folders: a run of that name may have another saved_dir."""
    with contextlib.ExitStack() as stack:
        for folder in {path.resolve(): path for path in (run.saved, run.checkpoints.parent)}.values():
            busy = "is writing this run: wait for it, or give this run another name by --set run=NAME"
            stack.enter_context(locked(folder / ".lock", busy))
        yield


# -- Archives of a run -------------------------------------------------------------------------------------------------


def archive(run: Run) -> None:
    """Move the files of an earlier run into `<run>.earlier-<time>`; nothing is deleted.

    Checkpoints first: if this is interrupted, nothing is left to resume from.
    """
    yamls = sorted(path for suffix in YAMLS for path in run.saved.glob(f"*{suffix}") if path.is_file())
    saved = list(dict.fromkeys([path for name in OWN if (path := run.saved / name).exists()] + yamls))
    checkpoints = list(run.checkpoints.iterdir())
    if not checkpoints and not any(run.log.iterdir()) and not any(p.name in FACTS for p in saved):
        return
    places = archive_paths(run, saved, [run.checkpoints] if checkpoints else [])
    for item, place in places:
        if run.yaml is not None and is_same(item, run.yaml):
            shutil.copy2(item, place)  # this run is started with it
        else:
            shutil.move(str(item), str(place))
    logger.info(f"the earlier run was moved to {folders_of(places)}")


def epochs_of(run: Run, loaded: Path) -> int:
    """Return the number of epochs in the run's files: `metrics.jsonl`, and `latest_model.pt` unless that is `loaded`."""
    latest, recorded = run.checkpoints / LATEST, 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # missing or damaged: the checkpoint decides
        recorded = int(read_rows(run.log / metrics.FILE)[-1]["epoch"]) + 1
    return max(recorded, 0 if is_same(loaded, latest) else checkpoint.epochs(latest))


def archive_later_epochs(run: Run, loaded: Path, state: State) -> str:
    """Copy a run that is resumed from an earlier checkpoint, or from one of another run, then set its files to that checkpoint.

    The copy, `<run>.earlier-<time>`, is complete. Files that do not depend on the epoch also stay in the run.

    Args:
        loaded: the checkpoint; if there is no such file, training starts over.
        state: what was loaded from it.
    Returns:
        the folders of the copy.
    Raises:
        UserError: the copy cannot be made; the run is unchanged.
    """
    records = [path for path in run.saved.iterdir() if path.is_file() and path.name != ".lock"]
    places = archive_paths(run, [*records, run.log], [run.checkpoints])
    try:
        for item, place in places:
            copy(item, place)
    except OSError as error:
        for _, place in places:
            shutil.rmtree(place.parent, ignore_errors=True)
        raise cannot_write(places[0][1].parent, error) from None
    if loaded.exists():
        latest, best = run.checkpoints / LATEST, run.checkpoints / BEST
        own = is_own(run, loaded)
        if not is_same(loaded, latest):
            replace(latest, loaded)
        if best.exists() and (not own or checkpoint.epochs(best) > state.epoch):
            if state.best_epoch == state.epoch:
                replace(best, loaded)
            else:
                best.unlink()  # of an epoch that will be trained again, or of another run; the archive has it
    ends = (run.log / confusion.FILE, run.log / page.FILE)  # results of the last epoch
    for path in (*(run.saved / name for name in SUSPECTS), *ends, *run.log.glob("*.png")):
        path.unlink(missing_ok=True)
    return folders_of(places)


def archive_paths(run: Run, saved: list[Path], checkpoints: list[Path]) -> list[tuple[Path, Path]]:
    """Make new folders, `<folder>.earlier-<time>`; return each item with its path in them."""
    stamp = time.strftime("earlier-%Y%m%d-%H%M%S")
    places = []
    for folder, items in ((run.checkpoints.parent, checkpoints), (run.saved, saved)):
        if items:
            target = unused(folder.with_name(f"{folder.name}.{stamp}"))
            target.mkdir(parents=True)
            places += [(item, target / item.name) for item in items]
    return places


def folders_of(places: list[tuple[Path, Path]]) -> str:
    """Return the names of the archive folders."""
    return " and ".join(dict.fromkeys(str(place.parent) for _, place in places))


def copy(item: Path, place: Path) -> None:
    """Copy a file or a folder, what links point to included; checkpoints, which are never modified in place, as hard links if
    the disk supports them."""
    if item.is_dir():
        shutil.copytree(item, place, ignore_dangling_symlinks=True, copy_function=lambda one, to: copy(Path(one), Path(to)))
    elif item.suffix != ".pt" or not link(item, place):
        shutil.copy2(item, place)


def replace(path: Path, source: Path) -> None:
    """Replace the contents of a file by those of another, atomically."""
    with open(source, "rb") as contents:

        def write(file: IO[bytes]) -> None:
            contents.seek(0)
            shutil.copyfileobj(contents, file)

        write_atomically(path, write)


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths are the same file."""
    return one.exists() and other.exists() and one.samefile(other)


def is_own(run: Run, checkpoint: Path) -> bool:
    """Return whether a checkpoint is one of the run's."""
    return any(is_same(checkpoint, own) for own in run.checkpoints.glob("*.pt"))


def unused(path: Path) -> Path:
    """Return the path, with a number appended if it exists."""
    out, n = path, 1
    while out.exists():
        n += 1
        out = path.with_name(f"{path.name}-{n}")
    return out
