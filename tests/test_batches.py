"""The tables of random draws: endless orders, MixMatch, supervised passes, scoring of all images."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.augment import Pipeline
from data.batches import MixMatchDraws, SupervisedDraws, draw_mixmatch, draw_supervised, draw_views, endless_order, views
from data.pools import Pools
from data.sets import ImageSet
from data.transforms import random_crop, random_horizontal_flip
from utils import config
from utils.config import Config
from utils.config.schema import Named

CROP = Named("random_crop", random_crop.Settings(32, 4, "reflect"))
FLIP = Named("random_horizontal_flip", random_horizontal_flip.Settings(0.5))
AUGMENT = Pipeline((CROP, FLIP), (), 32, 32)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_endless_order_repeats_nothing_within_a_pass(data: st.DataObject) -> None:
    """Positions are drawn without replacement: within each pass of full batches no position occurs twice, for any sizes."""
    count = data.draw(st.integers(1, 30))
    batch, steps = data.draw(st.integers(1, count)), data.draw(st.integers(1, 40))
    order = endless_order(count, batch, steps, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert order.shape == (steps, batch)
    assert order.dtype == torch.int64
    in_a_pass = 0
    seen: set[int] = set()
    for row in order.tolist():
        if in_a_pass == count // batch:  # the next batch would be incomplete: a new pass starts
            in_a_pass, seen = 0, set()
        for position in row:
            assert 0 <= position < count
            assert position not in seen
            seen.add(position)
        in_a_pass += 1


def test_endless_order_drops_other_positions_in_each_pass() -> None:
    """The dropped incomplete batch differs in each pass, so every image of the pool is used equally often."""
    passes = 2000
    order = endless_order(11, 4, 2 * passes, torch.Generator().manual_seed(1)).view(passes, 8)
    left_out = {tuple(sorted(set(range(11)) - set(row))) for row in order[:300].tolist()}
    assert len(left_out) > 100  # of 165 possible triples
    times = torch.bincount(order.flatten(), minlength=11)
    p = 8 / 11
    assert (times - passes * p).abs().max() < 5 * math.sqrt(passes * p * (1 - p))
    first = torch.bincount(order[:, 0], minlength=11)
    assert (first - passes / 11).abs().max() < 5 * math.sqrt(passes / 11)  # all are equally likely to be first


def test_endless_order_is_reshuffled_in_every_pass() -> None:
    """No pass has the order of the previous one."""
    order = endless_order(50, 10, 25, torch.Generator().manual_seed(2)).view(5, 50)
    for one, other in itertools.pairwise(order):
        assert sorted(one.tolist()) == list(range(50))
        assert (one == other).sum() < 10


# -- MixMatch ----------------------------------------------------------------------------------------------------------

CLEAN_POOL = torch.arange(0, 200, 3)  # 67
POLLUTED_POOL = torch.tensor([i for i in range(200) if i % 3])  # 133
POOLS = Pools(CLEAN_POOL, POLLUTED_POOL)


def plan(tiny: Path, steps: int = 20, batch: int = 8, *more: str) -> Config:
    """The tiny run with another number of steps and another batch size."""
    return config.load(tiny, [f"semi.mixmatch.train_iteration={steps}", f"semi.loader.batch_size={batch}", *more])


def table(settings: Config, epoch: int = 0) -> MixMatchDraws:
    """An epoch's tables."""
    steps = settings.semi.mixmatch.train_iteration
    return draw_mixmatch(settings, epoch, POOLS, AUGMENT, torch.linspace(0, 1, steps, dtype=torch.float64))


def test_mixmatch_tables_are_a_function_of_seed_epoch_and_pools(tiny: Path) -> None:
    """The same seed and epoch give the same numbers, whatever was drawn before; another epoch or seed gives others."""
    first = table(plan(tiny), 3)
    torch.manual_seed(99)
    torch.rand(5)
    np.random.seed(99)  # noqa: NPY002
    for name, one, again in zip(first._fields, first, table(plan(tiny), 3), strict=True):
        assert torch.equal(one, again), name
    for other in (table(plan(tiny), 4), table(plan(tiny, 20, 8, "seed.seed=8"), 3)):
        for name in ("labeled", "unlabeled", "views", "lam", "permutation"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (7, 8), (30, 64)])
