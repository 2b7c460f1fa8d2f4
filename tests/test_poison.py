"""Which images are poisoned, `poison_idx.npy`, and the poisoned image sets."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.attack import AttackBase
from data.choice import draw_poisoned, keep_index, poison_index
from data.loading import load_raw
from data.poisoned_sets.export import export
from data.poisoning import ATTACKS, build_attack, build_test_sets, poison_training_set
from data.seeds import draw_seed_samples
from data.sets import PoisonedData, RawData
from data.sources import from_attack, prepare, prepare_tests
from utils import config, plugins
from utils.config import Config
from utils.errors import UserError
from utils.kinds import CLEAN, POISONED
from utils.runtime.machine import Machine

LABELS = np.random.default_rng(0).integers(0, 10, 400)
TRIGGER = [(4, 4), (4, 5), (5, 4), (5, 5)]


def world(train: int = 400, test: int = 90, side: int = 8) -> RawData:
    """Random images, read-only, so that writing to them is an error."""
    rng = np.random.default_rng(1)
    arrays = [
        rng.integers(0, 256, (train, side, side, 3), dtype=np.uint8), LABELS[:train].copy(),
        rng.integers(0, 256, (test, side, side, 3), dtype=np.uint8), rng.integers(0, 10, test),
    ]  # fmt: skip
    for array in arrays:
        array.flags.writeable = False
    return RawData(*arrays, tuple("abcdefghij"))


def poisoned(plan: Config, raw: RawData, folder: Path) -> PoisonedData:
    """The data of a run in that folder."""
    return from_attack(plan, raw, build_attack(plan, raw), folder)


def loop(labels: list[int], target: int, ratio: float, seed: int) -> list[float]:
    """The rule of the authors' code as a loop: one draw for every image, in order."""
    rng, flags = random.Random(seed), []
    for label in labels:
        drawn = rng.random() < ratio
        flags.append(1.0 if drawn and label != target else 0.0)
    return flags


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 4), st.floats(0, 1), st.integers(0, 2**40))
def test_poisoned_images_equal_those_of_the_authors_code(labels: list[int], target: int, ratio: float, seed: int) -> None:
    """The same seed poisons the same images as in the authors' code: one draw per image, including the target class."""
    index = draw_poisoned(np.array(labels, np.int64) != target, ratio, seed, "bernoulli")
    assert index.dtype == np.float64
    assert index.shape == (len(labels),)
    assert index.tolist() == loop(labels, target, ratio, seed)


def test_poisoned_share_of_a_large_set() -> None:
    """With the paper's settings about 4.5 % of 50,000 images are poisoned: 5 % of the nine other classes."""
    labels = np.arange(50_000) % 10
    count = draw_poisoned(labels != 3, 0.05, 100, "bernoulli").sum()
    assert abs(count - 2250) < 5 * (45_000 * 0.05 * 0.95) ** 0.5


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 4), st.floats(0, 1), st.integers(0, 999))
def test_exact_mode_poisons_an_exact_count_outside_the_target_class(
    labels: list[int], target: int, ratio: float, seed: int
) -> None:
    """`poison_mode: exact` poisons int(ratio * N) images of other classes; if there are fewer, it is an error."""
    others, count = sum(label != target for label in labels), int(ratio * len(labels))
    if count > others:
        with pytest.raises(UserError, match=rf"needs {count} images to poison, but {others} are of other classes"):
            draw_poisoned(np.array(labels) != target, ratio, seed, "exact")
        return
    index = draw_poisoned(np.array(labels) != target, ratio, seed, "exact")
    assert set(index.tolist()) <= {0.0, 1.0}
    assert index.sum() == count
    assert all(label != target for label, flag in zip(labels, index, strict=True) if flag)
    assert index.tolist() == draw_poisoned(np.array(labels) != target, ratio, seed, "exact").tolist()


