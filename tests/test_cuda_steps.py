"""Training steps and their CUDA graphs on the simulated device (`fake_cuda.py`): what is captured, accepted, and refused."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conftest import logged
from fake_cuda import CUDA, Graph, Operation, Stream, pretended_cuda, running_device, tensors_in
from test_equality import check_captured
from torch import Tensor, nn

import ASD
from benchmark import first_look, workload
from benchmark.workload import in_runtime, make_context
from data.batches import draw_mixmatch
from data.pools import pools_of
from engine.context import build_state
from loss.mixmatch import ramp_up
from model.optimizer import build_optimizer, build_scheduler
from utils.config.schema import Named
from utils.config.settings import SGD, Adam, MixMatch, MultiStep, Runtime
from utils.runtime.stepper import TRIAL, Stepper, changed_tensors

PRODUCTS = {"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"}
ADAM = Named("Adam", Adam())
Change = Callable[[list[Operation]], list[Operation]]


def mixmatch_stepper(mode: str, amp: bool = False, blocks: int = 1, steps: int = 3) -> tuple[Stepper, Any]:
    """The method's own stepper and tables, for a network of width 8: narrower ones crash torch 2.14 without AVX-512."""
    context = in_runtime(make_context(120, 8, 8, CUDA, blocks), Runtime(mode, amp=amp))
    semi = replace(context.config.semi, mixmatch=MixMatch(train_iteration=steps))
    context = replace(context, config=replace(context.config, semi=semi))
    state = build_state(context.config, context.machine, 120)
    state.model.train()
    pool = torch.arange(20)
    draws = draw_mixmatch(context.config, 1, pools_of(pool, 120), context.train_transform, ramp_up(1, steps, 15.0, 120))
    return ASD.mixmatch_steps(context, state), draws.to(CUDA)


def quiet(numbers: Iterable[int]) -> Iterable[int]:
    """Show no progress bar."""
    return numbers


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_never_waits_for_the_host(amp: bool) -> None:
    """A MixMatch step of ResNet-18 reads nothing from the device and copies nothing to it. It starts at most 900 operators
    (1,120 with bf16), and in bf16 all images and weights of convolutions are in channels_last."""
    with pretended_cuda() as device:
        stepper, draws = mixmatch_stepper("eager", amp, blocks=2, steps=1)
        stepper.run(draws, quiet)
        for counter in (device.reads, device.uploads, device.launches, device.channels_last):
            counter.clear()
        stepper.run(draws, quiet)
    assert not device.reads and not device.uploads
    assert sum(device.launches.values()) <= (1120 if amp else 900)
    assert device.channels_last.total() == 2 * 5 * 20  # inputs and weights of five forward passes
    assert not (amp and device.channels_last[False])


class Row(NamedTuple):
    """The tables of a small step."""

    x: Tensor  # (S, 4, 3, 6, 6)


