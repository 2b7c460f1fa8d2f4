"""From YAML to frozen dataclasses: the dataclass is the schema, and all of it is checked at once.

A field is declared with `setting(default, help, ...)`. Its type says what the YAML may hold: `int`, `float`, `bool`,
`str`, `tuple[float, ...]`, any of them `| None`, another dataclass (a section), or one of the two kinds of choice:
`Named` (one key that names a plug-in and holds its settings) and `tuple[Named, ...]` (several, in their order).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from utils import plugins
from utils.errors import UserError, nearest

REQUIRED: Any = dataclasses.MISSING
DECIMAL = r"[+-]?(0|[1-9]\d*|\d*\.\d*(e[+-]\d+)?|\.inf|\.nan)"  # YAML 1.1 also has 010 (8), 1_0 (10), 0x10 and 1:30 (90)
NONE = ("none", "nil", "no", "off")  # what people write for it


@dataclass(frozen=True)
class Named:
    """A choice by name with its settings, e.g. `optimizer: {Adam: {lr: 0.002}}`."""

    name: str
    settings: Any


@dataclass(frozen=True)
class Choices:
    """Where the names of a `Named` field come from: a table of dataclasses, or the plug-ins of a kind.

    With a `place`, only those plug-ins that declare it in their `PLACES`.
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
        """Return where the plug-in `name` may stand; nowhere if there is none of that name or the place does not matter."""
        return tuple(self.declared("PLACES").get(name, ())) if self.place is not None else ()

    def schema(self, name: str) -> type:
        """Return the dataclass of the settings of `name`."""
        return self.table[name] if self.table is not None else plugins.settings(self.package, name)

    def declared(self, attribute: str) -> dict[str, Any]:
        """Return what the plug-ins declare under a name, by plug-in."""
        return {} if self.kind is None else plugins.declared(self.package, attribute)

    def check(self, name: str, settings: Any) -> None:
        """Let `check(plugin, settings)` of the plug-ins' package, where there is one, refuse settings by a UserError."""
        if self.kind is not None and hasattr(package := importlib.import_module(self.package), "check"):
            package.check(plugins.load(self.package, name), settings)


def setting(
    default: Any = REQUIRED,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    count: int | None = None,
    ascending: bool = False,
    options: tuple[str, ...] | None = None,
    choices: Choices | None = None,
    inline: bool = False,
    key: str | None = None,
    stands_for: str | None = None,
    instead_of: str | None = None,
) -> Any:
    """Declare one key of the YAML.

    Args:
        default: the value when the key is absent; a dataclass type means that section with all its defaults, the name of a
            plug-in among `choices` that plug-in with all its defaults.
        help: one line for docs/configuration.md, with the unit.
        low, high: inclusive bounds; above, below: exclusive ones. They hold for every number of a tuple.
        count, ascending: how many numbers a tuple has, and whether none may be less than the one before it.
        options: the legal strings.
        choices: the legal names of a `Named` field.
        inline: the `Named` key stands among the other keys of its section, as the attack does under `backdoor`.
        key: the name in the YAML where Python does not allow it (`global`).
        stands_for: a run depends on what the value names, and goes on under another value if that is the same: `images`,
            which the manifest has (`utils/manifest.py`), or `files`, a file or folder whose bytes count.
        instead_of: another key of the section; a YAML that gives this one takes back what its base gives for the other.
    """
    if choices is not None and isinstance(default, str):
        default = Named(default, choices.schema(default)())
    meta: dict[str, Any] = dict(help=help, low=low, high=high, above=above, below=below, count=count, ascending=ascending)
    meta |= dict(options=options, choices=choices, inline=inline, key=key, stands_for=stands_for, instead_of=instead_of)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def yaml_key(field: dataclasses.Field[Any]) -> str:
    """Return the field's name as the YAML has it."""
    return field.metadata.get("key") or field.name


