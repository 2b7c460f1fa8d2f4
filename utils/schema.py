"""From YAML to frozen dataclasses: a dataclass is the schema of a section, and all settings are checked on reading.

A field is declared with `setting(default, help, ...)`. Its type gives the legal values in the YAML: `int`, `float`, `bool`,
`str`, `tuple[float, ...]`, any of them `| None`, another dataclass (a section), `Mapping[str, Any]` (a section with any
keys), or one of the two kinds of choice: `Named` (one key that names a plug-in and holds its settings) and
`tuple[Named, ...]` (several of them, in order).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils import plugins
from utils.errors import UserError, nearest

REQUIRED: Any = dataclasses.MISSING
MAPPING: Any = Mapping[str, Any]
DECIMAL = r"[+-]?(0|[1-9]\d*|\d*\.\d*(e[+-]\d+)?|\.inf|\.nan)"  # YAML 1.1 also has 010 (8), 1_0 (10), 0x10 and 1:30 (90)
NONE = ("none", "nil", "no", "off")  # often written instead of null
BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt), "high": ("<=", operator.le), "below": ("<", operator.lt)}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string, in quotes if it has brackets"}


@dataclass(frozen=True)
class Named:
    """A choice by name with its settings, e.g. `optimizer: {Adam: {lr: 0.002}}`."""

    name: str
    settings: Any


@dataclass(frozen=True)
class Choices:
    """The legal names of a `Named` field: the keys of a table of dataclasses, or the plug-ins of a kind.

    With a `place`, only the plug-ins that declare it in their `PLACES`.
    """

    table: Mapping[str, type] | None = None
    kind: str | None = None
    place: str | None = None

    @property
    def package(self) -> str:
        """The package of the plug-ins."""
        return plugins.package_of(str(self.kind))

    def names(self) -> list[str]:
        """Return the legal names."""
        if self.table is not None:
            return list(self.table)
        if self.place is None:
            return plugins.names(self.package)
        return [name for name, places in self.declared("PLACES").items() if self.place in places]

    def places(self, name: str) -> tuple[str, ...]:
        """Return the keys under which the plug-in `name` is legal; none if there is no such plug-in or no `place`."""
        return tuple(self.declared("PLACES").get(name, ())) if self.place is not None else ()

    def schema(self, name: str) -> type:
        """Return the dataclass of the settings of `name`."""
        return self.table[name] if self.table is not None else plugins.settings(self.package, name)

    def declared(self, attribute: str) -> dict[str, Any]:
        """Return {plug-in: value of its attribute} for the plug-ins that declare the attribute."""
        return {} if self.kind is None else plugins.declared(self.package, attribute)

    def check(self, name: str, settings: Any) -> None:
        """Call `check(plugin, settings)` of the plug-ins' package, if it has one; it may raise `UserError`."""
        if self.kind is not None and hasattr(package := importlib.import_module(self.package), "check"):
            package.check(plugins.load(self.package, name), settings)


@dataclass(frozen=True)
class Key:
    """One key of a section: the dataclass field behind it, the field's type, and what `setting` declares about it."""

    field: dataclasses.Field[Any]
    kinds: tuple[Any, ...]  # the alternatives of the type without None, e.g. two of `int | tuple[int, ...]`
    optional: bool  # null is legal
    help: str = ""  # one line for docs/configuration.md, with the unit
    low: float | None = None  # inclusive bounds; all bounds hold for every number of a tuple
    high: float | None = None
    above: float | None = None  # exclusive bounds
    below: float | None = None
    count: int | None = None  # length of a tuple
    ascending: bool = False  # the numbers of a tuple must not decrease
    options: tuple[str, ...] = ()  # the legal strings
    choices: Choices = Choices(table={})  # the legal names of a `Named` field
    inline: bool = False  # the name is a key of the section itself, like the attack's in `backdoor`
    key: str | None = None  # the name in the YAML where Python does not allow it (`global`)
    # The value only names what a run depends on, and may change as long as the contents stay the same: `images`, recorded in
    # the manifest (`utils/manifest.py`), or `files`, a file or folder compared by its bytes.
    stands_for: str | None = None
    instead_of: str | None = None  # another key of the section; giving this key removes that one of the base YAML

    @property
    def required(self) -> bool:
        """Whether the YAML must give the key."""
        return self.field.default is REQUIRED and self.field.default_factory is REQUIRED

    @property
    def legal_range(self) -> str:
        """E.g. ` >= 0 and < 1`; empty if there are no bounds."""
        bounds = [f"{sign} {getattr(self, name):.10g}" for name, (sign, _) in BOUNDS.items() if getattr(self, name) is not None]
        return " " + " and ".join(bounds) if bounds else ""

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        bounds = [(getattr(self, name), holds) for name, (_, holds) in BOUNDS.items()]
        return math.isfinite(number) and all(bound is None or holds(number, bound) for bound, holds in bounds)