def test_exact_mode_reaches_every_image_and_depends_on_the_seed() -> None:
    """Over many seeds each image of the other classes is poisoned about equally often."""
    labels = np.array([0, 1, 1, 1, 0, 2, 2, 2, 1, 2])
    times = sum(draw_poisoned(labels != 0, 0.4, seed, "exact") for seed in range(1000))
    assert np.all(np.where(labels == 0, times == 0, np.abs(times - 500) < 80))


# -- The stored file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tiny: Path) -> Config:
    """The tiny run: ratio 0.1, target 3, seed 7, bernoulli."""
    return config.load(tiny)


def stored_index(path: Path, labels: np.ndarray, plan: Config) -> np.ndarray:
    """The poisoned images of a run, which are stored as the run does it."""
    index = poison_index(path, labels, plan)
    keep_index(path, index)
    return index


def test_poison_index_is_stored_as_float64_of_0_and_1(plan: Config, tmp_path: Path) -> None:
    """poison_idx.npy has the format of the authors' code, so that either program can use the other's file."""
    path = tmp_path / "run" / "poison_idx.npy"
    index = stored_index(path, LABELS, plan)
    stored = np.load(path, allow_pickle=False)
    assert stored.dtype == np.float64
    assert stored.shape == (400,)
    assert stored.tolist() == index.tolist() == loop(LABELS.tolist(), 3, 0.1, 7)
    assert [p.name for p in path.parent.iterdir()] == ["poison_idx.npy"]  # no temporary file remains


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.uint8, bool])
def test_a_stored_index_is_used_instead_of_drawing(plan: Config, tmp_path: Path, kind: Any) -> None:
    """A file of an earlier run, even of another seed or number type, determines the poisoned images and is not changed."""
    path = tmp_path / "poison_idx.npy"
    other = np.array(loop(LABELS.tolist(), 3, 0.1, 12345))
    assert other.tolist() != loop(LABELS.tolist(), 3, 0.1, 7)
    np.save(path, other.astype(kind))
    before = path.read_bytes()
    index = stored_index(path, LABELS, plan)
    assert index.dtype == np.float64
    assert index.tolist() == other.tolist()
    assert path.read_bytes() == before


def refused(path: Path, plan: Config, labels: np.ndarray = LABELS) -> str:
    """Return the error, one line that names the file and a remedy."""
    with pytest.raises(UserError) as caught:
        stored_index(path, labels, plan)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert "--resume False" in text
    return text


def marked(*indices: int, value: float = 1) -> np.ndarray:
    """A valid index with some entries changed to `value`."""
    index = np.array(loop(LABELS.tolist(), 3, 0.1, 7))
    index[list(indices)] = value
    return index


OF_TARGET = int(np.flatnonzero(LABELS == 3)[0])


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (marked()[:399], r"shape (399,): the training set has 400 images"),
        (np.append(marked(), 0), r"shape (401,)"),
        (marked()[:, None], r"shape (400, 1)"),
        (np.float64(1), r"shape ()"),
        (marked()[:0], r"shape (0,)"),
        (marked(5, value=2), "values other than 0 and 1"),
        (marked(5, value=0.5), "values other than 0 and 1"),
        (marked(5, value=-1), "values other than 0 and 1"),
        (marked(5, value=np.nan), "values other than 0 and 1"),
        (marked(5, value=np.inf), "values other than 0 and 1"),
        (marked().astype(complex), "values other than 0 and 1"),
        (marked().astype(str), "values other than 0 and 1"),
        (marked(OF_TARGET), "poisons images of the target class 3"),
        (np.zeros(400), "0 poisoned images, but backdoor.poison_ratio 0.1"),
        (np.where(LABELS == 3, 0.0, 1.0), "backdoor.poison_ratio 0.1"),
        (np.array(loop(LABELS.tolist(), 3, 0.3, 7)), "backdoor.poison_ratio 0.1"),
    ],
)
def test_a_stored_index_that_does_not_fit_is_refused(plan: Config, tmp_path: Path, array: Any, complaint: str) -> None:
    """A wrong length, shape, value, target class or ratio is one line with file, reason and remedy; the file is not changed."""
    path = tmp_path / "poison_idx.npy"
    np.save(path, array)
    before = path.read_bytes()
    assert complaint in refused(path, plan)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", [-1, 1])