def merge(base: Mapping[str, Any], over: Mapping[str, Any], schema: type | None) -> dict[str, Any]:
    """Return the mapping `base` with `over` on top, section by section.

    Where a section chooses one of several names (an optimizer, a network, the attack), another name replaces the base's choice
    instead of standing beside it, and a key declared `instead_of` another takes that one back. A list of names, as of
    transforms, is `over`'s whole, in its order.

    Args:
        schema: of both; None: unknown, so that every key is a section or a value.
    """
    fields = {} if schema is None else {yaml_key(f): f for f in dataclasses.fields(schema)}
    hints = {} if schema is None else typing.get_type_hints(schema)
    replaced = {f.metadata["instead_of"] for key, f in fields.items() if key in over and f.metadata.get("instead_of")}
    out = {key: value for key, value in base.items() if key not in replaced}
    inline = next((f for f in fields.values() if f.metadata.get("inline")), None)
    if inline is not None:
        names = [key for key in over if key not in fields]
        if set(names) - set(base):
            out = {key: value for key, value in out.items() if key in fields}
    for key, value in over.items():
        below = out.get(key)
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            out[key] = value
        elif key in fields:
            out[key] = merge_value(below, value, hints[fields[key].name], fields[key].metadata.get("choices"))
        else:
            out[key] = merge(below, value, schema_of(inline.metadata["choices"], key) if inline else None)
    return out


def merge_value(base: Mapping[str, Any], over: Mapping[str, Any], hint: Any, choices: Choices | None) -> Mapping[str, Any]:
    """Merge the two mappings that a base and a YAML on top of it give for one field of the type `hint`."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    inner = kinds[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint
    if choices is None:
        return merge(base, over, typing.cast(type, inner) if dataclasses.is_dataclass(inner) else None)
    if inner is not Named or set(over) - set(base):
        return over
    both = {n: v for n, v in over.items() if isinstance(v, Mapping) and isinstance(base[n], Mapping)}
    return {**base, **over, **{n: merge(base[n], v, schema_of(choices, n)) for n, v in both.items()}}


def schema_of(choices: Choices, name: str) -> type | None:
    """Return the schema of a choice's settings; None where there is no such choice, which the reader says later."""
    return choices.schema(name) if name in choices.names() else None


