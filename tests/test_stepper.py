"""The loop over the draws: the same steps as a plain loop, whatever runs them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

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
