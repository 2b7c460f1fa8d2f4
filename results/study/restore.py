"""Turn a stored run of the study back into run folders, the reverse of `collect.py`, so that a sweep need not train it again.

    python -m results.study.restore --run badnets/asd --name study_table/badnets/asd --saved DIR --storage DIR

The checkpoint has the weights alone: the run can be tested, compared and started from, but not resumed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copyfile

from results.study.collect import HERE, readable
from utils import config
from utils.cli import Parser, command
from utils.errors import UserError
from utils.files import write_text
from utils.run import LATEST


def main() -> None:
    """Read the command line, write the folders."""
    parser = Parser(prog="python -m results.study.restore", description="Turn a stored run of the study back into run folders.")
    parser.add_argument("--run", required=True, help="its name in the study, e.g. badnets/asd")
    parser.add_argument("--name", required=True, help="the run's new name")
    parser.add_argument("--saved", required=True, type=Path, help="saved_dir")
    parser.add_argument("--storage", required=True, type=Path, help="storage_dir")
    parser.add_argument("--dataset-dir", help="where the data set is (default: as in the stored settings)")
    args = parser.parse_args()
    print(f"written to {restore(args.run, args.name, args.saved, args.storage, args.dataset_dir)}")


def restore(run: str, name: str, saved: Path, storage: Path, dataset_dir: str | None = None) -> Path:
    """Write `<saved>/<name>/` and `<storage>/<name>/checkpoint/` of a stored run; return the first.

    Raises:
        UserError: there is no such run, or the folder exists.
    """
    source, target, checkpoints = HERE / run, saved / name, storage / name / "checkpoint"
    c = config.load(readable(source / "config.yaml", "give a run that results/study has"))
    if target.exists() or checkpoints.exists():
        raise UserError(f"--name {name}: {target if target.exists() else checkpoints} exists: give another name")
    places = {"dataset_dir": dataset_dir or c.dataset_dir, "saved_dir": str(saved), "storage_dir": str(storage)}
    (target / "log").mkdir(parents=True)
    checkpoints.mkdir(parents=True)
    copyfile(HERE / f"{run}.pt", checkpoints / LATEST)
    for part in ("metrics.jsonl", "test.json"):
        copyfile(source / part, target / "log" / part)
    write_text(target / "config.yaml", config.to_yaml(replace(c, run=name, **places)))  # type: ignore[arg-type]
    return target


if __name__ == "__main__":
    command("results.study.restore", main)
