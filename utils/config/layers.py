"""YAML files as plain dictionaries: reading, merging with their bases, overrides from the command line.

For every key, the file that sets it is recorded for error messages. For every value that YAML does not read as a string, the
source text is recorded, so that `run: 001` can be the string 001 and not the number 1.
"""

from __future__ import annotations

import copy
import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from utils.config.schema import join, merge
from utils.errors import UserError
from utils.paths import is_file


@dataclass(frozen=True)
class Layer:
    """The contents of one YAML file or override, or of several merged ones."""

    tree: dict[str, Any]
    origin: dict[str, str] = field(default_factory=dict)  # dotted key -> the file, or `--set key`, that sets it
    written: dict[str, str] = field(default_factory=dict)  # path (`a.b`, `a.b[0]`) -> source text of a non-string
    path: tuple[str, ...] = ()  # of an override: the keys of its value

    def under(self, over: Layer, schema: type) -> Layer:
        """Return this layer overridden by `over`; both follow the schema."""
        given = tuple(leaves(over.tree))
        kept = {at: text for at, text in self.written.items() if not any(is_below(at, key) for key in given)}
        return Layer(merge(self.tree, over.tree, schema, path=over.path), self.origin | over.origin, kept | over.written)


def is_below(path: str, key: str) -> bool:
    """Return whether a path such as `a.b[0]` is that key, or a part of its value."""
    return path == key or path.startswith((f"{key}.", f"{key}["))


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys instead of keeping the last one, and reads every key as a string."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys as written, before `<<` merges those of other mappings."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be a string")
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"line {line}: {key.value}: the key is given twice: keep one")
            seen.add(key.value)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping with its keys as written: `no` and `1` are strings here."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def parse(text: str) -> tuple[Any, dict[str, str]]:
    """Return the value of a YAML text, and by path the source texts of the values that are not strings.

    Raises:
        yaml.YAMLError, ValueError, TypeError, RecursionError: invalid YAML.
        UserError: a key is given twice.
    """
    return copy.deepcopy(parse_once(text))


@functools.lru_cache(maxsize=256)  # a sweep of hundreds of runs reads the same few files and values for each of them
def parse_once(text: str) -> tuple[Any, dict[str, str]]:
    """`parse`, but returns the same objects for the same text."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        try:
            value = loader.construct_document(node)
        except (KeyError, AttributeError, IndexError):  # of PyYAML, for e.g. `!!bool maybe`
            raise yaml.YAMLError("a value does not fit its tag (!!...)") from None
        return value, written_in(node, "")
    finally:
        loader.dispose()


def written_in(node: yaml.Node, path: str) -> dict[str, str]:
    """Return the source texts of the values below a node, constructed before: recursive aliases are refused there."""
    out: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # merged keys (`<<`) first, the mapping's own after them
            out |= written_in(value, join(path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out |= written_in(value, f"{path}[{i}]")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != "tag:yaml.org,2002:str":
        out[path] = node.value
    return out


def read_yaml(path: Path) -> Layer:
    """Return the mapping in a file; raise `UserError` if it is missing, not text or not valid YAML."""
    try:
        raw, written = parse(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a YAML file of settings, e.g. config/baseline_asd.yaml") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} invalid YAML: {problem(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): give a YAML file") from None
    except (ValueError, TypeError, RecursionError) as error:  # an invalid date; a recursive alias
        raise UserError(f"{path}: invalid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {raw!r}: expected a mapping of keys, as in config/baseline_asd.yaml")
    return Layer(raw, dict.fromkeys(leaves(raw), str(path)), written)


def problem(error: Exception) -> str:
    """Return the problem with a YAML text in one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def leaves(tree: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted paths of all keys, including sections."""
    out: list[str] = []
    for key, value in tree.items():
        at = join(path, key)
        out.append(at)
        if isinstance(value, Mapping):
            out += leaves(value, at)
    return out


def read_with_base(path: Path, schema: type, seen: tuple[Path, ...] = ()) -> Layer:
    """Return a YAML file merged over the chain of its bases."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: {path.name}: circular reference: remove one base")
    layer = read_yaml(path)
    base = layer.tree.pop("base", None)
    if base is None:
        return layer
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {base!r}: give the path of one YAML file, relative to this file")
    if not is_file(path.parent / base, f"{path}: base"):
        remedy = f"give a path relative to {path.parent}/"
        resolved = path.with_name("config.yaml")
        if resolved != path and resolved.is_file():  # a run's folder has both; the base of the copied YAML is not there
            remedy = f"for the settings of this run give --config {resolved}, which needs no base"
        raise UserError(f"{path}: base: {base}: no such file: {remedy}")
    return read_with_base(path.parent / base, schema, (*seen, path.resolve())).under(layer, schema)


def parse_override(text: str) -> Layer:
    """Parse `--set a.b=value` into {"a": {"b": value}}.

    A value in brackets, braces or quotes must be YAML. Any other value is read as YAML too, unless that drops a part of it
    (`set #1`) or fails (`@pics`): then it is taken as a string. Its source text is recorded for keys of type string.
    """
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UserError(f"--set {text}: expected key.path=value, e.g. --set global.epsilon=0.4")
    parsed: Any
    try:
        parsed, below = parse(value)
        lost = dropped(value)
    except UserError as error:
        raise UserError(f"--set {text}: {str(error).partition(': ')[2]}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        parsed, below, lost = value, {}, problem(error)
    written = {f"{key}{'' if not at or at.startswith('[') else '.'}{at}": source for at, source in below.items()}
    if value.lstrip()[:1] in ("[", "{", '"', "'"):
        if lost:
            raise UserError(f"--set {text}: the value is not valid YAML ({lost}): {how_to_quote(key, value)}")
    elif lost or isinstance(parsed, str):
        parsed = value
    elif value.strip():
        written[key] = value.strip()
    tree: Any = parsed
    path = tuple(key.split("."))
    for part in reversed(path):
        tree = {part: tree}
    return Layer(tree, dict.fromkeys(leaves(tree), f"--set {key}"), written, path)


NOT_VALUES = (yaml.AnchorToken, yaml.TagToken, yaml.DirectiveToken, yaml.DocumentStartToken, yaml.DocumentEndToken)


@functools.lru_cache(maxsize=256)
def dropped(value: str) -> str:
    """Return the first part of a YAML text that YAML drops from the value (a comment, anchor, tag or directive), or nothing."""
    tokens = list(yaml.scan(value, Loader))  # comments have no token: they are gaps between tokens
    for token in tokens:
        if isinstance(token, NOT_VALUES):
            return f"{value[token.start_mark.index : token.end_mark.index]} is not part of the value"
    for one, other in pairwise(tokens):
        gap = value[one.end_mark.index : other.start_mark.index].strip()
        if gap:
            return f"{gap} is a comment"
    return ""


def how_to_quote(key: str, value: str) -> str:
    """Return the `--set` option that passes a value as a string, quoted for the shell too."""
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).strip()
    return f"to pass a string, quote it: --set {shlex.quote(f'{key}={quoted}')}"
