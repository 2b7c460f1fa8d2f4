"""The loop over the draws gives the results of a plain loop, eagerly and as a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import logged
from torch import Tensor

from utils.errors import UserError
from utils.runtime.graph_check import COUNTER, SUMS, difference
from utils.runtime.stepper import Stepper, changed_tensors, put_back


class Rows(NamedTuple):
    """Tables of a toy step."""

    a: Tensor  # (S, 3)
    b: Tensor  # (S,)


def test_a_stepper_is_a_plain_loop() -> None:
    """Every row is used once, in order, and the sum of the results is returned; also in the next epoch."""
    seen: list[tuple[list[float], float]] = []

    def step(row: Rows) -> Tensor:
        seen.append((row.a.tolist(), float(row.b)))
        return torch.stack([row.a.sum(), row.b])

    stepper = Stepper(step, dict, width=2, capture=False)
    for epoch in range(2):
        rows = Rows(torch.arange(12.0).view(4, 3) + epoch, torch.arange(4.0) * 10)
        seen.clear()
        total = stepper.run(rows, lambda numbers: numbers)
        assert seen == [(rows.a[i].tolist(), float(rows.b[i])) for i in range(4)]
        assert total.tolist() == [float(rows.a.sum()), 60.0]


def test_what_a_warm_up_changed_is_put_back_in_place() -> None:
    """Tensors get their old values in place; moments created by the warm-up start at zero."""
    old, born = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    before = {id(old): old.clone()}
    place = old.data_ptr()
    old.mul_(7)
    put_back([old, born], before)
    assert old.tolist() == [1.0, 2.0] and old.data_ptr() == place and born.tolist() == [0.0]


class Fake:
    """A graph whose replay runs the step correctly, twice, or never; capturing it runs nothing."""

    def __init__(self, work: Callable[[], object], how: str) -> None:
        self.work, self.how = work, how

    def replay(self) -> None:
        for _ in range({"right": 1, "twice": 2, "nothing": 0}[self.how]):
            self.work()


def trained(how: str, monkeypatch: pytest.MonkeyPatch, insist: bool = False) -> tuple[list[Tensor], list[str], Stepper]:
    """Train a small model for two epochs of four steps, captured by a fake; return weights, moments and log lines."""

    def warm_up(work: Callable[[], object]) -> None:
        if how == "too large":
            raise torch.OutOfMemoryError("full")
        for _ in range(3):
            work()

    def capture(work: Callable[[], object]) -> Fake:
        if how == "full":
            raise torch.OutOfMemoryError("full")
        if how == "refuses":
            raise RuntimeError("operation not permitted\nat length")
        return Fake(work, how)

    monkeypatch.setattr("utils.runtime.stepper.warm_up", warm_up)
    monkeypatch.setattr("utils.runtime.stepper.capture", capture)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step(row: Rows) -> Tensor:
        loss = ((F.dropout(model(row.a)) - row.b) ** 2).sum()  # what is dropped must not depend on the trial either
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach().view(1)

    def tensors() -> dict[str, list[Tensor]]:
        return changed_tensors(model, optimizer)

    stepper = Stepper(step, tensors, 1, capture=how != "eager", insist=insist)
    rows = Rows(torch.arange(12.0).view(4, 3) / 12, torch.arange(4.0))
    with logged() as said:
        sums = [stepper.run(rows, lambda numbers: numbers) for _ in range(2)]
    return [*stepper.changed(), *sums], said, stepper


@pytest.mark.parametrize("how", ["right", "twice", "nothing", "refuses"])
def test_a_graph_is_used_only_if_its_trial_is_right(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a capture fails or its replays differ, one line is logged, and the eager steps give the same numbers as without a
    trial. A correct graph is used, and warm-up and trial leave no trace either."""
    plain, silence, _ = trained("eager", monkeypatch)
    tensors, said, stepper = trained(how, monkeypatch)
    assert (stepper.graph is not None) == (how == "right")
    assert len(said) == (how != "right") and silence == []
    assert all("\n" not in line and "eagerly" in line for line in said)
    for ours, theirs in zip(tensors, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["twice", "nothing", "refuses"])
