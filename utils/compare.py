"""Compare finished runs: a table on the screen, and optionally one plot.

    python -m utils.compare RUN_FOLDER [RUN_FOLDER ...] [--last N] [--plot FILE] [--markdown]

A run folder is `<saved_dir>/<run>`. Runs that differ only in their seed are summarized by mean and standard deviation. A run
that is not finished has a row of its own, with the number of its epochs, and is no baseline. The figures are those of the last
epoch; with `--last N`, ACC, ASR, RA and DER are computed from means over the last N. The DER of a run with a defense is
relative to its undefended baseline: the first given run without a defense that has the same network, poisoned set and seed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from utils.startup import begin

    begin("utils.compare")

import argparse
import statistics
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from utils import manifest, metrics
from utils.cli import Parser, command
from utils.config.compatibility import read_config
from utils.config.schema import as_dict
from utils.config.stages import UNDEFENDED
from utils.errors import UserError
from utils.files import check_writable
from utils.metrics import read_rows
from utils.paths import user_path
from utils.reporting.best_effort import BestEffort
from utils.reporting.plots import draw_comparison

HEAD = ("run", "defense", "ACC", "ASR", "RA", "DER", "poisoned in the clean pool", "seconds")


SUBJECT = ("dataset", "num_classes", "data.train_limit", "data.test_limit", "transform.pre", "backdoor", "network")
# What every line of metrics.jsonl has.
COLUMNS = {
    "epoch", "defense", "clean_accuracy", "attack_success_rate", "robust_accuracy", "clean_pool_size", "poisoned_in_clean_pool",
    "seconds",
}  # fmt: skip


def read_run(folder: Path, last: int = 1) -> dict[str, Any]:
    """Return a run's name, settings without the seed, rows of `metrics.jsonl`, their `ending`, and digest of its data (None:
    unknown)."""
    try:
        data = data_digest(folder / manifest.FILE)
        rows = read_rows(folder / "log" / metrics.FILE)
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        if not isinstance(settings, dict) or not isinstance(settings.get("seed"), dict) or "seed" not in settings["seed"]:
            raise ValueError("config.yaml: no settings with a seed")
        if not all(row.keys() >= COLUMNS for row in rows):
            raise ValueError(f"log/metrics.jsonl: a line without {', '.join(sorted(COLUMNS))}")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{folder}: not the folder of a run ({what}): give <saved_dir>/<run>") from None
    if not rows:
        raise UserError(f"{folder}: the run has not finished an epoch yet")
    settings, epochs = resolved(settings)
    done = rows[-1]["epoch"] + 1  # a run that began from a checkpoint of the authors has no rows of the epochs before
    seed, name = settings.pop("seed")["seed"], str(settings.pop("run", None) or folder.name)
    finished = epochs is None or done >= epochs
    name = name if finished else f"{name} (epoch {done} of {epochs})"
    end = ending(rows, last)
    return {"name": name, "seed": seed, "settings": settings, "rows": rows, "end": end, "data": data, "finished": finished}


def ending(rows: list[dict[str, Any]], last: int) -> dict[str, Any]:
    """Return the last row, with the means of its shares over the last `last` epochs, as far as they belong to its stage."""
    stage, tail = rows[-1].get("stage"), []
    for row in reversed(rows[-last:]):
        if row.get("stage") != stage:
            break
        tail.append(row)
    means = {}
    for key in metrics.SHARES.keys() & rows[-1].keys():
        known = [row[key] for row in tail if row.get(key) is not None]
        means[key] = statistics.fmean(known) if known else None
    return rows[-1] | means


def resolved(settings: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the settings of a run, with the defaults of those added since it was made, and its number of epochs.

    If they are of a version that cannot be read, they are returned as they are, with None.
    """
    try:
        config = read_config(settings)
    except UserError:
        return settings, None
    return as_dict(config), config.epochs


def data_digest(path: Path) -> str | None:
    """Return a digest of `data.csv` without the seed samples, which belong to the defense; None if there is no such file."""
    if not path.is_file():
        return None
    rows = manifest.rows_of(path.read_bytes().decode("utf-8", "surrogateescape"))
    kept = [row for row in rows if (row.part, row.name) != (manifest.INPUT, "seed_samples")]
    return sha256(manifest.to_text(kept).encode("utf-8", "surrogateescape")).hexdigest()


