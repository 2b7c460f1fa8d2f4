"""Store the results of a finished run of the study: metrics, settings, quality of the ranking, weights with their card.

    python -m results.study.collect --saved DIR --storage DIR --run badnets/asd --commit HASH [--processor TEXT]

The run must be trained by ASD.py, and its last checkpoint tested by test.py. Writes `badnets/asd.pt`, the folder
`badnets/asd/` and, last, the card `badnets/asd.json` next to this file. Paths of the machine that ran it are removed.

With `--unfinished`, the checkpoint of a run that is not finished and its metrics are stored in `unfinished/` instead: `run.sh`
then resumes it on any machine.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from data.batches import count_batches
from data.loading import dataset_of
from utils import checkpoint, config
from utils.cli import Parser, command
from utils.config import Config
from utils.config.compatibility import read_config
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.files import write_text
from utils.metrics import SHARES, read_rows
from utils.reporting import confusion, suspects
from utils.run import LATEST
from utils.runtime.machine import processor

HERE = Path(__file__).parent
ROUNDING = 0.001  # tolerance if test.py ran on another processor: 10 of 10,000 images


def main() -> None:
    """Read the command line, store the run."""
    parser = Parser(prog="python -m results.study.collect", description="Store the results of a finished run of the study.")
    parser.add_argument("--saved", required=True, type=Path, help="the run's saved_dir")
    parser.add_argument("--storage", required=True, type=Path, help="the run's storage_dir")
    parser.add_argument("--run", required=True, help="its name, e.g. badnets/asd")
    parser.add_argument("--commit", required=True, help="commit of this repository that the run was made with")
    parser.add_argument("--processor", default=processor(), help="processor that ran it (default: that of this machine)")
    parser.add_argument("--out", default=HERE, type=Path, help="folder of the study (default: this one)")
    parser.add_argument("--unfinished", action="store_true", help="store an unfinished run, to be resumed elsewhere")
    args = parser.parse_args()
    if not re.fullmatch("[0-9a-f]{7,40}", args.commit):
        raise UserError(f"--commit {args.commit}: must be 7 to 40 hexadecimal digits")
    facts = {"commit": args.commit, "processor": args.processor}
    weights = args.storage / args.run / "checkpoint" / LATEST
    if args.unfinished:
        print(f"written to {keep_unfinished(args.run, weights, args.commit, args.out)}")
    else:
        print(f"written to {collect(args.run, args.saved / args.run, weights, facts, args.out)}")


def keep_unfinished(run: str, weights: Path, commit: str, out: Path) -> Path:
    """Store the checkpoint of an unfinished run, its metrics and the commit that began it; return the new checkpoint.

    Args:
        run: its name in the study.
        weights: its last checkpoint.
        out: folder of the study.
    Raises:
        UserError: the run is finished.
    """
    saved, kept = checkpoint.read(weights), out / "unfinished" / f"{run}.pt"
    c = read_config(saved["config"])
    if saved["epoch"] + 1 >= c.epochs:
        raise UserError(f"{weights}: all {c.epochs} epochs are finished: leave --unfinished out")
    write_text(kept.with_suffix(".jsonl"), to_jsonl(saved["history"]))
    write_text(kept.with_suffix(".commit"), f"{commit}\n")
    checkpoint.write(kept, saved | {"config": as_dict(portable(c))})
    return kept


def collect(run: str, source: Path, weights: Path, facts: dict[str, str], out: Path) -> Path:
    """Copy a finished run into the study and return its card.

    Args:
        run: its name in the study.
        source: `<saved_dir>/<run>`.
        weights: the checkpoint of its last epoch.
        facts: `commit` and `processor`, for the card.
        out: folder of the study.
    Raises:
        UserError: the run is not finished or not tested, or its files belong to different runs.
    """
    c = config.load(readable(source / "config.yaml"))
    rows = read_rows(readable(source / "log" / "metrics.jsonl"))
    saved = checkpoint.read(weights)
    if not len(rows) == saved.get("epoch", -1) + 1 == c.epochs:
        raise UserError(f"{source}: {len(rows)} of {c.epochs} epochs are finished: resume it first")
    if saved.get("history") != rows:
        raise UserError(f"{source / 'log' / 'metrics.jsonl'}: does not belong to {weights}: give the folders of one run")
    tested = json.loads(readable(source / "log" / "test.json", "run test.py first").read_text())
    both = [(tested[key], rows[-1][key]) for key in SHARES if None not in (tested[key], rows[-1][key])]
    if any(abs(one - other) > ROUNDING for one, other in both):
        raise UserError(
            f"{source / 'log' / 'test.json'}: does not belong to the last epoch: run test.py --resume {LATEST} again"
        )
    kept = {"metrics.jsonl": to_jsonl(rows), "config.yaml": config.to_yaml(portable(c))}
    kept["test.json"] = confusion.to_json(tested | {"checkpoint": f"results/study/{run}.pt"})
    if c.defense.name == "asd":
        quality = json.loads(readable(source / suspects.QUALITY).read_text())
        if f"precision_of_first_{suspects.FIRST}" not in quality["measures"]["score"]:
            path = source / suspects.QUALITY
            raise UserError(f"{path}: is of an earlier version: remove {suspects.CSV} and run ASD.py again")
        kept[suspects.QUALITY] = json.dumps(quality, indent=2) + "\n"

    checkpoint.write(out / f"{run}.pt", {key: saved[key] for key in ("epoch", "model_state_dict", "about") if key in saved})
    for name, text in kept.items():
        write_text(out / run / name, text)
    yamls = [path for path in source.glob("*.yaml") if path.name != "config.yaml"]
    newest = max(yamls, key=lambda path: path.stat().st_mtime, default=source / "config.yaml").name
    full, rest = count_batches(len(saved["epochs_in_clean_pool"]), c.undefended.batch_size, least=2)
    steps = c.semi.mixmatch.train_iteration if c.defense.name == "asd" else full + (rest > 0)
    card = {
        "attack": c.attack.name if c.attacker.poison_ratio else "none",
        "defense": c.defense.name,
        "dataset": dataset_of(c).name,
        "network": yaml.safe_load(kept["config.yaml"])["network"],
        "config": f"config/{newest}",
        "seed": c.seed.seed,
        **facts,
        "steps": c.epochs * steps,
        "minutes": round(sum(row["seconds"] for row in rows) / 60),
        **{key: tested[key] for key in SHARES},
        "sha256": sha256((out / f"{run}.pt").read_bytes()).hexdigest(),
    }
    write_text(out / f"{run}.json", json.dumps(card, indent=2) + "\n")  # last: it marks the run as complete
    return out / f"{run}.json"


def to_jsonl(rows: list[dict[str, Any]]) -> str:
    """Return rows as the text of a `metrics.jsonl`."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def readable(path: Path, remedy: str = "give the folders of a finished run") -> Path:
    """Return the path; raise `UserError` if the file does not exist."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: {remedy}")
    return path


def portable(c: Config) -> Config:
    """Return the configuration with the paths of a fresh checkout instead of those of the machine that ran it."""
    data_set = c.dataset_dir and f"./dataset/{Path(c.dataset_dir).name}"
    places = {"dataset_dir": data_set, "saved_dir": Config.saved_dir, "storage_dir": Config.storage_dir}
    return replace(c, data=replace(c.data, cache_dir=None), **places)  # type: ignore[arg-type]


if __name__ == "__main__":
    command("results.study.collect", main)
