"""The same step again and again, over the rows of tables, without the host: on CUDA as one captured graph.

The step reads its row by a counter that lives on the device, so that nothing changes between two replays but numbers in
fixed places. Without capture (on a CPU) the very same function runs eagerly: that is how it is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.errors import UserError

WARM_UP = 3  # eager steps on a side stream before the capture, so that cuDNN and the allocator have settled


class Replayable(Protocol):
    """What a capture gives: `torch.cuda.CUDAGraph`."""

    def replay(self) -> object:
        """Do the captured work once more."""


class Stepper:
    """Runs `step(row)` over tables of fixed shapes and sums what it returns.

    A captured step is tried first: replayed once from the same state as an eager step, it must return the same and move
    the same tensors the same way. If it does not, or cannot be captured, one line says so and the eager steps go on.

    Args:
        step: takes a NamedTuple of tensors without the first axis, returns a tensor (k,).
        tensors: all tensors that a step changes in place (weights, BN statistics, optimizer state). The steps of the
            warm-up and of the trial are taken back in place.
        width: k.
        capture: record a CUDA graph; else run eagerly.
        insist: a capture that fails ends the run instead (`runtime.mode: graph`).
    """

    def __init__(
        self,
        step: Callable[[Any], Tensor],
        tensors: Callable[[], list[Tensor]],
        width: int,
        capture: bool,
        insist: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        self.step, self.tensors, self.width, self.capture, self.insist, self.say = step, tensors, width, capture, insist, say
        self.tables: Any = None
        self.graph: Replayable | None = None

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
        self.rewind()
        for _ in progress(range(steps)):
            if self.graph is not None:
                self.graph.replay()
            else:
                self.one()
        return self.sums.clone()

    def rewind(self) -> None:
        """Go back to the first row, with nothing summed."""
        self.counter.zero_()
        self.sums.zero_()

    def one(self) -> None:
        """Run the step of the counter's row, add what it returns, move the counter on."""
        row = type(self.tables)(*(table.index_select(0, self.counter)[0] for table in self.tables))
        self.sums += self.step(row)
        self.counter += 1

    def first(self) -> None:
        """Run the step of the first row."""
        self.rewind()
        self.one()

    def record(self) -> None:
        """Warm up, capture, try the graph against an eager step, and put every changed tensor back in place."""
        before = {id(t): t.clone() for t in self.tensors()}
        draws = random_states()

        def start() -> None:
            put_back(self.tensors(), before)
            set_random_states(draws)
            self.rewind()

        graph: Replayable | None = None
        try:
            warm_up(self.first)
            start()
            self.one()
            expected = [self.sums.clone(), *(t.clone() for t in self.tensors())]
            start()
            graph = capture(self.one)
            start()
            graph.replay()
            trouble = difference([self.sums, *self.tensors()], expected, before, self.tensors())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            trouble = (str(error).strip().splitlines() or [type(error).__name__])[0]
        start()
        if not trouble:
            self.graph = graph
        elif self.insist:
            raise UserError(f"runtime.mode: graph: the step cannot run as a CUDA graph ({trouble}): set runtime.mode=eager")
        else:
            self.say(f"the step does not run as a CUDA graph here ({trouble}): it runs eagerly, with the same numbers")


def random_states() -> list[Tensor]:
    """Return the states of torch's global generators, from which networks that drop units draw."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: list[Tensor]) -> None:
    """Set them back."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def warm_up(work: Callable[[], object]) -> None:
    """Do the work a few times on a side stream, so that cuDNN and the allocator have settled before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], object]) -> Replayable:
    """Return the work as a CUDA graph; nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@torch.no_grad()
def difference(found: list[Tensor], expected: list[Tensor], before: dict[int, Tensor], tensors: list[Tensor]) -> str:
    """Return what is wrong with a replayed step, or nothing.

    Two eager steps differ too: CUDA adds in no fixed order, bf16 rounds, and Adam's first steps take little but the signs
    of the gradients. So the sums may differ by 2 %, and the way that all tensors went by half its length; a replay that
    leaves a part out or does one twice is far beyond that.

    Args:
        found, expected: the sums, then the tensors after the replayed and after the eager step.
        before: the tensors' values before, by id; what did not exist was zero.
        tensors: the tensors themselves.
    """
    if not torch.allclose(found[0], expected[0], rtol=0.02, atol=1e-6):
        return f"a trial step gave {found[0].tolist()} and not {expected[0].tolist()}"
    way = apart = 0.0
    for t, a, b in zip(tensors, found[1:], expected[1:], strict=True):
        if t.is_floating_point():
            origin = before.get(id(t), torch.zeros_like(t))
            way += float((b - origin).double().square().sum())
            apart += float((a - b).double().square().sum())
        elif not torch.equal(a, b):
            return "a trial step counted wrongly"
    if not apart <= 0.25 * way:  # squares; also where one is not a number
        return f"a trial step moved the weights another way, {(apart / max(way, 1e-300)) ** 0.5:.2f} of its length apart"
    return ""


@torch.no_grad()
def put_back(tensors: list[Tensor], before: dict[int, Tensor]) -> None:
    """Give tensors, in place, the values they had; what did not exist then (an optimizer's moments) starts at 0."""
    for t in tensors:
        if id(t) in before:
            t.copy_(before[id(t)])
        else:
            t.zero_()
