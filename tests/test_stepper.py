"""The loop over the draws: the same steps as a plain loop, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError
from utils.stepper import Stepper, put_back


class Rows(NamedTuple):
    """Tables of a toy step."""

    a: Tensor  # (S, 3)
    b: Tensor  # (S,)


def test_a_stepper_is_a_plain_loop() -> None:
    """Every row is used once, in order, and the sum of what the steps return is given back; again in the next epoch."""
    seen: list[tuple[list[float], float]] = []

    def step(row: Rows) -> Tensor:
        seen.append((row.a.tolist(), float(row.b)))
        return torch.stack([row.a.sum(), row.b])

    stepper = Stepper(step, list, width=2, capture=False)
    for epoch in range(2):
        rows = Rows(torch.arange(12.0).view(4, 3) + epoch, torch.arange(4.0) * 10)
        seen.clear()
        total = stepper.run(rows, lambda numbers: numbers)
        assert seen == [(rows.a[i].tolist(), float(rows.b[i])) for i in range(4)]
        assert total.tolist() == [float(rows.a.sum()), 60.0]


def test_what_a_warm_up_changed_is_put_back_in_place() -> None:
    """Tensors get their old values where they lie; moments that the warm-up gave birth to start at zero."""
    old, born = torch.tensor([1.0, 2.0]), torch.tensor([5.0])
    before = {id(old): old.clone()}
    place = old.data_ptr()
    old.mul_(7)
    put_back([old, born], before)
    assert old.tolist() == [1.0, 2.0] and old.data_ptr() == place and born.tolist() == [0.0]


class Fake:
    """A graph that replays the step right, twice, without its end, or not at all; it is captured without being run."""

    def __init__(self, work: Callable[[], object], how: str) -> None:
        self.work, self.how = work, how

    def replay(self) -> None:
        for _ in range({"right": 1, "twice": 2, "nothing": 0}[self.how]):
            self.work()


def trained(how: str, monkeypatch: pytest.MonkeyPatch, insist: bool = False) -> tuple[list[Tensor], list[str], Stepper]:
    """Train a little model for two epochs of four steps, captured by a fake; return weights and moments, and what was said."""
    monkeypatch.setattr("utils.stepper.warm_up", lambda work: [work() for _ in range(3)])

    def capture(work: Callable[[], object]) -> Fake:
        if how == "refuses":
            raise RuntimeError("operation not permitted\nat length")
        return Fake(work, how)

    monkeypatch.setattr("utils.stepper.capture", capture)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def step(row: Rows) -> Tensor:
        loss = ((F.dropout(model(row.a)) - row.b) ** 2).sum()  # what is dropped must not depend on the trial either
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach().view(1)

    def tensors() -> list[Tensor]:
        return [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]

    said: list[str] = []
    stepper = Stepper(step, tensors, 1, capture=how != "eager", insist=insist, say=said.append)
    rows = Rows(torch.arange(12.0).view(4, 3) / 12, torch.arange(4.0))
    sums = [stepper.run(rows, lambda numbers: numbers) for _ in range(2)]
    return [*tensors(), *sums], said, stepper


@pytest.mark.parametrize("how", ["right", "twice", "nothing", "refuses"])
def test_a_graph_is_used_only_if_its_trial_is_right(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails, or replays something else, costs one line and no number: the eager steps go on as if nothing
    had been tried; a right one is used, and leaves no trace of warm-up and trial either."""
    plain, silence, _ = trained("eager", monkeypatch)
    tensors, said, stepper = trained(how, monkeypatch)
    assert (stepper.graph is not None) == (how == "right")
    assert len(said) == (how != "right") and silence == []
    assert all("\n" not in line and "eagerly" in line for line in said)
    for ours, theirs in zip(tensors, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", ["twice", "nothing", "refuses"])
def test_mode_graph_ends_where_the_graph_is_not_right(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a graph is told in one line that there is none, and how to go on."""
    with pytest.raises(UserError, match=r"runtime\.mode: graph: .*set runtime\.mode=eager") as caught:
        trained(how, monkeypatch, insist=True)
    assert "\n" not in str(caught.value)


def test_a_full_memory_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture for which the memory is too small is no reason to go on eagerly: the settings are too large."""

    def capture(work: Callable[[], object]) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(Fake, "__init__", lambda self, work, how: capture(work))
        trained("right", monkeypatch)


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

        def tensors(model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> list[Tensor]:
            return [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]

        rows = Rows(torch.arange(12.0).view(4, 3).cuda() / 12, torch.arange(4.0).cuda())
        stepper = Stepper(step, tensors, width=1, capture=capture)
        stepper.run(rows, lambda numbers: numbers)
        results.append(model.weight.detach().cpu())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)
