"""All-to-all labels: poisoned images, their labels, the success rate, exported sets, and refused settings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from training import train_here

from data.attacks import iab, refool
from data.choice import draw_poisoned, label_after, poison_index
from data.poisoned_sets import export
from data.poisoned_sets.folder import read_set
from data.poisoning import build_attack, build_test_sets, poison_training_set
from data.sets import AttackContext, RawData
from data.sources import prepare
from engine import evaluation
from utils import config
from utils.config import Config
from utils.errors import UserError
from utils.kinds import POISONED

SHIFTED = "backdoor={badnets: {}, poison_ratio: 0.1, target_shift: 1}"


def world() -> RawData:
    """Random images of ten classes, read-only."""
    rng = np.random.default_rng(1)
    arrays = [
        rng.integers(0, 256, (400, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 400),
        rng.integers(0, 256, (90, 8, 8, 3), dtype=np.uint8), rng.integers(0, 10, 90),
    ]  # fmt: skip
    for array in arrays:
        array.flags.writeable = False
    return RawData(*arrays, tuple("abcdefghij"))


@pytest.fixture
def plan(tiny: Path) -> Config:
    """The tiny run with all-to-all labels: ratio 0.1, shift 1, seed 7."""
    return config.load(tiny, [SHIFTED])


# -- The labels --------------------------------------------------------------------------------------------------------


@given(labels=st.lists(st.integers(0, 9), max_size=20), shift=st.integers(1, 9), target=st.integers(0, 9))
def test_label_after(labels: list[int], shift: int, target: int) -> None:
    """Poisoned images of class y carry the target class, or (y + shift) mod C with all-to-all labels, never their own."""
    given_labels = np.array(labels, np.int64)
    assert label_after(given_labels, target, None, 10).tolist() == [target] * len(labels)
    assert label_after(given_labels, None, shift, 10).tolist() == [(y + shift) % 10 for y in labels]
    assert (label_after(given_labels, None, shift, 10) != given_labels).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 999))
def test_images_of_every_class_are_drawn(labels: list[int], ratio: float, seed: int) -> None:
    """`bernoulli` draws once for every image and excludes no class; `exact` takes int(ratio N) of all images."""
    given_labels = np.array(labels, np.int64)
    allowed, rng = label_after(given_labels, None, 1, 5) != given_labels, random.Random(seed)
    expected = [float(rng.random() < ratio) for _ in labels]
    assert draw_poisoned(allowed, ratio, seed, "bernoulli").tolist() == expected
    assert draw_poisoned(allowed, ratio, seed, "exact").sum() == int(ratio * len(labels))


def test_the_training_set(plan: Config, tmp_path: Path) -> None:
    """Poisoned images of all classes have the trigger and the label of the next class; their original labels are known, and all
    other images are unchanged."""
    raw = world()
    attack = build_attack(plan, raw)
    data = poison_training_set(plan, raw, attack, tmp_path)
    poisoned, now = data.flags == POISONED, data.images
    assert set(raw.train_labels[poisoned].tolist()) == set(range(10))
    assert np.array_equal(data.labels, np.where(poisoned, (raw.train_labels + 1) % 10, raw.train_labels))
    assert np.array_equal(data.original_labels, raw.train_labels)
    assert np.array_equal(now[~poisoned], raw.train_images[~poisoned])
    assert np.array_equal(now[poisoned], attack.apply(raw.train_images[poisoned], np.flatnonzero(poisoned), "train"))
    stored = np.load(tmp_path / "poison_idx.npy")
    assert np.array_equal(poison_index(tmp_path / "poison_idx.npy", raw.train_labels, plan), stored)


def test_every_test_image_is_triggered(plan: Config) -> None:
    """The backdoor test set has all test images, of all classes, each with the label that counts as success."""
    raw = world()
    attack = build_attack(plan, raw)
    tests = build_test_sets(plan, raw, attack)
    assert tests.clean is not None and tests.backdoor is not None and tests.origin is not None
    assert tests.origin.tolist() == list(range(90))
    assert tests.backdoor.labels.tolist() == [(y + 1) % 10 for y in raw.test_labels.tolist()]
    expected = attack.apply(raw.test_images, np.arange(90), "test")
    assert np.array_equal(tests.backdoor.images.numpy().transpose(0, 2, 3, 1), expected)


def test_success_is_the_shifted_label(plan: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """ASR counts (y + 1) mod C, RA counts y, and `clean_as_target` counts (y + 1) mod C on clean images."""
    raw = world()
    tests = build_test_sets(plan, raw, build_attack(plan, raw))
    labels = torch.from_numpy(raw.test_labels.copy())
    on_clean, on_triggered = labels.clone(), (labels + 1) % 10
    on_clean[:9], on_triggered[:18] = (labels[:9] + 1) % 10, labels[:18]
    answers = iter([on_clean, on_triggered])
    monkeypatch.setattr(evaluation, "infer", lambda *_: torch.nn.functional.one_hot(next(answers), 10).float())
    context: Any = SimpleNamespace(config=plan)
    figures, by_class = evaluation.evaluate(context, torch.nn.Identity(), tests)
    assert figures == pytest.approx(
        {"clean_accuracy": 0.9, "attack_success_rate": 0.8, "robust_accuracy": 0.2, "clean_as_target": 0.1}
    )
    assert by_class is not None and by_class.triggered is not None and by_class.successes is not None
    assert by_class.successes.tolist() == [*by_class.triggered.diagonal(1).tolist(), by_class.triggered[9, 0]]
    assert by_class.successes.sum() == 72 and by_class.triggered.diagonal().sum() == 18


# -- Attacks that depend on the target ---------------------------------------------------------------------------------


def test_reflections_may_be_of_any_class() -> None:
    """With `source: classes` Refool excludes the target class; with all-to-all labels it excludes no class."""
    labels = np.arange(50) % 10
    images = np.broadcast_to(labels[:, None, None, None].astype(np.uint8), (50, 8, 8, 3))
    raw = RawData(images, labels, images, labels, tuple("abcdefghij"))
    one, every = AttackContext(raw, 3, 10, 0, Path("no")), AttackContext(raw, None, 10, 0, Path("no"), target_shift=1)
    shown = [set(np.unique(refool.other_classes(context, 50)).tolist()) for context in (one, every)]
    assert shown == [set(range(10)) - {3}, set(range(10))]


def test_the_iab_generator_is_trained_on_shifted_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loss of a step the first tenth of the batch has the label y + 1, all other images have their own."""
    raw = world()
    seen: list[torch.Tensor] = []

    def note(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        return logits.sum()

    monkeypatch.setattr(iab.F, "cross_entropy", note)
    context = AttackContext(raw, None, 10, 0, Path("no"), target_shift=1)
    generator, mask = (iab.EncoderDecoder(channels, 2) for channels in (3, 1))
    surrogate = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    index = np.arange(50, 80)
    iab.generator_loss(iab.Settings(), context, iab.Networks(generator, mask, surrogate), index, index[::-1].copy())
    own = raw.train_labels[index]
    assert seen[0].tolist() == [*((own[:3] + 1) % 10), *own[3:]]


# -- Exported sets -----------------------------------------------------------------------------------------------------


def write(tiny: Path, out: Path, *overrides: str) -> Path:
    """Write the set of the tiny configuration."""
    export.export(config.load(tiny, overrides), out, torch.device("cpu"))
    return out


def test_an_exported_set_is_read_again(tiny: Path, tmp_path: Path) -> None:
    """set.json has the shift; the set that is read from the folder equals the one that the YAML gives directly."""
    out = write(tiny, tmp_path / "set", SHIFTED)
    described = json.loads((out / "set.json").read_text())
    assert (described["version"], described["backdoor"]["target_shift"], described["backdoor"]["target_label"]) == (2, 1, None)
    there = config.load(tiny, ["dataset=poisoned_set", f"dataset_dir={out}", "backdoor=null"])
    a, b = prepare(there, tmp_path / "a"), prepare(config.load(tiny, [SHIFTED]), tmp_path / "b")
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.train.labels, b.train.labels)
    assert a.tests.backdoor is not None and b.tests.backdoor is not None
    assert torch.equal(a.tests.backdoor.labels, b.tests.backdoor.labels)
    assert "y + 1 (all-to-all)" in a.caption and "y + 1 (all-to-all)" in b.caption
    other = config.load(tiny, ["dataset=poisoned_set", f"dataset_dir={out}", SHIFTED.replace("shift: 1", "shift: 2")])
    with pytest.raises(UserError, match=r"backdoor\.target_shift: 2: the set has 1"):
        prepare(other, tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target_shift": 2}, r"do not carry class y \+ 2"),
        ({"target_label": 3, "target_shift": None}, "do not carry class 3"),
        ({"target_label": 3}, "either target_label or target_shift"),
        ({"target_shift": None}, "either target_label or target_shift"),
        ({"target_shift": True}, "must name one attack, and"),
    ],
)
def test_a_set_that_contradicts_its_description_is_refused(
    change: dict[str, Any], complaint: str, tiny: Path, tmp_path: Path
) -> None:
    """Labels that contradict the shift, and neither or both kinds of target, are one line."""
    out = write(tiny, tmp_path / "set", SHIFTED)
    described = json.loads((out / "set.json").read_text())
    described["backdoor"] |= change
    (out / "set.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=complaint):
        read_set(out)


def test_sets_of_version_1_are_read(tiny: Path, tmp_path: Path) -> None:
    """A set.json from before all-to-all labels can be read, and the export recognizes it as the same set."""
    out = write(tiny, tmp_path / "set")
    described = json.loads((out / "set.json").read_text())
    described["version"] = 1
    del described["backdoor"]["target_shift"]
    (out / "set.json").write_text(json.dumps(described))
    assert (read_set(out).backdoor.target_label, read_set(out).backdoor.target_shift) == (3, None)
    write(tiny, out)  # found, not refused
    described["version"] = 3
    (out / "set.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="version 3"):
        read_set(out)


def test_a_run_trains_and_reports(tiny: Path) -> None:
    """ASD runs on such a set from the first epoch to the suspects; its rates are shares of all test images."""
    plan = config.load(tiny, [SHIFTED, "num_epochs=1"])
    run = train_here(plan, tiny)
    (row,) = (json.loads(line) for line in (run.log / "metrics.jsonl").read_text().splitlines())
    for key in ("clean_accuracy", "attack_success_rate", "robust_accuracy", "clean_as_target"):
        assert (row[key] * 43) == pytest.approx(round(row[key] * 43))
    assert "y + 1 (all-to-all)" in (run.log / "asd.log").read_text()
    assert (run.saved / "suspects.csv").exists()


# -- Settings ----------------------------------------------------------------------------------------------------------


def test_one_of_the_two_targets_is_used(tiny: Path) -> None:
    """Without both keys the target is class 3; a shift replaces the target of a base, and a later target replaces the shift."""
    attack = "backdoor={badnets: {}}"
    cases = {
        (): (3, None),
        ("backdoor.target_shift=2",): (None, 2),
        ("backdoor.target_shift=2", "backdoor.target_label=0"): (0, None),
        ("backdoor.target_label=null",): (3, None),
    }
    for overrides, expected in cases.items():
        b = config.load(tiny, [attack, *overrides]).attacker
        assert (b.target_label, b.target_shift) == expected
    c = config.load(REPOSITORY / "config/badnets_all_to_all.yaml")
    assert (c.attack.name, c.attacker.target_label, c.attacker.target_shift) == ("badnets", None, 1)
    assert (c.attacker.poison_ratio, c.attacker.poison_mode) == (0.1, "exact")


@pytest.mark.parametrize(
    ("backdoor", "complaint"),
    [
        ("target_label: 3, target_shift: 1", r"backdoor\.target_label: 3: target_shift is 1"),
        ("target_shift: 0", r"backdoor\.target_shift: 0: "),
        ("target_shift: 10", r"backdoor\.target_shift: 10: must be in 1\.\.9"),
        ("target_shift: 1.5", r"backdoor\.target_shift: 1\.5: "),
        ("target_label: 10", r"backdoor\.target_label: 10: must be in 0\.\.9"),
    ],
)
def test_invalid_targets_are_refused(backdoor: str, complaint: str, tiny: Path) -> None:
    """Both targets together, and a shift or target out of range, are one line with the key and its value."""
    with pytest.raises(UserError, match=complaint):
        config.load(tiny, [f"backdoor={{badnets: {{}}, {backdoor}}}"])


@pytest.mark.parametrize("attack", ["clb", "sig"])
def test_clean_label_attacks_are_refused(attack: str, tiny: Path) -> None:
    """Attacks that change no label cannot be all-to-all; SIG with changed labels can."""
    raw, shifted = world(), "target_shift: 1"
    with pytest.raises(UserError, match=rf"backdoor\.target_shift: 1: {attack} "):
        build_attack(config.load(tiny, [f"backdoor={{{attack}: {{}}, {shifted}}}"]), raw)
    build_attack(config.load(tiny, [f"backdoor={{sig: {{label: flipped}}, {shifted}}}"]), raw)
