"""YAML files as plain dictionaries: read, laid one over another, overridden from the command line.

Every key remembers the file that gave it, so that an error can name it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.paths import is_file


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list, set)):
                raise UserError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: {key}: the key is given twice: keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the file's mapping; `UserError` where it is missing, no text or no YAML."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
        leaves(raw if isinstance(raw, dict) else {})  # an alias that holds itself has no end
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: give --config a YAML, e.g. config/baseline_asd.yaml") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}:{line} no YAML ({problem}): mend it there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): give --config a YAML file") from None
    except (ValueError, TypeError, RecursionError) as error:  # a date that is none; an alias that holds itself
        raise UserError(f"{path}: no YAML ({error}): mend it there") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {raw!r}: no mapping of keys: give a YAML like config/baseline_asd.yaml")
    return raw


CHOICE_KEYS = (
    "network",
    "dataset",
    "optimizer",
    "meta.optimizer",
    "lr_scheduler",
    "undefended.optimizer",
    "undefended.lr_scheduler",
    "backdoor.clb.surrogate",
    "backdoor.iab.surrogate",
)
EITHER_OR = {"backdoor.badnets": {"trigger_path", "pattern"}}  # of these keys of a section one is given


def merge(base: dict[str, Any], over: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return `base` with `over` on top, section by section.

    Where a section chooses one of several names (optimizer, network, the attack ...) another name replaces the base's
    choice instead of standing beside it, and so does the other one of two keys that exclude each other. The order of
    transforms is the upper file's.
    """
    out = dict(base)
    if path in EITHER_OR and EITHER_OR[path] & set(over):
        out = {k: v for k, v in base.items() if k not in EITHER_OR[path]}
    if path in CHOICE_KEYS and set(over) - set(base):
        return over
    if path == "backdoor":
        plain = {"poison_ratio", "target_label", "poison_mode"}
        if set(over) - plain - set(base):
            out = {k: v for k, v in base.items() if k in plain}
    for key, value in over.items():
        at = f"{path}.{key}" if path else str(key)
        whole = at.startswith("transform.") and at.rpartition(".")[2] in ("pre", "primary", "remaining")
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value, at) if both and not whole else value
    return out


def leaves(tree: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted paths of every key, sections included."""
    out: list[str] = []
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        out.append(at)
        if isinstance(value, Mapping):
            out += leaves(value, at)
    return out


def read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a YAML merged with the chain of its bases, and for each key the file that gave it."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: {path.name}: names itself in a circle: remove one base")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw, dict.fromkeys(leaves(raw), str(path))
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {base!r}: give the path of one YAML, relative to this file")
    if not is_file(path.parent / base, f"{path}: base"):
        raise UserError(f"{path}: base: {base}: no such file beside this one: give a path relative to {path.parent}/")
    below, origin = read_with_base(path.parent / base, (*seen, path.resolve()))
    return merge(below, raw), origin | dict.fromkeys(leaves(raw), str(path))


def parse_override(text: str) -> dict[str, Any]:
    """Turn `--set a.b=value` into {"a": {"b": value}}, the value read as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UserError(f"--set {text}: not of the form key.path=value, e.g. --set global.epsilon=0.4")
    try:
        parsed = yaml.load(value, Loader)
    except UserError as error:
        raise UserError(f"--set {text}: {str(error).partition(': ')[2]}") from None
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(f"--set {text}: the value is no YAML: quote it") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed
