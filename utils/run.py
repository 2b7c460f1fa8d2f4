"""The folders of a run: its records, logs and checkpoints, which process may write there, and what is kept of earlier runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils import checkpoint, confusion, evidence, page, suspects
from utils.checkpoint import State
from utils.config import Config, to_yaml
from utils.errors import UserError
from utils.files import cannot_write, link, remove_leftovers, try_lock, write_atomically, write_text
from utils.paths import exists, is_file, user_path

logger = logging.getLogger(__name__)
SUSPECTS = (suspects.CSV, suspects.PICTURE, suspects.QUALITY, evidence.FILE)
FACTS = ("data.csv", "poison_idx.npy", "set.json", "seed_samples.txt", *SUSPECTS)
OWN = ("config.yaml", *FACTS, "log")  # what a run keeps; the YAML itself comes on top
LATEST, BEST = "latest_model.pt", "best_model.pt"


@dataclass(frozen=True)
class Run:
    """`<saved_dir>/<run>/` with the YAML, `poison_idx.npy` and `log/`, and `<storage_dir>/<run>/checkpoint/`."""

    name: str
    saved: Path
    checkpoints: Path
    yaml: Path | None = None  # the configuration file; None: it is not kept with the run

    @property
    def log(self) -> Path:
        """Folder of logs, metrics and pictures."""
        return self.saved / "log"

    def checkpoint(self, name: str) -> Path:
        """Return the file that `--resume NAME` means.

        A name without a folder is looked for among the run's checkpoints first, then in the current folder; a path is
        taken as it is first, then from the run's checkpoints on.

        Raises:
            UserError: there is none.
        """
        given, own = user_path(name, "--resume"), self.checkpoints / name
        for path in (given, own) if Path(name).name != name else (own, given):
            if is_file(path, "--resume"):
                return path
        if name.lower() == "false":
            raise UserError(f"--resume {name}: no such checkpoint: did you mean False, with a capital letter?")
        there = ", ".join(sorted(p.name for p in self.checkpoints.glob("*.pt")))
        listed = f"{self.checkpoints} has {there}" if there else f"{self.checkpoints} has none: train first, without --resume"
        raise UserError(f"--resume {name}: no such checkpoint: {listed}")

    def resume(self, name: str) -> Path | None:
        """Return the checkpoint that training goes on from: the one that is named, or without a name the latest, if any."""
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
    """Make the run's folders and lock the run for the block.

    The configuration file is kept with the run beside the resolved `config.yaml`. A run that has checkpoints keeps its
    earlier ones until `make_ready`: this command may be refused.

    Args:
        fresh: `--resume False`: an earlier run is moved aside first.
    """
    try:
        run.log.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made ({error.strerror}): change saved_dir or storage_dir") from None
    with take(run):
        for folder in (run.saved, run.log, run.checkpoints):
            remove_leftovers(folder)
        if fresh:
            move_aside(run)
            run.log.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        if not any(run.checkpoints.glob("*.pt")):
            keep_settings(run, config)
        yield


def make_ready(run: Run, config: Config, loaded: Path, state: State, first: bool) -> bool:
    """Make the run's files ready for the epochs after those of the checkpoint `loaded`, which has been accepted.

    Args:
        loaded: where there is no such file, the run starts from its first epoch.
        first: this is the first process, which alone changes files.
    Returns:
        False: the checkpoint has all epochs and the run has more, so that all of it stays as it is.
    """
    finished = state.epoch >= config.num_epochs
    if finished and (there := epochs_there(run, loaded)) > state.epoch:
        logger.info(f"{loaded} has all {config.num_epochs} epochs: nothing to do; the run in {run.saved} has {there} and stays")
        return False
    if first:
        if not finished and (there := epochs_there(run, loaded)) > state.epoch:
            folders = keep_later(run, loaded, state.epoch, state.best_epoch)
            logger.info(f"going back from epoch {there} to epoch {state.epoch}: the run as it was is kept in {folders}")
        keep_settings(run, config)
    return True


def keep_settings(run: Run, config: Config) -> None:
    """Keep the configuration with the run: the YAML word for word, and `config.yaml` with every setting."""
    write_text(run.saved / "config.yaml", to_yaml(config))
    yaml = run.yaml
    if yaml is not None and yaml.name != "config.yaml" and yaml.resolve() != (run.saved / yaml.name).resolve():
        write_text(run.saved / yaml.name, yaml.read_text(encoding="utf-8"))


def take(run: Run) -> IO[str]:
    """Lock the run; the lock goes with the process, however that ends. Where the disk cannot lock, one line says so."""
    path = run.saved / ".lock"
    try:
        lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise UserError(f"{run.saved}: cannot be written ({error.strerror}): make it writable or set saved_dir") from None
    try:
        if not try_lock(lock.fileno()):
            lock.seek(0)
            raise UserError(
                f"{run.saved}: process {lock.read().strip() or 'unknown'} is writing this run: wait for it, or give another "
                "name with --set run=NAME"
            )
    except OSError as error:
        logger.info(
            f"{path}: cannot be locked here ({error.strerror}): going on without; do not start a second process that writes "
            "this run"
        )
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node() or 'this computer'}")
    lock.flush()
    return lock


# -- Earlier and later states of a run ---------------------------------------------------------------------------------


def move_aside(run: Run) -> None:
    """Move what an earlier run left into `<run>.earlier-<time>`; nothing is deleted."""
    names = OWN if run.yaml is None else (*OWN, run.yaml.name)
    saved = [run.saved / name for name in names if (run.saved / name).exists()]
    checkpoints = list(run.checkpoints.iterdir())
    if not checkpoints and not any(run.log.iterdir()) and not any(p.name in FACTS for p in saved):
        return
    places = set_aside(run, saved, [run.checkpoints] if checkpoints else [])
    for item, place in places:
        shutil.move(str(item), str(place))
    logger.info(f"an earlier run was moved aside to {folders_of(places)}")


def epochs_there(run: Run, loaded: Path) -> int:
    """Return how many epochs the run's own files show: `metrics.jsonl`, and `latest_model.pt` unless that is `loaded`."""
    latest, shown = run.checkpoints / LATEST, 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # none yet, or damaged: the checkpoint counts
        shown = int(json.loads((run.log / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["epoch"]) + 1
    return max(shown, 0 if is_same(loaded, latest) else checkpoint.epochs(latest))


def keep_later(run: Run, loaded: Path, epochs: int, best_epoch: int) -> str:
    """Copy a run that is about to go on from an earlier checkpoint, then make its files those of that checkpoint.

    The copy, `<run>.earlier-<time>`, has all that the run has. What a run keeps for its whole life stays in the run too.

    Args:
        loaded: the checkpoint; where there is none, training starts over.
        epochs: how many it has.
        best_epoch: as it says, 1-based.
    Returns:
        the folders of the copy.
    Raises:
        UserError: the copy cannot be made; the run is as it was.
    """
    records = [path for path in run.saved.iterdir() if path.is_file() and path.name != ".lock"]
    places = set_aside(run, [*records, run.log], [run.checkpoints])
    try:
        for item, place in places:
            copy(item, place)
    except OSError as error:
        for _, place in places:
            shutil.rmtree(place.parent, ignore_errors=True)
        raise cannot_write(places[0][1].parent, error) from None
    if loaded.exists():
        latest, best = run.checkpoints / LATEST, run.checkpoints / BEST
        if not is_same(loaded, latest):
            replace(latest, loaded)
        if checkpoint.epochs(best) > epochs:
            if best_epoch == epochs:
                replace(best, loaded)
            else:
                best.unlink()  # of an epoch that this run is going to train anew; the copy has it
    ends = (run.log / confusion.FILE, run.log / page.FILE)  # what tells how the run ended
    for path in (*(run.saved / name for name in SUSPECTS), *ends, *run.log.glob("*.png")):
        path.unlink(missing_ok=True)
    return folders_of(places)


def set_aside(run: Run, saved: list[Path], checkpoints: list[Path]) -> list[tuple[Path, Path]]:
    """Return each item with its place in a new folder, `<its own>.earlier-<time>`, which is made."""
    stamp = time.strftime("earlier-%Y%m%d-%H%M%S")
    places = []
    for folder, items in ((run.saved, saved), (run.checkpoints.parent, checkpoints)):
        if items:
            target = unused(folder.with_name(f"{folder.name}.{stamp}"))
            target.mkdir(parents=True)
            places += [(item, target / item.name) for item in items]
    return places


def folders_of(places: list[tuple[Path, Path]]) -> str:
    """Return the names of the folders that earlier files are in."""
    return " and ".join(dict.fromkeys(str(place.parent) for _, place in places))


def copy(item: Path, place: Path) -> None:
    """Copy a file or a folder; checkpoints, which are never changed in place, as hard links where the disk has them."""
    if item.is_dir():
        shutil.copytree(item, place, symlinks=True, copy_function=lambda one, to: copy(Path(one), Path(to)))
    elif item.suffix != ".pt" or not link(item, place):
        shutil.copy2(item, place)


def replace(path: Path, source: Path) -> None:
    """Make a file's contents those of another, atomically."""
    with open(source, "rb") as contents:

        def write(file: IO[bytes]) -> None:
            contents.seek(0)
            shutil.copyfileobj(contents, file)

        write_atomically(path, write)


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one file."""
    return one.exists() and other.exists() and one.samefile(other)


def unused(path: Path) -> Path:
    """Return the path, with a number at the end if it is taken."""
    out, n = path, 1
    while out.exists():
        n += 1
        out = path.with_name(f"{path.name}-{n}")
    return out
