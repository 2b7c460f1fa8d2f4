"""The figures of a sweep: one record for each run, mean and standard deviation of each cell, the tables and the CSV."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils import plugins
from utils.compare import effectiveness, render, subject_of
from utils.config import Config
from utils.config.schema import as_dict
from utils.config.settings import DEFENSES
from utils.config.stages import UNDEFENDED
from utils.csv_text import csv_text
from utils.sweep.plan import Job, Plan, shown
from utils.sweep.status import FAILED, FINISHED, OUTPUT, Status, status_of
from utils.sweep.sweep_file import MEASURES

# Column -> figure of test.json; those in % first.
SHARES = {
    "ACC": "clean_accuracy", "ASR": "attack_success_rate", "ASR without trigger": "clean_as_target", "RA": "robust_accuracy",
}  # fmt: skip
FORMS = {"DER": ".3f", "seconds": ".0f"}
NOTHING = "-"


@dataclass(frozen=True)
class Record:
    """One run with its figures."""

    job: Job
    status: Status
    der: float | None  # None: has no defense, no undefended baseline that is finished, or no attack

    def value(self, measure: str) -> float | None:
        """Return a figure of a finished run: a share in %, the DER in 0..1, seconds of training; None where it has none."""
        if self.status.state != FINISHED:
            return None
        if measure in SHARES:
            share = self.status.metrics.get(SHARES[measure])
            return None if share is None else 100 * share
        return self.der if measure == "DER" else self.status.seconds


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of a figure over the finished runs of a cell that have it."""

    mean: float
    deviation: float | None  # None: of one run
    count: int


def records_of(plan: Plan, states: Mapping[str, Status]) -> list[Record]:
    """Return the record of each run, in the order of the plan."""
    states = {name: status.over(plan.last) for name, status in states.items()}
    return [Record(job, states[job.name], der(plan, states, job)) for job in plan.jobs]


def der(plan: Plan, states: Mapping[str, Status], job: Job) -> float | None:
    """Return a run's defense effectiveness rate against its undefended baseline (`utils.compare`), 0 to 1.

    Args:
        states: of each run, with means over the plan's last epochs.
    """
    baseline = baseline_of(plan, job)
    if baseline is None:
        return None
    own, other = states[job.name], states.get(baseline.name) or status_of(baseline).over(plan.last)
    return effectiveness(own.metrics, other.metrics) if own.state == other.state == FINISHED else None


def baseline_of(plan: Plan, job: Job) -> Job | None:
    """Return the run without a defense with the same data set, attack, network and seed; of several, the one whose values
    differ in the fewest axes."""
    if job.config.defense.name == UNDEFENDED:
        return None
    own, undefended = subject(job), (o for o in (*plan.jobs, *plan.others) if o.config.defense.name == UNDEFENDED)
    baselines = [other for other in undefended if subject(other) == own]
    return max(
        baselines, key=lambda other: sum(other.labels[axis] == label for axis, label in job.labels.items()), default=None
    )


def subject(job: Job) -> tuple[object, ...]:
    """Return the settings that a run and its baseline have in common."""
    return job.config.dataset_dir, job.config.seed.seed, subject_of(as_dict(job.config))


def cell_of(records: Sequence[Record], axes: Sequence[str], labels: Sequence[str]) -> list[Record]:
    """Return the records whose labels of some axes are those."""
    return [record for record in records if record.job.labels_of(axes) == tuple(labels)]


def summary(records: Sequence[Record], measure: str) -> Summary | None:
    """Return mean and sample standard deviation (n - 1) of a figure; None: no run of the cell has it."""
    values = [value for record in records if (value := record.value(measure)) is not None]
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def summary_text(records: Sequence[Record], measure: str) -> str:
    """Return e.g. `97.50 ± 0.42`, or `-`; where only some of the finished runs have the figure, how many."""
    found, form = summary(records, measure), FORMS.get(measure, ".2f")
    if found is None:
        return NOTHING
    text = f"{found.mean:{form}}" + ("" if found.deviation is None else f" ± {found.deviation:{form}}")
    done = sum(record.status.state == FINISHED for record in records)
    return text if found.count == done else f"{text} (of {found.count})"


def runs_text(records: Sequence[Record]) -> str:
    """Return the number of finished runs, and what the others are, e.g. `1 of 3 (1 failed, 1 not finished)`."""
    count = Counter(record.status.state for record in records)
    done, failed = count[FINISHED], count[FAILED]
    if done == len(records):
        return str(done)
    rest = (f"{failed} failed" if failed else "", f"{n} not finished" if (n := len(records) - done - failed) else "")
    return f"{done} of {len(records)} ({', '.join(filter(None, rest))})"


# -- Tables ------------------------------------------------------------------------------------------------------------