def test_exact_mode_accepts_the_exact_count_only(tiny: Path, tmp_path: Path, wrong: int) -> None:
    """With `poison_mode: exact` a stored file must have exactly int(ratio * N) poisoned images."""
    exact = config.load(tiny, ["backdoor.poison_mode=exact"])
    path = tmp_path / "poison_idx.npy"
    index = stored_index(path, LABELS, exact)
    assert index.sum() == 40
    assert stored_index(path, LABELS, exact).tolist() == index.tolist()
    changed = index.copy()
    changed[np.flatnonzero((index == (wrong < 0)) & (LABELS != 3))[0]] = wrong > 0
    assert changed.sum() == 40 + wrong
    np.save(path, changed)
    assert "about 40" in refused(path, exact)


@pytest.mark.parametrize("seed", range(20))
def test_a_drawn_index_is_never_refused_for_its_count(plan: Config, tmp_path: Path, seed: int) -> None:
    """The check of the ratio allows for random variation: an index drawn with any seed is accepted."""
    path = tmp_path / "poison_idx.npy"
    np.save(path, np.array(loop(LABELS.tolist(), 3, 0.1, seed)))
    stored_index(path, LABELS, plan)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x93NUMPY",
        b"PK\x03\x04 not an archive",
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117)
        + b"\n",
        b"\x93NUMPY\x01\x00\xff\xff" + b" " * 0xFFFF,
        pickle.dumps([0.0] * 400),
        pickle.dumps(np.zeros(400)),
    ],
)
def test_a_stored_index_that_is_not_an_array_file_is_refused(plan: Config, tmp_path: Path, content: bytes) -> None:
    """Empty files, other formats, pickles and absurdly large arrays give the same error, one line."""
    path = tmp_path / "poison_idx.npy"
    path.write_bytes(content)
    assert "not an array of numbers" in refused(path, plan)


def test_an_archive_of_arrays_is_refused(plan: Config, tmp_path: Path) -> None:
    """An .npz file with the name of the index is refused as well."""
    with open(tmp_path / "poison_idx.npy", "wb") as file:
        np.savez(file, index=marked())
    refused(tmp_path / "poison_idx.npy", plan)


