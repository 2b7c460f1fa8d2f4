"""A run of the tests in this process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

import ASD
from engine.session import start
from utils.config import Config
from utils.machine import Machine
from utils.run import Run, locate, open_run


def train_here(settings: Config, yaml_path: Path, resume: str = "") -> Run:
    """Train as `ASD.py --config YAML --resume RESUME` does; return the run."""
    run, fresh = locate(settings, yaml_path), resume == "False"
    with open_run(run, settings, fresh), ExitStack() as stack:
        session = start(settings, run, Machine(torch.device("cpu")), None if fresh else run.resume(resume), stack)
        if session:
            ASD.train(session)
    return run
