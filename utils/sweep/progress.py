"""What a sweep shows while it runs: a line for each run that ends, and for each worker how far its run is."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from utils.reporting.runlog import percent
from utils.sweep.plan import Job
from utils.sweep.status import FAILED, FINISHED, OUTPUT, Status, not_started, rows_of, status_of

logger = logging.getLogger(__name__)
EVERY = 60.0  # seconds between two lines of a worker where the output is no terminal


def duration(seconds: float) -> str:
    """Return e.g. `45 s`, `12 min` or `3 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figures_text(figures: dict[str, float | None]) -> str:
    """Return ACC and ASR, as far as they are known."""
    parts = (("ACC", figures.get("clean_accuracy")), ("ASR", figures.get("attack_success_rate")))
    return ", ".join(f"{name} {percent(share).strip()}" for name, share in parts if share is not None)


class Progress:
    """Shows the runs of one call of the command, and estimates when it will end.

    Args:
        devices: of the workers, by number.
        states: of all runs of the sweep, by name.
    """

    def __init__(self, jobs: Sequence[Job], devices: Sequence[str], states: dict[str, Status]) -> None:
        self.todo = {job.name: job for job in jobs}
        self.devices, self.count, self.done = devices, len(jobs), 0
        self.seconds: dict[str, list[float]] = {}  # durations by defense
        self.running: dict[int, Job] = {}
        self.shown: dict[int, tuple[float, int]] = {}  # worker: when its line was last shown, and with which epoch
        self.bars: dict[int, tqdm] = {}
        self.prefix = len(min(states, default="").partition("/")[0]) + 1  # of all names

    def learn(self, job: Job, seconds: float) -> None:
        """Take a duration into account."""
        self.seconds.setdefault(job.config.defense.name, []).append(seconds)

    def began(self, worker: int, job: Job | None) -> None:
        """Note that a worker has begun a run."""
        assert job is not None
        self.running[worker] = job
        self.shown[worker] = (time.monotonic(), -1)

    def ended(self, worker: int, job: Job, seconds: float, error: str = "") -> None:
        """Show the line of a run that has ended, or that could not be started because of an error."""
        status = not_started(job, error) if error else status_of(job)
        self.done += 1
        del self.todo[job.name], self.running[worker]
        if worker in self.bars:
            self.bars.pop(worker).close()
        if status.state == FINISHED:
            self.learn(job, seconds)
        found = figures_text(status.metrics) if status.state == FINISHED else status.error
        left = self.left()
        rest = f", about {duration(left)} left" if self.todo and left is not None else ""
        logger.info(f"{self.done}/{self.count}  {status.state}  {job.name}  {found}  ({duration(seconds)}{rest})")
        if status.state == FAILED and not error:
            logger.info(f"{' ' * len(f'{self.done}/{self.count}')}  its output: {job.run.saved / OUTPUT}")

    def left(self) -> float | None:
        """Return the seconds until all runs have ended, by the mean of the same defense; None: nothing is known yet."""
        every = [s for values in self.seconds.values() for s in values]
        if not every:
            return None
        means = {name: statistics.fmean(values) for name, values in self.seconds.items()}
        return sum(means.get(job.config.defense.name, statistics.fmean(every)) for job in self.todo.values()) / len(
            self.devices
        )

    def show(self) -> None:
        """Show how far the running runs are."""
        terminal = sys.stderr.isatty()
        for worker, job in self.running.items():
            then, epoch = self.shown[worker]
            now = time.monotonic()
            if now - then < (1 if terminal else EVERY):
                continue
            rows = rows_of(job.run.log / "metrics.jsonl")
            self.shown[worker] = (now, len(rows))
            found = figures_text(rows[-1]) if rows else ""
            name = f"{self.devices[worker]}: {job.name[self.prefix :]}"
            if terminal:
                bar = self.bars.get(worker) or tqdm(total=job.config.epochs, position=worker, leave=False, unit="epoch")
                self.bars[worker] = bar
                bar.n = len(rows)
                bar.set_description(name, refresh=False)
                bar.set_postfix_str(found, refresh=False)
                bar.refresh()
            elif len(rows) != epoch:
                logger.info(f"{name}: epoch {len(rows)} of {job.config.epochs}{found and ', '}{found}")

    def close(self) -> None:
        """Remove the bars."""
        for bar in self.bars.values():
            bar.close()
