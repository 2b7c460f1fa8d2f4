"""The demo's two YAML files belong together, and the stored results are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from data.pools import per_class
from model.optimizer import build_optimizer, build_scheduler
from utils import config
from utils.config import Config

RESULTS = REPOSITORY / "results" / "demo"
SEEDS = sorted(RESULTS.glob("*/seed*"))  # avx2/seed100, ...
YAML = {"asd": "demo.yaml", "none": "demo_undefended.yaml"}


def shipped(defense: str) -> Config:
    """Return the settings of one of the demo's runs."""
    return config.load(REPOSITORY / "config" / YAML[defense])


def rows(folder: Path, defense: str) -> list[dict[str, Any]]:
    """Return the epochs of a stored `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / f"{defense}.jsonl").read_text().splitlines()]


def learning_rates(c: Config) -> list[float]:
    """Return the learning rate of each epoch."""
    stage = c.stages[0]
    optimizer = build_optimizer(stage.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    scheduler, rates = build_scheduler(stage.lr_scheduler, optimizer, c.num_epochs), []
    for _ in range(c.num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


def test_both_runs_meet_the_same_attack_with_the_same_network() -> None:
    """The two compared runs differ only in the defense."""
    own, twin = shipped("asd"), shipped("none")
    assert (own.defense.name, twin.defense.name) == ("asd", "none")
    for key in ("dataset", "transform", "backdoor", "network", "seed"):
        assert getattr(own, key) == getattr(twin, key), key


def test_stage_1_never_takes_a_whole_class() -> None:
    """Stage 1 takes the easy images of a class; a pool as large as the class would include the poisoned ones."""
    c = shipped("asd")
    g = c.global_
    of_a_class = c.dataset.settings.train_size / c.num_classes
    largest = g.seed_num + per_class(g.epoch_first - 1, g.n, g.t)
    assert largest < (1 - c.attacker.poison_ratio) * of_a_class


def test_five_seeds_are_kept() -> None:
    """There are five seeds for each kind of processor: a single run could be luck."""
    for kind in ("avx2", "avx512"):
        assert sum(folder.parent.name == kind for folder in SEEDS) >= 5


@pytest.mark.parametrize("folder", SEEDS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_the_kept_runs_are_of_the_shipped_settings(folder: Path) -> None:
    """If the demo's length, stages or learning rates change, its stored results must be replaced."""
    for defense in YAML:
        c, kept = shipped(defense), rows(folder, defense)
        assert [row["stage"] for row in kept] == [c.stage(epoch) for epoch in range(c.num_epochs)]
        assert [row["learning_rate"] for row in kept] == pytest.approx(learning_rates(c))


@pytest.mark.parametrize("folder", SEEDS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_the_demo_shows_attack_and_defense_with_every_seed(folder: Path) -> None:
    """The attack works without a defense; with ASD it fails at nearly the same accuracy, and the suspects are poisoned."""
    none, asd = rows(folder, "none")[-1], rows(folder, "asd")[-1]
    quality = json.loads((folder / "suspects.json").read_text())
    assert none["attack_success_rate"] >= 0.95
    assert asd["attack_success_rate"] <= 0.03
    assert asd["clean_accuracy"] >= none["clean_accuracy"] - 0.02
    assert quality["measures"]["score"]["auroc"] >= 0.99
