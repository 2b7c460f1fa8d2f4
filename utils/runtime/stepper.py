"""Runs a step for every row of tables without waiting for the host: on CUDA as one captured graph.

The step finds its row by a counter in device memory, so that replays differ only in values at fixed addresses. Without capture
(on a CPU) the same function runs eagerly, which is how it is tested.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.paths import PROJECT
from utils.runtime.graph_check import COUNTER, SUMS, Kinds, difference, distances

logger = logging.getLogger(__name__)
WARM_UP = 3  # eager steps on a side stream before the capture, so that cuDNN and the allocator have settled
TRIAL = 2  # rows of the trial of a new graph: one row would not show that the row counter advances

WEIGHTS = "weights"


class Replayable(Protocol):
    """A captured graph: `torch.cuda.CUDAGraph`."""

    def replay(self) -> object:
        """Run the captured work."""


class Stepper:
    """Runs `step(row)` for each row of tables of fixed shapes, and sums the results.

    A captured graph is compared with eager steps before it is used: replayed on the first rows from the same state, it must
    return the same values and change the same tensors in the same way (`difference`). If it does not, or if the capture
    fails, the reason is logged in one line and the steps run eagerly.

    Args:
        step: takes a NamedTuple of tensors (one row of each table), returns a tensor (k,).
        tensors: returns all tensors that a step changes in place, by kind (`changed_tensors`). The steps of warm-up and
            trial are undone in place.
        width: k.
        capture: capture a CUDA graph; otherwise run eagerly.
        insist: raise `UserError` if the capture fails (`runtime.mode: graph`).
    """

    def __init__(
        self,
        step: Callable[[Any], Tensor],
        tensors: Callable[[], Kinds],
        width: int,
        capture: bool,
        insist: bool = False,
    ) -> None:
        self.step, self.tensors, self.width, self.capture, self.insist = step, tensors, width, capture, insist
        self.tables: Any = None
        self.graph: Replayable | None = None

    def run(self, tables: Any, progress: Callable[[range], Iterable[int]]) -> Tensor:
        """Run one step for each row of the tables; return the sum (k,) of the results."""
        steps = tables[0].shape[0]
        if self.tables is None:
            self.tables = type(tables)(*(table.clone() for table in tables))
            self.counter = torch.zeros(1, dtype=torch.int64, device=tables[0].device)
            self.sums = torch.zeros(self.width, device=tables[0].device)
            if self.capture:
                self.record()
        for kept, table in zip(self.tables, tables, strict=True):
            kept.copy_(table)
        self.rewind()
        for _ in progress(range(steps)):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.one()
        return self.sums.clone()

    def rewind(self) -> None:
        """Go back to the first row and reset the sums."""
        self.counter.zero_()
        self.sums.zero_()

    def one(self) -> None:
        """Run the step for the current row, add its result to the sums, advance the row counter."""
        row = type(self.tables)(*(table.index_select(0, self.counter)[0] for table in self.tables))
        self.sums += self.step(row)
        self.counter += 1

    def first(self) -> None:
        """Run the step for the first row."""
        self.rewind()
        self.one()

    def record(self) -> None:
        """Warm up, capture, compare the graph with eager steps, and restore every changed tensor in place."""
        before = {id(t): t.clone() for t in self.changed()}
        draws = random_states()

        def start() -> None:
            put_back(self.changed(), before)
            set_random_states(draws)
            self.rewind()

        graph: Replayable | None = None
        fits = False  # into memory, eagerly
        try:
            warm_up(self.first)
            start()
            expected = {kind: [t.clone() for t in tensors] for kind, tensors in self.outcome(self.one).items()}
            start()
            scatter = distances(self.outcome(self.one), expected, before)
            start()
            fits = True
            free_memory()
            graph = capture(self.one)
            start()
            trouble = difference(self.outcome(graph.replay), expected, before, scatter)
        except torch.OutOfMemoryError as error:
            if not fits or self.insist:
                raise
            trouble = reason(error)  # a graph has memory of its own, which nothing else can use
        except RuntimeError as error:
            trouble = reason(error)
        start()
        if not trouble:
            self.graph = graph
            return
        graph = None
        free_memory()
        if self.insist:
            raise UserError(f"runtime.mode: graph: the step cannot run as a CUDA graph ({trouble}): set runtime.mode=eager")
        logger.info(f"the step cannot run as a CUDA graph ({trouble}): it runs eagerly, with the same results")

    def changed(self) -> list[Tensor]:
        """Return all tensors that a step changes in place."""
        return [t for tensors in self.tensors().values() for t in tensors]

    def outcome(self, work: Callable[[], object]) -> dict[str, list[Tensor]]:
        """Run `work` for the rows of the trial; return the sums after each row, the row counter, and `tensors()`."""
        sums = []
        for _ in range(min(TRIAL, self.tables[0].shape[0])):
            work()
            sums.append(self.sums.clone())
        return {SUMS: sums, COUNTER: [self.counter], **self.tensors()}


def free_memory() -> None:
    """Free the memory of graphs and failed steps that only reference cycles keep, as those of finished stages."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_states() -> list[Tensor]:
    """Return the states of torch's global generators, which dropout uses."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: list[Tensor]) -> None:
    """Restore the states of torch's global generators."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def warm_up(work: Callable[[], object]) -> None:
    """Run `work` a few times on a side stream, so that cuDNN and the allocator have settled before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], object]) -> Replayable:
    """Return the work as a CUDA graph, without running it. The current stream is restored, also after an error.

    Raises:
        RuntimeError: the capture failed. If the work itself raised an error, that one is raised: leaving a broken capture
            raises another, which would hide the cause.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    cause: Exception | None = None
    try:
        with torch.cuda.graph(graph):
            try:
                work()
            except Exception as error:
                cause = error
                raise
    except RuntimeError as error:
        raise (cause or error) from None
    finally:
        cause = None  # its traceback refers to this frame, which would keep the tensors of the failed step
        torch.cuda.set_stream(stream)  # a failed capture leaves torch on the capture stream
    return graph


def reason(error: RuntimeError) -> str:
    """Return the first line of an error, and the innermost line of this project in its traceback."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(path, line) for path, line in frames if PROJECT in path.parents and "site-packages" not in path.parts]
    own = [(path, line) for path, line in ours if path != Path(__file__).resolve()]
    return f"{text}, at {own[-1][0].relative_to(PROJECT)}:{own[-1][1]}" if own else text


def changed_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Return all tensors that a training step changes in place, by kind.

    The kinds are `weights`, the names of the layers' buffers (`running_mean`, ...), and the names of the optimizer's moments
    (`exp_avg`, `step`, ...).
    """
    kinds: dict[str, list[Tensor]] = {WEIGHTS: list(model.parameters())}
    for name, buffer in model.named_buffers():
        kinds.setdefault(name.rpartition(".")[2], []).append(buffer)
    for moments in optimizer.state.values():
        for name, moment in moments.items():
            if isinstance(moment, Tensor):
                kinds.setdefault(name, []).append(moment)
    return kinds


@torch.no_grad()
def put_back(tensors: list[Tensor], before: dict[int, Tensor]) -> None:
    """Restore the values of tensors in place; those that did not exist before (an optimizer's moments) become 0."""
    for t in tensors:
        if id(t) in before:
            t.copy_(before[id(t)])
        else:
            t.zero_()
