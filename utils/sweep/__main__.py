"""Run a sweep, or report on it: python -m utils.sweep config/sweeps/ratio.yaml --gpu 0,1"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from utils.startup import begin

    begin("utils.sweep")

import argparse
import logging
from collections import Counter
from pathlib import Path

from utils.cli import Parser, command, fail
from utils.errors import UserError
from utils.sweep.plan import Plan, read
from utils.sweep.progress import Progress
from utils.sweep.report import write_report
from utils.sweep.status import FAILED, FINISHED, not_started, status_of
from utils.sweep.workers import SCRIPTS, Worker, command_text, devices, locked, run_all

logger = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="python -m utils.sweep", description="Train and test the runs of a sweep file.", allow_abbrev=False)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("--gpu", default="0", help="CUDA devices, one run at a time on each, e.g. 0,1; or cpu")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs at a time on each device (default 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument(
        "--only", action="append", default=[], metavar="AXIS=VALUE,VALUE", help="run and report only these values of an axis"
    )
    parser.add_argument("--dry-run", action="store_true", help="show each run's state and commands, and start nothing")
    parser.add_argument("--report", action="store_true", help="write table and plot of the finished runs, and start nothing")
    args = parser.parse_args()
    if args.dry_run and args.report:
        raise UserError("--dry-run --report: give one of the two")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: give at least 1")
    return args


def main() -> None:
    """Run what the command line asks for."""
    args = parse()
    places = [] if args.report else devices(args.gpu, args.workers)
    plan = read(args.sweep, args.set, args.only)
    if args.dry_run:
        show_plan(plan, places[0])
        return
    blocked: dict[str, str] = {}
    if not args.report:
        with locked(plan):
            blocked = run(plan, places)
    states = {job.name: not_started(job, blocked[job.name]) if job.name in blocked else status_of(job) for job in plan.jobs}
    write_report(plan, states)
    count = Counter(state.state for state in states.values())
    if count[FAILED] and not args.report:
        fail(f"utils.sweep: {count[FAILED]} of {len(plan.jobs)} runs failed: see {plan.folder / 'sweep.md'}", 1)


def show_plan(plan: Plan, device: str) -> None:
    """Print each run's state, and the commands of those that are not finished."""
    for job in plan.jobs:
        status = status_of(job)
        print(f"{job.name}: {status.text}{status.error and ': '}{status.error}")
        if status.state != FINISHED:
            for script in SCRIPTS:
                print(f"  {command_text(job, script, device)}")


def run(plan: Plan, places: list[str]) -> dict[str, str]:
    """Run what is not finished; return the reason for each run, by name, that could not be started."""
    left_out = {job.name: job for job in plan.others}
    states = {job.name: status_of(job) for job in plan.jobs}
    todo = [job for job in plan.jobs if states[job.name].state != FINISHED]
    for job in todo:
        start = left_out.get(job.start or "")
        if start and status_of(start).epochs < start.config.epochs:
            raise UserError(
                f"--only: leaves out {start.name}, which is not finished and from which {job.name} starts: include it"
            )
    progress = Progress(todo, places, states)
    for job in plan.jobs:
        if states[job.name].state == FINISHED:
            progress.learn(job, states[job.name].seconds)
    finished = len(plan.jobs) - len(todo)
    logger.info(f"{plan.name}: {len(plan.jobs)} runs, {finished} finished, {len(todo)} to do; workers: {', '.join(places)}")
    return run_all(todo, [Worker(number, device) for number, device in enumerate(places)], progress)


if __name__ == "__main__":
    command("utils.sweep", main, kept="Finished runs and epochs are kept; the same command resumes the sweep.")
