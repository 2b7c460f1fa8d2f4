"""Runs of the tests in this process, and small runs of every defense."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import TINY
from torch import Tensor

import ASD
from engine.session import start
from utils import config
from utils.config import Config
from utils.run import Run, locate, open_run
from utils.runtime.machine import Machine

SMALL: dict[str, dict[str, Any]] = {  # a few epochs of every stage
    "none": {},
    "asd": {},
    "abl": {"isolation_epochs": 2, "isolation_ratio": 0.1, "finetune_epochs": 2, "unlearn_epochs": 1, "batch_size": 32},
    "nad": {"teacher_epochs": 2, "student_epochs": 2, "batch_size": 16},
    "fp": {"finetune_epochs": 1, "batch_size": 8},
    "cbd": {"biased_epochs": 2, "clean_epochs": 2, "lr_scheduler": None},
    "dbd": {
        "simclr_epochs": 2, "simclr_batch_size": 32, "head_epochs": 1, "mixmatch_epochs": 2, "projection_dim": 8,
        "simclr_transform": {"random_resize_crop": {"size": 32}, "random_horizontal_flip": {}, "random_grayscale": {"p": 0.2}},
    },
    "reference_filter": {},
    "reference_split": {},
}  # fmt: skip


def metrics_row(epoch: int, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl with all its keys: one of ASD's third stage, unless changed."""
    return {
        "epoch": epoch, "defense": "asd", "stage": "meta-split", "clean_accuracy": 0.9341, "attack_success_rate": 0.0118,
        "robust_accuracy": 0.9, "clean_as_target": 0.01, "clean_pool_size": 50, "polluted_pool_size": 50,
        "poisoned_in_clean_pool": 3, "split_tpr": 0.25, "split_fpr": 0.4896, "loss": 1.5, "loss_x": 1.0, "loss_u": 0.125,
        "lambda_u": 4.0, "learning_rate": 0.002, "seconds": 2.0,
    } | changes  # fmt: skip


def small(folder: Path, name: str, *overrides: str) -> tuple[config.Config, Path]:
    """A tiny run of a defense, and its YAML."""
    raw = TINY | {"defense": {name: SMALL[name]}, "num_epochs": 3, "saved_dir": str(folder / "saved")}
    raw |= {"storage_dir": str(folder / "storage"), "global": TINY["global"] | {"epoch_first": 1, "epoch_second": 2}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return config.load(path, overrides), path


def last(folder: Path, run: str) -> dict[str, Any]:
    """The last checkpoint of a run."""
    loaded: dict[str, Any] = torch.load(folder / "storage" / run / "checkpoint/latest_model.pt", weights_only=True)
    return loaded


def same(one: Any, two: Any) -> bool:
    """Return whether two nested containers hold equal values, seconds aside."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one if key != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two or one != one


def train_here(settings: Config, yaml_path: Path, resume: str = "") -> Run:
    """Train as `ASD.py --config YAML --resume RESUME` does; return the run."""
    run, fresh = locate(settings, yaml_path), resume == "False"
    with open_run(run, settings, fresh), ExitStack() as stack:
        session = start(settings, run, Machine(torch.device("cpu")), None if fresh else run.resume(resume), stack)
        if session:
            ASD.train(session)
    return run
