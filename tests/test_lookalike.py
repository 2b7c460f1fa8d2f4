"""Look-alike: the images that the attacker chooses, the trigger of another attack, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from data.attacks._surrogate import load_surrogate
from data.choice import choose_poisoned
from data.loading import load_raw
from data.poisoned_sets.export import make
from data.poisoning import build_attack, build_test_sets, poison_training_set
from data.sets import RawData, no_network
from model.classifier import new_classifier
from utils import config
from utils.config import Config
from utils.errors import UserError
from utils.kinds import COVER, POISONED

TARGET, CLASSES, COUNT = 1, 3, 240
LOOKALIKE = (
    "lookalike: {share: 1.0, trigger: {badnets: {}}, epochs: 3, batch_size: 16, "
    "surrogate: {resnet18_cifar: {width: 4, blocks: 1}}}"
)


def world() -> RawData:
    """Noise of three levels of brightness, one for each class; the last 20 images look like class 1 but are of class 2."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, COUNT)
    level = 60 * labels
    labels[-20:], level[-20:] = 2, 60 * TARGET
    images = (rng.integers(0, 80, (COUNT, 16, 16, 3)) + level[:, None, None, None]).astype(np.uint8)
    images.flags.writeable = False
    return RawData(images, labels, images[:60], labels[:60], ("a", "b", "c"))


def plan_of(tiny: Path, attack: str = LOOKALIKE, more: str = "poison_mode: exact") -> Config:
    """Settings with a tenth of the images poisoned, or others."""
    target = "" if "target" in more else f"target_label: {TARGET}, "
    ratio = "" if "poison_ratio" in more else "poison_ratio: 0.08, "
    return config.load(tiny, [f"num_classes={CLASSES}", f"backdoor={{{attack}, {target}{ratio}{more}}}"])


def attack_of(plan: Config, tmp_path: Path, network: Any = new_classifier) -> Any:
    """The configured attack on the small world, its assets in a folder of their own."""
    return build_attack(replace(plan, saved_dir=str(tmp_path)), world(), torch.device("cpu"), network)


def test_the_images_that_resemble_the_target_class_are_poisoned(tiny: Path, tmp_path: Path) -> None:
    """Poisoned are exactly the images of other classes whose surrogate loss for the target label is lowest, by a plain sort;
    most of the 20 look-alikes are among the first 19."""
    plan, raw = plan_of(tiny), world()
    attack = attack_of(plan, tmp_path)
    network = load_surrogate("lookalike", attack.settings, attack.context)
    ranked = []
    for i in range(COUNT):
        if raw.train_labels[i] != TARGET:
            with torch.no_grad():
                logits = network(torch.from_numpy(raw.train_images[i : i + 1].copy()).permute(0, 3, 1, 2).float() / 255)
            ranked.append((torch.nn.functional.cross_entropy(logits, torch.tensor([TARGET])).item(), i))
    expected = {i for _, i in sorted(ranked)[:19]}
    index = choose_poisoned(plan, raw.train_labels, attack.clean_label, attack.selection_scores)
    assert index.dtype == np.float64 and set(np.flatnonzero(index)) == expected
    assert sum(i >= COUNT - 20 for i in expected) >= 15


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_others_are_drawn_at_random(tiny: Path, tmp_path: Path, share: float) -> None:
    """Of the poisoned images `share` are the first in the order of resemblance, but for those that are drawn anyway. The others
    are drawn by the seed from all images of other classes, and a larger number of images contains a smaller one."""
    plan = plan_of(tiny, LOOKALIKE.replace("share: 1.0", f"share: {share}"), "poison_mode: exact, poison_ratio: 0.2")
    attack = attack_of(plan, tmp_path)
    labels, losses = world().train_labels, attack.losses()
    index = choose_poisoned(plan, labels, False, attack.selection_scores)
    chosen = set(np.flatnonzero(index))
    order = [int(i) for i in np.argsort(losses, kind="stable") if labels[i] != TARGET]
    first = next(k for k, i in enumerate(order) if i not in chosen)  # so many of the first are all poisoned
    others = [order.index(i) for i in chosen if i not in order[:first]]
    assert len(chosen) == 48 and first >= 48 * share - 1
    assert len(others) == pytest.approx(48 * (1 - share), abs=6 + 48 * share * 0.35)
    assert np.mean(others) > len(order) / 3  # from all over the order
    fewer = choose_poisoned(replace_ratio(plan, 0.1), labels, False, attack.selection_scores)
    assert set(np.flatnonzero(fewer)) < chosen
    other_seed = replace(plan, seed=replace(plan.seed, seed=99))
    assert (
        set(np.flatnonzero(choose_poisoned(other_seed, labels, False, attack_of(other_seed, tmp_path).selection_scores)))
        != chosen
    )


