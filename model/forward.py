"""The forward passes of a training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.grouped_norm import is_grouped, rows_per_group
from utils.runtime.machine import Machine


def forward(model: nn.Module, batches: Sequence[Tensor], machine: Machine) -> list[Tensor]:
    """Return the logits (B, C) of several batches (B, 3, H, W), each normalized by its own batch statistics.

    One forward pass for each batch, or, if the model has grouped BN (`runtime.merged`), one for all of them, with the same
    results up to rounding, including running statistics. Every process computes its shard of each batch.
    """
    count = len(batches[0])
    share = machine.shard(count)
    shares = [machine.to_memory_format(batch[share]) for batch in batches]
    with machine.autocast(cast_once=not torch.is_grad_enabled()):
        if is_grouped(model):
            with rows_per_group(model, len(shares[0])):
                logits = list(model(torch.cat(shares)).split(len(shares[0])))
        else:
            logits = [model(batch) for batch in shares]
    return [machine.all_gather(each, count) for each in logits]
