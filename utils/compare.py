"""Put finished runs side by side: a table on the screen, and one picture.

    python -m utils.compare RUN_FOLDER [RUN_FOLDER ...] [--picture FILE] [--markdown]

A run folder is `<saved_dir>/<run>`. Runs that differ in their seed alone are told as mean and deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from utils.best_effort import BestEffort
from utils.cli import Parser, command
from utils.errors import UserError
from utils.pictures import draw_comparison

HEAD = ("run", "defense", "ACC", "ASR", "poisoned in the clean pool", "seconds")


def read_run(folder: Path) -> dict[str, Any]:
    """Return a run's name, settings without the seed, and rows of `metrics.jsonl`."""
    try:
        rows = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: is no run's folder ({error}): give <saved_dir>/<run> of a run") from None
    if not rows:
        raise UserError(f"{folder}: no epoch of the run is finished: wait for it or train again")
    seed = settings.pop("seed")["seed"]
    settings.pop("run")
    return {"name": folder.name, "seed": seed, "settings": settings, "rows": rows}


def group(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Put together the runs that have equal settings but for the seed, in the order given."""
    groups: list[list[dict[str, Any]]] = []
    for run in runs:
        mates = next((g for g in groups if g[0]["settings"] == run["settings"]), None)
        if mates is None:
            groups.append([run])
        else:
            mates.append(run)
    return groups


def spread(values: list[float], form: str) -> str:
    """Return `mean` of one value, or `mean ± deviation (least to most)` of several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return format(mean, form)
    low, high = format(min(values), form), format(max(values), form)
    return f"{mean:{form}} ± {statistics.stdev(values):{form}} ({low} to {high})"


def share_text(shares: list[float | None]) -> str:
    """Return `spread` in %, or `unknown` where there was nothing to test on."""
    told = [100 * share for share in shares if share is not None]
    return spread(told, ".2f") + " %" if told else "unknown"


def pool_text(row: dict[str, Any]) -> str:
    """Return how many images of the clean pool are poisoned, and how many are cover images where the set has any."""
    poisoned, cover = row["poisoned_in_clean_pool"], row.get("cover_in_clean_pool")
    found = "unknown" if poisoned is None else str(poisoned)
    return f"{found} of {row['clean_pool_size']}" + ("" if cover is None else f" (and {cover} cover)")


def table(groups: list[list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the rows of the table, the head first."""
    out: list[tuple[str, ...]] = [HEAD]
    for runs in groups:
        last = [run["rows"][-1] for run in runs]
        name = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} seeds ({', '.join(str(r['seed']) for r in runs)})"
        pool = "no split"
        if last[0]["clean_pool_size"] is not None:
            pool = ", ".join(map(pool_text, last))
        seconds = [sum(row["seconds"] for row in run["rows"]) for run in runs]
        acc, asr = (share_text([r[key] for r in last]) for key in ("clean_accuracy", "attack_success_rate"))
        out.append((name, last[0]["defense"], acc, asr, pool, spread(seconds, ".0f")))
    return out


def render(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """Return the table as text, aligned for a screen or as Markdown."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(widths))
    return "\n".join(lines)


def main() -> None:
    """Read the command line, print the table, draw the picture."""
    parser: argparse.ArgumentParser = Parser(prog="utils.compare", description="Compare finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--picture", type=Path, help="also draw ACC and ASR over epochs into this PNG")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    groups = group([read_run(folder) for folder in args.folders])
    print(render(table(groups), args.markdown))
    if args.picture:
        histories = [[run["rows"] for run in runs] for runs in groups]
        if not BestEffort().attempt(str(args.picture), draw_comparison, args.picture, histories):
            raise UserError(f"--picture {args.picture}: was not drawn, see above: mend that, or leave it out")
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    command("utils.compare", main)