def setting(default: Any = REQUIRED, help: str = "", **declared: Any) -> Any:
    """Declare one key of the YAML.

    Args:
        default: the value if the key is absent; a dataclass type means that section with its defaults, the name of one of the
            `choices` that choice with its defaults.
        help, declared: see `Key`.
    """
    metadata = {"help": help, **declared}
    choices = declared.get("choices")
    if choices is not None and isinstance(default, str):
        name: str = default  # its schema is looked up when it is needed: a plug-in may import the module that declares the key
        return dataclasses.field(default_factory=lambda: Named(name, choices.schema(name)()), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def keys_of(schema: type) -> dict[str, Key]:
    """Return the keys of a section by name in the YAML."""
    hints, out = typing.get_type_hints(schema), {}
    for f in dataclasses.fields(schema):
        hint = hints[f.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        some = tuple(kind for kind in kinds if kind is not types.NoneType)
        out[f.metadata.get("key") or f.name] = Key(f, some, some != kinds, **f.metadata)
    return out


def inline_key(schema: type) -> Key | None:
    """Return the `inline` key of a section, if it has one."""
    return next((key for key in keys_of(schema).values() if key.inline), None)


def is_section(kind: Any) -> bool:
    """Return whether a type is a section with keys of its own."""
    return dataclasses.is_dataclass(kind) and kind is not Named


def join(path: str, name: object) -> str:
    """Return the dotted path of a key."""
    return f"{path}.{name}" if path else str(name)


def merge(
    base: Mapping[str, Any], over: Mapping[str, Any], schema: type | None, choices: Choices | None = None
) -> dict[str, Any]:
    """Return the mapping `base` overridden by `over`, section by section.

    In a choice of one name (optimizer, network, attack), another name replaces that of the base, and a key declared
    `instead_of` another removes that one. A list of names, as of transforms, replaces that of the base.

    Args:
        schema: of both mappings; None: they have no known keys.
        choices: the choices if both mappings are a choice of one name.
    """
    keys = {} if schema is None else keys_of(schema)
    inline = None if schema is None else inline_key(schema)
    choices = inline.choices if inline else choices
    dropped = {key.instead_of for name, key in keys.items() if name in over}
    if choices is not None and set(over) - set(keys) - set(base):
        dropped |= set(base) - set(keys)
    out = {name: value for name, value in base.items() if name not in dropped}
    for name, value in over.items():
        key, below = keys.get(name), out.get(name)
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            out[name] = value
        elif key is None:
            out[name] = merge(below, value, choices.schema(name) if choices and name in choices.names() else None)
        elif key.kinds[0] is Named:
            out[name] = merge(below, value, None, key.choices)
        else:
            out[name] = merge(below, value, key.kinds[0]) if is_section(key.kinds[0]) else value
    return out


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
        return schema(**values)

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
        if key.options and raw not in key.options:
            self.fail(path, raw, f"unknown; {nearest(raw, key.options)}")
        return float(raw) if kind is float else raw


def with_point(text: str) -> str:
    """Return a number such as `2e-3` in the form that YAML 1.1 recognizes: `2.0e-3`."""
    mantissa, exponent = re.split("e", re.sub(r"^([+-]?)\.", r"\g<1>0.", text), flags=re.I)
    sign = "" if exponent[0] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"


def as_dict(value: Any) -> Any:
    """Return the settings as plain dictionaries with the YAML's keys, as they are saved with a run."""
    if isinstance(value, Named):
        return {value.name: as_dict(value.settings)}
    if isinstance(value, tuple):
        if value and all(isinstance(item, Named) for item in value):
            return {item.name: as_dict(item.settings) for item in value}
        return [as_dict(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    out: dict[str, Any] = {}
    for name, key in keys_of(value.__class__).items():
        item = as_dict(getattr(value, key.field.name))
        if key.kinds[0] is Named and not key.inline and isinstance(item, dict) and not any(item.values()):
            (item,) = item  # a choice without settings is written as its name
        out |= item if key.inline else {name: item}
    return out


def stand_ins(settings: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (key, `stands_for`, value) of every setting or section that declares `stands_for`."""
    for name, key in keys_of(settings.__class__).items():
        value = getattr(settings, key.field.name)
        at = path if key.inline else join(path, name)
        if key.stands_for:
            yield at, key.stands_for, value
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Named):
                yield from stand_ins(item.settings, join(at, item.name))
            elif dataclasses.is_dataclass(item):
                yield from stand_ins(item, at)


def describe(schema: type, path: str = "", described: set[type] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, help) of every key in `schema` and below, for the documentation.

    The settings of a choice (an optimizer, a transform) are described once, under the first key that accepts it.
    """
    described = set() if described is None else described
    for name, key in keys_of(schema).items():
        at, kind = path if key.inline else join(path, name), key.kinds[0]
        names = key.choices.names()
        if is_section(kind):
            label = "section" if key.optional else ""
        elif names:
            label = "" if key.inline else "one of" if kind is Named else "any of"
        else:
            plain = {tuple: "list", Mapping: "section"}.get(typing.get_origin(kind)) or kind.__name__
            label = " / ".join(key.options) or plain
        if label:
            yield at, label, default_text(key), key.help
        if is_section(kind):
            yield from describe(kind, at, described)
        fresh = {chosen: found for chosen in names if (found := key.choices.schema(chosen)) not in described}
        described |= {*fresh.values()}  # before any of them: one may have a choice of the same kind
        for chosen, settings in fresh.items():
            yield from describe(settings, join(at, chosen), described)


def default_text(key: Key) -> str:
    """Return the default as it is written in YAML."""
    if key.field.default is REQUIRED:
        if key.kinds[0] is not Named or key.required:
            return "required" if key.required else ""
        return next(iter(as_dict(key.field.default_factory())))  # type: ignore[misc, operator]
    value = as_dict(key.field.default)
    if isinstance(value, float) and "e" in repr(value):
        return with_point(repr(value))
    return ", ".join(value) if isinstance(value, dict) else json.dumps(value)
