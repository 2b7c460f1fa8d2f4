"""Output files that are either whole or absent, and the temporary files behind them.

A file is written under a temporary name, `.<name>.<boot>-<token>.part`, and renamed once it is whole. The writer holds an
advisory lock on it, so that what a killed process left can be told from what another process is writing now:

- a part from this boot of this computer, in a container or not, is a leftover if nobody holds its lock;
- any other part (another computer on a shared disk, or a disk that cannot lock) is one if it has not grown for a day.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
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

HAS_LOCKS = fcntl is not None
Write = Callable[[IO[bytes]], Any]

# Earlier versions put the number of the process where the boot and the token are now.
PART = re.compile(r"\.(?P<name>.+)\.(?:(?P<boot>[0-9a-f]{12})-[0-9a-f]{12}|\d+)\.part", re.DOTALL)
UNKNOWN = "0" * 12
ABANDONED = 24 * 3600  # seconds without growth; generous, for a writer may be suspended overnight
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, write: Write, also: Sequence[Path] = ()) -> None:
    """Write a file so that a reader, or a process killed at any moment, sees the old one or the new one, never a part.

    Links are followed. What is no regular file (a device, a named pipe), or is this process' own output, is written into.

    Args:
        write: writes the contents into the open file that it is given; may be called more than once.
        also: other files with the same contents. Each is there before `path` is, as a hard link where the disk has them.
    Raises:
        UserError: the disk is full, the folder is not writable, or the name is that of a folder. A regular file that was
            there before is untouched.
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
            for named in also:
                if not link(part, named):
                    write_atomically(named, write)
            named = path
            os.replace(part, target)
    except OSError as error:
        raise cannot_write(named, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` at the end of the block, or removed where the block fails.

    Args:
        path: absent, or an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with temporary(path, folder=True) as (part, _):
        yield part
        os.replace(part, path)


def write_durably(file: IO[bytes], write: Write) -> None:
    """Write into an open file and wait until the disk has it."""
    write(file)
    file.flush()
    os.fsync(file.fileno())


def link(source: Path, path: Path) -> bool:
    """Make `path` a hard link to `source`, atomically; False where the disk has no such links or it is another disk.

    Neither of the two may be changed in place later: they are to be replaced.
    """
    path = Path(os.path.realpath(path))
    part = part_name(path)
    try:
        os.link(source, part)
    except OSError:
        return False
    try:
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # renaming one link to another of the same file does nothing
    return True


def cannot_write(path: object, error: OSError) -> UserError:
    """Return the error of a file or folder, named `path` in the line, that could not be written."""
    if error.errno == errno.EISDIR:
        return UserError(f"{path}: is a folder: give the name of a file")
    if error.errno in FULL:
        remedy = "free some space"
    else:
        remedy = "make the folder writable, or give another one" if error.errno in FORBIDDEN else "give another place"
    return UserError(f"{path}: cannot be written ({error.strerror or error}): {remedy}; what was there before is untouched")


# -- What is written into ----------------------------------------------------------------------------------------------


def is_stream(path: Path) -> bool:
    """Return whether output to that name goes into what is there, which renaming would replace.

    Raises:
        IsADirectoryError, or OSError where the path cannot be looked at.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return not stat.S_ISREG(status.st_mode) or own_output(status) is not None


def own_output(status: os.stat_result) -> int | None:
    """Return the descriptor of standard output or error if it is that file (`--out /dev/stdout`), else None."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def write_into(path: Path, write: Write) -> None:
    """Write into a device, a pipe or this process' own output; a pipe without a reader is waited for, as a shell does."""
    contents = io.BytesIO()  # a pipe cannot seek, and what fails halfway has written nothing
    write(contents)
    own = own_output(path.stat())
    if own is not None:
        (sys.stdout if own == 1 else sys.stderr).flush()
    with open(path, "wb") if own is None else os.fdopen(os.dup(own), "wb") as file:
        file.write(contents.getbuffer())


# -- Temporary names, locks, leftovers ---------------------------------------------------------------------------------


def boot() -> str:
    """Return what names this computer since it was started, the same in all its containers; UNKNOWN if nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")[:12]
    except (OSError, ValueError):
        return UNKNOWN


def part_name(path: Path) -> Path:
    """Return a new temporary name beside a path."""
    return path.with_name(f".{path.name}.{boot()}-{secrets.token_hex(6)}.part")


@contextlib.contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """Yield a new, locked file or folder beside `path` and its descriptor; removed at the end unless it was renamed."""
    while True:
        part = part_name(path)
        if folder:
            part.mkdir()
            descriptor = os.open(part, os.O_RDONLY)
        else:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if is_locked(descriptor, part):
            break
        os.close(descriptor)  # another process took it for a leftover before it was locked
    try:
        yield part, descriptor
    finally:
        os.close(descriptor)
        remove(part)


def is_locked(descriptor: int, part: Path) -> bool:
    """Lock a new temporary file; return whether it is still there and this process' own."""
    with contextlib.suppress(OSError):  # this disk cannot lock: age decides
        if not try_lock(descriptor):
            return False
    try:
        return os.path.samestat(os.fstat(descriptor), part.stat())
    except FileNotFoundError:
        return False


def try_lock(descriptor: int) -> bool:
    """Take the advisory lock of an open file; it goes when the file is closed, or the process ends in whatever way.

    Returns:
        whether it is ours; False: another process holds it.
    Raises:
        OSError: this disk or this system cannot lock.
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


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder while they wrote `name`, or while they wrote anything.

    Without a name it is for folders that hold nothing but this project's files.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = PART.fullmatch(entry.name)
            if found and name in (None, found["name"]):
                remove_if_left(folder / entry.name, found["boot"])


def remove_if_left(part: Path, origin: str | None) -> None:
    """Remove a temporary file or folder unless somebody may still be writing it.

    Args:
        origin: the boot in its name.
    """
    try:
        descriptor = os.open(part, os.O_NONBLOCK | (os.O_RDONLY if part.is_dir() else os.O_RDWR))
    except OSError:  # gone, or another user's
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
    """Return when a temporary file, or anything in a temporary folder, was last changed."""
    return max(p.stat().st_mtime for p in (part, *(part.iterdir() if part.is_dir() else ())))


def remove(part: Path) -> None:
    """Remove a temporary file or folder if it is there."""
    with contextlib.suppress(OSError):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
