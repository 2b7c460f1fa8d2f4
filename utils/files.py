"""Atomic writing: an output file is either complete or absent. Also the temporary files that this needs.

A file is written under a temporary name, `.<name>.<boot>-<token>.part`, and renamed once it is complete. The writer holds an
advisory lock on it, which distinguishes the leftovers of killed processes from files that another process is writing:

- a temporary file of the current boot of this computer, in a container or not, is a leftover if its lock is free;
- any other one (of another computer on a shared disk, or on a disk without locks) is a leftover if it has not changed for a
  day.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
Write = Callable[[IO[bytes]], Any]

# Earlier versions had the process number in place of boot and token.
PART = re.compile(r"\.(?P<name>.+)\.(?:(?P<boot>[0-9a-f]{12})-[0-9a-f]{12}|\d+)\.part", re.DOTALL)
UNKNOWN = "0" * 12
ABANDONED = 24 * 3600  # seconds without a change; generous, because a writer may be suspended overnight
PAUSE = 0.5  # seconds between two looks at a lock that is waited for
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, write: Write, also: Sequence[Path] = ()) -> None:
    """Write a file such that readers see the old or the new one, never a part of it, even if the process is killed.

    Links are followed. A device, a named pipe and this process's own output are written directly.

    Args:
        write: writes the contents into the open file that it is given; may be called more than once.
        also: further files with the same contents, written before `path`; hard links if the disk supports them.
    Raises:
        UserError: the disk is full, the folder is not writable, or the path is a folder. An earlier regular file at the
            path is then unchanged.
    """
    named = path
    try:
        if is_stream(path):
            write_into(path, write)
            return
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        with temporary(target) as (part, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                write_durably(file, write)
            with contextlib.suppress(OSError):  # there is no earlier file, or it belongs to somebody else
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            for named in also:
                if not link(part, named):
                    write_atomically(named, write)
            named = path
            os.replace(part, target)
            sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(named, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))  # paths need not be UTF-8


def check_folder_writable(folder: Path, named: object) -> None:
    """Raise UserError, which names `named`, if nothing can be written into a folder or the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary(folder / "check"):
            pass
    except OSError as error:
        raise cannot_write(named, error) from None


def check_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written there, before the work that it is for."""
    try:
        if not is_stream(path):
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary(target):
                pass
    except OSError as error:
        raise cannot_write(path, error) from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` at the end of the block, or removed if the block fails.

    Args:
        path: absent, or an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with temporary(path, folder=True) as (part, _):
        yield part
        os.replace(part, path)
        sync_folder(path.parent)


def write_durably(file: IO[bytes], write: Write) -> None:
    """Write into an open file and wait until the contents are on disk."""
    write(file)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, so that a power failure does not undo a rename; not all disks can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(source: Path, path: Path) -> bool:
    """Make `path` a hard link to `source`, atomically; return False if the disk does not support that or is another one.

    Neither file may be modified in place afterwards; replace it instead. Links are followed.
    """
    path = Path(os.path.realpath(path))
    part = part_name(path)
    try:
        os.link(os.path.realpath(source), part)
    except OSError:
        return False
    try:
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # rename does nothing between two links to one file
    return True


def cannot_write(path: object, error: OSError) -> UserError:
    """Return the error for a file or folder, named `path`, that could not be written."""
    if error.errno == errno.EISDIR:
        return UserError(f"{path}: is a folder: give a file name")
    if error.errno in FULL:
        remedy = "free some space"
    else:
        remedy = "make the folder writable, or give another one" if error.errno in FORBIDDEN else "give another path"
    return UserError(f"{path}: cannot be written ({error.strerror or error}): {remedy}; an earlier file is unchanged")


# -- Devices, pipes and standard output --------------------------------------------------------------------------------


def is_stream(path: Path) -> bool:
    """Return whether the path is written directly, because a rename would replace a device, pipe or standard output.

    Raises:
        IsADirectoryError, or another OSError if the path cannot be examined.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return not stat.S_ISREG(status.st_mode) or own_output(status) is not None


