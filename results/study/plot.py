"""The plot of the study: the runs with ASD beside a run of the authors' code."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

from matplotlib.figure import Figure

from results.study.stored import KEYS, STAGES, TITLES, Row, Runs, percents, read
from utils.files import write_atomically

PICTURE = "progress.png"


def curves(folder: Path, runs: Runs) -> dict[str, list[list[float]]]:
    """Return the curves of the plot: name -> `course` of each run, beginning with the authors'."""
    authors = read(folder / "authors_run.json")
    share = authors["poisoned"] / authors["images"]
    out = {"authors' code, full size": course(authors["rows"], authors["stage_ends"], share)}
    for attack, title in TITLES.items():
        run = runs.of(attack)[1]
        if run and run.quality:
            ends = [sum(row["stage"] in STAGES[: i + 1] for row in run.rows) for i in range(3)]
            counts = run.quality["counts"]
            out[title] = course(run.rows, ends, counts["poisoned"] / counts["images"])
    return out


def course(rows: list[Row], ends: list[int], share: float) -> list[list[float]]:
    """Return four rows: progress in stages, 0 to 3; ACC, %; ASR, %; poisoned share of the clean pool relative to the set's.

    Without poisoned images, the ASR and the relative share are NaN and not drawn.

    Args:
        ends: number of epochs up to the end of each stage.
        share: poisoned share of the training set.
    """
    points = []
    for row in rows:
        stage = sum(row["epoch"] >= end for end in ends)
        done = (row["epoch"] + 1 - [0, *ends][stage]) / (ends[stage] - [0, *ends][stage])
        ratio = row["poisoned_in_clean_pool"] / row["clean_pool_size"] / share if share else math.nan
        points.append((stage + done, *percents(row, KEYS[:2]).values(), ratio))
    return [list(column) for column in zip(*points, strict=True)]


def draw(path: Path, drawn: dict[str, list[list[float]]]) -> None:
    """Draw `curves`; the Description of the PNG is their SHA-256, so that an outdated plot can be detected."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels, titles = figure.subplots(1, 3), ("ACC, %", "ASR, %", "poisoned in the clean pool, by chance = 1")
    for row, (axes, title) in enumerate(zip(panels, titles, strict=True), 1):
        for i, (name, values) in enumerate(drawn.items()):
            color, width = (f"C{i - 1}", 1.3) if i else ("black", 2.5)
            axes.plot(values[0], values[row], "o-", ms=3, label=name, color=color, lw=width)
        axes.set(title=title, xlim=(0, 3), xticks=(0.5, 1.5, 2.5), xticklabels=STAGES[:3])
        axes.set_ylim(bottom=0)
        for end in (1, 2):
            axes.axvline(end, color="grey", lw=0.8)
        axes.grid(axis="y", alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    metadata = {"Description": sha256(json.dumps(drawn).encode()).hexdigest()}
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png", metadata=metadata))