def small_training(optimizer: Named, capture: bool) -> tuple[Stepper, Row, torch.optim.Optimizer]:
    """Return a stepper and tables that take milliseconds: convolution, BN, and the optimizer of a run with a graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 2)).to(CUDA)
    updates = build_optimizer(optimizer, model.parameters(), capturable=True)

    def step(row: Row) -> Tensor:
        updates.zero_grad(set_to_none=True)
        loss = model(row.x).square().mean()
        loss.backward()
        updates.step()
        return loss.detach().view(1)

    tables = Row(torch.randn(3, 4, 3, 6, 6).to(CUDA))
    return Stepper(step, partial(changed_tensors, model, updates), width=1, capture=capture), tables, updates


def small_stepper() -> tuple[Stepper, Row]:
    """Return the same with Adam and a graph."""
    return small_training(ADAM, capture=True)[:2]


@pytest.mark.parametrize("optimizer", [ADAM, Named("SGD", SGD(momentum=0.9))], ids=["Adam", "SGD"])
def test_a_schedule_reaches_the_captured_step(optimizer: Named) -> None:
    """Replays use the learning rate that a schedule sets between epochs: weights, moments and losses equal those of eager
    steps bit for bit."""
    results = []
    for capture in (True, False):
        with pretended_cuda() as device:
            stepper, tables, updates = small_training(optimizer, capture)
            schedule = build_scheduler(Named("multi_step", MultiStep(milestones=(1, 2))), updates, num_epochs=3)
            assert schedule is not None
            sums, rates = [], []
            for _ in range(3):
                sums.append(stepper.run(tables, quiet).tolist())
                rates.append(float(updates.param_groups[0]["lr"]))
                schedule.step()
            assert len(device.graphs) == capture and (stepper.graph is not None) == capture and len({*rates}) == 3
            results.append(([t.cpu() for t in stepper.changed()], sums, rates))
    (ours, *others), (theirs, *same) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) and others == same


mixmatch_graph = partial(mixmatch_stepper, "auto")


def trial(make: Callable[[], tuple[Stepper, Any]], change: Change) -> tuple[list[str], int]:
    """Run steps whose graph is modified after its capture; return the log lines of the trial, and the number of replays."""
    end = Graph.capture_end

    def capture_end(graph: Graph) -> None:
        end(graph)
        graph.operations = change(graph.operations)

    with pretended_cuda() as device, mock.patch.object(Graph, "capture_end", capture_end), logged() as lines:
        stepper, tables = make()
        stepper.run(tables, quiet)
        return lines, device.graphs[0].replays


def without(chosen: Callable[[Operation], bool]) -> Change:
    """Remove operators, of which there must be some."""

    def change(operations: list[Operation]) -> list[Operation]:
        kept = [operation for operation in operations if not chosen(operation)]
        assert len(kept) < len(operations)
        return kept

    return change


def is_optimizer(operation: Operation) -> bool:
    return operation.name.startswith("aten::_fused_adam")


def is_addition(operation: Operation, shape: tuple[int, ...]) -> bool:
    """Return whether an operator adds to an integer tensor of that shape."""
    if operation.name != "aten::add_.Tensor":
        return False
    return operation.args[0].shape == shape and operation.args[0].dtype == torch.int64


def rounded(operations: list[Operation]) -> list[Operation]:
    """Round every product to bf16, as if another kernel had computed it."""

    def run(func: Callable[..., object], *args: object, **kwargs: object) -> object:
        out = func(*args, **kwargs)
        for t in tensors_in(out):
            t.mul_(1 + 2**-9 * (2 * torch.rand_like(t) - 1))
        return out

    chosen = [operation for operation in operations if operation.name in PRODUCTS]
    assert chosen
    for operation in chosen:
        operation.func = partial(run, operation.func)
    return operations


@pytest.mark.parametrize(
    ("make", "change"), [(small_stepper, list), pytest.param(mixmatch_graph, rounded, marks=pytest.mark.slow)]
)
def test_the_trial_accepts_a_whole_graph(make: Callable[[], tuple[Stepper, Any]], change: Change) -> None:
    """A graph that does the complete step is used, even if its kernels round differently."""
    assert trial(make, change) == ([], TRIAL + 3)


DEFECTS: dict[str, tuple[str, Change]] = {
    "no optimizer": ("weights", without(is_optimizer)),
    "optimizer twice": ("weights", lambda operations: [*operations, *filter(is_optimizer, operations)]),
    "row counter stands still": ("row counter", without(partial(is_addition, shape=(1,)))),
    "BN counters stand still": ("num_batches_tracked", without(partial(is_addition, shape=()))),
    "no gradients": ("", without(lambda operation: operation.name == "aten::convolution_backward")),
    "nothing": ("", lambda operations: []),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_trial_refuses_a_graph_that_lacks_a_part(name: str) -> None:
    """One line names the tensors that differ, and the steps run eagerly."""
    kind, change = DEFECTS[name]  # of tensors
    lines, replays = trial(small_stepper, change)
    assert len(lines) == 1 and "\n" not in lines[0] and kind in lines[0]
    assert replays == TRIAL


@pytest.mark.slow
def test_the_trial_of_mixmatch_refuses_a_graph_without_the_optimizer() -> None:
    """The large BN statistics and step counters of a whole network do not hide unchanged weights."""
    lines, replays = trial(mixmatch_graph, without(is_optimizer))
    assert len(lines) == 1 and "weights" in lines[0] and replays == TRIAL


def failing(step: Callable[[Any], Tensor]) -> tuple[list[str], list[object], list[float]]:
    """Run three rows of a step that cannot be captured; return the log lines, the streams of the last three steps, and the
    sum."""
    streams: list[object] = []

    def watched(row: Any) -> Tensor:
        streams.append(torch.cuda.current_stream())
        return step(row)

    stepper = Stepper(watched, dict, width=1, capture=True)
    with logged() as lines:
        sums = stepper.run(Row(torch.arange(3.0).to(CUDA)), quiet)
    return lines, streams[-3:], sums.tolist()


def test_the_cause_of_a_failed_capture_is_shown() -> None:
    """A step that cannot be captured runs eagerly on the default stream. The line has the original cause, not the error
    that follows from it."""
    with pretended_cuda():
        (line,), streams, sums = failing(lambda row: row.x.view(1) + row.x.item())
    assert streams == [Stream.default] * 3 and sums == [2 * (0 + 1 + 2)]
    assert "operation not permitted when stream is capturing" in line and "previous error" not in line


def test_the_place_of_a_failed_capture_is_shown() -> None:
    """The line names the innermost line of the project in the traceback."""

    def step(row: Row) -> Tensor:
        device = running_device()
        if device.capturing is not None:
            device.capturing.broken = True
            raise RuntimeError("no kernel for this\nand so on")
        return row.x.view(1)

    with pretended_cuda():
        (line,), _, _ = failing(step)
    number = step.__code__.co_firstlineno + 4
    assert f"(no kernel for this, at tests/test_cuda_steps.py:{number})" in line


def test_a_mistake_in_a_step_is_raised_as_it_is() -> None:
    """An error that is unrelated to the capture is raised unchanged, and the default stream stays current."""

    def step(row: Row) -> Tensor:
        device = running_device()
        if device.capturing is not None:
            device.capturing.broken = True
            raise TypeError("a mistake")
        return row.x.view(1)

    with pretended_cuda():
        with pytest.raises(TypeError, match="a mistake"):
            failing(step)
        assert torch.cuda.current_stream() is Stream.default


@pytest.mark.slow
def test_replays_are_eager_steps() -> None:
    """Replays of a captured MixMatch step and eager steps give the same numbers in float64."""
    with pretended_cuda():
        check_captured(CUDA)


@pytest.mark.slow
def test_the_first_look_goes_on_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    """If the capture of one variant fails, it is reported, and the others are measured."""
    begin, tries = Graph.capture_begin, count()

    def capture_begin(graph: Graph, *args: object, **kwargs: object) -> None:
        if next(tries) == 0:
            raise RuntimeError("CUDA error: out of luck")
        begin(graph)

    monkeypatch.setattr(Graph, "capture_begin", capture_begin)
    monkeypatch.setattr("utils.runtime.machine.Machine.compiled", lambda self, function: function)
    monkeypatch.setattr(workload, "make_context", lambda *_: make_context(120, 8, 4, CUDA, 1))
    monkeypatch.setattr(workload, "step_gflop", lambda *_: 1.0)
    monkeypatch.setattr(first_look, "timer", time.perf_counter)  # torch's own waits for a driver
    monkeypatch.setattr(first_look, "timed", lambda work: argparse.Namespace(median=1.0))
    monkeypatch.setattr(first_look, "STEPS", 1)
    monkeypatch.setattr(first_look, "SIDE", 32)
    for name in ("inference", "virtual"):
        monkeypatch.setattr(first_look, name, lambda *_: None)
    with pretended_cuda() as device:
        assert first_look.look(CUDA, 8, 4) == ["step: graph"]
    assert any(line.startswith("warning: step: graph") and "out of luck" in line for line in said)
    assert capsys.readouterr().out.count("ms per step") == 2
    assert len(device.graphs) == 1  # of the third variant