def replace_ratio(plan: Config, ratio: float) -> Config:
    """The settings with another ratio."""
    return replace(plan, backdoor=replace(plan.attacker, poison_ratio=ratio))


def test_the_trigger_is_that_of_the_other_attack(tiny: Path, tmp_path: Path) -> None:
    """Poisoned and triggered test images are those that the other attack makes of the same images."""
    plan, raw = plan_of(tiny), world()
    attack = attack_of(plan, tmp_path)
    plain = attack_of(plan_of(tiny, "badnets: {}"), tmp_path)
    train = poison_training_set(plan, raw, attack, tmp_path)
    poisoned = np.flatnonzero(train.flags == POISONED)
    assert len(poisoned) == 19 and (train.labels[poisoned] == TARGET).all()
    assert np.array_equal(train.images[poisoned], plain.apply(raw.train_images[poisoned], poisoned, "train"))
    ours, theirs = build_test_sets(plan, raw, attack), build_test_sets(plan, raw, plain)
    assert ours.backdoor is not None and theirs.backdoor is not None
    assert torch.equal(ours.backdoor.images, theirs.backdoor.images)
    assert np.array_equal(np.load(tmp_path / "poison_idx.npy"), train.flags == POISONED)


def test_a_trigger_with_cover_images_keeps_them(tiny: Path, tmp_path: Path) -> None:
    """The cover images of the other attack are made too, from images that are not poisoned."""
    attack = "lookalike: {trigger: {wanet: {cover_ratio: 1}}, epochs: 1, surrogate: {resnet18_cifar: {width: 2, blocks: 1}}}"
    plan = plan_of(tiny, attack)
    train = poison_training_set(plan, world(), attack_of(plan, tmp_path), tmp_path)
    assert np.bincount(train.flags).tolist() == [COUNT - 38, 19, 19]


def test_a_trigger_whose_cover_images_leave_out_the_target_class(tiny: Path, tmp_path: Path) -> None:
    """`cover_target_class: false` of the other attack holds here too."""
    trigger = "adaptive_blend: {cover_target_class: false, cover_ratio: 4}"
    plan = plan_of(
        tiny, f"lookalike: {{trigger: {{{trigger}}}, epochs: 1, surrogate: {{resnet18_cifar: {{width: 2, blocks: 1}}}}}}"
    )
    train = poison_training_set(plan, world(), attack_of(plan, tmp_path), tmp_path)
    cover = train.original_labels[train.flags == COVER]
    assert len(cover) == 4 * 19 and (cover != TARGET).all()


def test_an_exported_set_is_that_of_a_run(tiny: Path, tmp_path: Path) -> None:
    """`data.poison` poisons the images that the attacker chooses, not random ones."""
    attack = LOOKALIKE.replace("epochs: 3", "epochs: 1")
    given = [f"backdoor={{{attack}, target_label: {TARGET}, poison_ratio: 0.08, poison_mode: exact}}", f"saved_dir={tmp_path}"]
    plan = config.load(tiny, given)
    made, raw = make(plan, torch.device("cpu"), new_classifier), load_raw(plan)
    train = poison_training_set(plan, raw, build_attack(plan, raw, torch.device("cpu"), new_classifier), tmp_path)
    assert np.array_equal(made.parts["train"].flags, train.flags) and np.array_equal(made.parts["train"].images, train.images)


def test_with_all_to_all_labels_each_image_is_ranked_by_its_own_label(tiny: Path, tmp_path: Path) -> None:
    """An image of class y is ranked by its loss with y + 1, so that those that look like class 1 precede others of class 0."""
    plan = plan_of(tiny, more="poison_mode: exact, target_shift: 2")  # class 2 becomes class 1
    values = attack_of(plan, tmp_path).losses()
    labels = world().train_labels
    assert values.shape == (COUNT,)
    assert np.median(values[-20:]) < np.quantile(values[:-20][labels[:-20] == 2], 0.1)


