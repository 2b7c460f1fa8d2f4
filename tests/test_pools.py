"""Seed samples and the three splits, on constructed and random losses, compared with simple loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.pools import (
    check_pool_sizes,
    class_agnostic_split,
    class_aware_split,
    meta_split,
    per_class,
    pools_of,
)
from data.seeds import draw_seed_samples
from data.sets import GroundTruth
from utils import config
from utils.errors import UserError
from utils.kinds import CLEAN, COVER, POISONED

# Few different values, so that there are many ties.
LOSSES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=40)


def by_loss(values: list[float], among: list[int], count: int) -> list[int]:
    """Pick the lowest values one after another; among equal ones the first."""
    left, picked = list(among), []
    for _ in range(min(count, len(left))):
        best = left[0]
        for i in left:
            if values[i] < values[best]:
                best = i
        picked.append(best)
        left.remove(best)
    return picked


def truth(flags: list[int], labels: list[int]) -> GroundTruth:
    """A ground truth."""
    return GroundTruth(torch.tensor(flags, dtype=torch.uint8), torch.tensor(labels))


@settings(deadline=None, max_examples=80)
@given(LOSSES, st.floats(0.01, 0.99))
def test_class_agnostic_split_takes_the_lowest_losses(values: list[float], epsilon: float) -> None:
    """Stage 2 keeps the int(N * epsilon) images of lowest loss, ties to the lower index, sorted."""
    expected = sorted(by_loss(values, list(range(len(values))), int(len(values) * epsilon)))
    assert class_agnostic_split(torch.tensor(values), epsilon).tolist() == expected


@settings(deadline=None, max_examples=80)
@given(st.data(), LOSSES, st.floats(0.01, 0.99))
def test_meta_split_takes_the_smallest_decrease_of_the_loss(data: st.DataObject, values: list[float], epsilon: float) -> None:
    """Stage 3 keeps the int(N * epsilon) images of smallest loss minus virtual loss, ties to the lower index."""
    virtual = data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=len(values), max_size=len(values)))
    falls = [a - b for a, b in zip(values, virtual, strict=True)]
    expected = sorted(by_loss(falls, list(range(len(falls))), int(len(falls) * epsilon)))
    assert meta_split(torch.tensor(values), torch.tensor(virtual), epsilon).tolist() == expected


def test_meta_split_excludes_images_that_the_virtual_model_learns_quickly() -> None:
    """Poisoned images, whose loss falls most, are not in the clean pool even if their loss is lowest."""
    losses = torch.tensor([0.2, 3.0, 2.0, 0.1, 5.0, 4.0])
    virtual = torch.tensor([0.0, 2.9, 1.9, -3.0, 1.0, 3.9])  # images 3 and 4 fall by 3.1 and 4
    assert meta_split(losses, virtual, 0.67).tolist() == [0, 1, 2, 5]


@settings(deadline=None, max_examples=120)
@given(st.data(), LOSSES, st.integers(1, 4), st.integers(0, 12))
def test_class_aware_split_takes_seeds_and_the_lowest_of_each_class(
    data: st.DataObject, values: list[float], classes: int, count: int
) -> None:
    """Stage 1 has the seed samples and, of each class, the k other images of lowest loss that carry its label."""
    n = len(values)
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    seeds = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    expected = set(seeds)
    for c in range(classes):
        expected |= set(by_loss(values, [i for i in range(n) if labels[i] == c and i not in seeds], count))
    pool = class_aware_split(torch.tensor(values), torch.tensor(labels), torch.tensor(seeds, dtype=torch.int64), classes, count)
    assert pool.dtype == torch.int64
    assert pool.tolist() == sorted(expected)


def test_class_aware_split_of_a_small_example() -> None:
    """Two classes with one seed sample and two more images each, which can be checked by hand."""
    losses = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.5, 0.2, 0.0, 0.8])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    seeds = torch.tensor([1, 7])
    # class 0 without its seed 1: 0.5 at 2, 3, 4 and 0.9 at 0; class 1 without its seed 7: 0.0 at 6, 0.2 at 5
    assert class_aware_split(losses, labels, seeds, 2, 2).tolist() == [1, 2, 3, 5, 6, 7]
    assert class_aware_split(losses, labels, seeds, 2, 0).tolist() == [1, 7]
    assert class_aware_split(losses, labels, seeds, 2, 99).tolist() == list(range(8))


@pytest.mark.parametrize("n", [7, 5000])
def test_ties_go_to_the_lower_index_at_any_size(n: int) -> None:
    """If all losses are equal, the pool is the first half: the result does not depend on the sorting algorithm."""
    equal = torch.ones(n)
    assert class_agnostic_split(equal, 0.5).tolist() == list(range(n // 2))
    assert meta_split(equal, equal, 0.5).tolist() == list(range(n // 2))


def test_splits_change_neither_losses_nor_seeds() -> None:
    """A split does not modify its inputs, which reports use afterwards."""
    losses, labels, seeds = torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([0, 1, 0, 1]), torch.tensor([3])
    class_aware_split(losses, labels, seeds, 2, 1)
    class_agnostic_split(losses, 0.5)
    meta_split(losses, losses, 0.5)
    assert losses.tolist() == [2, 1, 0, 3] and seeds.tolist() == [3] and labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("n", "t"), [(10, 5), (2, 1), (50, 3), (0, 4)])
def test_stage_1_grows_by_n_images_per_class_every_t_epochs(n: int, t: int) -> None:
    """In the first t epochs the clean pool has the seed samples only; every t epochs n more images of each class are added."""
    grown = 0
    for epoch in range(40):
        if epoch > 0 and epoch % t == 0:
            grown += n
        assert per_class(epoch, n, t) == grown


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.data())
def test_the_polluted_pool_is_the_complement(count: int, data: st.DataObject) -> None:
    """Every image is in exactly one pool; the polluted pool is in ascending order."""
    pool = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    pools = pools_of(torch.tensor(pool, dtype=torch.int64), count)
    assert pools.clean.tolist() == pool
    assert pools.polluted.tolist() == [i for i in range(count) if i not in pool]
    assert pools.polluted.dtype == torch.int64


# -- Seed samples ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 99))
def test_seed_samples_equal_those_of_the_authors_code_and_are_never_poisoned(seed: int, count: int, world: int) -> None:
    """The same seed gives the seed samples of the authors' code; poisoned and cover images are never among them."""
    rng = np.random.default_rng(world)
    labels = np.concatenate([np.arange(30) % 3, rng.integers(0, 3, 30)])
    flags = rng.choice([CLEAN, POISONED, COVER], 60, p=[0.6, 0.3, 0.1])
    flags[:9] = CLEAN  # at least three clean images of each class
    drawn = draw_seed_samples(torch.from_numpy(labels), truth(flags.tolist(), labels.tolist()), 3, count, seed)
    state, expected = np.random.RandomState(seed), []
    for c in range(3):
        clean = [i for i in range(60) if flags[i] == CLEAN and labels[i] == c]
        expected += list(state.choice(clean, size=count, replace=False))
    assert drawn.tolist() == expected
    assert drawn.dtype == torch.int64
    for i in drawn.tolist():
        assert flags[i] == CLEAN
    assert len(set(expected)) == 3 * count


