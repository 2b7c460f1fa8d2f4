"""The plan of a sweep: the runs that follow from its file. Nothing is written or started here."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils import config
from utils.config import Config
from utils.config.compatibility import flatten
from utils.config.layers import is_below, parse_override, read_yaml
from utils.config.reader import Reader
from utils.config.schema import as_dict, join
from utils.errors import UserError, nearest
from utils.paths import user_path
from utils.run import Run, locate
from utils.sweep.sweep_file import (
    MEASURES,
    Axis,
    Published,
    SweepFile,
    Value,
    axis_named,
    check_roles,
    chosen,
    labels_named,
    matches,
    read_axes,
    settings_of,
    skip_of,
    slug,
    yaml_beside,
)

CHOICES = ("defense", "network", "backdoor", "dataset")
OVERRIDDEN = "is overridden by another axis or by --set: remove one of the two"


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
    last: int = 1  # epochs over which the shares are means
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
    load: Callable[[Path, tuple[str, ...]], Config]  # reads a YAML with settings; the same one once for all runs


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
    base, common = yaml_beside(path, file.config, "config"), tuple(settings_of(reader, file.set_, "set"))
    source = Source(path, base, common, functools.cache(config.load))
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
    roles = rows, file.columns, file.repeats, file.x, file.cells, file.last, file.published
    return Plan(path, name, folders.pop() / name, axes, tuple(jobs), tuple(others), *roles)


def build_job(sweep: str, axes: Sequence[Axis], labels: dict[str, str], file: Source, overrides: Sequence[str]) -> Job:
    """Return the run of one combination of values after a check of its configuration."""
    name, values = run_name(sweep, axes, labels), [value_of(axis, labels) for axis in axes]
    yamls = [value.yaml for value in values if value.yaml is not None]
    if len(yamls) > 1:
        raise UserError(f"{file.path}: {name}: config: {len(yamls)} of its values name a YAML: only one axis may")
    base = yamls[0] if yamls else file.base
    settings = (*file.common, *(text for value in values for text in value.settings), *overrides)
    for text in settings:
        if key_of(text) == "run":
            raise UserError(f"{file.path}: {text}: the runs of a sweep are named after their values: leave it out")
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
                raise UserError(f"{axis.name}: {value.label}: {OVERRIDDEN}")
            if chosen_by(axis, file) & changed_names(file.load(base, value.settings), settled):
                raise UserError(f"{axis.name}: {value.label}: {OVERRIDDEN}")
            if not value.settings and differ(axis, file.load(base, file.common), settled):
                raise UserError(f"{axis.name}: {value.label}: {OVERRIDDEN}")
    except UserError as error:
        raise UserError(f"{file.path}: {name}: {error}") from None
    return Job(labels, base, settings, settled, locate(settled), start)


def chosen_by(axis: Axis, file: Source) -> set[str]:
    """Return the `CHOICES` in which the YAMLs of an axis differ: what its values stand for."""
    yamls = {value.yaml or file.base for value in axis.values}
    if len(yamls) == 1:
        return set()
    loaded = [names_of(file.load(path, ())) for path in yamls]
    return {key for key in CHOICES if len({names[key] for names in loaded}) > 1}


def changed_names(own: Config, settled: Config) -> set[str]:
    """Return the `CHOICES` in which a run has another name than its own YAML and value of the axis give."""
    before, after = names_of(own), names_of(settled)
    return {key for key in CHOICES if before[key] != after[key]}


def differ(axis: Axis, before: Config, after: Config) -> bool:
    """Return whether two configurations differ in what the values of an axis set."""
    keys = {key for value in axis.values for text in value.settings for key in keys_set_by(text)}
    if not keys:
        return False
    one, other = flatten(as_dict(before)), flatten(as_dict(after))
    return any(below(one, key) != below(other, key) for key in keys)


def keys_set_by(text: str) -> list[str]:
    """Return the keys that `KEY=VALUE` sets; for a choice without settings, `defense=abl`, also the key `defense.abl`."""
    found = flatten(parse_override(text).tree)
    return [
        f"{key}.{value}" if isinstance(value, str) and key.rpartition(".")[2] in CHOICES else key
        for key, value in found.items()
    ]


def below(settings: Mapping[str, object], key: str) -> dict[str, object]:
    """Return the settings of a key and the keys below it; of a choice without settings, that it is chosen."""
    section, _, name = key.rpartition(".")
    return {k: v for k, v in settings.items() if is_below(k, key)} | ({key: True} if settings.get(section) == name else {})


def names_of(settled: Config) -> dict[str, str]:
    """Return the name that a configuration has for each of `CHOICES`."""
    attack, dataset = settled.backdoor and settled.attack.name, settled.dataset and settled.dataset.name
    return {
        "defense": settled.defense.name, "network": settled.network.name, "backdoor": attack or "", "dataset": dataset or "",
    }  # fmt: skip


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


def shown(path: Path) -> str:
    """Return a path as a command has it: from the current folder on if it is below that. A link stays the file's name, since
    the base of a YAML is looked for beside the link."""
    resolved = path.parent.resolve() / path.name
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)
