"""The sweep file: its keys, and its axes with their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from utils.config.reader import Reader
from utils.config.schema import REQUIRED, join, setting
from utils.errors import UserError, nearest
from utils.paths import is_file, user_path

MEASURES = ("ACC", "ASR", "ASR without trigger", "RA", "DER", "seconds")


@dataclass(frozen=True)
class Published:
    """Figures that others have published for cells of the first table."""

    source: str = setting(REQUIRED, "where they are published")
    figures: Mapping[str, Any] = setting(REQUIRED, "`{ROW: {COLUMN: TEXT}}`, values of the axes in `rows` and `columns`")


@dataclass(frozen=True)
class SweepFile:
    """The keys of a sweep file."""

    config: str = setting(REQUIRED, "the YAML that the runs start from, relative to this file")
    axes: Mapping[str, Any] = setting(
        REQUIRED,
        "what the runs differ in. `KEY: [VALUE, ...]`: values of a setting. `NAME: {VALUE: {KEY: ...}, ...}`: named values, "
        "each a section of settings; its key `config` replaces the YAML of the sweep; with `start: {AXIS: VALUE}` the defense "
        "starts from the weights of the run that has these values instead, which is trained first",
    )
    name: str | None = setting(None, "first part of the runs' names, and the folder in `saved_dir`; null: name of this file")
    set_: Mapping[str, Any] = setting(dict, "settings of all runs", key="set")
    skip: tuple[Mapping[str, Any], ...] = setting((), "combinations to leave out, each `{AXIS: VALUE, AXIS: [VALUE, ...]}`")
    repeats: str | None = setting(None, "axis over which mean and standard deviation are taken, usually the seed")
    columns: tuple[str, ...] = setting((), "axes whose values are columns of the first table, and lines of the plot")
    rows: tuple[str, ...] | None = setting(None, "axes of the table's rows; null: all that are neither columns nor repeats")
    x: str | None = setting(None, "axis along the plot's x axis; null: a heat map of rows and columns")
    cells: tuple[str, ...] = setting(
        (), f"metrics in each cell of the first table, from {', '.join(MEASURES)}; empty: separate columns for ACC, ASR, DER"
    )
    last: int = setting(
        1, "the shares are means over this many last epochs, as far as they belong to the last stage of the run", low=1
    )
    published: Published | None = setting(None, "figures of others, shown below the first table")


@dataclass(frozen=True)
class Value:
    """One value of an axis."""

    label: str  # as the sweep file has it
    slug: str  # its part of a run's name
    settings: tuple[str, ...]  # `KEY=VALUE`, as `--set` takes them
    yaml: Path | None = None  # replaces the YAML of the sweep
    start: tuple[tuple[str, str], ...] = ()  # axis and label: the run with these other values provides the first weights


@dataclass(frozen=True)
class Axis:
    """What runs differ in; the name of `backdoor.poison_ratio` is `poison_ratio`."""

    name: str
    values: tuple[Value, ...]


def read_axes(reader: Reader, path: Path, raw: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return the axes of a sweep file."""
    if not raw:
        reader.fail("axes", raw, "give at least one axis, e.g. seed.seed: [100, 101]")
    axes = []
    for key, values in raw.items():
        at, name = join("axes", key), key.rpartition(".")[2]
        if isinstance(values, list) and values:
            for i, value in enumerate(values):
                if value in values[:i]:  # also 0.10 beside 0.1
                    reader.fail(at, value, "is given twice: keep one")
            found = [listed_value(reader, key, value, f"{at}[{i}]") for i, value in enumerate(values)]
        elif isinstance(values, Mapping) and values:
            found = [named_value(reader, path, label, value, join(at, label)) for label, value in values.items()]
        else:
            reader.fail(at, values, "give a list of values of that setting, or named values, each a section of settings")
        found = [replace(v, slug=f"{name}-{v.slug}" if v.slug[:1].isdigit() else v.slug) for v in found]
        for value in found:
            if not value.slug or sum(v.slug == value.slug for v in found) > 1:
                reader.fail(at, value.label, "must have letters or digits that no other value of the axis has")
        axes.append(Axis(name, tuple(found)))
    for axis in axes:
        for value in axis.values:
            for other, label in value.start:
                where = f"{reader.where('axes')}: axes.{axis.name}.{value.label}.start"
                labels_named(axis_named(axes, other, where), [label], f"{where}.{other}")
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            reader.fail("axes", name, "names two axes: axes must differ in the last part of their keys")
    return tuple(axes)


def listed_value(reader: Reader, key: str, value: Any, at: str) -> Value:
    """Return one of a list of values of a setting."""
    if isinstance(value, (Mapping, list)):
        reader.fail(at, value, f"give plain values in the list; to name sections of settings, write {key}: {{NAME: {{...}}}}")
    label = reader.source(at, value) or str(value)
    return Value(label, slug(label), (f"{key}={as_text(reader, value, at)}",))


