"""The plot of a sweep: lines over an axis with error bars, or a heat map of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.reporting.plots import drawing
from utils.sweep.plan import Plan
from utils.sweep.status import FAILED, FINISHED
from utils.sweep.table import Record, Summary, cell_of, runs_text, summary

COLORS = ("#c1121f", "#2a6f97", "#e09f3e", "#8e5ea2", "#3a7d44", "#6c757d")
MARKERS = "osD^vP"
NAMES = {"ACC": "accuracy (ACC), %", "ASR": "attack success rate (ASR), %", "DER": "defense effectiveness rate (DER)"}


def draw(path: Path, plan: Plan, records: Sequence[Record]) -> None:
    """Draw what the axes' roles ask for."""
    (draw_heat if plan.x is None else draw_lines)(path, plan, records)


def title_of(plan: Plan, records: Sequence[Record]) -> str:
    """Return what the plot is of."""
    spread = "" if plan.x is None else " and standard deviation"
    over = f", mean{spread} over {words(plan.repeats)}" if plan.repeats else ""
    runs = runs_text(records)
    return f"{plan.name}{over}; {f'{runs} runs' if ' of ' not in runs else f'runs: {runs}'}"


def words(name: str) -> str:
    """Return an axis's name for a reader."""
    return name.replace("_", " ")


def draw_lines(path: Path, plan: Plan, records: Sequence[Record]) -> None:
    """ACC above ASR over the axis `x`: a panel for each of the other rows' values, a line for each of the columns'."""
    x = str(plan.x)
    of_panels, of_lines = ([axis for axis in axes if axis != x] for axes in (plan.rows, plan.columns))
    panels, lines, ticks = plan.combinations(of_panels), plan.combinations(of_lines), plan.labels(x)
    size = (max(1.6 + 0.62 * len(ticks), 3.4) * len(panels) + 0.8, 6.6)
    with drawing(path, size, 2, len(panels), sharex=True, sharey=True) as (figure, grid):
        for column, panel in enumerate(panels):
            for row, measure in enumerate(("ACC", "ASR")):
                axes = grid[row][column]
                for i, line in enumerate(lines):
                    cells = [cell_of(records, [*of_panels, *of_lines, x], [*panel, *line, tick]) for tick in ticks]
                    add_line(axes, [summary(cell, measure) for cell in cells], i, len(lines), ", ".join(line))
                axes.set(ylim=(-3, 103), xlim=(-0.5, len(ticks) - 0.5))
                axes.grid(alpha=0.25)
            grid[0][column].set_title(", ".join(panel), fontsize=10)
            grid[1][column].set_xticks(range(len(ticks)), ticks)
            grid[1][column].set_xlabel(words(x))
        for row, measure in enumerate(("ACC", "ASR")):
            grid[row][0].set_ylabel(NAMES[measure])
        if of_lines:
            grid[0][0].legend(title=", ".join(map(words, of_lines)), fontsize=8, title_fontsize=8, loc="lower left")
        figure.suptitle(title_of(plan, records), fontsize=10)


def add_line(axes: Any, values: Sequence[Summary | None], number: int, count: int, label: str) -> None:
    """Add one line with error bars, broken where a value is missing; lines are shifted so that their bars do not overlap."""
    places = np.arange(len(values)) + 0.08 * (number - (count - 1) / 2)
    means = [np.nan if value is None else value.mean for value in values]
    spreads = [np.nan if value is None else value.deviation or 0.0 for value in values]
    style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "ms": 4, "lw": 1.3}
    axes.errorbar(places, means, spreads, capsize=3, label=label, **style)


def draw_heat(path: Path, plan: Plan, records: Sequence[Record]) -> None:
    """A heat map of rows and columns for ACC and ASR, and for the DER where there is any, the means written in."""
    rows, columns = plan.combinations(plan.rows), plan.combinations(plan.columns)
    measures = [measure for measure in NAMES if summary(records, measure)] or ["ACC"]
    names = [", ".join(row) for row in rows]
    left = 0.085 * max(map(len, names)) + 0.5
    size = (left + max(1.0 * len(columns) + 1.2, 3.0) * len(measures), 0.45 * len(rows) + 2.1)
    with drawing(path, size, 1, len(measures), sharey=True) as (figure, grid):
        for axes, measure in zip(grid[0], measures, strict=True):
            top = 1 if measure == "DER" else 100
            found = [[cell_of(records, (*plan.rows, *plan.columns), (*r, *c)) for c in columns] for r in rows]
            means = [[summary(cell, measure) for cell in line] for line in found]
            values = np.array([[np.nan if mean is None else mean.mean for mean in line] for line in means])  # (rows, columns)
            axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                text = f"{value:.2f}" if measure == "DER" else f"{value:.1f}"
                text = text if np.isfinite(value) else "" if not found[i][j] else missing(found[i][j])
                color = "white" if value > 0.6 * top else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
            axes.set_xticks(range(len(columns)), [", ".join(column) for column in columns])
            axes.set_yticks(range(len(rows)), names)
            axes.set_title(NAMES[measure], fontsize=9)
            axes.set_xlabel(", ".join(map(words, plan.columns)))
        grid[0][0].set_ylabel(", ".join(map(words, plan.rows)))
        figure.suptitle(title_of(plan, records), fontsize=10)


def missing(records: Sequence[Record]) -> str:
    """Return why a cell has no figure."""
    states = {record.status.state for record in records}
    return "-" if FINISHED in states else "failed" if FAILED in states else "not\nfinished"
