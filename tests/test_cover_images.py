"""Cover images of all attacks that have them: their number, pixels and labels, and which images they are made from."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from data.choice import draw_cover
from data.poisoning import ATTACKS, build_attack, build_test_sets, poison_training_set
from data.sets import RawData
from model.classifier import new_classifier
from utils import config, plugins
from utils.errors import UserError
from utils.kinds import CLEAN, COVER, POISONED

# The attacks with cover images, with settings that make them fast.
COVERED = {
    "adaptive_blend": "", "adaptive_patch": "", "bpp": "", "wanet": "",
    "iab": "mask_epochs: 1, generator_epochs: 1, width: 2, surrogate: {resnet18_cifar: {width: 2, blocks: 1}}",
}  # fmt: skip
TARGET = 3


def world() -> RawData:
    """300 training and 60 test images of noise in ten classes, read-only."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8), rng.integers(0, 10, 300)
    images.flags.writeable = False
    return RawData(images, labels, images[:60], labels[:60], tuple("abcdefghij"))


def test_every_attack_with_cover_images_is_tested() -> None:
    """The attacks with a setting `cover_ratio` are those tested here."""
    kinds = {name: plugins.settings(ATTACKS, name) for name in plugins.names(ATTACKS)}
    assert {name for name, kind in kinds.items() if "cover_ratio" in {f.name for f in fields(kind)}} == set(COVERED)


@pytest.mark.parametrize("ratio", [0, 0.5, 2])
@pytest.mark.parametrize("name", COVERED)
def test_poisoned_and_cover_images_are_disjoint(name: str, ratio: float, tiny: Path, tmp_path: Path) -> None:
    """Poisoned images of other classes get the trigger and the target label; `cover_ratio` times as many other images are
    altered and keep their label; the rest is unchanged. The backdoor test set has the triggered images of other classes."""
    settings = f"{name}: {{{', '.join(filter(None, (COVERED[name], f'cover_ratio: {ratio}')))}}}"
    plan = config.load(tiny, [f"backdoor={{{settings}, target_label: {TARGET}, poison_ratio: 0.1, poison_mode: exact}}"])
    raw = world()
    images, labels = raw.train_images, raw.train_labels
    attack = build_attack(plan, raw, torch.device("cpu"), new_classifier)
    data = poison_training_set(plan, raw, attack, tmp_path)
    poisoned, cover = np.flatnonzero(data.flags == POISONED), np.flatnonzero(data.flags == COVER)
    assert (len(poisoned), len(cover)) == (30, int(30 * ratio))
    assert (labels[poisoned] != TARGET).all()
    assert np.array_equal(data.labels, np.where(data.flags == POISONED, TARGET, labels))
    assert np.array_equal(data.images[data.flags == CLEAN], images[data.flags == CLEAN])
    assert np.array_equal(data.images[poisoned], attack.apply(images[poisoned], poisoned, "train"))
    assert (data.images[poisoned] != images[poisoned]).any((1, 2, 3)).all()
    if len(cover):
        assert np.array_equal(data.images[cover], attack.cover(images[cover], cover))
        assert (data.images[cover] != images[cover]).any((1, 2, 3)).all()
    backdoor, others = build_test_sets(plan, raw, attack).backdoor, np.flatnonzero(raw.test_labels != TARGET)
    assert backdoor is not None and backdoor.labels.tolist() == [TARGET] * len(others)
    expected = attack.apply(raw.test_images[others], others, "test")
    assert np.array_equal(backdoor.images.numpy().transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize("target_class", [True, False])
@pytest.mark.parametrize("name", ["adaptive_blend", "adaptive_patch"])
def test_the_target_class_can_be_excluded(name: str, target_class: bool, tiny: Path, tmp_path: Path) -> None:
    """Cover images are of the target class too, unless `cover_target_class` is false."""
    attack_yaml = f"{name}: {{cover_target_class: {str(target_class).lower()}}}"
    plan = config.load(tiny, [f"backdoor={{{attack_yaml}, target_label: {TARGET}, poison_ratio: 0.1, poison_mode: exact}}"])
    data = poison_training_set(plan, world(), build_attack(plan, world()), tmp_path)
    assert (data.flags == COVER).any()
    assert (data.original_labels[data.flags == COVER] == TARGET).any() == target_class


def test_the_seed_decides_which_images_are_cover_images() -> None:
    """Another seed draws others; the same seed the same."""
    poisoned = np.arange(100) < 10
    assert np.array_equal(draw_cover(poisoned, 2, 0), draw_cover(poisoned, 2, 0))
    assert not np.array_equal(draw_cover(poisoned, 2, 0), draw_cover(poisoned, 2, 1))


CHOOSY = "poison_ratio: 0.5, lookalike: {trigger: {wanet: {cover_ratio: 9}}, surrogate: {resnet18_cifar: {width: 2}}}"


@pytest.mark.parametrize("more", ["poison_ratio: 0.97", "poison_ratio: 0.5, iab: {cover_ratio: 9}", CHOOSY])
def test_too_many_images_are_refused_before_networks_are_trained(more: str, tiny: Path, tmp_path: Path) -> None:
    """IAB trains two networks, which may take hours, and an attack that chooses its images another one; whether there are
    enough images is checked first."""
    attack = more if "{" in more else f"iab: {{}}, {more}"
    plan = config.load(tiny, [f"backdoor={{{attack}, target_label: {TARGET}, poison_mode: exact}}", f"saved_dir={tmp_path}"])
    with pytest.raises(UserError, match="lower it"):
        poison_training_set(plan, world(), build_attack(plan, world(), torch.device("cpu"), new_classifier), tmp_path)
    assert not list(tmp_path.rglob("*.np?"))


def test_cover_images_are_drawn_among_the_allowed_images() -> None:
    """Only allowed images are drawn, without a restriction all others; too few images are an error with the ratio."""
    poisoned, allowed = np.arange(40) < 10, np.arange(40) % 2 == 0
    assert (draw_cover(poisoned, 1, 0, allowed) % 2 == 0).all() and (draw_cover(poisoned, 1, 0, allowed) >= 10).all()
    assert np.array_equal(draw_cover(poisoned, 1, 0), draw_cover(poisoned, 1, 0, np.ones(40, bool)))
    with pytest.raises(UserError, match=r"cover_ratio: 2: needs 20 cover images, but there are 15 "):
        draw_cover(poisoned, 2, 0, allowed)
    with pytest.raises(UserError, match=r"cover_ratio: 1e\+308: needs inf cover images"):
        draw_cover(poisoned, 1e308, 0)
    assert len(draw_cover(poisoned, 1.59, 0, allowed)) == 15
