"""Shared pieces: a tiny configuration that runs all three stages in seconds, and the scripts as processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from utils.logs import attach, detach

# In the background of a shell Ctrl-C is ignored, and so it would be in every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in REPOSITORY.glob("config/**/*.yaml") if path.parent.name != "sweeps")  # of ASD.py

TINY = {
    "dataset": {"shapes": {"train_size": 200, "test_size": 43}},  # 43 is no multiple of any batch
    "seed": {"seed": 7},
    "transform": {
        "train": {
            "primary": {
                "random_crop": {"size": 32, "padding": 4, "padding_mode": "reflect"},
                "random_horizontal_flip": {"p": 0.5},
            },
            "remaining": {"to_tensor": True, "normalize": {}},
        },
        "test": {"remaining": {"to_tensor": True, "normalize": {}}},
    },
    "backdoor": {"poison_ratio": 0.1, "target_label": 3, "badnets": {}},
    "network": {"resnet18_cifar": {"width": 2, "blocks": 1}},
    "num_epochs": 6,
    "loader": {"batch_size": 64},
    "semi": {
        "loader": {"batch_size": 8},
        "criterion": {"mixmatch": {"rampup_length": 6}},
        "mixmatch": {"train_iteration": 3},
    },
    "global": {"epoch_first": 2, "epoch_second": 4, "epoch_third": 6, "seed_num": 2, "t": 1, "n": 2},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only cost time."""
    torch.set_num_threads(1)


class Lines(logging.Handler):
    """Collects messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that this project logs in the block."""
    handler = Lines()
    attach(handler)
    yield handler.lines
    detach(handler)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that this project logs during the test."""
    with logged() as lines:
        yield lines


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A YAML of the tiny run whose folders lie in the test's own folder; outside config/, so the run is named `tiny`."""
    raw = TINY | {"saved_dir": str(tmp_path / "saved_data"), "storage_dir": str(tmp_path / "storage")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def run_script(
    script: str, *arguments: object, cwd: Path = REPOSITORY, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ASD.py or test.py (or any file of the repository) as a user does, on the CPU, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
