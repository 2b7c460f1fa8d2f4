"""The same step again and again, over the rows of tables, without the host: on CUDA as one captured graph.

The step reads its row by a counter that lives on the device, so that nothing changes between two replays but numbers in
fixed places. Without capture (on a CPU) the very same function runs eagerly: that is how it is tested.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.errors import UserError

WARM_UP = 3  # eager steps on a side stream before the capture, so that cuDNN and the allocator have settled
TRIAL = 2  # rows that a new graph is tried on: with one row nobody would notice that the row counter stands still

# Tensors that a step changes, by kind. A plain list is split into weights and everything else.
Kinds = Mapping[str, list[Tensor]]


class Replayable(Protocol):
    """What a capture gives: `torch.cuda.CUDAGraph`."""

    def replay(self) -> object:
        """Do the captured work once more."""


class Stepper:
    """Runs `step(row)` over tables of fixed shapes and sums what it returns.

    A captured step is tried first: replayed on the first rows from the same state as eager steps, it must return the same
    and move the same tensors the same way (`difference`). If it does not, or cannot be captured, one line says why and
    the eager steps go on.

    Args:
        step: takes a NamedTuple of tensors without the first axis, returns a tensor (k,).
        tensors: returns all tensors that a step changes in place, at best by kind (`changed_tensors`). The steps of the
            warm-up and of the trial are undone in place.
        width: k.
        capture: record a CUDA graph; else run eagerly.
        insist: a capture that fails ends the run instead (`runtime.mode: graph`).
    """

    def __init__(
        self,
        step: Callable[[Any], Tensor],
        tensors: Callable[[], Kinds | list[Tensor]],
        width: int,
        capture: bool,
        insist: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        self.step, self.width, self.capture, self.insist, self.say = step, width, capture, insist, say
        self.tensors = lambda: by_kind(tensors())
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
        """Warm up, capture, try the graph against eager steps, and put every changed tensor back in place."""
        before = {id(t): t.clone() for tensors in self.tensors().values() for t in tensors}
        draws = random_states()

        def start() -> None:
            put_back([t for tensors in self.tensors().values() for t in tensors], before)
            set_random_states(draws)
            self.rewind()

        graph: Replayable | None = None
        try:
            warm_up(self.first)
            start()
            expected = self.outcome(self.one, copy=True)
            start()
            graph = capture(self.one)
            start()
            trouble = difference(self.outcome(graph.replay, copy=False), expected, before)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            trouble = reason(error)
        start()
        if not trouble:
            self.graph = graph
        elif self.insist:
            raise UserError(f"runtime.mode: graph: the step cannot run as a CUDA graph ({trouble}): set runtime.mode=eager")
        else:
            self.say(f"the step does not run as a CUDA graph here ({trouble}): it runs eagerly, with the same numbers")

    def outcome(self, work: Callable[[], object], copy: bool) -> dict[str, list[Tensor]]:
        """Do the work for the rows of the trial; return what it changed, by kind.

        Args:
            copy: return copies of the changed tensors, not the tensors themselves.
        """
        sums = []
        for _ in range(min(TRIAL, self.tables[0].shape[0])):
            work()
            sums.append(self.sums.clone())
        changed = {kind: [t.clone() if copy else t for t in tensors] for kind, tensors in self.tensors().items()}
        return {SUMS: sums, COUNTER: [self.counter.clone()], **changed}


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
    """Return the work as a CUDA graph; nothing is computed yet.

    Raises:
        RuntimeError: what the work itself raised, if it did. To end the broken capture fails too, and that second error
            tells nothing.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    cause: RuntimeError | None = None
    try:
        with torch.cuda.graph(graph):
            try:
                work()
            except RuntimeError as error:
                cause = error
                raise
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch leaves the stream of the capture current if that cannot be ended
        raise (cause or error) from None
    return graph


