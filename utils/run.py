"""The folders of a run: where its facts, logs and checkpoints lie, and who may write there."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.config import Config, to_yaml
from utils.errors import UserError
from utils.files import write_text

FACTS = ("data.csv", "poison_idx.npy", "set.json", "seed_samples.txt", "suspects.csv", "suspects.png", "suspects.json")
OWN = ("config.yaml", *FACTS, "log")  # what a run keeps; the YAML itself comes on top
LATEST, BEST = "latest_model.pt", "best_model.pt"


@dataclass(frozen=True)
class Run:
    """`<saved_dir>/<run>/` with the YAML, `poison_idx.npy` and `log/`, and `<storage_dir>/<run>/checkpoint/`."""

    name: str
    saved: Path
    checkpoints: Path

    @property
    def log(self) -> Path:
        """Folder of logs, metrics and pictures."""
        return self.saved / "log"

    def checkpoint(self, name: str) -> Path:
        """Return the file that `--resume NAME` means: a path that exists, or a name in the run's folder."""
        given = Path(name).expanduser()
        return given if given.is_file() and len(given.parts) > 1 else self.checkpoints / name


def locate(config: Config) -> Run:
    """Return the run's folders; creates nothing."""
    name = str(config.run)
    return Run(name, Path(config.saved_dir).expanduser() / name, Path(config.storage_dir).expanduser() / name / "checkpoint")


def open_run(config: Config, yaml_path: Path, fresh: bool, say: Any) -> tuple[Run, IO[str]]:
    """Make the run's folders and take the run for this process.

    Args:
        yaml_path: the configuration file, kept with the run beside the resolved `config.yaml`.
        fresh: `--resume False`: an earlier run is moved aside first.
    Returns:
        the run, and its lock, held as long as the file is open.
    """
    run = locate(config)
    try:
        run.log.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be made ({error.strerror}): mend saved_dir or storage_dir") from None
    lock = take(run)
    for folder in (run.saved, run.log, run.checkpoints):
        for part in folder.glob(".*.part"):  # what a run killed in the middle of a write left; the lock is ours
            part.unlink()
    if fresh:
        move_aside(run, yaml_path.name, say)
        run.log.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(run.saved / "config.yaml", to_yaml(config))
    if yaml_path.resolve() != (run.saved / yaml_path.name).resolve() and yaml_path.name != "config.yaml":
        write_text(run.saved / yaml_path.name, yaml_path.read_text(encoding="utf-8"))
    return run, lock


def take(run: Run) -> IO[str]:
    """Lock the run; the lock goes with the process, however that ends."""
    try:
        lock = open(run.saved / ".lock", "a+")  # noqa: SIM115 - held for the life of the run
    except OSError as error:
        raise UserError(f"{run.saved}: cannot be written ({error.strerror}): make it writable or set saved_dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise UserError(
            f"{run.saved}: process {lock.read().strip() or 'unknown'} is writing this run: wait for it, or give another "
            "name with --set run=NAME"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def move_aside(run: Run, yaml_name: str, say: Any) -> None:
    """Move what an earlier run left into `<run>.earlier-<time>`; nothing is deleted."""
    stamp = time.strftime("earlier-%Y%m%d-%H%M%S")
    saved = [run.saved / name for name in (*OWN, yaml_name) if (run.saved / name).exists()]
    checkpoints = list(run.checkpoints.iterdir())
    if not checkpoints and not any(run.log.iterdir()) and not any(p.name in FACTS for p in saved):
        return
    moved = []
    for folder, items in ((run.saved, saved), (run.checkpoints.parent, [run.checkpoints] if checkpoints else [])):
        target = unused(folder.with_name(f"{folder.name}.{stamp}"))
        for item in items:
            target.mkdir(parents=True, exist_ok=True)
            shutil.move(str(item), str(target / item.name))
        if items:
            moved.append(str(target))
    say(f"an earlier run was moved aside to {' and '.join(moved)}")


def unused(path: Path) -> Path:
    """Return the path, with a number at the end if it is taken."""
    out, n = path, 1
    while out.exists():
        n += 1
        out = path.with_name(f"{path.name}-{n}")
    return out