def head_table(plan: Plan, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the table of rows and columns, the head first: the figures that `cells` names, in one cell; or ACC, ASR and, where
    there is any, DER of each cell."""
    columns = plan.combinations(plan.columns)
    axes = (*plan.rows, *plan.columns)
    if plan.cells:
        return compact_table(plan, records)
    measures = {
        column: [m for m in ("ACC", "ASR", "DER") if m != "DER" or summary(cell_of(records, plan.columns, column), m)]
        for column in columns
    }
    heads = [f"{', '.join(column)}: {measure}" for column in columns for measure in measures[column]]
    out = [(*plan.rows, *heads)]
    for row in plan.combinations(plan.rows):
        cells = []
        for column in columns:
            found = cell_of(records, axes, (*row, *column))
            cells += [cell_text(found, [measure]) for measure in measures[column]]
        out.append((*row, *cells))
    return out


def compact_table(plan: Plan, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the table with one column for each value, e.g. for each defense, and all figures of a cell in one; above them the
    number of images that are given as clean, below them the mean seconds of training."""
    columns, axes = plan.combinations(plan.columns), (*plan.rows, *plan.columns)
    names = plan.rows or ("",)  # without axes for rows, one row
    blank = ("",) * (len(names) - 1)
    given = [cell_of(records, plan.columns, column) for column in columns]
    out: list[tuple[str, ...]] = [
        (*names, *(", ".join(column) for column in columns)),
        ("clean images given", *blank, *(", ".join(sorted({clean_images(r.job.config) for r in found})) for found in given)),
    ]
    for row in plan.combinations(plan.rows):
        found = [cell_of(records, axes, (*row, *column)) for column in columns]
        out.append((*(row or (" / ".join(plan.cells),)), *(cell_text(cell, plan.cells) for cell in found)))
    means = [summary(found, "seconds") for found in given]
    return [*out, ("mean seconds", *blank, *(NOTHING if mean is None else f"{mean.mean:.0f}" for mean in means))]


def clean_images(config: Config) -> str:
    """Return how many known clean images a run is given, or that it uses the ground truth."""
    defense = config.defense
    if hasattr(plugins.load(DEFENSES.package, defense.name), "reference_images"):
        return "ground truth"
    if not defense.settings.needs_clean:
        return "none"
    return "given" if config.seed_samples else f"{config.global_.seed_num} a class"


def published_table(plan: Plan) -> list[tuple[str, ...]]:
    """Return the table of the figures that others have published, with the rows and columns of the first one."""
    assert plan.published is not None
    (row,), (column,) = plan.rows, plan.columns
    figures, columns = plan.published.figures, plan.labels(column)
    return [(row, *columns), *((name, *(figures.get(name, {}).get(c, NOTHING) for c in columns)) for name in plan.labels(row))]


def cell_text(records: Sequence[Record], measures: Sequence[str]) -> str:
    """Return figures of a cell, joined by slashes; where runs are missing, how many there are."""
    if not records:
        return ""  # skipped
    done = sum(record.status.state == FINISHED for record in records)
    if not done:
        return "failed" if any(record.status.state == FAILED for record in records) else "not finished"
    text = " / ".join(summary_text(records, measure) for measure in measures)
    return text if done == len(records) else f"{text} ({done} of {len(records)} runs)"


def full_table(plan: Plan, records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the table with a row for each cell and all figures, the head first."""
    axes = (*plan.rows, *plan.columns)
    out: list[tuple[str, ...]] = [(*axes, "runs", *MEASURES)]
    for cell in plan.combinations(axes):
        found = cell_of(records, axes, cell)
        out.append((*cell, runs_text(found), *(summary_text(found, measure) for measure in MEASURES)))
    return out


def open_table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the table of the runs that are not finished, the head first."""
    out: list[tuple[str, ...]] = [("run", "state", "error", "output")]
    for record in records:
        job, status = record.job, record.status
        if status.state != FINISHED:
            output = shown(job.run.saved / OUTPUT) if (job.run.saved / OUTPUT).is_file() else NOTHING
            out.append((job.name, status.text, status.error or NOTHING, output))
    return out


def to_markdown(plan: Plan, records: Sequence[Record]) -> str:
    """Return the text of sweep.md."""
    count = Counter(record.status.state for record in records)
    done, failed = count[FINISHED], count[FAILED]
    states = [f"{done} finished", f"{failed} failed", f"{len(records) - done - failed} not finished"]
    over = f"mean ± sample standard deviation over {plan.repeats} of the finished runs" if plan.repeats else "one run a cell"
    counts = ", ".join(state for state in states if not state.startswith("0 "))
    apart = " (not of the run that a defense starts from)" if any(record.job.start for record in records) else ""
    when = "After the last epoch" if plan.last == 1 else f"Means of the last {plan.last} epochs of each run"
    head = (
        f"# Sweep {plan.name}\n\n{shown(plan.path)}, {len(records)} runs: {counts}. {when}; {over}. ACC, ASR and "
        f"RA in %, DER in 0..1, seconds of training{apart}. `{NOTHING}`: not defined, e.g. the ASR without an attack.\n"
    )
    tables = [("", head_table(plan, records))] if plan.columns else []
    if plan.cells and plan.columns:
        head += f"\nEach cell: {' / '.join(plan.cells)}.\n"
    if plan.published:
        tables.append((f"## Published\n\n{plan.published.source}.\n\n", published_table(plan)))
    tables.append(("## All figures\n\n" if plan.columns else "", full_table(plan, records)))
    if done < len(records):
        tables.append(("## Runs that are not finished\n\n", open_table(records)))
    return "\n".join([head, *(f"{title}{markdown(rows)}\n" for title, rows in tables)])


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table as Markdown."""
    return render([tuple(cell.replace("|", "\\|") for cell in row) for row in rows], True)


def to_csv(plan: Plan, records: Sequence[Record]) -> str:
    """Return the text of sweep.csv: a row for each run; shares in 0..1, empty where there is no figure."""
    axes = [axis.name for axis in plan.axes]
    rows: list[Sequence[object]] = [["run", *axes, "state", "epochs", *SHARES.values(), "der", "seconds", "error"]]
    for record in records:
        job, status = record.job, record.status
        shares = [status.metrics.get(key) for key in SHARES.values()]
        figures = [*shares, record.der, round(status.seconds, 3)]
        rows.append([job.name, *job.labels_of(axes), status.state, status.epochs, *figures, status.error])
    return csv_text(rows)
