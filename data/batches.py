"""All random draws of an epoch as tables, made before it starts.

A table is a function of (seed, epoch) and of the pools. The loop reads one row per step: it draws no random numbers itself
and never waits for the host, and a resumed run sees the same rows as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from data.augment import Pipeline
from data.pools import Pools
from data.sets import ImageSet
from utils.config import Config
from utils.draws import generator, numpy_generator


def endless_order(count: int, batch: int, steps: int, rng: torch.Generator) -> Tensor:
    """Return (steps, batch) positions below `count`, reshuffled in each pass, the incomplete last batch of a pass dropped."""
    whole = count // batch  # complete batches in one pass
    passes = -(-steps // whole)
    order = [torch.randperm(count, generator=rng)[: whole * batch] for _ in range(passes)]
    return torch.cat(order)[: steps * batch].view(steps, batch)


class MixMatchDraws(NamedTuple):
    """The draws of S MixMatch steps, or of one step (without the first axis)."""

    labeled: Tensor  # (S, B) int64 indices into the training set
    unlabeled: Tensor  # (S, B) int64
    views: Tensor  # (S, 3B, k) augmentation draws of x, u1, u2
    lam: Tensor  # (S,) float32 mixup weight, >= 0.5
    permutation: Tensor  # (S, 3B) int64
    lambda_u: Tensor  # (S,) float32 weight of the unlabeled loss

    def to(self, device: torch.device) -> MixMatchDraws:
        """Return the tables on a device."""
        return MixMatchDraws(*(table.to(device) for table in self))

    def step(self, i: int) -> MixMatchDraws:
        """Return the draws of step i."""
        return MixMatchDraws(*(table[i] for table in self))


def draw_mixmatch(config: Config, epoch: int, pools: Pools, augment: Pipeline, lambda_u: Tensor) -> MixMatchDraws:
    """Draw an epoch of MixMatch steps.

    Args:
        pools: on the CPU.
        lambda_u: (S,) weights of the unlabeled loss.
    """
    steps, batch, seed = config.semi.mixmatch.train_iteration, config.semi.loader.batch_size, config.seed.seed
    alpha = config.semi.mixmatch.alpha
    rng = generator(seed, "mixmatch", epoch)
    labeled = pools.clean[endless_order(len(pools.clean), batch, steps, rng)]
    unlabeled = pools.polluted[endless_order(len(pools.polluted), batch, steps, rng)]
    views = augment.draw(steps * 3 * batch, rng).view(steps, 3 * batch, -1)
    lam = torch.from_numpy(numpy_generator(seed, "mixup", epoch).beta(alpha, alpha, steps)).float()
    permutation = torch.rand(steps, 3 * batch, generator=rng, dtype=torch.float64).argsort(1)
    return MixMatchDraws(labeled, unlabeled, views, torch.maximum(lam, 1 - lam), permutation, lambda_u.float())


class SupervisedDraws(NamedTuple):
    """The draws of one pass over all N images, or a part of it."""

    order: Tensor  # (N,) int64
    views: Tensor  # (N, k), in that order

    def to(self, device: torch.device) -> SupervisedDraws:
        """Return the tables on a device."""
        return SupervisedDraws(self.order.to(device), self.views.to(device))

    def of(self, indices: Tensor) -> SupervisedDraws:
        """Return the draws as those of the images `indices` (N,) of a larger set."""
        return SupervisedDraws(indices[self.order], self.views)

    def cut(self, batch: int, least: int) -> tuple[SupervisedDraws, SupervisedDraws]:
        """Cut the pass into S batches of equal size and the remaining images.

        Returns:
            the tables of the equal batches, (S, batch) and (S, batch, k), one row per step, and those of the last batch, (L,)
            and (L, k); S or L may be 0.
        """
        steps, _ = count_batches(len(self.order), batch, least)
        equal = (table[: steps * batch].view(steps, batch, *table.shape[1:]) for table in self)
        return SupervisedDraws(*equal), SupervisedDraws(*(table[steps * batch :] for table in self))


def count_batches(count: int, batch: int, least: int) -> tuple[int, int]:
    """Return how many full batches a pass over `count` images has, and the size of the last, incomplete batch (or 0).

    Fewer than `least` remaining images join the batch before: batch normalization cannot train on a single value.
    """
    rest = count % batch
    if 0 < rest < least and rest < count:
        rest += batch
    return (count - rest) // batch, rest


def draw_supervised(seed: int, purpose: str, epoch: int, count: int, augment: Pipeline) -> SupervisedDraws:
    """Draw one pass of supervised training: a permutation of all images and a view of each."""
    rng = generator(seed, purpose, epoch)
    return SupervisedDraws(torch.randperm(count, generator=rng), augment.draw(count, rng))


def draw_views(seed: int, purpose: str, epoch: int, count: int, augment: Pipeline) -> Tensor:
    """Draw one view of every image, (N, k), in the order of the set."""
    return augment.draw(count, generator(seed, purpose, epoch))


def views(image_set: ImageSet, draws: Tensor, augment: Pipeline, batch: int) -> Iterator[Tensor]:
    """Yield the images' views in order, (<= batch, 3, H, W) float32 each."""
    for start in range(0, len(image_set), batch):
        part = slice(start, start + batch)
        yield augment(image_set.fetch(part), draws[part])
