"""The simulated CUDA device itself (`fake_cuda.py`): it refuses and counts what a real device refuses or waits for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import CUDA, Stream, pretended_cuda
from torch import Tensor, nn


def test_the_device_is_there_for_the_block_only() -> None:
    """Inside the block torch finds one CUDA device; afterwards everything is as before."""
    before = torch.cuda.is_available(), torch.cuda.CUDAGraph, torch.Generator
    with pretended_cuda():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.zeros(2, device=CUDA).device == CUDA
    assert before == (torch.cuda.is_available(), torch.cuda.CUDAGraph, torch.Generator)


def test_training_gives_the_numbers_of_the_cpu() -> None:
    """Forward, backward and optimizer compute what they compute on the CPU, bit for bit."""
    images, weights = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    with pretended_cuda():
        for device in (torch.device("cpu"), CUDA):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).to(device)
            optimizer = torch.optim.Adam(model.parameters(), fused=True)
            for _ in range(3):
                optimizer.zero_grad()
                model(images.to(device)).square().mean().backward()
                optimizer.step()
            weights.append([t.detach().cpu() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_tensors_of_two_devices_do_not_mix() -> None:
    """As on CUDA, only scalars may come from the host."""
    with pretended_cuda():
        x = torch.ones(3).to(CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
        assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool((x > 0).all()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "copy to the host": lambda x: x.cpu(),
    "tensor from the host": lambda x: torch.ones(3).to(CUDA),
    "number from the host": lambda x: torch.tensor(1.0, device=CUDA),
    "index from the host": lambda x: x[torch.tensor([0, 2])],
}


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_counted_and_cannot_be_captured(name: str) -> None:
    """Reads and uploads are counted one by one; during a capture they are errors, and the capture is lost."""
    with pretended_cuda() as device:
        x = torch.ones(3, device=CUDA)
        WAITS[name](x)
        assert (sum(device.reads.values()), sum(device.uploads.values())) == ((0, 1) if "from" in name else (1, 0))
        with pytest.raises(RuntimeError, match="due to a previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            WAITS[name](x)
        assert not device.graphs
        assert torch.cuda.current_stream() is not Stream.default  # as on CUDA: whoever captures has to put that right


def test_a_graph_replays_the_recorded_work() -> None:
    """A capture computes nothing. Replays read the current values of tensors, but Python numbers from the time of the
    capture."""
    with pretended_cuda() as device:
        x, total, rate = torch.ones(3, device=CUDA), torch.zeros(3, device=CUDA), 1.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total += rate * x
        assert total.tolist() == [0, 0, 0] and device.graphs == [graph]
        rate = 5.0
        graph.replay()
        assert total.tolist() == [1, 1, 1]
        x.fill_(7)
        graph.replay()
        assert total.tolist() == [8, 8, 8]


def test_a_number_of_the_host_would_be_frozen() -> None:
    """A host tensor with one number may be added, but not during a capture, where it would become a constant."""
    with pretended_cuda():
        x, rate = torch.ones(3, device=CUDA), torch.tensor(2.0)
        assert (x * rate).tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x * rate


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_fused_optimizers_want_one_memory_layout(kind: type[torch.optim.Optimizer]) -> None:
    """Moments in another memory format than their weights are refused, as by CUDA's fused kernels."""
    with pretended_cuda():
        weight = nn.Parameter(torch.ones(8, 8, 3, 3, device=CUDA))
        optimizer = kind([weight], fused=True, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))  # type: ignore[call-arg]
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        for name, moment in optimizer.state[weight].items():
            if moment.dim() == 4:
                optimizer.state[weight][name] = moment.contiguous(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="layout"):
            optimizer.step()