def test_only_clean_images_of_the_target_label_are_seed_samples() -> None:
    """Only clean images of the target label are drawn, even if almost all images with that label are poisoned."""
    labels, flags = [0] * 100 + [1] * 4, [POISONED] * 96 + [CLEAN] * 8
    for seed in range(30):
        drawn = draw_seed_samples(torch.tensor(labels), truth(flags, labels), 2, 3, seed).tolist()
        assert min(drawn) >= 96


def test_a_class_with_too_few_clean_images_is_named() -> None:
    """If a class has fewer clean images than seed samples, the error names key, value, class and the number of images."""
    labels, flags = [0] * 5 + [1] * 5, [CLEAN] * 7 + [POISONED] * 3
    with pytest.raises(UserError, match=r"global\.seed_num: 3: class 1 has only 2 clean") as caught:
        draw_seed_samples(torch.tensor(labels), truth(flags, labels), 2, 3, 0)
    assert "\n" not in str(caught.value)
    assert len(draw_seed_samples(torch.tensor(labels), truth(flags, labels), 2, 2, 0)) == 4


# -- The sizes of the pools --------------------------------------------------------------------------------------------

# 200 images, 10 classes of 20, batch 8, epochs 2 / 4 / 6 and 6 in all; seed_num 2, t 1, n 2
LABELS = torch.arange(200) % 10


def check(tiny: Path, *overrides: str, labels: Tensor = LABELS) -> None:
    """Check the tiny run's pools with some changed settings."""
    plan = config.load(tiny, overrides)
    check_pool_sizes(
        plan, labels, torch.cat([torch.nonzero(labels == c).squeeze(1)[: plan.global_.seed_num] for c in range(10)])
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("semi.loader.batch_size=20",),  # exactly the 20 seed samples
        ("global.epsilon=0.04",),  # exactly 8 images
        ("global.epsilon=0.96",),  # exactly 8 images are left
        ("global.epsilon=0.01", "num_epochs=2"),  # stage 2 is never reached
        ("global.n=999", "num_epochs=1"),  # nor is the first growth
        ("global.seed_num=19", "global.n=0"),
        ("global.seed_num=1", "global.epoch_first=0", "global.epoch_second=0"),  # only the meta-split
    ],
)
def test_pools_of_at_least_a_batch_pass(tiny: Path, overrides: tuple[str, ...]) -> None:
    """Pools of exactly one batch, and settings of stages that are never reached, are not errors."""
    check(tiny, *overrides)