class Reader:
    """Turns nested dictionaries into dataclasses.

    Args:
        where: names the file that a key came from.
        written: how the values of keys (`a.b`, `a.b[0]`) that YAML takes for numbers, switches or dates are written.
    """

    def __init__(self, where: Callable[[str], str], written: Mapping[str, str] | None = None) -> None:
        self.where, self.written = where, written or {}

    def source(self, path: str, value: object) -> str | None:
        """Return how a value that is no text is written; None where nobody knows."""
        return None if isinstance(value, str) else self.written.get(path)

    def fail(self, path: str, value: object, remedy: str) -> typing.NoReturn:
        """Raise the one-line error: file, key, value, remedy."""
        shown = repr(value) if not isinstance(value, Mapping) else "{" + ", ".join(map(str, value)) + "}"
        source = self.source(path, value)
        if source and source != shown:
            shown = f"{source} (to YAML {shown})"
        raise UserError(f"{self.where(path)}: {path or '(top level)'}: {shown}: {remedy}")

    def section(self, schema: type, raw: Any, path: str = "") -> Any:
        """Build the dataclass `schema` from the mapping `raw`, checking every key, type and range."""
        raw = {} if raw is None else raw
        if not isinstance(raw, Mapping):
            self.fail(path, raw, "give a section of keys here")
        hints = typing.get_type_hints(schema)
        fields = {yaml_key(f): f for f in dataclasses.fields(schema)}
        inline = next((f for f in fields.values() if f.metadata.get("inline")), None)
        known = {k for k, f in fields.items() if f is not inline}
        values: dict[str, Any] = {}
        if inline is not None:
            named = {k: v for k, v in raw.items() if k not in known}
            values[inline.name] = self.named(inline.metadata["choices"], named, path, also=known)
        for key, value in raw.items():
            at = f"{path}.{key}" if path else str(key)
            if key in known:
                values[fields[key].name] = self.value(hints[fields[key].name], value, at, fields[key].metadata)
            elif inline is None:
                self.fail(at, value, f"unknown key; {nearest(key, known)}")
        for key in known:
            f = fields[key]
            if key not in raw and f.default is REQUIRED and f.default_factory is REQUIRED:
                self.fail(f"{path}.{key}" if path else key, None, f"missing; give {f.metadata['help'] or 'a value'}")
        return schema(**values)

    def named(self, choices: Choices, raw: Any, path: str, also: set[str] | None = None) -> Named:
        """Build a choice: exactly one known name, holding its settings; a bare name means its defaults."""
        if isinstance(raw, str):
            raw = {raw: None}
        if not isinstance(raw, Mapping) or not raw:
            self.fail(path, raw, f"name one of {', '.join(choices.names())}")
        for name, value in raw.items():
            if name not in choices.names():
                at = f"{path}.{name}" if path else str(name)
                if places := choices.places(name):
                    self.fail(at, value, f"belongs under {' or '.join(places)}")
                self.fail(at, value, f"unknown key; {nearest(name, [*choices.names(), *(also or ())])}")
        if len(raw) > 1:
            self.fail(path, raw, f"{len(raw)} names where one is chosen: keep one of {', '.join(map(str, raw))}")
        ((name, value),) = raw.items()
        prefix = f"{path}." if path else ""
        settings = self.section(choices.schema(name), value, f"{prefix}{name}")
        try:
            choices.check(name, settings)
        except UserError as error:  # `NAME.KEY: ...`
            line = f"{prefix}{error}"
            raise UserError(f"{self.where(line.partition(': ')[0])}: {line}") from None
        return Named(name, settings)

    def value(self, hint: Any, raw: Any, path: str, meta: Mapping[str, Any]) -> Any:
        """Build one value of the type `hint`, in the range that `meta` gives."""
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            kinds = [a for a in typing.get_args(hint) if a is not type(None)]
            if raw is None:
                return None
            if kinds[0] is not str and (raw is False or (isinstance(raw, str) and raw.lower() in NONE)):
                self.fail(path, raw, "YAML's word for none is null: give that")
            if len(kinds) > 1 and not isinstance(raw, (list, tuple)):
                kinds = [k for k in kinds if typing.get_origin(k) is not tuple]
            hint = kinds[-1] if isinstance(raw, (list, tuple)) else kinds[0]
        if dataclasses.is_dataclass(hint) and hint is not Named:
            return self.section(typing.cast(type, hint), raw, path)
        if hint is Named:
            return self.named(meta["choices"], raw, path)
        if typing.get_origin(hint) is tuple:
            return self.several(typing.get_args(hint)[0], raw, path, meta)
        return self.scalar(hint, raw, path, meta)

    def several(self, kind: Any, raw: Any, path: str, meta: Mapping[str, Any]) -> tuple[Any, ...]:
        """Build a tuple: a list of numbers, or the names of a mapping in their order."""
        if kind is Named:
            if raw is None or raw == []:
                return ()
            if not isinstance(raw, Mapping):
                self.fail(path, raw, f"give a section of names from {', '.join(meta['choices'].names())}")
            switched_on = {k: {} if v is True else v for k, v in raw.items() if v is not None and v is not False}
            return tuple(self.named(meta["choices"], {k: v}, path) for k, v in switched_on.items())
        if not isinstance(raw, (list, tuple)):
            self.fail(path, raw, f"give a list, e.g. {f'[{raw}]' if kind is str else '[0.1, 0.2]'}")
        out = tuple(self.scalar(kind, item, f"{path}[{i}]", meta) for i, item in enumerate(raw))
        if len(out) != (meta.get("count") or len(out)) or (meta.get("ascending") and list(out) != sorted(out)):
            self.fail(path, list(raw), f"give {meta['count']} numbers{', the least first' if meta['ascending'] else ''}")
        return out

    def scalar(self, kind: type, raw: Any, path: str, meta: Mapping[str, Any]) -> Any:
        """Build an int, float, bool or str and check its range; a text is what is written, also where YAML sees a number."""
        source = self.source(path, raw)
        if kind is str and source is not None and raw is not None:
            raw = source
        if kind in (int, float) and isinstance(raw, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", raw, re.I):
            self.fail(path, raw, f"YAML reads this as text; write {with_point(raw)} (with a decimal point and a sign)")
        right = {
            bool: isinstance(raw, bool),
            int: isinstance(raw, int) and not isinstance(raw, bool),
            float: isinstance(raw, (int, float)) and not isinstance(raw, bool),
            str: isinstance(raw, str),
        }[kind]
        if not right:
            wanted = {
                bool: "true or false",
                int: "a whole number",
                float: "a number",
                str: "a text, in quotes if it has brackets",
            }[kind]
            self.fail(path, raw, f"wrong type ({type(raw).__name__}); give {wanted}{legal_range(meta)}")
        if kind in (int, float) and source is not None and not re.fullmatch(DECIMAL, source, re.I):
            self.fail(path, raw, "is no plain decimal number: write it without leading 0, 0x, _ or :")
        if kind in (int, float) and isinstance(raw, int) and abs(raw) >= 2**63:
            self.fail(path, raw if abs(raw) < 10**30 else "...", f"out of range; give a number{legal_range(meta)} below 2**63")
        value = float(raw) if kind is float else raw
        if kind in (int, float):
            outside = (
                not math.isfinite(value)
                or (meta.get("low") is not None and value < meta["low"])
                or (meta.get("high") is not None and value > meta["high"])
                or (meta.get("above") is not None and value <= meta["above"])
                or (meta.get("below") is not None and value >= meta["below"])
            )
            if outside:
                self.fail(path, raw, f"out of range; give a number{legal_range(meta) or ' that is finite'}")
        if meta.get("options") and value not in meta["options"]:
            self.fail(path, raw, f"unknown; {nearest(value, meta['options'])}")
        return value


def with_point(text: str) -> str:
    """Return `2e-3` as YAML 1.1 reads a number: `2.0e-3`."""
    mantissa, exponent = re.split("e", re.sub(r"^([+-]?)\.", r"\g<1>0.", text), flags=re.I)
    sign = "" if exponent[0] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"


def legal_range(meta: Mapping[str, Any]) -> str:
    """Return e.g. ` >= 0 and < 1`, or nothing where any number will do."""
    signs = (("low", ">="), ("above", ">"), ("high", "<="), ("below", "<"))
    bounds = [f"{sign} {meta[name]:.10g}" for name, sign in signs if meta.get(name) is not None]
    return " " + " and ".join(bounds) if bounds else ""


def as_dict(value: Any) -> Any:
    """Return the settings as plain dictionaries with the YAML's keys: what is saved with a run."""
    if isinstance(value, Named):
        return {value.name: as_dict(value.settings)}
    if isinstance(value, tuple):
        if value and all(isinstance(item, Named) for item in value):
            return {item.name: as_dict(item.settings) for item in value}
        return [as_dict(item) for item in value]
    if dataclasses.is_dataclass(value):
        out: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = as_dict(getattr(value, f.name))
            if f.metadata.get("inline"):
                out |= item
            else:
                out[yaml_key(f)] = item
        return out
    return value


def stand_ins(settings: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (key, what it stands for, value) of every setting, and section, that was declared with `stands_for`."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        at = path if f.metadata.get("inline") else (f"{path}.{yaml_key(f)}" if path else yaml_key(f))
        if f.metadata.get("stands_for"):
            yield at, f.metadata["stands_for"], value
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Named):
                yield from stand_ins(item.settings, f"{at}.{item.name}")
            elif dataclasses.is_dataclass(item):
                yield from stand_ins(item, at)


def describe(schema: type, path: str = "", described: set[type] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, help) of every key below `schema`, for the documentation.

    The settings of a choice (an optimizer, a transform) are described once, at the first place that takes it.
    """
    hints = typing.get_type_hints(schema)
    described = set() if described is None else described
    for f in dataclasses.fields(schema):
        meta, hint = f.metadata, hints[f.name]
        at = path if meta.get("inline") else (f"{path}.{yaml_key(f)}" if path else yaml_key(f))
        optional = [a for a in typing.get_args(hint) if a is not type(None)]
        inner = optional[0] if typing.get_origin(hint) in (types.UnionType, typing.Union) else hint
        if dataclasses.is_dataclass(inner) and inner is not Named:
            if inner is not hint:  # a section that may be null
                yield at, "section", default_text(f), meta["help"]
            yield from describe(typing.cast(type, inner), at, described)
        elif meta.get("choices") is not None:
            if not meta.get("inline"):
                yield at, "one of" if inner is Named else "any of", default_text(f), meta["help"]
            for name in meta["choices"].names():
                chosen = meta["choices"].schema(name)
                if chosen not in described:
                    described.add(chosen)
                    yield from describe(chosen, f"{at}.{name}", described)
        else:
            kind = str(getattr(inner, "__name__", inner)) if typing.get_origin(inner) is None else "list"
            yield at, (" / ".join(meta["options"]) if meta.get("options") else kind), default_text(f), meta["help"]


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default as the YAML would have it."""
    if field.default is REQUIRED:
        return "required" if field.default_factory is REQUIRED else ""
    value = as_dict(field.default)
    if isinstance(value, float) and "e" in repr(value):
        return with_point(repr(value))
    return ", ".join(value) if isinstance(value, dict) else json.dumps(value)
