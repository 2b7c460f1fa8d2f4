"""YAML files as plain dictionaries: read, laid one over another, overridden from the command line.

Every key remembers the file that gave it, so that an error can name it, and every value that YAML takes for something
else than text remembers how it was written, so that `run: 001` can be the text 001 and no number 1.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError
from utils.paths import is_file
from utils.schema import join, merge


@dataclass(frozen=True)
class Layer:
    """One YAML file or override, or several laid over one another."""

    tree: dict[str, Any]
    origin: dict[str, str] = field(default_factory=dict)  # dotted key: the file, or `--set key`, that gave it
    written: dict[str, str] = field(default_factory=dict)  # dotted key (`a.b`, `a.b[0]`): the text of a value that is no text

    def under(self, over: Layer, schema: type) -> Layer:
        """Return this layer with another one on top, both of a schema."""
        return Layer(merge(self.tree, over.tree, schema), self.origin | over.origin, self.written | over.written)


class Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of keeping the last, and takes every key for text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys as they are written, before `<<` brings those of other mappings."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"line {line}: a key must be a word")
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"line {line}: {key.value}: the key is given twice: keep one")
            seen.add(key.value)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, the keys as they are written: `no` and `1` are words here."""
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


def parse(text: str) -> tuple[Any, dict[str, str]]:
    """Return what a YAML text means, and by path how each value is written that YAML takes for something else than text.

    Raises:
        yaml.YAMLError, ValueError, TypeError, RecursionError: it is no YAML.
        UserError: a key is given twice.
    """
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)
        return value, written_in(node, "")
    finally:
        loader.dispose()


def written_in(node: yaml.Node, path: str) -> dict[str, str]:
    """Return the source texts of the values below a node that was constructed; an alias that holds itself has no end."""
    out: dict[str, str] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:  # those of `<<` come first, the mapping's own after them
            out |= written_in(value, join(path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            out |= written_in(value, f"{path}[{i}]")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != "tag:yaml.org,2002:str":
        out[path] = node.value
    return out


def read_yaml(path: Path) -> Layer:
    """Return the file's mapping; `UserError` where it is missing, no text or no YAML."""
    try:
        raw, written = parse(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: give --config a YAML, e.g. config/baseline_asd.yaml") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} no YAML ({problem(error)}): mend it there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}): give --config a YAML file") from None
    except (ValueError, TypeError, RecursionError) as error:  # a date that is none; an alias that holds itself
        raise UserError(f"{path}: no YAML ({error}): mend it there") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {raw!r}: no mapping of keys: give a YAML like config/baseline_asd.yaml")
    return Layer(raw, dict.fromkeys(leaves(raw), str(path)), written)


def problem(error: Exception) -> str:
    """Return what is wrong with a YAML text, in one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def leaves(tree: Mapping[str, Any], path: str = "") -> list[str]:
    """Return the dotted paths of every key, sections included."""
    out: list[str] = []
    for key, value in tree.items():
        at = join(path, key)
        out.append(at)
        if isinstance(value, Mapping):
            out += leaves(value, at)
    return out


def read_with_base(path: Path, schema: type, seen: tuple[Path, ...] = ()) -> Layer:
    """Return a YAML laid over the chain of its bases."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: {path.name}: names itself in a circle: remove one base")
    layer = read_yaml(path)
    base = layer.tree.pop("base", None)
    if base is None:
        return layer
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {base!r}: give the path of one YAML, relative to this file")
    if not is_file(path.parent / base, f"{path}: base"):
        remedy = f"give a path relative to {path.parent}/"
        resolved = path.with_name("config.yaml")
        if resolved != path and resolved.is_file():  # a run keeps both; the copy of its YAML has lost its base
            remedy = f"for the settings of this run give --config {resolved}, which needs no base"
        raise UserError(f"{path}: base: {base}: no such file beside this one: {remedy}")
    return read_with_base(path.parent / base, schema, (*seen, path.resolve())).under(layer, schema)


def parse_override(text: str) -> Layer:
    """Turn `--set a.b=value` into {"a": {"b": value}}.

    A value in brackets, braces or quotes is YAML. So is any other, unless YAML would drop a part of it, as of `set #1`,
    or cannot read it, as `@pics`: it is the text that it is. How it is written is remembered for keys that are texts.
    """
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise UserError(f"--set {text}: not of the form key.path=value, e.g. --set global.epsilon=0.4")
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
            raise UserError(f"--set {text}: the value is no YAML ({lost}): {how_to_quote(key, value)}")
    elif lost or isinstance(parsed, str):
        parsed = value
    elif value.strip():
        written[key] = value
    tree: Any = parsed
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return Layer(tree, dict.fromkeys(leaves(tree), f"--set {key}"), written)


NO_VALUES = (yaml.AnchorToken, yaml.TagToken, yaml.DirectiveToken, yaml.DocumentStartToken, yaml.DocumentEndToken)


def dropped(value: str) -> str:
    """Return what of a YAML text is no part of its value: a comment, an anchor, a tag, a directive; usually nothing."""
    tokens = list(yaml.scan(value, Loader))  # not those of comments: a comment is a gap between two tokens
    for token in tokens:
        if isinstance(token, NO_VALUES):
            return f"{value[token.start_mark.index : token.end_mark.index]} is no part of the value"
    for one, other in pairwise(tokens):
        gap = value[one.end_mark.index : other.start_mark.index].strip()
        if gap:
            return f"{gap} is a comment"
    return ""


def how_to_quote(key: str, value: str) -> str:
    """Return the option that gives a value as the text that it is, quoted for the shell too."""
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).strip()
    return f"quote a text: --set {shlex.quote(f'{key}={quoted}')}"
