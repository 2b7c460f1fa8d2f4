"""The demo's two YAMLs belong together."""

from __future__ import annotations

from conftest import REPOSITORY

from data.pools import per_class
from utils import config
from utils.config import Config


def shipped(name: str) -> Config:
    """Return the settings of one of the demo's runs."""
    return config.load(REPOSITORY / "config" / name)


def test_both_runs_meet_the_same_attack_with_the_same_network() -> None:
    """What is compared differs in the defense alone."""
    own, twin = shipped("demo.yaml"), shipped("demo_undefended.yaml")
    assert (own.defense, twin.defense) == ("asd", "none")
    for key in ("dataset", "transform", "backdoor", "network", "seed"):
        assert getattr(own, key) == getattr(twin, key), key


def test_stage_1_never_takes_a_whole_class() -> None:
    """It takes the easiest images of a class; as many as the class has clean ones would take in poisoned ones too."""
    c = shipped("demo.yaml")
    g = c.global_
    of_a_class = c.dataset.settings.train_size / c.num_classes
    assert g.seed_num + per_class(g.epoch_first - 1, g.n, g.t) < (1 - c.attacker.poison_ratio) * of_a_class
