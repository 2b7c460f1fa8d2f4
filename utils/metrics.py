"""The metrics of a run: their names, and the rows of `metrics.jsonl`, one per epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
# Metrics of a model on the test images, shares in 0..1 -> short names.
SHARES = {
    "clean_accuracy": "ACC", "attack_success_rate": "ASR", "robust_accuracy": "RA", "clean_as_target": "without trigger",
}  # fmt: skip


def own_figures(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that the defense has added to the row of an epoch; they come after `seconds`, which every row has."""
    keys = list(row)
    return {key: row[key] for key in keys[keys.index("seconds") + 1 :]}


def sets_of(row: dict[str, Any]) -> list[str]:
    """Return the names of the sets of training images that the defense has chosen, beside a clean pool."""
    names = [key.removesuffix("_size") for key in row.keys() - own_figures(row).keys() if key.endswith("_size")]
    return sorted(name for name in names if name not in ("clean_pool", "polluted_pool"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`.

    Raises:
        OSError, ValueError: the file cannot be read, or a line is not a JSON object.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path.name}: not every line is a JSON object")
    return rows