def test_a_truncated_index_is_refused(plan: Config, tmp_path: Path) -> None:
    """A file truncated at any byte is refused."""
    path = tmp_path / "poison_idx.npy"
    np.save(path, marked())
    whole = path.read_bytes()
    for length in [*range(0, 140), *range(140, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, plan)


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_index_is_used_only_if_it_is_valid(at: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whichever byte is changed, the file is refused in one line or is still a valid index."""
    folder = tmp_path_factory.getbasetemp()
    path, yaml = folder / "damaged.npy", folder / "damaged.yaml"
    yaml.write_text(
        "backdoor: {badnets: {}, poison_ratio: 0.1}\nnetwork: resnet18_cifar\ndataset: shapes\n"
        "transform: {train: {remaining: {to_tensor: true}}, test: {remaining: {to_tensor: true}}}\n"
    )
    np.save(path, marked())
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    try:
        index = stored_index(path, LABELS, config.load(yaml))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert set(index.tolist()) <= {0.0, 1.0} and not index[LABELS == 3].any()


class Bait:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["array of objects", "bare pickle"])
def test_a_malicious_index_runs_no_code(plan: Config, tmp_path: Path, form: str) -> None:
    """A poison_idx.npy with a pickle inside is refused, and the code in it does not run."""
    path, trace = tmp_path / "poison_idx.npy", tmp_path / "code ran"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Bait(trace)))
    else:
        array = np.empty(400, object)
        array[0] = Bait(trace)
        np.save(path, array, allow_pickle=True)
    refused(path, plan)
    assert not trace.exists()
    np.load(path, allow_pickle=True)
    assert trace.exists()  # the bait works where pickles are allowed


# -- The image sets ----------------------------------------------------------------------------------------------------


def test_poisoned_training_images_differ_by_the_trigger_only(plan: Config, tmp_path: Path) -> None:
    """A poisoned image has the trigger and the target label; all other pixels, images and the raw data are unchanged."""
    raw = world()
    before = raw.train_images.copy(), raw.train_labels.copy()
    data = poisoned(plan, raw, tmp_path)
    flags = loop(raw.train_labels.tolist(), 3, 0.1, 7)
    assert 0 < sum(flags) < 400
    colors = {(4, 4): (180, 249, 112), (4, 5): (155, 50, 126), (5, 4): (234, 82, 68), (5, 5): (187, 201, 219)}
    for i, flag in enumerate(flags):
        expected = before[0][i].copy()
        if flag:
            for at, color in colors.items():
                expected[at] = color
        assert np.array_equal(data.train.images[i].numpy().transpose(1, 2, 0), expected)
        assert int(data.train.labels[i]) == (3 if flag else before[1][i])
        assert int(data.ground_truth.flags[i]) == (POISONED if flag else CLEAN)
    assert data.ground_truth.original_labels.tolist() == before[1].tolist()
    assert data.ground_truth.poisoned().tolist() == [bool(flag) for flag in flags]
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert np.array_equal(raw.train_images, before[0]) and np.array_equal(raw.train_labels, before[1])
    shown = [i for i, flag in enumerate(flags) if flag][: data.examples.shape[1]]
    assert np.array_equal(data.examples[0], before[0][shown])
    assert np.array_equal(data.examples[1], data.train.images[shown].numpy().transpose(0, 2, 3, 1))


def test_ratio_0_poisons_nothing(tiny: Path, tmp_path: Path) -> None:
    """`poison_ratio: 0` trains on the clean set and tests on clean images only."""
    plan, raw = config.load(tiny, ["backdoor.poison_ratio=0.0"]), world()
    data = poisoned(plan, raw, tmp_path)
    assert not data.ground_truth.poisoned().any()
    assert np.array_equal(data.train.images.numpy().transpose(0, 2, 3, 1), raw.train_images)
    assert data.train.labels.tolist() == raw.train_labels.tolist()
    assert data.examples.shape[1] == 0
    tests = data.tests
    assert len(tests.clean) == len(raw.test_labels) and tests.backdoor is None and tests.origin is None


def test_poisoning_again_from_the_stored_file_gives_the_same_set(plan: Config, tiny: Path, tmp_path: Path) -> None:
    """A resumed run, which finds poison_idx.npy, has the same training set, even if its seed is changed."""
    raw = world()
    first = poisoned(plan, raw, tmp_path)
    other = config.load(tiny, ["seed.seed=8"])
    again = poisoned(other, raw, tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert torch.equal(first.ground_truth.flags, again.ground_truth.flags)


def test_backdoor_test_set_leaves_out_the_target_class(plan: Config, tmp_path: Path) -> None:
    """The backdoor test set has every test image of another class once, in order, triggered and labeled as the target; the
    clean test set has the raw images."""
    raw = world()
    before = raw.test_images.copy()
    tests = build_test_sets(plan, raw, build_attack(plan, raw))
    others = [i for i, label in enumerate(raw.test_labels.tolist()) if label != 3]
    assert 0 < len(others) < 90
    assert len(tests.backdoor) == len(others)
    assert tests.backdoor.labels.tolist() == [3] * len(others)
    for image, i in zip(tests.backdoor.images.numpy(), others, strict=True):
        changed = np.argwhere((image.transpose(1, 2, 0) != before[i]).any(2))
        assert [tuple(at) for at in changed] == TRIGGER  # in this noise no pixel equals the trigger's color
    assert np.array_equal(tests.clean.images.numpy().transpose(0, 2, 3, 1), before)
    assert tests.clean.labels.tolist() == raw.test_labels.tolist()
    assert np.array_equal(raw.test_images, before)


def test_a_test_set_of_the_target_class_alone_is_refused(plan: Config, tmp_path: Path) -> None:
    """Without an image of another class there is no success rate, which is an error."""
    raw = world()
    only = RawData(raw.train_images, raw.train_labels, raw.test_images, np.full(90, 3), raw.class_names)
    with pytest.raises(UserError, match=r"backdoor\.target_label: 3 \(d\): every test image is of that class"):
        build_test_sets(plan, only, build_attack(plan, only))


@pytest.mark.parametrize("name", plugins.names(ATTACKS))
def test_no_attack_is_built_where_its_success_cannot_be_measured(tiny: Path, tmp_path: Path, name: str) -> None:
    """Without test images, or with images of the target class alone, training, testing and `python -m data.poison` are refused
    before the attack trains a network."""
    label = load_raw(config.load(tiny)).test_labels[0]
    plan = config.load(tiny, ["data.test_limit=1", f"backdoor={{{name}: {{}}, target_label: {label}}}"])
    device = torch.device("cpu")
    for work in (
        lambda: prepare(plan, tmp_path / "run", Machine(device)),
        lambda: prepare_tests(plan, device),
        lambda: export(plan, tmp_path / "set", device),
    ):
        with pytest.raises(UserError, match="every test image is of that class"):
            work()
    raw = world()
    with pytest.raises(UserError, match="no test images"):
        build_attack(plan, replace(raw, test_images=raw.test_images[:0], test_labels=raw.test_labels[:0]), device)
    assert not (tmp_path / "saved_data" / "assets").exists() and not (tmp_path / "set").exists()


@pytest.mark.parametrize("seed", [0, 7, 100])
@pytest.mark.parametrize("ratio", [0.1, 0.6])
def test_seed_samples_of_a_poisoned_set_are_clean_and_the_originals(
    tiny: Path, tmp_path: Path, seed: int, ratio: float
) -> None:
    """The seed samples are those of the authors' code; the attacker has not changed them or their labels."""
    plan, raw = config.load(tiny, [f"seed.seed={seed}", f"backdoor.poison_ratio={ratio}"]), world()
    data = poisoned(plan, raw, tmp_path)
    drawn = draw_seed_samples(data.train.labels, data.ground_truth, 10, 4, seed).tolist()
    flags, state, expected = loop(raw.train_labels.tolist(), 3, ratio, seed), np.random.RandomState(seed), []
    for c in range(10):
        clean = [i for i in range(400) if not flags[i] and raw.train_labels[i] == c]
        expected += list(state.choice(clean, size=4, replace=False))
    assert drawn == expected
    for i in drawn:
        assert np.array_equal(data.train.images[i].numpy().transpose(1, 2, 0), raw.train_images[i])
        assert int(data.train.labels[i]) == raw.train_labels[i]


def test_a_completely_poisoned_class_has_no_seed_samples(tiny: Path, tmp_path: Path) -> None:
    """If a class has too few clean images left, the error names the class and their number."""
    plan, raw = config.load(tiny, ["backdoor.poison_ratio=1.0"]), world()
    with pytest.raises(UserError, match=r"global\.seed_num: 2: class 0 has only 0 clean training images"):
        poisoned(plan, raw, tmp_path)
    assert not (tmp_path / "poison_idx.npy").exists()  # which would be refused with the ratio that the error recommends
    data = poisoned(config.load(tiny, ["backdoor.poison_ratio=1.0", "defense=none"]), raw, tmp_path)  # needs no clean images
    with pytest.raises(UserError, match=r"global\.seed_num: 2: class 0 has only 0 clean training images"):
        draw_seed_samples(data.train.labels, data.ground_truth, 10, 2, 7)


@pytest.mark.parametrize("mode", ["bernoulli", "exact"])
def test_an_attack_that_poisons_nothing_is_refused(tiny: Path, tmp_path: Path, mode: str) -> None:
    """A ratio above 0 that gives no poisoned image is an error: the ASR would be that of an attack that was not made."""
    plan = config.load(tiny, ["backdoor.poison_ratio=0.0001", f"backdoor.poison_mode={mode}"])
    with pytest.raises(UserError, match=r"backdoor\.poison_ratio: 0\.0001: poisons none of \d+ images that may be poisoned: "):
        poisoned(plan, world(), tmp_path)
    assert not (tmp_path / "poison_idx.npy").exists()


def test_a_file_that_cannot_be_written_is_a_clear_error(plan: Config, tmp_path: Path) -> None:
    """If poison_idx.npy cannot be written, one line names the file, and no incomplete file remains."""
    (tmp_path / "run").write_text("a file where the run's folder should be")
    with pytest.raises(UserError, match=r"poison_idx\.npy: cannot be written") as caught:
        stored_index(tmp_path / "run" / "poison_idx.npy", LABELS, plan)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "tiny.yaml"]


def test_a_trigger_that_depends_on_the_index_has_that_of_the_test_image(tiny: Path, tmp_path: Path) -> None:
    """Test images are altered a few hundred at a time; each gets the trigger drawn for its own place among all of them."""
    plan = config.load(tiny, ["backdoor={refool: {count: 5}, target_label: 3, poison_ratio: 0.1}"])
    raw = replace(world(), test_images=world().train_images, test_labels=world().train_labels)
    attack = build_attack(plan, raw)
    backdoor, others = build_test_sets(plan, raw, attack).backdoor, np.flatnonzero(raw.test_labels != 3)
    assert len(others) > 256
    expected = [attack.apply(raw.test_images[i : i + 1], np.array([i]), "test")[0] for i in others]
    assert np.array_equal(backdoor.images.numpy().transpose(0, 2, 3, 1), np.stack(expected))


@pytest.mark.parametrize(("ratio", "index"), [(0.02, np.zeros(400)), (0, (np.arange(400) == 5).astype(float))])
def test_a_stored_index_poisons_something_if_and_only_if_there_is_an_attack(
    tiny: Path, tmp_path: Path, ratio: float, index: np.ndarray
) -> None:
    """No draw gives an attack without poisoned images, or poisoned images without an attack, however small the ratio."""
    np.save(tmp_path / "poison_idx.npy", index)
    assert "poisoned images" in refused(tmp_path / "poison_idx.npy", config.load(tiny, [f"backdoor.poison_ratio={ratio}"]))


@pytest.mark.parametrize("target", ["target_label: 3", "target_label: 3, sig: {}", "target_shift: 1"])
def test_a_target_class_without_training_images_is_refused(tiny: Path, tmp_path: Path, target: str) -> None:
    """Labels that no training image has are given to none, whatever the attack: one line names the key and the class."""
    attack = f"backdoor={{{target}, poison_ratio: 0.5{'' if 'sig' in target else ', badnets: {}'}}}"
    plan, raw = config.load(tiny, [attack]), world()
    labels = np.where(raw.train_labels == 3, 2, raw.train_labels)
    with pytest.raises(UserError, match=r"backdoor\.target_(label|shift): \d: no training image is of class 3 \(d\)"):
        build_attack(plan, replace(raw, train_labels=labels))
    build_attack(plan, raw)


class Faulty(AttackBase):
    """An attack whose result is computed in floats, or is one row short."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def apply(self, images: np.ndarray, index: np.ndarray, split: str) -> np.ndarray:
        """Return images brighter than white, or images that are cut."""
        return images * 0.5 + 150 if self.kind == "floats" else images[:, 1:]


@pytest.mark.parametrize("kind", ["floats", "shape"])
def test_an_attack_must_return_images_of_the_same_type_and_size(plan: Config, tmp_path: Path, kind: str) -> None:
    """Floats would be cast without a word, 260 becoming 4: training and test images are checked, and the file is named."""
    for work in (
        lambda: poison_training_set(plan, world(), Faulty(kind), tmp_path),
        lambda: build_test_sets(plan, world(), Faulty(kind)),
    ):
        with pytest.raises(UserError, match=r"test_poison\.py: returned altered images of dtype .*: must be uint8"):
            work()
