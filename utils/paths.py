"""Paths that a user names: `~` expanded, and looked at without a traceback."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from utils.errors import UserError

# What is no regular file, by the test that tells it. A read of some of these waits for ever.
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
# What Windows, macOS, ext4 and network storage put into a folder without being asked; in lower case.
LEFT_BY_PROGRAMS = (
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "__macosx", "icon\r", "lost+found",
    "@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb",
)  # fmt: skip


def user_path(name: str | Path, key: str) -> Path:
    """Return the path that a user names; a leading `~` or `~user` is that user's home folder.

    A file or folder that is there under the very name is meant as well, though nobody is called so.

    Args:
        key: the setting or option that names the path, for the error.
    Raises:
        UserError: whose home folder that is, is not known.
    """
    path = Path(name)
    if not str(name).startswith("~"):  # not pathlib's parts: they do not have the ./ of ./~name
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        if os.path.lexists(path.parts[0]):
            return path
        raise UserError(
            f"{key}: {name}: the home folder {path.parts[0]} is not known: give the whole path, or ./{name} if that is its name"
        ) from None


def look(path: Path, key: str) -> os.stat_result | None:
    """Return the status of what is at a path, links followed, or None where nothing is.

    Args:
        key: the setting or option that names the path, for the error.
    Raises:
        UserError: nobody can tell, e.g. because a folder above it is not accessible.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the name holds a zero byte
        return None
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}: make it accessible, or give another path") from None


def exists(path: Path, key: str) -> bool:
    """Return whether there is anything at the path; as `look`."""
    return look(path, key) is not None


def is_file(path: Path, key: str) -> bool:
    """Return whether the path is a regular file; as `look`."""
    status = look(path, key)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_dir(path: Path, key: str) -> bool:
    """Return whether the path is a folder; as `look`."""
    status = look(path, key)
    return status is not None and stat.S_ISDIR(status.st_mode)


def require_file(path: Path) -> None:
    """Raise OSError unless the path is a regular file: to be called before one is opened that may be something else."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in KINDS.items() if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"is {kind} and not a regular file", str(path))


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, sorted by name, without hidden files and what programs leave."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BY_PROGRAMS]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}): make it readable") from None
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; a link that nobody can follow is a file, whose reading will fail."""
    try:
        return entry.is_dir()
    except OSError:
        return False
