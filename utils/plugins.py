"""Plug-ins are found by file name: a new attack, data set or network is one new file, registered nowhere.

The file declares everything that the rest of the program must know about the plug-in; no other file mentions its name.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from utils.errors import UserError, nearest
from utils.paths import PROJECT


@functools.cache
def package_of(kind: str) -> str:
    """Return the package of the plug-ins of a kind: `attacks` -> `data.attacks`, from the folder `*/attacks/` or `attacks/`."""
    (found,) = (*PROJECT.glob(f"*/{kind}/__init__.py"), *PROJECT.glob(f"{kind}/__init__.py"))
    return ".".join(found.parent.relative_to(PROJECT).parts)


def names(package: str) -> list[str]:
    """Return the names of the plug-ins of a package, e.g. `names("data.attacks")` -> ["badnets", ...]."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import the plug-in `name` of `package`.

    Raises:
        UserError: the package has no such file, or the file lacks one of the names in the package's `DECLARED`.
    """
    folder = package.replace(".", "/")
    if name not in names(package):
        raise UserError(f"{name!r}: no such file in {folder}/: {nearest(name, names(package))}")
    module = importlib.import_module(f"{package}.{name}")
    for attribute in getattr(importlib.import_module(package), "DECLARED", ()):
        if not hasattr(module, attribute):
            raise UserError(f"{folder}/{name}.py: declares no {attribute}: see {folder}/__init__.py")
    return module


def declared(package: str, attribute: str) -> dict[str, Any]:
    """Return {plug-in: value of the attribute} of the plug-ins whose modules have it."""
    modules = {name: importlib.import_module(f"{package}.{name}") for name in names(package)}
    return {name: getattr(module, attribute) for name, module in modules.items() if hasattr(module, attribute)}


def settings(package: str, name: str) -> type[Any]:
    """Return the `Settings` of a plug-in: the frozen dataclass that is the schema of its YAML section."""
    found: type[Any] = load(package, name).Settings
    return found