def test_mixmatch_tables_have_a_row_for_every_step(tiny: Path, steps: int, batch: int) -> None:
    """Each of S steps has B labeled and B unlabeled images, 3B views, 3B permuted rows and a lambda."""
    draws = table(plan(tiny, steps, batch))
    assert draws.labeled.shape == draws.unlabeled.shape == (steps, batch)
    assert draws.views.shape == (steps, 3 * batch, 3)
    assert draws.lam.shape == draws.lambda_u.shape == (steps,)
    assert draws.permutation.shape == (steps, 3 * batch)
    assert draws.lambda_u.tolist() == torch.linspace(0, 1, steps, dtype=torch.float64).float().tolist()
    one = draws.step(steps - 1)
    for whole, row in zip(draws, one, strict=True):
        assert torch.equal(whole[steps - 1], row)
    for there, here in zip(draws.to(torch.device("cpu")), draws, strict=True):
        assert torch.equal(there, here)


def test_only_labels_of_the_clean_pool_are_used(tiny: Path) -> None:
    """Labeled batches have images of the clean pool only, unlabeled ones of the polluted pool only, none twice in a pass."""
    draws = table(plan(tiny, 100, 8))
    for rows, pool in ((draws.labeled, CLEAN_POOL), (draws.unlabeled, POLLUTED_POOL)):
        assert set(rows.flatten().tolist()) == set(pool.tolist())  # 100 steps are several passes over either pool
        whole = len(pool) // 8
        for start in range(0, 100 - whole, whole):
            one_pass = rows[start : start + whole].flatten().tolist()
            assert len(set(one_pass)) == len(one_pass)


def test_mixup_permutations_are_permutations(tiny: Path) -> None:
    """Every row permutes all 3B inputs, differently in each step, and every input can get every position."""
    draws = table(plan(tiny, 400, 4))
    for row in draws.permutation.tolist():
        assert sorted(row) == list(range(12))
    assert len({tuple(row) for row in draws.permutation.tolist()}) == 400
    landed = torch.zeros(12, 12)
    for row in draws.permutation:
        landed[torch.arange(12), row] += 1
    assert (landed - 400 / 12).abs().max() < 5 * math.sqrt(400 / 12)


def moments(alpha: float, grid: int = 20_000) -> tuple[float, float]:
    """Mean and deviation of max(l, 1 - l), l ~ Beta(alpha, alpha), summed over a fine grid of l = sin^2(angle)."""
    total = first = second = 0.0
    for k in range(grid):
        angle = (k + 0.5) / grid * math.pi / 2
        lam = math.sin(angle) ** 2
        weight = (math.sin(angle) * math.cos(angle)) ** (2 * alpha - 1)
        lam = max(lam, 1 - lam)
        total, first, second = total + weight, first + weight * lam, second + weight * lam * lam
    mean = first / total
    return mean, math.sqrt(second / total - mean * mean)


@pytest.mark.parametrize("alpha", [0.75, 0.5, 4.0])
def test_mixup_weight_is_a_folded_beta_draw(tiny: Path, alpha: float) -> None:
    """Lambda is max(l, 1 - l) with l ~ Beta(alpha, alpha): at least 1/2, with the mean and deviation of that distribution."""
    n = 4000
    lam = table(plan(tiny, n, 2, f"semi.mixmatch.alpha={alpha}")).lam
    assert lam.dtype == torch.float32
    assert lam.min() >= 0.5 and lam.max() <= 1
    mean, deviation = moments(alpha)
    assert abs(float(lam.double().mean()) - mean) < 4 * deviation / math.sqrt(n)
    assert abs(float(lam.double().std()) / deviation - 1) < 0.06
    correlation = np.corrcoef(lam[:-1].numpy(), lam[1:].numpy())[0, 1]
    assert abs(correlation) < 4 / math.sqrt(n)