def group(runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group the finished runs whose settings are equal except for the seed, in the order given; no seed twice in a group."""
    groups: list[list[dict[str, Any]]] = []
    for run in runs:
        alike = (g for g in groups if g[0]["settings"] == run["settings"] and g[0]["finished"] and run["finished"])
        same = next((g for g in alike if run["seed"] not in [other["seed"] for other in g]), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    return groups


def spread(values: list[float], form: str) -> str:
    """Return a single value, or `mean ± standard deviation (minimum to maximum)` of several."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return format(mean, form)
    low, high = format(min(values), form), format(max(values), form)
    return f"{mean:{form}} ± {statistics.stdev(values):{form}} ({low} to {high})"


def share_text(shares: list[float | None], missing: str) -> str:
    """Return the `spread` in %, or `missing` if there were no images to test on."""
    known = [100 * share for share in shares if share is not None]
    return spread(known, ".2f") + " %" if known else missing


def attacked(run: dict[str, Any]) -> bool:
    """Return whether a run has an attack, as far as its settings say."""
    backdoor = run["settings"].get("backdoor")
    return not isinstance(backdoor, dict) or backdoor.get("poison_ratio") != 0


def pool_text(row: dict[str, Any]) -> str:
    """Return how many images of the clean pool are poisoned, and how many are cover images if the set has any."""
    poisoned, cover = row["poisoned_in_clean_pool"], row.get("cover_in_clean_pool")
    found = "unknown" if poisoned is None else str(poisoned)
    return f"{found} of {row['clean_pool_size']}" + ("" if cover is None else f" (and {cover} cover)")


# -- Defense effectiveness rate ----------------------------------------------------------------------------------------


def is_baseline(baseline: dict[str, Any], run: dict[str, Any]) -> bool:
    """Return whether a run without a defense trains the same network on the same poisoned set as another run."""
    if baseline["rows"][-1]["defense"] != UNDEFENDED or baseline["seed"] != run["seed"] or not baseline["finished"]:
        return False
    if None not in (baseline["data"], run["data"]) and baseline["data"] != run["data"]:
        return False
    return subject_of(baseline["settings"]) == subject_of(run["settings"])


def subject_of(settings: dict[str, Any]) -> list[Any]:
    """Return the settings that a run and its undefended baseline have in common, besides the seed: data, attack, network."""

    def at(key: str) -> Any:
        value: Any = settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    return [at(key) for key in SUBJECT]


def effectiveness(row: dict[str, Any], baseline: dict[str, Any]) -> float | None:
    """Return the DER, in 0..1, of a run's row against that of its baseline: (1 + fall of the ASR - fall of the ACC) / 2.

    0.5 means no effect, 1 an ASR that falls from 1 to 0 at no loss of ACC. A gain in ACC or ASR counts as 0.
    """
    if any(r[key] is None for r in (row, baseline) for key in ("clean_accuracy", "attack_success_rate")):
        return None
    acc, asr = (max(0.0, baseline[key] - row[key]) for key in ("clean_accuracy", "attack_success_rate"))
    return (asr - acc + 1) / 2


def der_text(runs: list[dict[str, Any]], every: list[dict[str, Any]]) -> str:
    """Return the DER of runs that differ only in their seed, against their baselines among `every` run."""
    if runs[0]["rows"][-1]["defense"] == UNDEFENDED or not attacked(runs[0]):
        return "-"
    pairs = [(run, next((baseline for baseline in every if is_baseline(baseline, run)), None)) for run in runs]
    rates = [effectiveness(run["end"], baseline["end"]) for run, baseline in pairs if baseline]
    known = [rate for rate in rates if rate is not None]
    if not known:
        return "unknown" if rates else "no undefended run"
    return spread(known, ".3f") + ("" if len(known) == len(runs) else f", of {len(known)} of the runs")


def table(groups: list[list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """Return the rows of the table, beginning with the header."""
    out: list[tuple[str, ...]] = [HEAD]
    for runs in groups:
        last = [run["end"] for run in runs]
        name = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} seeds ({', '.join(str(r['seed']) for r in runs)})"
        pool = "no split"
        if last[0]["clean_pool_size"] is not None:
            pool = ", ".join(map(pool_text, last))
        seconds = [sum(row["seconds"] for row in run["rows"]) for run in runs]
        missing = "unknown" if attacked(runs[0]) else "-"
        keys = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
        shares = (share_text([r.get(key) for r in last], missing) for key in keys)
        der = der_text(runs, [run for other in groups for run in other])
        out.append((name, last[0]["defense"], *shares, der, pool, spread(seconds, ".0f")))
    return out


def render(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """Return the table as text, aligned for a terminal or as Markdown."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * len(widths))
    return "\n".join(lines)


def title_of(runs: list[dict[str, Any]], groups: list[list[dict[str, Any]]]) -> str:
    """Return the title of a group in the plot: its defense, or the run's name where several groups have that defense."""
    defense = runs[0]["rows"][0]["defense"]
    if sum(other[0]["rows"][0]["defense"] == defense for other in groups) > 1:
        return str(runs[0]["name"])
    return "no defense" if defense == UNDEFENDED else str(defense.upper())


def main() -> None:
    """Read the command line, print the table, draw the plot."""
    parser: argparse.ArgumentParser = Parser(prog="python -m utils.compare", description="Compare runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--last", type=int, default=1, metavar="N", help="shares as means over the last N epochs (default 1)")
    parser.add_argument("--plot", type=Path, help="also plot ACC and ASR over epochs into this file")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if args.last < 1:
        raise UserError(f"--last {args.last}: give at least 1")
    places = [folder.resolve() for folder in args.folders]
    for i, folder in enumerate(args.folders):
        if places[i] in places[:i]:
            raise UserError(f"{folder}: is given twice: give each run once")
    plot = args.plot and user_path(args.plot, "--plot")
    if plot:
        check_writable(plot)
    groups = group([read_run(folder, args.last) for folder in args.folders])
    print(render(table(groups), args.markdown))
    if plot:
        panels = [(title_of(runs, groups), [run["rows"] for run in runs]) for runs in groups]
        if not BestEffort().attempt(str(plot), draw_comparison, plot, panels):
            raise UserError(f"--plot {args.plot}: could not be drawn: see the warning above, or leave the option out")
        print(f"plot written to {plot}")


if __name__ == "__main__":
    command("utils.compare", main)
