"""MixMatch (Berthelot et al., NeurIPS 2019) as pure functions; random numbers are arguments (paper section 3.3)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from loss.supervised import full_precision


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Return p^(1/T), normalized again: (B, C) -> (B, C)."""
    powered = probabilities ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def guess_labels(logits1: Tensor, logits2: Tensor, temperature: float) -> Tensor:
    """Return the guessed labels of two views: their mean softmax, sharpened: 2 x (B, C) -> (B, C)."""
    mean = (full_precision(logits1).softmax(1) + full_precision(logits2).softmax(1)) / 2
    return sharpen(mean, temperature)


def mixup(values: Tensor, lam: Tensor, permutation: Tensor) -> Tensor:
    """Return lam a + (1 - lam) a[permutation]: (R, ...), (), (R,) int64 -> (R, ...)."""
    return lam * values + (1 - lam) * values[permutation]


@functools.lru_cache
def interleave_order(batch: int, blocks: int, device: torch.device) -> Tensor:
    """Return (blocks * batch,) int64: the source row of each row when the blocks of a batch are interleaved.

    `rows[order]` swaps rows between the blocks, so that BN sees labeled and unlabeled rows together; indexing again swaps
    them back. With k blocks, each block is divided into k groups of floor(batch / k) rows, with the remainder distributed
    over the last groups; group i of block 0 is swapped with group i of block i.

    Cached for each device, because a captured CUDA graph cannot copy it from the host.
    """
    sizes = [batch // blocks + (1 if i >= blocks - batch % blocks else 0) for i in range(blocks)]
    source = torch.arange(blocks * batch).view(blocks, batch)
    start = sizes[0]
    for i in range(1, blocks):
        group = slice(start, start + sizes[i])
        source[0, group], source[i, group] = source[i, group].clone(), source[0, group].clone()
        start += sizes[i]
    return source.view(-1).to(device)


def mixmatch_loss(logits: Tensor, targets: Tensor, labeled: int) -> tuple[Tensor, Tensor]:
    """Return (Lx, Lu): cross-entropy of the labeled rows, mean squared error of the others' probabilities.

    Args:
        logits: (R, C).
        targets: (R, C) mixed label distributions.
        labeled: number of labeled rows, which come first.
    """
    logits = full_precision(logits)
    loss_x = -(targets[:labeled] * logits[:labeled].log_softmax(1)).sum(1).mean()
    loss_u = ((logits[labeled:].softmax(1) - targets[labeled:]) ** 2).mean()
    return loss_x, loss_u


def ramp_up(epoch: int, steps: int, lambda_u: float, rampup_length: float) -> Tensor:
    """Return (steps,) float64: lambda_u of every step, linear in epoch + step / steps; constant if rampup_length is 0."""
    if rampup_length == 0:
        return torch.full((steps,), lambda_u, dtype=torch.float64)
    at = epoch + torch.arange(steps, dtype=torch.float64) / steps
    return lambda_u * (at / rampup_length).clamp(0, 1)