def test_the_two_views_of_an_unlabeled_image_are_drawn_independently(tiny: Path) -> None:
    """u1 and u2 of one image, and x, are cropped and flipped independently."""
    draws = table(plan(tiny, 150, 8)).views  # (S, 24, 3)
    x, u1, u2 = (draws[:, i : i + 8].reshape(-1, 3) for i in (0, 8, 16))
    correlation = np.corrcoef(torch.cat([x, u1, u2], 1).numpy().T)
    assert np.abs(correlation - np.eye(9)).max() < 5 / math.sqrt(1200)
    for part in (x, u1, u2):
        assert set(part[:, 0].tolist()) == set(part[:, 1].tolist()) == set(range(9))
        assert set(part[:, 2].tolist()) == {0, 1}


# -- Supervised passes, scoring ----------------------------------------------------------------------------------------


def test_a_supervised_pass_has_every_image_once() -> None:
    """One pass is a permutation of all images; order and views are a function of seed, purpose and epoch."""
    draws = draw_supervised(7, "virtual 0", 4, 101, AUGMENT)
    assert sorted(draws.order.tolist()) == list(range(101))
    assert draws.views.shape == (101, 3)
    again = draw_supervised(7, "virtual 0", 4, 101, AUGMENT).to(torch.device("cpu"))
    assert torch.equal(draws.order, again.order) and torch.equal(draws.views, again.views)
    for seed, purpose, epoch in ((8, "virtual 0", 4), (7, "virtual 1", 4), (7, "virtual 0", 5)):
        other = draw_supervised(seed, purpose, epoch, 101, AUGMENT)
        assert not torch.equal(draws.order, other.order) and not torch.equal(draws.views, other.views)


def test_scoring_draws_one_view_of_every_image_per_epoch() -> None:
    """Each image has one view, which is the same if an epoch is repeated and another one in the next epoch."""
    draws = draw_views(7, "score", 4, 300, AUGMENT)
    assert draws.shape == (300, 3)
    assert torch.equal(draws, draw_views(7, "score", 4, 300, AUGMENT))
    for seed, purpose, epoch in ((8, "score", 4), (7, "score virtual", 4), (7, "score", 5)):
        assert not torch.equal(draws, draw_views(seed, purpose, epoch, 300, AUGMENT))


@pytest.mark.parametrize("batch", [1, 5, 7, 20, 64])
def test_views_are_complete_and_in_order(batch: int) -> None:
    """For every batch size each image occurs once, in order; only the last batch is smaller."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8))
    draws = draw_views(1, "score", 0, 20, AUGMENT)
    parts: list[Tensor] = list(views(ImageSet(images, torch.zeros(20, dtype=torch.int64)), draws, AUGMENT, batch))
    assert [len(part) for part in parts] == [batch] * (20 // batch) + [20 % batch] * (20 % batch > 0)
    one_by_one = [AUGMENT(images[i : i + 1], draws[i : i + 1]) for i in range(20)]
    assert torch.equal(torch.cat(parts), torch.cat(one_by_one))


@given(count=st.integers(1, 300), batch=st.integers(1, 70), least=st.integers(1, 8))
def test_one_pass_takes_every_image_once_in_batches_that_can_be_normalized(count: int, batch: int, least: int) -> None:
    """All batches except the last are full; fewer than `least` remaining images join the batch before, `least` or more do
    not."""
    pass_ = SupervisedDraws(torch.randperm(count), torch.rand(count, 2))
    equal, last = pass_.cut(batch, least)
    sizes = [batch] * len(equal.order) + [len(last.order)] * bool(len(last.order))
    assert torch.equal(torch.cat([equal.order.flatten(), last.order]), pass_.order)
    assert torch.equal(torch.cat([equal.views.flatten(0, 1), last.views]), pass_.views)
    assert equal.order.shape[1:] == (batch,) and equal.views.shape[1:] == (batch, 2)
    rest = count % batch
    assert sum(sizes) == count
    assert sizes[-1] == (count if count < batch else batch + rest if 0 < rest < least else rest or batch)
