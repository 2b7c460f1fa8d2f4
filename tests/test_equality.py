"""Every way to run a MixMatch step gives the numbers of the plain loop, in float64; on a CUDA device too if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import to_pil_image

import ASD
from benchmark import reference
from benchmark.workload import fresh_model, in_runtime, make_context, mixmatch
from data.augment import Pipeline
from data.batches import MixMatchDraws, draw_mixmatch
from data.pools import pools_of
from engine.context import Context, build_state
from loss.mixmatch import ramp_up
from model.grouped_norm import group
from model.optimizer import build_optimizer
from utils.config.settings import MixMatch, Runtime
from utils.runtime.stepper import Stepper, changed_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
real_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [CPU, pytest.param(CUDA, marks=real_cuda)]
STEPS = 3
BATCH = 7  # no multiple of three: the interleaved groups differ in size


class DoublePipeline(Pipeline):
    """The train augmentation in float64."""

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to float64."""
        return super().normalize(images).double()


def small_run(device: torch.device) -> tuple[Context, MixMatchDraws]:
    """Return a run on 40 images in float64 and the draws of three steps."""
    context = make_context(40, 2, BATCH, device, blocks=1)
    primary, remaining = context.config.transform.train.primary, context.config.transform.train.remaining
    semi = replace(context.config.semi, mixmatch=MixMatch(train_iteration=STEPS))
    augment, config = DoublePipeline(primary, remaining, 32, 32), replace(context.config, semi=semi)
    pool, weights = torch.arange(2 * BATCH), ramp_up(60, STEPS, 15.0, 120)
    draws = draw_mixmatch(config, 0, pools_of(pool, 40), augment, weights).to(device)
    draws = draws._replace(lam=draws.lam.double(), lambda_u=draws.lambda_u.double())
    return replace(context, config=config, train_transform=augment), draws


def double_model(context: Context) -> nn.Module:
    """Return the network in float64, in train mode."""
    return fresh_model(context).double().train()


def plain_loop(context: Context, model: nn.Module, draws: MixMatchDraws, capturable: bool = False) -> Tensor:
    """Train with `ASD.mixmatch_step`, step by step; return (STEPS, 3) losses."""
    optimizer = build_optimizer(context.config.optimizer, model.parameters(), capturable)
    return torch.stack([ASD.mixmatch_step(context, model, optimizer, draws.step(i)) for i in range(STEPS)])


def merged(context: Context, model: nn.Module, draws: MixMatchDraws) -> Tensor:
    """Train with the forward passes merged."""
    return plain_loop(context, group(model), draws)


def baseline(context: Context, model: nn.Module, draws: MixMatchDraws) -> Tensor:
    """Train with the step of the benchmark's baseline."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    losses = []
    for i in range(STEPS):
        draw = draws.step(i)
        index = torch.cat([draw.labeled, draw.unlabeled, draw.unlabeled])
        x, u1, u2 = context.train_transform(context.train_set.images[index], draw.views).split(BATCH)
        batch = (x, context.train_set.labels[draw.labeled], u1, u2)
        mix = float(draw.lam), draw.permutation
        losses.append(reference.mixmatch_step(model, optimizer, batch, mix, float(draw.lambda_u)))
    return torch.tensor(losses, dtype=torch.float64, device=draws.lam.device)


def captured(context: Context, model: nn.Module, draws: MixMatchDraws) -> None:
    """Train with a captured step, replayed."""
    optimizer = build_optimizer(context.config.optimizer, model.parameters(), capturable=True)

    def step(draw: MixMatchDraws) -> Tensor:
        return ASD.mixmatch_step(context, model, optimizer, draw)

    stepper = Stepper(step, partial(changed_tensors, model, optimizer), width=3, capture=True, insist=True)
    stepper.run(draws, lambda numbers: numbers)
    assert stepper.graph is not None


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return the greatest difference between two models' weights and buffers."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("way", [merged, baseline])
def test_a_step_is_the_same_in_every_way(way: Callable[..., Tensor], device: torch.device) -> None:
    """Merged forward passes, and the baseline of the benchmark, give the losses, weights and BN statistics of the method's
    step."""
    context, draws = small_run(device)
    plain, other = double_model(context), double_model(context)
    losses = plain_loop(context, plain, draws)
    near = 1e-12 if device.type == "cpu" else 1e-9  # cuDNN sums in an order of its own, and Adam divides by tiny gradients
    torch.testing.assert_close(way(context, other, draws), losses, rtol=0, atol=near)
    assert distance(other, plain) < near
    assert distance(other, double_model(context)) > 1e-3


def check_captured(device: torch.device) -> None:
    """Compare a captured step with the eager loop.

    With the same fused optimizer they agree up to rounding. The captured one's learning rate is a float32 tensor, so it
    differs from that of the eager optimizer by that rounding.
    """
    context, draws = small_run(device)
    graph, plain, fused = (double_model(context) for _ in range(3))
    plain_loop(context, plain, draws)
    plain_loop(context, fused, draws, capturable=True)
    captured(context, graph, draws)
    assert distance(graph, fused) < 1e-9 and distance(graph, plain) < 1e-7


@real_cuda
def test_a_captured_step_is_the_eager_step() -> None:
    """Replays of the CUDA graph give the weights and BN statistics of eager steps."""
    check_captured(CUDA)


@real_cuda
def test_views_are_the_same_on_a_device() -> None:
    """All 9 x 9 x 2 crops and flips equal those of torchvision on PIL images, up to rounding (CUDA divides by multiplying)."""
    context = make_context(162, 2, BATCH, CUDA)
    rows = [(top, left, mirrored) for top in range(9) for left in range(9) for mirrored in (0, 1)]
    made = context.train_transform(context.train_set.images, torch.tensor(rows, dtype=torch.float64, device=CUDA)).cpu()
    for image, view, (top, left, mirrored) in zip(context.train_set.images.cpu(), made, rows, strict=True):
        picture = TF.crop(TF.pad(to_pil_image(image), 4, padding_mode="reflect"), top, left, 32, 32)
        picture = TF.hflip(picture) if mirrored else picture
        expected = TF.normalize(TF.to_tensor(picture), context.train_transform.mean, context.train_transform.std)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_forward_passes_of_a_step_are_traceable(grouped: bool, amp: bool) -> None:
    """The network traces without graph breaks, as `runtime.compile` needs, and gives the same numbers."""
    context = in_runtime(make_context(40, 1, 4, CPU, blocks=1), Runtime("eager", merged=grouped, amp=amp))
    pool = torch.arange(20)
    draw = draw_mixmatch(context.config, 0, pools_of(pool, 40), context.train_transform, torch.ones(1024)).step(0)
    results = []
    for compiled in (False, True):
        state = build_state(context.config, context.machine, 40)
        network: Any = state.model.train()
        if compiled:
            network = torch.compile(network, fullgraph=True, dynamic=False, backend="eager")
        results.append(ASD.mixmatch_step(context, network, state.optimizer, draw))
    assert torch.allclose(*results, rtol=1e-5)


def test_a_compiled_run_calls_the_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`runtime.compile` passes the network to the compiler and trains the compiled one."""
    called: list[int] = []

    class Compiled(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            called.append(len(images))
            return self.network(images)

    monkeypatch.setattr("utils.runtime.machine.Machine.compiled", lambda self, network: Compiled(network))
    context = make_context(40, 1, 4, CPU, blocks=1)
    mixmatch(12, 2, in_runtime(context, Runtime("eager", compile=True)))()
    assert called == [4] * ASD.FORWARDS * 2
    mixmatch(12, 2, context)()
    assert len(called) == ASD.FORWARDS * 2
