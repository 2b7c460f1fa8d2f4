"""Reads a mapping, as YAML gives it, into a dataclass of settings (`schema.py`); every key, type and range is checked."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from utils.config.schema import MAPPING, Choices, Key, Named, inline_key, is_section, join, keys_of, with_point
from utils.errors import UserError, nearest

DECIMAL = r"[+-]?(0|[1-9]\d*|\d*\.\d*(e[+-]\d+)?|\.inf|\.nan)"  # YAML 1.1 also has 010 (8), 1_0 (10), 0x10 and 1:30 (90)
NONE = ("none", "nil", "no", "off")  # often written instead of null
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string, in quotes if it has brackets"}


class Reader:
    """Turns nested dictionaries into dataclasses.

    Args:
        where: returns the file that set a key.
        written: path (`a.b`, `a.b[0]`) -> source text of every value that YAML does not read as a string.
    """

    def __init__(self, where: Callable[[str], str], written: Mapping[str, str] | None = None) -> None:
        self.where, self.written = where, written or {}

    def source(self, path: str, value: object) -> str | None:
        """Return the source text of a value; None if it is unknown, or the value is a string."""
        return None if isinstance(value, str) else self.written.get(path)

    def fail(self, path: str, value: object, expected: str) -> typing.NoReturn:
        """Raise the one-line error: file, key, value, what is expected."""
        shown = repr(value) if not isinstance(value, Mapping) else "{" + ", ".join(map(str, value)) + "}"
        source = self.source(path, value)
        if source and source != shown:
            shown = f"{source} (read as {shown})"
        raise UserError(f"{self.where(path)}: {path or '(top level)'}: {shown}: {expected}")

    def section(self, schema: type, raw: Any, path: str = "") -> Any:
        """Build the dataclass `schema` from the mapping `raw`, checking every key, type and range."""
        raw = {} if raw is None else raw
        if not isinstance(raw, Mapping):
            self.fail(path, raw, "expected a section of keys")
        inline = inline_key(schema)
        keys = {name: key for name, key in keys_of(schema).items() if key is not inline}
        values: dict[str, Any] = {}
        if inline is not None:
            named = {name: value for name, value in raw.items() if name not in keys}
            values[inline.field.name] = self.named(inline.choices, named, path, siblings=[*keys])
        for name, value in raw.items():
            if name in keys:
                values[keys[name].field.name] = self.value(keys[name], value, join(path, name))
            elif inline is None:
                self.fail(join(path, name), value, f"unknown key; {nearest(name, keys)}")
        for name, key in keys.items():
            if key.required and name not in raw:
                self.fail(join(path, name), None, f"missing; give {key.help or 'a value'}")
        settings = schema(**values)
        if hasattr(settings, "contradiction") and (found := settings.contradiction()):
            name, expected = found
            self.fail(join(path, name), getattr(settings, name), expected)
        return settings

    def named(self, choices: Choices, raw: Any, path: str, siblings: Sequence[str] = ()) -> Named:
        """Build a choice: exactly one known name, holding its settings; a bare name means its defaults.

        Args:
            siblings: the other keys of the section of an inline choice, also suggested for a misspelled name.
        """
        names = choices.names()
        if isinstance(raw, str) and raw not in names and not siblings and not choices.places(raw):
            self.fail(path, raw, f"unknown; {nearest(raw, names)}")
        if isinstance(raw, str):
            raw = {raw: None}
        if not isinstance(raw, Mapping) or not raw:
            self.fail(path, raw, f"name one of {', '.join(names)}")
        for name, value in raw.items():
            if name not in names:
                places = " or ".join(choices.places(name))
                remedy = f"belongs under {places}" if places else f"unknown key; {nearest(name, [*names, *siblings])}"
                self.fail(join(path, name), value, remedy)
        if len(raw) > 1:
            self.fail(path, raw, f"{len(raw)} names where only one is allowed: keep one of {', '.join(map(str, raw))}")
        ((name, value),) = raw.items()
        settings = self.section(choices.schema(name), value, join(path, name))
        try:
            choices.check(name, settings)
        except UserError as error:  # `NAME.KEY: ...`
            line = join(path, error)
            raise UserError(f"{self.where(line.partition(': ')[0])}: {line}") from None
        return Named(name, settings)

    def value(self, key: Key, raw: Any, path: str) -> Any:
        """Build the value of a key."""
        is_list = isinstance(raw, (list, tuple))
        kind = next((kind for kind in key.kinds if (typing.get_origin(kind) is tuple) == is_list), key.kinds[0])
        if key.optional:
            if raw is None:
                return None
            if kind is not str and (raw is False or (isinstance(raw, str) and raw.lower() in NONE)):
                self.fail(path, raw, "write null")
        if is_section(kind):
            return self.section(kind, raw, path)
        if kind is Named:
            return self.named(key.choices, raw, path)
        if kind == tuple[Named, ...]:
            return self.several(key.choices, raw, path)
        if typing.get_origin(kind) is not tuple:
            return self.scalar(key, kind, raw, path)
        item_kind = typing.get_args(kind)[0]
        if not is_list:
            self.fail(path, raw, f"give a list, e.g. {f'[{raw}]' if item_kind is str else '[0.1, 0.2]'}")
        out = tuple(self.scalar(key, item_kind, item, f"{path}[{i}]") for i, item in enumerate(raw))
        if len(out) != (key.count or len(out)) or (key.ascending and list(out) != sorted(out)):
            self.fail(path, list(raw), f"give {key.count} numbers{' in ascending order' if key.ascending else ''}")
        return out

    def several(self, choices: Choices, raw: Any, path: str) -> tuple[Named, ...]:
        """Build several choices from a mapping, in its order; `true` means the defaults, false and null leave one out."""
        if raw is None or raw == []:
            return ()
        if not isinstance(raw, Mapping):
            self.fail(path, raw, f"give a section of names from {', '.join(choices.names())}")
        on = {name: {} if value is True else value for name, value in raw.items() if value is not None and value is not False}
        return tuple(self.named(choices, {name: value}, path) for name, value in on.items())

    def scalar(self, key: Key, kind: type, raw: Any, path: str) -> Any:
        """Build an int, float, bool or str and check its range; a string is the source text, even if YAML reads a number."""
        if kind == MAPPING:
            return dict(raw) if isinstance(raw, Mapping) else self.fail(path, raw, "give a section of keys here")
        source = self.source(path, raw)
        if kind is str and source is not None and raw is not None:
            raw = source
        is_number = kind in (int, float)
        if is_number and isinstance(raw, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", raw, re.I):
            self.fail(path, raw, f"a string in YAML; write {with_point(raw)} (with a decimal point and a sign)")
        legal: tuple[type, ...] = (int, float) if kind is float else (kind,)
        if type(raw) not in legal:
            self.fail(path, raw, f"wrong type ({type(raw).__name__}); give {EXPECTED[kind]}{key.legal_range}")
        if is_number and source is not None and not re.fullmatch(DECIMAL, source, re.I):
            self.fail(path, raw, "must be a plain decimal number: write it without leading 0, 0x, _ or :")
        if is_number and isinstance(raw, int) and abs(raw) >= 2**63:
            self.fail(path, raw if abs(raw) < 10**30 else "...", f"out of range; give a number{key.legal_range} below 2**63")
        if is_number and not key.allows(raw):
            self.fail(path, raw, f"out of range; give a number{key.legal_range or ' that is finite'}")
        if kind is str and "\0" in raw:
            self.fail(path, raw, "contains a null character, which no file and no name can have")
        if key.stands_for and kind is str and not raw.strip():
            self.fail(path, raw, f"names no file or folder: give a path{', or null' if key.optional else ''}")
        if key.options and raw not in key.options:
            self.fail(path, raw, f"unknown; {nearest(raw, key.options)}")
        return float(raw) if kind is float else raw
