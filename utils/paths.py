"""Paths given by a user: expansion of `~`, and checks that fail with a `UserError`."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from utils.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
# Files that are not regular, by the function that recognizes them. Reading some of these would block forever.
KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
# Files and folders that Windows, macOS, ext4 and network storage create by themselves; in lower case.
LEFT_BY_PROGRAMS = (
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "__macosx", "icon\r", "lost+found",
    "@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb",
)  # fmt: skip


def user_path(name: str | Path, key: str) -> Path:
    """Return a path given by a user, with a leading `~` or `~user` expanded.

    If there is no such user, but a file or folder of that very name exists, the path is returned as it is.

    Args:
        key: the setting or option that names the path, for the error.
    Raises:
        UserError: the name is empty or blank, e.g. of a shell variable that is not set; or the home folder is unknown.
    """
    if not str(name).strip():
        raise UserError(f"{key}: {str(name)!r}: names no file or folder: give a path, or leave it out")
    path = Path(name)
    if not str(name).startswith("~"):  # pathlib's parts would not show the ./ of ./~name
        return path
    try:
        return path.expanduser()
    except RuntimeError:
        if os.path.lexists(path.parts[0]):
            return path
        raise UserError(
            f"{key}: {name}: unknown home folder {path.parts[0]}: give the full path, or ./{name} if the name begins with ~"
        ) from None


def named_path(name: str, key: str) -> Path:
    """Return the file or folder that a setting names; a relative path may also start at the project's folder.

    Args:
        key: the setting, for the error.
    Raises:
        UserError: there is none, or its home folder is unknown.
    """
    path = user_path(name, key)
    for candidate in (path, PROJECT / path):
        if exists(candidate, key):
            return candidate
    raise UserError(f"{name}: no such file or folder: correct {key}, or remove it to use the built-in default")


def look(path: Path, key: str) -> os.stat_result | None:
    """Return the status of a file or folder, following links; None if it does not exist.

    Args:
        key: the setting or option that names the path, for the error.
    Raises:
        UserError: that cannot be determined, e.g. because a parent folder is not accessible.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the name
        return None
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}: make it accessible, or give another path") from None


def exists(path: Path, key: str) -> bool:
    """Return whether the path exists; errors as in `look`."""
    return look(path, key) is not None


def is_file(path: Path, key: str) -> bool:
    """Return whether the path is a regular file; errors as in `look`."""
    status = look(path, key)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_dir(path: Path, key: str) -> bool:
    """Return whether the path is a folder; errors as in `look`."""
    status = look(path, key)
    return status is not None and stat.S_ISDIR(status.st_mode)


def require_file(path: Path) -> None:
    """Raise OSError unless the path is a regular file; call it before opening a file whose kind is unknown."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in KINDS.items() if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"is {kind} and not a regular file", str(path))


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name, without hidden files and those of `LEFT_BY_PROGRAMS`."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LEFT_BY_PROGRAMS]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}): make it readable") from None
    return sorted(kept, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; False for a broken link, which fails when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_broken_link(entry: os.DirEntry[str], key: str) -> bool:
    """Return whether an entry of a folder is a link to nothing.

    Args:
        key: the setting that names the folder, for errors.
    """
    return entry.is_symlink() and not exists(Path(entry.path), key)