def reason(error: RuntimeError) -> str:
    """Return the first line of an error and the innermost line of this project that led to it."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    root = Path(__file__).resolve().parents[1]
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(path, line) for path, line in frames if root in path.parents and "site-packages" not in path.parts]
    own = [(path, line) for path, line in ours if path != Path(__file__).resolve()]
    return f"{text}, at {own[-1][0].relative_to(root)}:{own[-1][1]}" if own else text


def changed_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Return all tensors that a training step changes in place, by kind.

    The kinds are `weights`, the model's buffers by their names in the layers (`running_mean`, ...), and the optimizer's
    moments by theirs (`exp_avg`, `step`, ...).
    """
    kinds: dict[str, list[Tensor]] = {WEIGHTS: list(model.parameters())}
    for name, buffer in model.named_buffers():
        kinds.setdefault(name.rpartition(".")[2], []).append(buffer)
    for moments in optimizer.state.values():
        for name, moment in moments.items():
            if isinstance(moment, Tensor):
                kinds.setdefault(name, []).append(moment)
    return kinds


def by_kind(tensors: Kinds | list[Tensor]) -> Kinds:
    """Return tensors by kind; of a plain list only the weights are known by their type."""
    if isinstance(tensors, Mapping):
        return tensors
    weights = [t for t in tensors if isinstance(t, nn.Parameter)]
    return {WEIGHTS: weights, "state": [t for t in tensors if not isinstance(t, nn.Parameter)]}


WEIGHTS, SUMS, COUNTER = "weights", "sums of losses", "row counter"
SUMS_APART = 0.02  # relative
PATH_APART = 0.5  # of the length of the path
ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative to a tensor's own length


@torch.no_grad()
def difference(found: Kinds, expected: Kinds, before: dict[int, Tensor]) -> str:
    """Return what is wrong with a replayed trial, or nothing.

    Two eager trials differ too: CUDA adds in no fixed order, bf16 rounds, and Adam's first steps take little but the signs
    of the gradients, so that a gradient near zero sends its weight either way. What is compared, each kind of tensors by
    itself, so that none is lost in the size of another:

    - Counters (whole numbers: the row counter, Adam's steps, BN's batches) exactly.
    - The sums of losses within 2 %.
    - Tensors that the eager steps moved: one that the replays left untouched was left out.
    - The path of all tensors of a kind together: apart by less than half of its length. Rounding stays below a quarter
      (measured with every product off by a bf16 rounding); a part done twice or left out gives 1 and more. Single
      tensors cannot be judged so: a bias before BN has a gradient of rounding alone, and goes either way.

    Args:
        found, expected: the outcome of the replays and of the eager steps.
        before: the tensors' values before, by the id of what `found` holds; what did not exist was zero.
    """
    for ours, theirs in zip(found[SUMS], expected[SUMS], strict=True):
        if not torch.allclose(ours, theirs, rtol=SUMS_APART, atol=1e-6):
            return f"a trial gave the losses {ours.tolist()} and not {theirs.tolist()}"
    for kind in found.keys() - {SUMS}:
        path = apart = slack = 0.0  # squares
        for a, b in zip(found[kind], expected[kind], strict=True):
            if is_counter(b):
                if not torch.equal(a, b):
                    return f"a trial counted wrongly ({kind})"
                continue
            origin = before.get(id(a), torch.zeros_like(a))
            size, moved, off = (float(t.double().square().sum()) for t in (b, b - origin, a - b))
            rounding = ROUNDING**2 * size
            if moved > rounding and torch.equal(a, origin):
                return f"a trial left out a change ({kind})"
            path, apart, slack = path + moved, apart + off, slack + rounding
        if not apart <= PATH_APART**2 * path + slack:  # also where one is not a number
            return f"a trial changed the {kind} another way, {(apart / max(path, 1e-300)) ** 0.5:.2f} of its length apart"
    return ""


def is_counter(t: Tensor) -> bool:
    """Return whether a tensor counts: whole numbers, or one floating-point number without a fraction (Adam's steps)."""
    return not t.is_floating_point() or (t.ndim == 0 and bool(t == t.round()))


@torch.no_grad()
def put_back(tensors: list[Tensor], before: dict[int, Tensor]) -> None:
    """Give tensors, in place, the values they had; what did not exist then (an optimizer's moments) starts at 0."""
    for t in tensors:
        if id(t) in before:
            t.copy_(before[id(t)])
        else:
            t.zero_()
