"""How far each run of a sweep is, as its files show; what a run that failed leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from utils.compare import ending
from utils.config.compatibility import refuse_other_settings
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.files import write_text
from utils.metrics import SHARES, read_rows
from utils.sweep.plan import Job

OUTPUT, FAILURE = "output.log", "failed.json"  # in a run's folder, beside what ASD.py writes there
ROUNDING = 0.01  # a test on another device; a test with another trigger or limit differs by more
FINISHED, FAILED, STARTED, WAITING = "finished", "failed", "started", "not started"


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    state: str  # FINISHED (trained and tested), FAILED, STARTED or WAITING
    epochs: int  # finished ones
    total: int
    seconds: float = 0.0  # training time so far
    metrics: dict[str, float | None] = field(default_factory=dict)  # `SHARES` by test.py, of a finished run
    error: str = ""  # last line of a failed run
    rows: tuple[dict[str, Any], ...] = ()  # its epochs, of a finished run

    def over(self, last: int) -> Status:
        """Return the status with means over the last epochs, as far as they belong to the last stage, in `metrics`."""
        if last == 1 or not self.rows:
            return self
        rows = [row | {key: number(row.get(key)) for key in SHARES} for row in self.rows]
        return replace(self, metrics={key: ending(rows, last)[key] for key in SHARES})

    @property
    def text(self) -> str:
        """The state in words, e.g. `epoch 12 of 120`."""
        return f"epoch {self.epochs} of {self.total}" if self.state == STARTED else self.state


def status_of(job: Job) -> Status:
    """Return how far a run is; files that cannot be read count as missing."""
    rows, tested = rows_of(job.run.log / "metrics.jsonl"), as_mapping(read_json(job.run.log / "test.json"))
    if not all(isinstance(figures.get(key), (int, float, type(None))) for figures in (*rows[-1:], tested) for key in SHARES):
        tested = {}
    total, seconds = job.config.epochs, sum(row["seconds"] for row in rows)
    done = rows[-1]["epoch"] + 1 if rows else 0
    if done == total and is_tested(job, rows[-1], tested) and has_settings(job):
        return Status(FINISHED, total, total, seconds, {key: tested.get(key) for key in SHARES}, rows=tuple(rows))
    failed = as_mapping(read_json(job.run.saved / FAILURE))
    if failed:
        return Status(FAILED, done, total, seconds, error=str(failed.get("error", "")))
    return Status(STARTED if rows else WAITING, done, total, seconds)


def not_started(job: Job, error: str) -> Status:
    """Return the status of a run that could not be started."""
    return Status(FAILED, 0, job.config.epochs, error=error)


def is_tested(job: Job, last: dict[str, Any], tested: dict[str, Any]) -> bool:
    """Return whether test.json is of the weights of the last epoch, tested as the run tests them.

    Its figures are those of that epoch. On CUDA they may differ by rounding; then it must be the later of the two files.
    """
    pairs = [(tested.get(key), last.get(key)) for key in SHARES]
    if tested.get("epoch") != last["epoch"] or any((one is None) != (other is None) for one, other in pairs):
        return False
    if all(one == other for one, other in pairs):
        return True
    if any(one is not None and abs(one - other) > ROUNDING for one, other in pairs):
        return False
    try:
        return (job.run.log / "test.json").stat().st_mtime >= (job.run.log / "metrics.jsonl").stat().st_mtime
    except OSError:
        return False


def has_settings(job: Job) -> bool:
    """Return whether the run in the folder was made with the settings of the sweep.

    The data are not read: settings that name them are compared as text. If they differ, the run does not count as finished,
    and ASD.py decides by the contents. `dataset_dir` alone may differ: the same data can be in another place.
    """
    path = job.run.saved / "config.yaml"
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict):
            return False
        refuse_other_settings(path, {"config": kept}, as_dict(job.config))
    except (OSError, ValueError, yaml.YAMLError, UserError):
        return False
    return True


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`; none where it is missing or damaged."""
    try:
        rows = read_rows(path)
    except (OSError, ValueError):
        return []
    return rows if all(isinstance(row.get(key), (int, float)) for row in rows for key in ("epoch", "seconds")) else []


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def number(value: Any) -> float | None:
    """Return a number; None for anything else."""
    return value if isinstance(value, (int, float)) else None


def as_mapping(value: Any) -> dict[str, Any]:
    """Return a mapping; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


# -- Failures ----------------------------------------------------------------------------------------------------------


def mark_failed(job: Job, error: str, code: int, command: str) -> None:
    """Keep why a run failed, until it is started again."""
    text = json.dumps({"error": error, "exit_code": code, "command": command}, indent=2)
    write_text(job.run.saved / FAILURE, text + "\n")


def forget_failure(job: Job) -> None:
    """Remove what `mark_failed` kept."""
    (job.run.saved / FAILURE).unlink(missing_ok=True)


def last_line(output: str) -> str:
    """Return the line of a command's output that says why it failed: the last one with an error, else the last one."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return (errors or lines or ["no output"])[-1]