@pytest.mark.parametrize(
    ("overrides", "key", "pool", "what"),
    [
        (("semi.loader.batch_size=21",), "global.seed_num: 2", "clean pool of epoch 1", "would hold 20 images"),
        (("global.n=18",), "global.seed_num/n/t: 2/18/1", "polluted pool of epoch 2", "would be empty"),
        (("global.n=999",), "global.seed_num/n/t: 2/999/1", "polluted pool of epoch 2", "would be empty"),
        (("global.n=3", "global.epoch_first=6", "global.epoch_second=6", "global.seed_num=5"), "global.seed_num/n/t",
         "polluted pool of epoch 6", "would be empty"),
        (("global.seed_num=20",), "global.seed_num: 20", "polluted pool of epoch 1", "would be empty"),
        (("global.seed_num=18", "semi.loader.batch_size=50"), "global.seed_num", "polluted pool", "would hold 20 images"),
        (("global.epsilon=0.039",), "global.epsilon: 0.039", "clean pool of epoch 3", "would hold 7 images"),
        (("global.epsilon=0.001",), "global.epsilon: 0.001", "clean pool of epoch 3", "would be empty"),
        (("global.epsilon=0.97",), "global.epsilon: 0.97", "polluted pool of epoch 3", "would hold 6 images"),
        (
            ("global.epsilon=0.97", "global.epoch_first=0", "global.epoch_second=0"),
            "global.epsilon",
            "polluted pool of epoch 1",
            "would hold 6 images",
        ),
        (
            ("global.epsilon=0.9", "global.keep_seeds=true", "semi.loader.batch_size=16"),
            "global.epsilon: 0.9",
            "polluted pool of epoch 3",
            "would be empty",
        ),
    ],
)  # fmt: skip
def test_a_pool_smaller_than_a_batch_is_refused_at_the_start(
    tiny: Path, overrides: tuple[str, ...], key: str, pool: str, what: str
) -> None:
    """If a pool will be empty or smaller than a batch, the error has its epoch, its size and the setting."""
    with pytest.raises(UserError) as caught:
        check(tiny, *overrides)
    text = str(caught.value)
    assert text.startswith(key) and f"the {pool}" in text and what in text
    assert "batch_size" in text and "200" in text and "\n" not in text


def test_given_seed_samples_are_named_in_the_refusal(tiny: Path) -> None:
    """If the user gave the seed samples, the error for a pool that is too small names that key and the number of images."""
    plan = config.load(tiny, ["seed_samples=list.txt", "global.n=0"])
    with pytest.raises(UserError, match=r"seed_samples: 7 images: the clean pool .* 7 images"):
        check_pool_sizes(plan, LABELS, torch.arange(7))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pool_sizes_are_predicted_exactly(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A configuration passes if and only if the actual splits of all epochs give pools of at least a batch."""
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    seeds, n, t, first = (data.draw(st.integers(*r)) for r in ((1, 3), (0, 9), (1, 3), (0, 4)))
    given_seeds = data.draw(st.none() | st.tuples(*(st.integers(1, 5) for _ in range(3))))
    epsilon, batch = data.draw(st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.95])), data.draw(st.integers(2, 12))
    path.write_text(
        "backdoor: {badnets: {}, target_label: 0}\nnetwork: resnet18_cifar\ndataset: shapes\nnum_classes: 3\nnum_epochs: 6\n"
        "transform: {train: {remaining: {to_tensor: true}}, test: {remaining: {to_tensor: true}}}\n"
        f"global: {{epoch_first: {first}, epoch_second: 5, epoch_third: 6, seed_num: {seeds}, n: {n}, t: {t}, "
        f"epsilon: {epsilon}}}\n"
        f"semi: {{loader: {{batch_size: {batch}}}}}\n"
    )
    labels = torch.tensor([0] * 5 + [1] * 9 + [2] * 21)
    if given_seeds:
        path.write_text(path.read_text() + "seed_samples: list.txt\n")
    own = torch.cat([torch.nonzero(labels == c).squeeze(1)[: (given_seeds or [seeds] * 3)[c]] for c in range(3)])
    losses = torch.arange(35.0)
    fits = True
    for epoch in range(6):
        if epoch < first:
            pool = class_aware_split(losses, labels, own, 3, per_class(epoch, n, t))
        else:
            pool = class_agnostic_split(losses, epsilon)
        fits = fits and batch <= len(pool) <= 35 - batch
    plan = config.load(path)
    if fits:
        check_pool_sizes(plan, labels, own)
    else:
        with pytest.raises(UserError):
            check_pool_sizes(plan, labels, own)