def own_output(status: os.stat_result) -> int | None:
    """Return the descriptor of standard output or error if the file is one of them (`--out /dev/stdout`), else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def write_into(path: Path, write: Write) -> None:
    """Write into a device, a pipe or this process's own output; wait for the reader of a pipe, as a shell does."""
    contents = io.BytesIO()  # pipes cannot seek, and a failing `write` must write nothing
    write(contents)
    own = own_output(path.stat())
    if own is not None:
        (sys.stdout if own == 1 else sys.stderr).flush()
    with open(path, "wb") if own is None else os.fdopen(os.dup(own), "wb") as file:
        file.write(contents.getbuffer())


# -- Temporary names, locks, leftovers ---------------------------------------------------------------------------------


def boot() -> str:
    """Return an identifier of this boot of this computer, the same in all its containers; UNKNOWN if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")[:12]
    except (OSError, ValueError):
        return UNKNOWN


def part_name(path: Path) -> Path:
    """Return a new temporary name in the same folder."""
    return path.with_name(f".{path.name}.{boot()}-{secrets.token_hex(6)}.part")


@contextlib.contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """Yield a new, locked file or folder next to `path`, and its descriptor; removed at the end unless it was renamed."""
    while True:
        part = part_name(path)
        if folder:
            part.mkdir()
            descriptor = os.open(part, os.O_RDONLY)
        else:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if is_locked(descriptor, part):
            break
        os.close(descriptor)  # another process has removed it as a leftover before it was locked
    try:
        yield part, descriptor
    finally:
        os.close(descriptor)
        remove(part)


def is_locked(descriptor: int, part: Path) -> bool:
    """Lock a new temporary file; return whether it still exists and belongs to this process."""
    with contextlib.suppress(OSError):  # a disk without locks: age decides
        if not try_lock(descriptor):
            return False
    try:
        return os.path.samestat(os.fstat(descriptor), part.stat())
    except FileNotFoundError:
        return False


def try_lock(descriptor: int) -> bool:
    """Try to take the advisory lock of an open file, which is released when the file is closed or the process ends.

    Returns:
        False if another process holds the lock.
    Raises:
        OSError: the disk or the system does not support locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for the block, or until this process ends in any other way. If the disk has no locks, log that.

    Args:
        busy: what another process that holds it is doing, and what to do then, e.g. `is writing this run: wait for it`.
        wait: until it is free, after a line in the log, instead of raising.
    Raises:
        UserError: another process holds it, or the file cannot be written.
    """
    try:
        lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise cannot_write(path, error) from None
    with lock:
        try:
            if not try_lock(lock.fileno()):
                lock.seek(0)
                line = f"{path.parent}: process {lock.read().strip() or 'unknown'} {busy}"
                if not wait:
                    raise UserError(line)
                logger.info(line)
                while not try_lock(lock.fileno()):
                    time.sleep(PAUSE)
        except OSError as error:
            reason = error.strerror
            logger.info(
                f"{path}: cannot be locked ({reason}): continuing without; do not start a second process for this folder"
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node() or 'this computer'}")
        lock.flush()
        yield


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files for `name` that killed processes left in a folder; None: for any name.

    Without a name, use it only on folders that hold nothing but this project's files.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = PART.fullmatch(entry.name)
            if found and name in (None, found["name"]):
                remove_if_left(folder / entry.name, found["boot"])


def remove_if_left(part: Path, origin: str | None) -> None:
    """Remove a temporary file or folder unless a process may still be writing it.

    Args:
        origin: the boot in its name.
    """
    try:
        descriptor = os.open(part, os.O_NONBLOCK | (os.O_RDONLY if part.is_dir() else os.O_RDWR))
    except OSError:  # already gone, or owned by another user
        return
    try:
        free = None
        with contextlib.suppress(OSError):
            free = try_lock(descriptor)
        here = origin == boot() != UNKNOWN
        if free is not False and ((free and here) or time.time() - last_growth(part) > ABANDONED):
            remove(part)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def last_growth(part: Path) -> float:
    """Return the time of the last change of a temporary file or of anything in a temporary folder."""
    return max(p.stat().st_mtime for p in (part, *(part.iterdir() if part.is_dir() else ())))


def remove(part: Path) -> None:
    """Remove a temporary file or folder if it exists."""
    with contextlib.suppress(OSError):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