def test_poison_mode_bernoulli_is_refused(tiny: Path, tmp_path: Path) -> None:
    """poison_mode must be `exact`, as the attacker chooses the images; that, and a wrong number, is refused before training."""
    for more, complaint in (
        ("poison_mode: bernoulli", r"backdoor\.poison_mode: bernoulli: .*exact"),
        ("poison_mode: exact, poison_ratio: 0.9", r"backdoor\.poison_ratio: 0\.9: needs 216 images to poison"),
        ("poison_mode: exact, poison_ratio: 0.001", r"backdoor\.poison_ratio: 0\.001: poisons none"),
    ):
        plan = plan_of(tiny, more=more)
        attack = attack_of(plan, tmp_path)
        with pytest.raises(UserError, match=complaint):
            poison_training_set(plan, world(), attack, tmp_path)
    assert not list(tmp_path.rglob("*.np?"))  # neither poison_idx.npy nor a trained surrogate


@pytest.mark.parametrize("trigger", ["lookalike", "clb", "sig"])
def test_a_trigger_without_changed_labels_is_refused(tiny: Path, tmp_path: Path, trigger: str) -> None:
    """The other attack must change labels, and must be another one."""
    with pytest.raises(UserError, match=rf"backdoor\.lookalike\.trigger: {trigger}: .*changes labels") as caught:
        attack_of(plan_of(tiny, f"lookalike: {{trigger: {{{trigger}: {{}}}}}}"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trigger", "key"),
    [
        ("badnets: {trigger_path: nowhere.png}", "backdoor.lookalike.trigger.badnets.trigger_path"),
        ("iab: {surrogate: {resnet18_cifar: {num_classes: 7}}}", "backdoor.lookalike.trigger.iab.surrogate.resnet18_cifar."),
    ],
)
def test_errors_of_the_trigger_name_its_keys(tiny: Path, tmp_path: Path, trigger: str, key: str) -> None:
    """The settings of the other attack are named as they are in the YAML, below `lookalike`."""
    with pytest.raises(UserError, match=re.escape(key)) as error:
        attack_of(plan_of(tiny, f"lookalike: {{trigger: {{{trigger}}}}}"), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 3, 5, 11])
def test_the_share_is_rounded_down(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Of any number of poisoned images at least the share, rounded down to whole images, are those of lowest loss."""
    plan = plan_of(tiny, LOOKALIKE.replace("share: 1.0", "share: 0.5"))
    attack, losses = attack_of(plan, tmp_path), np.random.default_rng(count).random(COUNT)
    monkeypatch.setattr(attack, "losses", lambda: losses)
    may = np.flatnonzero(world().train_labels != TARGET)
    easiest = set(may[np.argsort(losses[may])][:count].tolist())
    chosen = may[np.argsort(attack.selection_scores()[may], kind="stable")[:count]]
    assert len(easiest & set(chosen.tolist())) >= count // 2


def test_the_seed_draws_the_others(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same ranking by the surrogate, another seed draws other images."""
    plan, found = plan_of(tiny, LOOKALIKE.replace("share: 1.0", "share: 0.5")), []
    for seed in (7, 99):
        attack = attack_of(replace(plan, seed=replace(plan.seed, seed=seed)), tmp_path)
        monkeypatch.setattr(attack, "losses", lambda: np.arange(COUNT, dtype=np.float64))
        found.append(attack.selection_scores())
    assert not np.array_equal(*found)


def test_no_surrogate_without_poisoned_images(tiny: Path, tmp_path: Path) -> None:
    """Testing a checkpoint, and training without an attack, need no surrogate."""
    for ratio in (0.08, 0):
        plan = plan_of(tiny, more=f"poison_mode: exact, poison_ratio: {ratio}")
        attack = attack_of(plan, tmp_path, no_network)
        build_test_sets(plan, world(), attack)
    assert poison_training_set(plan, world(), attack, tmp_path).flags.sum() == 0
    assert not (tmp_path / "assets").exists()


def test_the_shipped_yaml() -> None:
    """config/lookalike.yaml poisons exactly 5 % with BadNets' trigger; the rest is the paper's run."""
    plan, base = (config.load(REPOSITORY / "config" / f"{name}.yaml") for name in ("lookalike", "baseline_asd"))
    assert (plan.attacker.poison_ratio, plan.attacker.poison_mode) == (0.05, "exact")
    assert plan.attack.name == "lookalike" and plan.attack.settings.trigger.name == base.attack.name
    assert plan.optimizer == base.optimizer and plan.global_ == base.global_
