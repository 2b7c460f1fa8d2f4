"""Supervised training, of the virtual model and undefended, on a simulated CUDA device: one graph, replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from fake_cuda import Device, Graph, pretended_cuda
from torch import Tensor

import ASD
from data.sets import ImageSet
from defenses import none
from engine.context import Context, build_context, build_state
from engine.supervised import supervised_steps
from model.classifier import Classifier
from utils import config as configuration
from utils.errors import UserError
from utils.runtime.machine import Machine

N, BATCH, C = 22, 8, 10  # two batches, and a smaller one
NARROW = "network={resnet18_cifar: {width: 8, blocks: 1}}"
CUDA = torch.device("cuda", 0)


@dataclass
class Outcome:
    """Two epochs of training."""

    device: Device
    tensors: list[dict[str, Tensor]]  # the model's after each epoch, on the CPU
    losses: list[float]


@contextlib.contextmanager
def device_that(captures: bool) -> Iterator[Device]:
    """Simulate a device on which captures succeed or fail; in the latter case the same steps run eagerly."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no capture")

    with pretended_cuda() as device, mock.patch.object(Graph, "capture_begin", Graph.capture_begin if captures else refuse):
        yield device


def make_context(tiny: Path, *overrides: str, resident: bool = True, amp: bool = False) -> Context:
    """Return random images on the simulated device and the tiny settings."""
    settings = configuration.load(tiny, [f"loader.batch_size={BATCH}", f"undefended.batch_size={BATCH}", NARROW, *overrides])
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 32, 32), generator=rng).to(torch.uint8)
    train_set = ImageSet(images, torch.arange(N) % C, "device" if resident else "host").to(CUDA)
    return build_context(settings, Machine(CUDA, amp), train_set)


def kept(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors of a model on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def train_virtual(context: Context, after_epoch: Callable[[], object]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Train the virtual model in two epochs, between which the model changes, reusing its tensors."""
    model = build_state(context.config, context.machine, N).model
    assert isinstance(model, Classifier)
    virtual, out = ASD.build_virtual(context, model), []
    for epoch in range(2):
        out.append(kept(ASD.train_virtual_model(context, epoch, model, virtual)))
        after_epoch()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    assert all((p.grad is not None) == p.requires_grad for p in virtual.model.parameters())
    assert not all(p.requires_grad for p in virtual.model.parameters())
    return out, []


def train_undefended(context: Context, after_epoch: Callable[[], object]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Train two epochs without a defense, the second with another learning rate."""
    state = build_state(context.config, context.machine, N)
    state.stepper = supervised_steps(context, state)
    out, losses = [], []
    for epoch in range(2):
        losses.append(none.Defense(context, torch.arange(0)).train_epoch(state, epoch)["loss"])
        out.append(kept(state.model))
        after_epoch()
        state.optimizer.param_groups[0]["lr"].fill_(0.01)
    return out, losses


KINDS = {"virtual model": train_virtual, "undefended": train_undefended}
SETTINGS = {
    "virtual model": ("meta.epoch=2",),
    "undefended": ("defense=none", "undefended.optimizer={SGD: {lr: 0.1, momentum: 0.9, nesterov: true}}"),
}
both = pytest.mark.parametrize("kind", KINDS)


def run(tiny: Path, kind: str, captures: bool, *overrides: str, amp: bool = False) -> Outcome:
    """Train two epochs on a device; check that the second one captures nothing."""
    graphs = []
    with device_that(captures) as device:
        context = make_context(tiny, *SETTINGS[kind], *overrides, amp=amp)
        tensors, losses = KINDS[kind](context, lambda: graphs.append(len(device.graphs)))
    assert graphs == [int(captures)] * 2
    return Outcome(device, tensors, losses)


@both
@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_captured_steps_equal_eager_steps(kind: str, amp: bool, tiny: Path, said: list[str]) -> None:
    """One graph, captured in the first epoch, runs all full batches of both. Weights, BN statistics, counters and losses
    equal those of eager steps bit for bit."""
    graph = run(tiny, kind, True, amp=amp)
    assert said == []
    eager = run(tiny, kind, False, amp=amp)
    assert any("no capture" in line for line in said)
    assert graph.losses == eager.losses
    for ours, theirs in zip(graph.tensors, eager.tensors, strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    passes = 2 if kind == "virtual model" else 1  # an epoch
    trial = 2
    assert graph.device.graphs[0].replays == trial + 2 * passes * (N // BATCH)
    counted = [int(tensors["backbone.bn1.num_batches_tracked"]) for tensors in graph.tensors]
    batches = passes * -(-N // BATCH)
    assert counted == ([batches, batches] if kind == "virtual model" else [batches, 2 * batches])


@both
def test_the_host_never_waits_in_a_loop(kind: str, tiny: Path) -> None:
    """No step reads from the device or copies pageable memory to it, including the last, eager one."""
    few = run(tiny, kind, True)
    more = run(tiny, kind, True, "loader.batch_size=4", "undefended.batch_size=4")
    assert few.device.reads and few.device.uploads
    assert more.device.reads == few.device.reads
    assert more.device.uploads == few.device.uploads


@pytest.mark.parametrize("name", ["mixmatch", "virtual model"])
def test_a_captured_step_counts_no_batches(name: str, tiny: Path) -> None:
    """BN's batch counters are not part of a captured step: its only integer addition is that of the row counter."""
    with device_that(True) as device:
        context = make_context(tiny, "semi.loader.batch_size=4", "semi.mixmatch.train_iteration=2")
        if name == "mixmatch":
            state = build_state(context.config, context.machine, N)
            ASD.train_mixmatch(context, 0, state, torch.arange(8))
        else:
            train_virtual(context, lambda: None)
        (graph,) = device.graphs
        additions = [op for op in graph.operations if op.name.startswith(("aten::add_", "aten::_foreach_add_"))]
        whole = [op for op in additions if isinstance(op.args[0], Tensor) and not op.args[0].is_floating_point()]
    assert len(whole) == 1


def test_graphs_that_are_insisted_on_need_images_on_the_device(tiny: Path) -> None:
    """`runtime.mode: graph` is refused in one line if the images are in host memory, for every kind of training."""
    with device_that(True):
        context = make_context(tiny, "runtime.mode=graph", resident=False)
        model = build_state(context.config, context.machine, N).model
        for build in (ASD.mixmatch_steps, supervised_steps):
            with pytest.raises(UserError, match=r"runtime\.mode: graph: [^\n]*data\.placement"):
                build(context, build_state(context.config, context.machine, N))
        with pytest.raises(UserError, match=r"runtime\.mode: graph"):
            ASD.build_virtual(context, model)
