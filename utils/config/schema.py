"""The schema of a configuration: a frozen dataclass is the schema of a section, which `utils/config/reader.py` reads from YAML.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from utils import plugins
from utils.errors import UserError

REQUIRED: Any = dataclasses.MISSING
MAPPING: Any = Mapping[str, Any]
PLAIN = (int, float, bool, str)
BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt), "high": ("<=", operator.le), "below": ("<", operator.lt)}


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


def batch_size_setting(default: int, help: str, low: int = 2) -> Any:
    """Declare a batch size; the upper bound, far above what any device holds, is there to report typing errors at the start."""
    return setting(default, help, low=low, high=65536)


@functools.cache
def keys_of(schema: type) -> dict[str, Key]:
    """Return the keys of a section by name in the YAML."""
    if not dataclasses.is_dataclass(schema):
        raise UserError(f"{source_of(schema)}: must be a dataclass: write @dataclass(frozen=True) above it")
    hints, out = typing.get_type_hints(schema), {}
    for f in dataclasses.fields(schema):
        hint = hints[f.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        some = tuple(kind for kind in kinds if kind is not types.NoneType)
        key = Key(f, some, some != kinds, **f.metadata)
        at = f"{source_of(schema)}: {f.name}"
        if not all(map(is_legal, some)):
            raise UserError(
                f"{at}: type {hint}: must be int, float, bool, str, tuple[float, ...] or a dataclass, or any | None"
            )
        numbers = f.default if isinstance(f.default, tuple) else (f.default,)
        if not all(key.allows(number) for number in numbers if type(number) in (int, float)):
            raise UserError(f"{at}: default {f.default}: must be{key.legal_range or ' finite'}")
        out[f.metadata.get("key") or f.name] = key
    return out


def source_of(schema: type) -> str:
    """Return file and name of a section's schema, for errors of a plug-in's author."""
    return f"{schema.__module__.replace('.', '/')}.py: {schema.__name__}"


def is_legal(kind: Any) -> bool:
    """Return whether a type, without `| None`, is one that a key may have."""
    items = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return len(items) == 2 and items[1] is ... and (items[0] in (*PLAIN, Named, MAPPING))
    return kind in PLAIN or kind in (Named, MAPPING) or dataclasses.is_dataclass(kind)


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
    base: Mapping[str, Any],
    over: Mapping[str, Any],
    schema: type | None,
    choices: Choices | None = None,
    path: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the mapping `base` overridden by `over`, section by section.

    In a choice of one name (optimizer, network, attack), another name replaces that of the base, and a key declared
    `instead_of` another removes that one, unless it is null. A list of names, as of transforms, replaces that of the base; a
    path that goes on below the list changes that one name, in its place.

    Args:
        schema: of both mappings; None: they have no known keys.
        choices: the choices if both mappings are a choice of one name.
        path: the keys, from here on, of the only value in `over`; empty: it has any number of values.
    """
    keys = {} if schema is None else keys_of(schema)
    inline = None if schema is None else inline_key(schema)
    choices = inline.choices if inline else choices
    dropped = {key.instead_of for name, key in keys.items() if over.get(name) is not None}
    if choices is not None and set(over) - set(keys) - set(base):
        dropped |= set(base) - set(keys)
    out = {name: value for name, value in base.items() if name not in dropped}
    for name, value in over.items():
        key, below = keys.get(name), out.get(name)
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            out[name] = value
        elif key is None:
            own = choices.schema(name) if choices and name in choices.names() else None
            out[name] = merge(below, value, own, path=path[1:])
        elif key.kinds[0] is Named:
            out[name] = merge(below, value, None, key.choices, path[1:])
        elif is_section(key.kinds[0]):
            out[name] = merge(below, value, key.kinds[0], path=path[1:])
        else:
            out[name] = merge(below, value, None) if path[1:] else value
    return out


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


def chosen_text(chosen: Named) -> str:
    """Return a choice as it is written in YAML, with the settings that differ from the defaults of its name."""
    keys, values = keys_of(chosen.settings.__class__), as_dict(chosen.settings)
    own = {name: values[name] for name, key in keys.items() if getattr(chosen.settings, key.field.name) != key.field.default}
    listed = ", ".join(
        f"{name}: {with_point(repr(v)) if isinstance(v, float) and 'e' in repr(v) else json.dumps(v)}"
        for name, v in own.items()
    )
    return f"{{{chosen.name}: {{{listed}}}}}" if own else chosen.name


def default_text(key: Key) -> str:
    """Return the default as it is written in YAML."""
    if key.field.default is REQUIRED:
        if key.kinds[0] is not Named or key.required:
            return "required" if key.required else ""
        return chosen_text(key.field.default_factory())  # type: ignore[misc, operator]
    if isinstance(key.field.default, Named):
        return chosen_text(key.field.default)
    value = as_dict(key.field.default)
    if isinstance(value, float) and "e" in repr(value):
        return with_point(repr(value))
    return ", ".join(value) if isinstance(value, dict) else json.dumps(value)
