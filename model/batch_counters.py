"""Updates BN's batch counters once an epoch instead of in every forward pass.

Batch normalization adds 1 to `num_batches_tracked` in each forward pass. With a fixed momentum nothing reads that counter, but
on CUDA every addition is a kernel: 100 of the 890 kernels of a MixMatch step with ResNet-18.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from model.grouped_norm import GroupedBatchNorm2d

KINDS = (nn.BatchNorm2d, GroupedBatchNorm2d)  # not synchronized BN: its steps are never captured


@contextlib.contextmanager
def count_at_end(model: nn.Module, batches: int) -> Iterator[None]:
    """Turn off BN's batch counters in the block; if it succeeds, add `batches` to all of them.

    Layers in eval mode see no batches and are not counted. Inside the block the counters are missing from the model's buffers.
    Layers with `momentum=None` (statistics averaged over all batches) read their counter in every forward pass, so they keep
    counting.

    Args:
        batches: number of forward passes in the block; each must use every BN layer once.
    """
    norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and type(norm) in KINDS]
    counters = {norm: norm.num_batches_tracked for norm in norms if norm.momentum is not None and norm.training}
    for norm in counters:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in counters.items():
            norm.num_batches_tracked = counter
    for counter in counters.values():
        if counter is not None:
            counter += batches
