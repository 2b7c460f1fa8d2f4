"""The same step again and again, over the rows of tables, without the host: on CUDA as one captured graph.

The step reads its row by a counter that lives on the device, so that nothing changes between two replays but numbers in
fixed places. Without capture (on a CPU) the very same function runs eagerly: that is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # eager steps on a side stream before the capture, so that cuDNN and the allocator have settled


class Stepper:
    """Runs `step(row)` over tables of fixed shapes and sums what it returns.

    Args:
        step: takes a NamedTuple of tensors without the first axis, returns a tensor (k,).
        tensors: all tensors that a step changes in place (weights, BN statistics, optimizer state). The warm-up's steps
            are taken back in place.
        width: k.
        capture: record a CUDA graph; else run eagerly.
    """

    def __init__(self, step: Callable[[Any], Tensor], tensors: Callable[[], list[Tensor]], width: int, capture: bool) -> None:
        self.step, self.tensors, self.width, self.capture = step, tensors, width, capture
        self.tables: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, tables: Any, progress: Callable[[range], Iterable[int]]) -> Tensor:
        """Run one step for each row of the tables and return the sum of what the steps return."""
        steps = tables[0].shape[0]
        if self.tables is None:
            self.tables = type(tables)(*(table.clone() for table in tables))
            self.counter = torch.zeros(1, dtype=torch.int64, device=tables[0].device)
            self.sums = torch.zeros(self.width, device=tables[0].device)
            if self.capture:
                self.record()
        for kept, table in zip(self.tables, tables, strict=True):
            kept.copy_(table)
        self.counter.zero_()
        self.sums.zero_()
        for _ in progress(range(steps)):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.one()
        return self.sums.clone()

    def one(self) -> None:
        """Run the step of the counter's row, add what it returns, move the counter on."""
        row = type(self.tables)(*(table.index_select(0, self.counter)[0] for table in self.tables))
        self.sums += self.step(row)
        self.counter += 1

    def record(self) -> None:
        """Warm up, capture, and put every changed tensor back in place."""
        before = {id(t): t.clone() for t in self.tensors()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.counter.zero_()
                self.one()
        torch.cuda.current_stream().wait_stream(stream)
        self.counter.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.one()
        put_back(self.tensors(), before)


@torch.no_grad()
def put_back(tensors: list[Tensor], before: dict[int, Tensor]) -> None:
    """Give tensors, in place, the values they had; what did not exist then (an optimizer's moments) starts at 0."""
    for t in tensors:
        if id(t) in before:
            t.copy_(before[id(t)])
        else:
            t.zero_()
