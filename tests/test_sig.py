"""SIG: pixel values, the stripes, and the labels in its two modes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from data.attacks.sig import Attack, Settings
from data.poisoning import build_attack, build_test_sets, poison_training_set
from data.sets import AttackContext, RawData
from utils import config
from utils.errors import UserError
from utils.kinds import CLEAN, POISONED

ROW = [0, 37, 28, -15, -40, -15, 28, 37, 0, -37, -28, 15, 40, 15, -28, -37]  # delta 40, f 6, 32 px: the first half


def make(settings: Settings, height: int = 32, width: int = 32) -> Attack:
    """The attack for images of the given size."""
    images, labels = np.zeros((1, height, width, 3), np.uint8), np.zeros(1, np.int64)
    return Attack(settings, AttackContext(RawData(images, labels, images, labels, ("one",)), 3, 10, 0, Path("nowhere")))


def noise(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Random read-only images; pure black and white among them."""
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[0, : height // 2], images[0, height // 2 :] = 0, 255
    images.flags.writeable = False
    return images


@pytest.mark.parametrize(
    ("height", "width", "delta", "f"), [(32, 32, 40, 6), (9, 21, 30, 6), (5, 64, 255, 0.7), (4, 7, 3.3, 2)]
)
def test_every_pixel_equals_the_formula(height: int, width: int, delta: float, f: float) -> None:
    """A value is the image's plus the signal's, rounded to the nearest level, within 0..255; columns count from 0."""
    images = noise(3, height, width)
    out = make(Settings(delta, f), height, width).apply(images, np.arange(3), "train")
    assert out.dtype == np.uint8 and not np.shares_memory(out, images)
    for j in range(width):
        s = delta * math.sin(2 * math.pi * j * f / width)
        added = math.floor(round(s, 9) + 0.5)
        assert np.array_equal(out[:, :, j], np.clip(images[:, :, j].astype(int) + added, 0, 255))


def test_the_published_signal() -> None:
    """On a grey image the change is the published signal with delta 40 and f 6; its mean is 25 levels."""
    grey = np.full((1, 32, 32, 3), 128, np.uint8)
    change = make(Settings()).apply(grey, np.arange(1), "test").astype(int) - 128
    assert (change == np.array([*ROW, *ROW])[:, None]).all()
    assert abs(change).mean() == 25


def test_flipped_stripes_are_shifted_stripes() -> None:
    """A flip keeps the trigger: the mirrored signal is the signal shifted by seven columns."""
    row = make(Settings()).signal[:, 0]
    assert np.array_equal(row[::-1], np.roll(row, 7))


@settings(deadline=None, max_examples=40)
@given(delta=st.floats(1, 255), f=st.floats(1, 11), level=st.integers(0, 255))
def test_no_value_leaves_its_range(delta: float, f: float, level: int) -> None:
    """No value wraps around or moves by more than delta, whatever the signal."""
    images = np.full((1, 4, 24, 3), level, np.uint8)
    out = make(Settings(delta, f), 4, 24).apply(images, np.arange(1), "train")
    assert abs(out.astype(int) - level).max() <= delta + 0.5


def test_an_image_alone_equals_the_same_image_among_others() -> None:
    """The result depends on the image only: not on index, split, other images or batch size."""
    images, attack = noise(150), make(Settings())
    out = attack.apply(images, np.arange(150), "train")
    assert np.array_equal(attack.apply(images[149:], np.array([3]), "test")[0], out[149])
    assert attack.apply(images[:0], np.arange(0), "train").shape == (0, 32, 32, 3)


# -- In a run ----------------------------------------------------------------------------------------------------------


def world() -> RawData:
    """300 training and 60 test images of ten classes."""
    images, labels = noise(300, 16, 16), np.random.default_rng(0).integers(0, 10, 300)
    return RawData(images, labels, images[:60], labels[:60], tuple("abcdefghij"))


@pytest.mark.parametrize("label", ["clean", "flipped"])
def test_which_images_and_labels_change(label: str, tiny: Path, tmp_path: Path) -> None:
    """`clean` alters int(ratio * n) images of the target class and no label; `flipped` alters and relabels images of others.

    In both modes the backdoor test set has the triggered images of the other classes.
    """
    plan = config.load(tiny, [f"backdoor.sig.label={label}", "backdoor.poison_mode=exact", "backdoor.poison_ratio=0.3"])
    raw = world()
    labels, inside = raw.train_labels, raw.train_labels == 3
    attack = build_attack(plan, raw)
    data = poison_training_set(plan, raw, attack, tmp_path)
    flags = data.flags
    poisoned, now = flags == POISONED, data.images
    assert set(flags.tolist()) == {CLEAN, POISONED}
    assert poisoned.sum() == int(0.3 * (inside.sum() if label == "clean" else 300)) > 0
    assert (labels[poisoned] == 3).all() if label == "clean" else (labels[poisoned] != 3).all()
    assert np.array_equal(data.labels, np.where(poisoned, 3, labels))
    assert np.array_equal(now[~poisoned], raw.train_images[~poisoned])
    assert np.array_equal(now[poisoned], attack.apply(raw.train_images[poisoned], np.flatnonzero(poisoned), "train"))
    backdoor, others = build_test_sets(plan, raw, attack).backdoor, np.flatnonzero(raw.test_labels != 3)
    assert backdoor is not None and backdoor.labels.tolist() == [3] * len(others)
    expected = attack.apply(raw.test_images[others], others, "test")
    assert np.array_equal(backdoor.images.numpy().transpose(0, 2, 3, 1), expected)


def test_a_target_class_without_clean_images_is_refused_with_asd(tiny: Path, tmp_path: Path) -> None:
    """At ratio 1 no seed sample of the target class is left; the error names the class and the ratio's key."""
    plan = config.load(tiny, ["backdoor={sig: {}, poison_ratio: 1.0, poison_mode: exact}"])
    raw = world()
    with pytest.raises(UserError, match=r"global\.seed_num: 2: class 3 has only 0 clean .*backdoor\.poison_ratio"):
        poison_training_set(plan, raw, build_attack(plan, raw), tmp_path)
    assert not (tmp_path / "poison_idx.npy").exists()  # with a lower ratio, as the error recommends, the run can start


@pytest.mark.parametrize("given", [{"f": 16}, {"f": 32}, {"f": 64}, {"delta": 0}, {"delta": 0.4}])
def test_a_signal_that_is_zero_everywhere_is_refused(given: dict[str, float]) -> None:
    """At a multiple of half the width all values of the sine are 0; without a trigger there is no attack."""
    with pytest.raises(UserError, match=r"backdoor\.sig: f: .*: the signal is 0 in all 32 columns: give"):
        make(Settings(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "value"), [("delta", -1), ("delta", 256), ("f", 0), ("label", "both")])
def test_settings_out_of_range_are_refused(key: str, value: object) -> None:
    """The configuration refuses amplitudes outside 0..255, the frequency 0 and unknown modes."""
    with pytest.raises(UserError, match=rf"backdoor\.sig\.{key}: '?{value}"):
        config.load(REPOSITORY / "config/sig.yaml", [f"backdoor.sig.{key}={value}"])


def test_the_shipped_yamls() -> None:
    """sig.yaml alters 80 % of the target class, sig_flipped.yaml 5 % of all images."""
    clean, flipped = (config.load(REPOSITORY / f"config/{name}.yaml") for name in ("sig", "sig_flipped"))
    assert (clean.attack.settings, clean.attacker.poison_ratio) == (Settings(40, 6, "clean"), 0.8)
    assert (flipped.attack.settings, flipped.attacker.poison_ratio) == (Settings(40, 6, "flipped"), 0.05)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
def test_a_clean_label_run_finds_its_poisoned_images_again(mode: str, tiny: Path, tmp_path: Path) -> None:
    """The stored index is one of images of the target class, of which the ratio is a share; another class is refused."""
    plan = config.load(tiny, [f"backdoor={{sig: {{label: clean}}, poison_ratio: 0.3, poison_mode: {mode}}}"])
    raw = world()
    attack = build_attack(plan, raw)
    first, again = (poison_training_set(plan, raw, attack, tmp_path) for _ in range(2))
    assert np.array_equal(first.flags, again.flags) and np.array_equal(first.images, again.images)
    index = (first.flags == POISONED).astype(float)
    index[[np.flatnonzero(index)[0], np.flatnonzero(raw.train_labels == 4)[0]]] = 0, 1
    np.save(tmp_path / "poison_idx.npy", index)
    with pytest.raises(UserError, match="poisons images of other classes than 3"):
        poison_training_set(plan, raw, attack, tmp_path)
