"""Plug-ins found by file name: a new attack, data set or network is one new file, and no list names it."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from utils.errors import UserError, nearest


def names(package: str) -> list[str]:
    """Return the names of the plug-ins of a package, e.g. `names("data.attacks")` -> ["badnets", ...]."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises:
        UserError: no file of that name lies in the package's folder.
    """
    if name not in names(package):
        raise UserError(f"{name!r} is no file in {package.replace('.', '/')}/: {nearest(name, names(package))}")
    return importlib.import_module(f"{package}.{name}")


def settings(package: str, name: str) -> type[Any]:
    """Return the plug-in's `Settings`: the frozen dataclass that is the schema of its YAML section."""
    found: type[Any] = load(package, name).Settings
    return found
