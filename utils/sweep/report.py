"""The report of a sweep, in its folder: `sweep.md`, `sweep.csv`, `sweep.png`. May be written while the sweep runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from utils.compare import render
from utils.files import write_text
from utils.reporting.best_effort import BestEffort
from utils.sweep.plan import Plan
from utils.sweep.plot import draw
from utils.sweep.status import Status
from utils.sweep.table import full_table, head_table, records_of, to_csv, to_markdown

logger = logging.getLogger(__name__)
TABLE, CSV, PLOT = "sweep.md", "sweep.csv", "sweep.png"


def write_report(plan: Plan, states: Mapping[str, Status]) -> None:
    """Write table, CSV and plot, and show the table.

    Args:
        states: of each run, by name.
    """
    records = records_of(plan, states)
    write_text(plan.folder / TABLE, to_markdown(plan, records))
    write_text(plan.folder / CSV, to_csv(plan, records))
    BestEffort().attempt(str(plan.folder / PLOT), draw, plan.folder / PLOT, plan, records)
    logger.info(render((head_table if plan.columns else full_table)(plan, records), False))
    logger.info(f"report: {plan.folder / TABLE}, {CSV}, {PLOT}")