def named_value(reader: Reader, path: Path, label: str, raw: Any, at: str) -> Value:
    """Return a named value: a section of settings, empty for those of the YAML itself."""
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        reader.fail(at, raw, "give a section of settings, {} for none")
    given = raw.get("config")
    if given is not None and not isinstance(given, str):
        reader.fail(join(at, "config"), given, "give the path of a YAML, relative to this file")
    own = None if given is None else yaml_beside(path, given, join(at, "config"))
    start = raw.get("start", {})
    if not isinstance(start, Mapping):
        reader.fail(join(at, "start"), start, "give {AXIS: VALUE}")
    settings = {key: value for key, value in raw.items() if key not in ("config", "start")}
    pairs = tuple((axis, reader.source(join(at, f"start.{axis}"), other) or str(other)) for axis, other in start.items())
    return Value(label, slug(label), tuple(settings_of(reader, settings, at)), own, pairs)


def settings_of(reader: Reader, tree: Mapping[str, Any], at: str) -> list[str]:
    """Return `KEY=VALUE` texts of a section of settings, whose keys may have dots."""
    return [f"{key}={as_text(reader, value, join(at, key))}" for key, value in tree.items()]


def as_text(reader: Reader, value: Any, at: str) -> str:
    """Return a value as `--set` reads it: YAML in one line, with the source texts of all values that are not strings."""
    source = reader.source(at, value)
    if source is not None:
        return source
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{one_line_yaml(k)}: {as_text(reader, v, join(at, k))}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(as_text(reader, v, f'{at}[{i}]') for i, v in enumerate(value))}]"
    return one_line_yaml(value)


def one_line_yaml(value: Any) -> str:
    """Return a value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=2**31)
    return text.strip().removesuffix("\n...")


def slug(label: str) -> str:
    """Return a label as a part of a run's name: letters, digits, `_`, `-` and single dots."""
    return re.sub(r"\.\.+", ".", re.sub(r"[^\w.-]+", "-", label)).strip("-.")


def yaml_beside(path: Path, name: str, key: str) -> Path:
    """Return the path of a YAML that a sweep file names, relative to itself."""
    found = path.parent / user_path(name, key)
    if not is_file(found, f"{path}: {key}"):
        raise UserError(f"{path}: {key}: {name}: no such file: give the path of a YAML, relative to {path.parent}/")
    return found


def axis_named(axes: Sequence[Axis], name: str, where: str) -> Axis:
    """Return the axis of a name; `where` begins the error."""
    found = next((axis for axis in axes if axis.name == name), None)
    if found is None:
        raise UserError(f"{where}: {name}: no such axis; {nearest(name, [axis.name for axis in axes])}")
    return found


def labels_named(axis: Axis, labels: Sequence[str], where: str) -> set[str]:
    """Return the labels as a set; raise `UserError` if the axis has no such value."""
    known = [value.label for value in axis.values]
    for label in labels:
        if label not in known:
            raise UserError(f"{where}: {label}: no value of {axis.name}; {nearest(label, known)}")
    return set(labels)


def chosen(axes: Sequence[Axis], only: Sequence[str]) -> dict[str, set[str]]:
    """Return axis -> labels of each `AXIS=VALUE,VALUE`; those of one axis add up."""
    out: dict[str, set[str]] = {}
    for text in only:
        name, sign, labels = text.partition("=")
        if not sign:
            raise UserError(f"--only {text}: not of the form AXIS=VALUE,VALUE, e.g. --only seed=100")
        named = labels_named(axis_named(axes, name, "--only"), labels.split(","), f"--only {name}")
        out[name] = out.get(name, set()) | named
    return out


def skip_of(reader: Reader, axes: Sequence[Axis], entry: Mapping[str, Any], at: str) -> dict[str, set[str]]:
    """Return axis -> labels of one entry of `skip`."""
    if not entry:
        reader.fail(at, entry, "name a value of at least one axis")
    out = {}
    for name, raw in entry.items():
        key = join(at, name)
        axis = axis_named(axes, name, f"{reader.where(at)}: {at}")
        values = [(f"{key}[{i}]", value) for i, value in enumerate(raw)] if isinstance(raw, list) else [(key, raw)]
        labels = [reader.source(place, value) or str(value) for place, value in values]
        out[name] = labels_named(axis, labels, f"{reader.where(at)}: {key}")
    return out


def matches(labels: Mapping[str, str], entry: Mapping[str, set[str]]) -> bool:
    """Return whether a run has one of the labels of every axis that an entry of `skip` names."""
    return all(labels[axis] in those for axis, those in entry.items())


def check_roles(reader: Reader, file: SweepFile, axes: Sequence[Axis]) -> tuple[str, ...]:
    """Check what the axes are for; return the axes of the table's rows."""
    repeats = [] if file.repeats is None else [file.repeats]
    every = [axis.name for axis in axes]
    rows = [name for name in every if name not in (*file.columns, *repeats)] if file.rows is None else [*file.rows]
    for key, names in (("repeats", repeats), ("columns", file.columns), ("rows", rows), ("x", [file.x] if file.x else [])):
        for name in names:
            axis_named(axes, name, f"{reader.where(key)}: {key}")
    named = [*rows, *file.columns, *repeats]
    for name in every:
        if named.count(name) != 1:
            reader.fail("rows", rows, f"rows, columns and repeats must name {name} once; it is there {named.count(name)} times")
    if file.x is not None and file.x == file.repeats:
        reader.fail("x", file.x, "is the axis of the repeats: give another one")
    return tuple(rows)
