"""The three splits: which images keep their label in an epoch (paper section 3.2).

A split is a pure function of per-image losses. It returns the clean pool as sorted indices; all other images are the polluted
pool (`pools_of`). Ties go to the lower index.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from utils.config import Config
from utils.errors import UserError


def lowest(losses: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the lowest among (N,) losses; ties go to the lower index."""
    return torch.argsort(losses, stable=True)[:count]


def class_aware_split(losses: Tensor, labels: Tensor, seeds: Tensor, num_classes: int, per_class: int) -> Tensor:
    """Stage 1: the seed samples, and of each class the `per_class` other images of lowest loss.

    Args:
        losses: (N,) split losses.
        labels: (N,) int64, the labels that the images carry.
        seeds: (S,) int64.
    Returns:
        the clean pool, sorted (P,) int64.
    """
    free = torch.ones_like(labels, dtype=torch.bool)
    free[seeds] = False
    pool = [seeds]
    for c in range(num_classes):
        candidates = torch.nonzero(free & (labels == c)).squeeze(1)
        pool.append(candidates[lowest(losses[candidates], per_class)])
    return torch.cat(pool).sort().values


def class_agnostic_split(losses: Tensor, epsilon: float) -> Tensor:
    """Stage 2: the `int(N * epsilon)` images of lowest loss, whatever their class."""
    return lowest(losses, int(len(losses) * epsilon)).sort().values


def meta_split(losses: Tensor, virtual_losses: Tensor, epsilon: float) -> Tensor:
    """Stage 3: the `int(N * epsilon)` images whose loss decreases least from the model to the virtual model.

    Poisoned images are learned quickly, so their loss falls most (paper section 3.2.3).
    """
    return class_agnostic_split(losses - virtual_losses, epsilon)


def per_class(epoch: int, n: int, t: int) -> int:
    """Return how many images of each class stage 1 adds to the seed samples: 0 at first, n more every t epochs."""
    return n * (epoch // t)


class Pools(NamedTuple):
    """The two pools of an epoch; together they are all N images."""

    clean: Tensor  # (P,) int64 indices
    polluted: Tensor  # (N - P,) int64, ascending


def pools_of(clean_pool: Tensor, count: int) -> Pools:
    """Return the clean pool (P,) and the polluted pool, all other indices below `count`."""
    inside = torch.zeros(count, dtype=torch.bool, device=clean_pool.device)
    inside[clean_pool] = True
    return Pools(clean_pool, torch.nonzero(~inside).squeeze(1))


def check_pool_sizes(config: Config, labels: Tensor, seeds: Tensor) -> None:
    """Check, before training starts, that both pools will hold at least a batch in every epoch.

    Args:
        labels: (N,) int64.
        seeds: (S,) int64.
    Raises:
        UserError: a pool would be smaller than a batch.
    """
    g, n = config.global_, len(labels)
    carried = labels.cpu()
    others = torch.bincount(carried, minlength=config.num_classes)  # by class, all images but the seed samples
    others -= torch.bincount(carried[seeds], minlength=config.num_classes)
    growth = "global.seed_num/n/t" if config.seed_samples is None else "seed_samples and global.n/t"
    last_first = min(g.epoch_first, config.num_epochs)
    first = "global.seed_num" if config.seed_samples is None else "seed_samples"
    sizes = [
        (epoch, len(seeds) + int(others.clamp(max=per_class(epoch, g.n, g.t)).sum()), growth if epoch else first)
        for epoch in {0, last_first - 1}
        if 0 <= epoch < last_first
    ]
    if config.num_epochs > g.epoch_first:
        sizes.append((g.epoch_first, int(n * g.epsilon), "global.epsilon"))
        if g.keep_seeds:  # at worst, none of the seed samples is among these images
            most = min(n, int(n * g.epsilon) + len(seeds))
            sizes.append((g.epoch_first, most, "global.epsilon"))
    start = f"{g.seed_num}/" if config.seed_samples is None else f"{len(seeds)} images and "
    given = {growth: f"{start}{g.n}/{g.t}", "global.epsilon": str(g.epsilon)}
    given[first] = str(g.seed_num) if config.seed_samples is None else f"{len(seeds)} images"
    for epoch, size, key in sizes:
        check_pool_size(config, n, size, f"{key}: {given[key]}", epoch)


def check_pool_size(config: Config, n: int, size: int, cause: str, epoch: int) -> None:
    """Check that a clean pool of `size` of the n images, and the rest, hold at least a batch.

    Args:
        cause: `key: value` of what determines the size.
        epoch: the first one with this size, 0-based.
    """
    key, batch = cause.partition(":")[0], config.semi.loader.batch_size
    for pool, count in (("clean", size), ("polluted", n - size)):
        if count < batch:
            what = "would be empty" if count <= 0 else f"would hold {count} images, less than a batch"
            raise UserError(
                f"{cause}: the {pool} pool of epoch {epoch + 1} {what} (semi.loader.batch_size: {batch}; "
                f"training set: {n}): change {key} or lower the batch size"
            )


def check_share(config: Config, n: int, epoch: int) -> None:
    """Check the pools of a defense whose clean pool is `int(n * epsilon)` images from an epoch on."""
    epsilon = config.global_.epsilon
    check_pool_size(config, n, int(n * epsilon), f"global.epsilon: {epsilon}", epoch)