def test_mode_graph_fails_if_the_graph_is_wrong(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `runtime.mode: graph` a graph that cannot be used is a one-line error with the remedy."""
    with pytest.raises(UserError, match=r"runtime\.mode: graph: .*set runtime\.mode=eager") as caught:
        trained(how, monkeypatch, insist=True)
    assert "\n" not in str(caught.value)


def test_a_graph_that_does_not_fit_into_memory_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has memory of its own: if its capture runs out of memory, the steps run eagerly, with the same results."""
    expected, _, _ = trained("eager", monkeypatch)
    found, said, stepper = trained("full", monkeypatch)
    assert stepper.graph is None and all(map(torch.equal, found, expected))
    assert len(said) == 1 and said[0].startswith("the step cannot run as a CUDA graph (full")


@pytest.mark.parametrize(("how", "insist"), [("too large", False), ("full", True)])
def test_out_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch, how: str, insist: bool) -> None:
    """If the eager steps before the capture do not fit either, or only the graph may be used, the settings are too large."""
    with pytest.raises(torch.OutOfMemoryError):
        trained(how, monkeypatch, insist)


def moved(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Train one step on random images."""
    model(torch.randn(8, 3, 6, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_all_that_a_step_changes_is_compared() -> None:
    """Weights, BN statistics and counters, and the optimizer's moments and steps are separate kinds."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.Adam(model.parameters())
    moved(model, optimizer)
    kinds = changed_tensors(model, optimizer)
    assert {kind: len(tensors) for kind, tensors in kinds.items()} == {
        "weights": 4, "running_mean": 1, "running_var": 1, "num_batches_tracked": 1, "exp_avg": 4, "exp_avg_sq": 4, "step": 4
    }  # fmt: skip


COUNTERS = (COUNTER, "num_batches_tracked", "step")
OTHERS = (SUMS, "weights", "running_mean", "exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [*((k, w) for k in COUNTERS + OTHERS for w in ("unchanged", "elsewhere")), *((k, "not a number") for k in OTHERS)],
)
def test_each_kind_of_tensors_is_compared_by_itself(kind: str, wrong: str) -> None:
    """An outcome in which one kind of tensors is unchanged, different or NaN is refused, however large the others are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.Adam(model.parameters())
    moved(model, optimizer)
    found = changed_tensors(model, optimizer) | {SUMS: [torch.ones(3)], COUNTER: [torch.tensor([1])]}
    before = {id(t): t.clone() for tensors in found.values() for t in tensors}
    moved(model, optimizer)
    for t in (found[SUMS][0], found[COUNTER][0]):
        t += 1
    expected = {name: [t.clone() for t in tensors] for name, tensors in found.items()}
    scatter = dict.fromkeys(expected, 0.0)
    assert difference(found, expected, before, scatter) == ""
    with torch.no_grad():
        for t in found[kind]:
            t.copy_({"unchanged": before[id(t)], "elsewhere": t + t.abs().max() + 1, "not a number": t * torch.nan}[wrong])
    assert difference(found, expected, before, scatter) != ""


def test_a_graph_may_differ_as_much_as_two_eager_trials() -> None:
    """On a nondeterministic device, a graph may differ from an eager trial twice as much as another eager trial, up to a
    limit."""
    before, expected = torch.zeros(2), torch.tensor([1.0, 0.0])
    sums = {SUMS: [torch.ones(1)]}
    for value, scatter, accepted in [(0.6, 0.0, False), (0.6, 0.4, True), (1.0, 0.9, False)]:
        found = torch.tensor([1.0, value])
        kinds = ({"weights": [found]} | sums, {"weights": [expected]} | sums)
        assert (difference(*kinds, {id(found): before}, {"weights": scatter}) == "") == accepted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_the_eager_step() -> None:
    """On CUDA the graph's replays change the weights as the eager steps do."""
    results = []
    for capture in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True, fused=True)

        def step(row: Rows, model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            loss = ((model(row.a) - row.b) ** 2).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach().view(1)

        rows = Rows(torch.arange(12.0).view(4, 3).cuda() / 12, torch.arange(4.0).cuda())
        stepper = Stepper(step, partial(changed_tensors, model, optimizer), width=1, capture=capture)
        stepper.run(rows, lambda numbers: numbers)
        results.append(model.weight.detach().cpu())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)
