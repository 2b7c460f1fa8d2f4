"""The plan of a sweep: the sweep file, and the runs that follow from it. Nothing is written or started here."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from utils import config
from utils.config import Config
from utils.config.layers import read_yaml
from utils.config.reader import Reader
from utils.config.schema import REQUIRED, join, setting
from utils.errors import UserError, nearest
from utils.paths import is_file, user_path
from utils.run import Run, locate

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


@dataclass(frozen=True)
class Job:
    """One run of a sweep, to be trained and tested."""

    labels: dict[str, str]  # axis -> label of its value
    yaml: Path
    settings: tuple[str, ...]  # of `--set`, in this order
    config: Config
    run: Run
    start: str | None = None  # the run, by its name, that must be finished first

    @property
    def name(self) -> str:
        """The run's name, e.g. `ratio/badnets/poison_ratio-0.05/asd/seed-100`."""
        return self.run.name

    def labels_of(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Return the labels of some axes."""
        return tuple(self.labels[axis] for axis in axes)

    def arguments(self, device: str) -> list[str]:
        """Return the options of ASD.py and of test.py."""
        options = ["--config", shown(self.yaml), "--gpu", device]
        return options + [word for text in (*self.settings, f"run={self.name}") for word in ("--set", text)]


@dataclass(frozen=True)
class Plan:
    """A sweep: its runs in the order in which they are started, and what their axes are for."""

    path: Path
    name: str
    folder: Path  # <saved_dir>/<name>/, of the runs and the report
    axes: tuple[Axis, ...]
    jobs: tuple[Job, ...]
    others: tuple[Job, ...]  # those that `--only` leaves out
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    repeats: str | None
    x: str | None
    cells: tuple[str, ...] = ()
    published: Published | None = None

    def labels(self, axis: str) -> list[str]:
        """Return the labels of an axis that some run has, in the order of the sweep file."""
        (values,) = (a.values for a in self.axes if a.name == axis)
        used = {job.labels[axis] for job in self.jobs}
        return [value.label for value in values if value.label in used]

    def combinations(self, axes: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the combinations of some axes that some run has, in the order of the sweep file."""
        used = {job.labels_of(axes) for job in self.jobs}
        return [cell for cell in itertools.product(*map(self.labels, axes)) if cell in used]


@dataclass(frozen=True)
class Source:
    """What all runs of a sweep file have in common."""

    path: Path
    base: Path  # the YAML of ASD.py
    common: tuple[str, ...]  # settings


def read(path: Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    """Read a sweep file and check every run that follows from it.

    Args:
        overrides: `KEY=VALUE` for all runs, on top of what the file says.
        only: `AXIS=VALUE,VALUE`: leaves out the other values of the axis.
    Raises:
        UserError: one line with file, key, value and what is expected; for a run that cannot be, with the run's name.
    """
    layer = read_yaml(path)
    reader = Reader(lambda key: str(path), layer.written)
    file: SweepFile = reader.section(SweepFile, layer.tree)
    source = Source(path, yaml_beside(path, file.config, "config"), tuple(settings_of(reader, file.set_, "set")))
    axes = read_axes(reader, path, file.axes)
    kept = chosen(axes, only)
    skipped = [skip_of(reader, axes, entry, f"skip[{i}]") for i, entry in enumerate(file.skip)]
    rows = check_roles(reader, file, axes)
    name = slug(file.name or path.stem)
    # Repeats come last: the first value of every other combination makes a table early.
    slow = sorted(range(len(axes)), key=lambda i: axes[i].name != file.repeats)
    every = []
    for product in itertools.product(*(axes[i].values for i in slow)):
        values = [value for _, value in sorted(zip(slow, product, strict=True))]
        labels = {axis.name: value.label for axis, value in zip(axes, values, strict=True)}
        if not any(matches(labels, entry) for entry in skipped):
            every.append(labels)
    chosen_labels = [labels for labels in every if all(labels[axis] in those for axis, those in kept.items())]
    jobs = [build_job(name, axes, labels, source, overrides) for labels in chosen_labels]
    others = []
    for labels in every if kept else []:
        if labels not in chosen_labels:
            with contextlib.suppress(UserError):  # not to be run
                others.append(build_job(name, axes, labels, source, overrides))
    if not jobs:
        raise UserError(f"{path}: skip: no run is left after it and --only")
    folders = {user_path(job.config.saved_dir, "saved_dir") for job in jobs}
    if len(folders) > 1:
        raise UserError(f"{path}: saved_dir: {', '.join(map(str, folders))}: must be the same for all runs; give it in `set`")
    check_starts(path, jobs, {run_name(name, axes, labels) for labels in every if not starts_of(axes, labels)})
    check_table(reader, file, axes, rows)
    roles = rows, file.columns, file.repeats, file.x, file.cells, file.published
    return Plan(path, name, folders.pop() / name, axes, tuple(jobs), tuple(others), *roles)


def build_job(sweep: str, axes: Sequence[Axis], labels: dict[str, str], file: Source, overrides: Sequence[str]) -> Job:
    """Return the run of one combination of values after a check of its configuration."""
    name, values = run_name(sweep, axes, labels), [value_of(axis, labels) for axis in axes]
    yamls = [value.yaml for value in values if value.yaml is not None]
    if len(yamls) > 1:
        raise UserError(f"{file.path}: {name}: config: {len(yamls)} of its values name a YAML: only one axis may")
    base = yamls[0] if yamls else file.base
    for text in (*file.common, *overrides):
        if key_of(text) == "run":
            raise UserError(f"{file.path}: {text}: the runs of a sweep are named after their values: leave it out")
    settings = (*file.common, *(text for value in values for text in value.settings), *overrides)
    other = starts_of(axes, labels)
    start = run_name(sweep, axes, labels | other) if other else None
    try:
        settled = config.load(base, [*settings, f"run={name}"])
        if start:
            settings = (*settings, f"defense.{settled.defense.name}.start_run={start}")
            settled = config.load(base, [*settings, f"run={name}"])
        for axis, value in zip(axes, values, strict=True):
            again = [*settings, *value.settings, f"run={name}"]
            if is_touched(axis, value, settings, overrides) and (not value.settings or config.load(base, again) != settled):
                raise UserError(f"{axis.name}: {value.label}: is overridden by another axis or by --set: remove one of the two")
    except UserError as error:
        raise UserError(f"{file.path}: {name}: {error}") from None
    return Job(labels, base, settings, settled, locate(settled), start)


def key_of(setting: str) -> str:
    """Return the key of `KEY=VALUE`."""
    return setting.partition("=")[0].strip()


def is_touched(axis: Axis, value: Value, settings: Sequence[str], overrides: Sequence[str]) -> bool:
    """Return whether later settings may override a value of an axis.

    Args:
        settings: all of the run, in order; the later ones win.
        overrides: those of `--set`, the last ones.
    """
    if not value.settings:  # it stands for what the YAML says where the other values have settings
        keys = {key_of(text) for other in axis.values for text in other.settings}
        return any(f"{key}.".startswith(f"{key_of(text)}.") for key in keys for text in overrides)
    after = settings[settings.index(value.settings[-1]) + 1 :]
    pairs = [(f"{key_of(a)}.", f"{key_of(b)}.") for a in value.settings for b in after]
    return any(a.startswith(b) or b.startswith(a) for a, b in pairs)


def value_of(axis: Axis, labels: Mapping[str, str]) -> Value:
    """Return the value of an axis that a run has."""
    return next(value for value in axis.values if value.label == labels[axis.name])


def run_name(sweep: str, axes: Sequence[Axis], labels: Mapping[str, str]) -> str:
    """Return the name of a run: the sweep's and those of its values."""
    return "/".join((sweep, *(value_of(axis, labels).slug for axis in axes)))


def starts_of(axes: Sequence[Axis], labels: Mapping[str, str]) -> dict[str, str]:
    """Return the values, by axis, in which the run that a run starts from differs from it; empty: it starts by itself."""
    return dict(pair for axis in axes for pair in value_of(axis, labels).start)


def check_starts(path: Path, jobs: Sequence[Job], plain: set[str]) -> None:
    """Refuse a run whose start run is not in `plain`, the runs of the sweep that have no start run themselves."""
    for job in jobs:
        if job.start and job.start not in plain:
            raise UserError(f"{path}: {job.name}: start: {job.start}: must be a run of this sweep that has no `start` itself")


def check_table(reader: Reader, file: SweepFile, axes: Sequence[Axis], rows: tuple[str, ...]) -> None:
    """Check that `cells` names figures, and that the published ones name rows and columns."""
    for i, name in enumerate(file.cells):
        if name not in MEASURES:
            reader.fail(f"cells[{i}]", name, f"unknown; {nearest(name, MEASURES)}")
    if file.published is None:
        return
    at = "published.figures"
    if (len(rows), len(file.columns)) != (1, 1):
        reader.fail(at, file.published.figures, "needs a sweep with one axis in rows and one in columns")
    (row,), (column,) = rows, file.columns
    for label, cells in file.published.figures.items():
        labels_named(axis_named(axes, row, at), [str(label)], f"{reader.where(at)}: {at}")
        if not isinstance(cells, Mapping) or not all(isinstance(text, str) for text in cells.values()):
            reader.fail(join(at, str(label)), cells, "give {COLUMN: TEXT}")
        labels_named(axis_named(axes, column, at), [str(name) for name in cells], f"{reader.where(at)}: {join(at, str(label))}")


# -- The parts of a sweep file -----------------------------------------------------------------------------------------


def read_axes(reader: Reader, path: Path, raw: Mapping[str, Any]) -> tuple[Axis, ...]:
    """Return the axes of a sweep file."""
    if not raw:
        reader.fail("axes", raw, "give at least one axis, e.g. seed.seed: [100, 101]")
    axes = []
    for key, values in raw.items():
        at, name = join("axes", key), key.rpartition(".")[2]
        if isinstance(values, list) and values:
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
    """Return a value as `--set` reads it: its source text, or YAML in one line."""
    source = reader.source(at, value)
    if source is not None:
        return source
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


def shown(path: Path) -> str:
    """Return a path as a command has it: from the current folder on if it is below that."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)


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
