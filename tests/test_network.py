"""The network, the virtual copy, the optimizers and schedules against independent constructions."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import NarrowProjection, is_narrow_projection
from model.classifier import Classifier, build_classifier, virtual_copy
from model.inference import predict
from model.networks.resnet18_cifar import Settings
from model.optimizer import build_optimizer, build_scheduler
from utils.config.schema import Named
from utils.config.settings import SGD, Adam, CosineAnnealing, MultiStep
from utils.runtime.machine import Machine

FP32 = Machine(torch.device("cpu"), amp=False)


def network(width: int = 2, blocks: int = 2, classes: int = 10, seed: int = 0) -> Classifier:
    """Return the classifier as the scripts build it."""
    return build_classifier(Named("resnet18_cifar", Settings(width=width, blocks=blocks)), classes, seed)


def used(model: Classifier) -> Classifier:
    """Give the network BN weights and statistics like those of a trained one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bn" in name or "shortcut.1" in name:
                drawn = torch.rand(tensor.shape, generator=generator)
                around_one = name.endswith(("running_var", "weight"))
                tensor.copy_(drawn + 0.5 if around_one else 0.2 * (drawn - 0.5))
    return model


def block_plan(width: int, blocks: int) -> list[tuple[str, int, int, int]]:
    """Return (name, channels in, channels out, stride) of every block, in order."""
    plan, channels = [], width
    for stage in range(4):
        out = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            plan.append((f"backbone.layer{stage + 1}.{block}", channels, out, stride))
            channels = out
    return plan


def slow_weights(width: int, blocks: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Draw the weights layer by layer: torch's defaults in order, Kaiming normal over the convolutions, the linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: dict[str, Tensor] = {}
        kernels: list[tuple[str, Tensor, int]] = []

        def convolution(name: str, channels_in: int, channels: int, side: int) -> None:
            weight = nn.Conv2d(channels_in, channels, side, bias=False).weight.detach()  # only to use up its draws
            out[name + ".weight"] = weight
            kernels.append((name + ".weight", weight, channels * side * side))

        def batch_norm(name: str, channels: int) -> None:
            out[name + ".weight"], out[name + ".bias"] = torch.ones(channels), torch.zeros(channels)
            out[name + ".running_mean"], out[name + ".running_var"] = torch.zeros(channels), torch.ones(channels)
            out[name + ".num_batches_tracked"] = torch.tensor(0)

        convolution("backbone.conv1", 3, width, 3)
        batch_norm("backbone.bn1", width)
        for name, channels_in, channels, stride in block_plan(width, blocks):
            convolution(f"{name}.conv1", channels_in, channels, 3)
            batch_norm(f"{name}.bn1", channels)
            convolution(f"{name}.conv2", channels, channels, 3)
            batch_norm(f"{name}.bn2", channels)
            if stride != 1 or channels_in != channels:
                convolution(f"{name}.shortcut.0", channels_in, channels, 1)
                batch_norm(f"{name}.shortcut.1", channels)
        for _, weight, fan_out in kernels:
            weight.normal_(0, math.sqrt(2.0) / math.sqrt(fan_out))
        linear = nn.Linear(8 * width, classes)
        out["linear.weight"], out["linear.bias"] = linear.weight.detach(), linear.bias.detach()
        return out


def slow_forward(weights: dict[str, Tensor], images: Tensor, width: int, blocks: int) -> Tensor:
    """Run the network in eval mode from a dictionary of weights, with torch's functions and the formula of BN."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{key}"][None, :, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = norm("backbone.bn1", F.conv2d(images, weights["backbone.conv1.weight"], padding=1)).clamp(min=0)
    for name, channels_in, channels, stride in block_plan(width, blocks):
        inner = F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
        inner = norm(f"{name}.bn1", inner).clamp(min=0)
        inner = norm(f"{name}.bn2", F.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1))
        if stride != 1 or channels_in != channels:
            x = norm(f"{name}.shortcut.1", F.conv2d(x, weights[f"{name}.shortcut.0.weight"], stride=stride))
        x = (inner + x).clamp(min=0)
    return x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]


def test_resnet18_has_the_keys_and_the_size_of_the_published_checkpoints() -> None:
    """At width 64 the network has 11,173,962 parameters under the keys of the authors' checkpoints, and no others."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["backbone.conv1.weight", *(f"backbone.bn1.{k}" for k in bn)]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"backbone.layer{stage}.{block}"
            for i in (1, 2):
                keys += [f"{at}.conv{i}.weight", *(f"{at}.bn{i}.{k}" for k in bn)]
            if stage > 1 and block == 0:
                keys += [f"{at}.shortcut.0.weight", *(f"{at}.shortcut.1.{k}" for k in bn)]
    keys += ["linear.weight", "linear.bias"]
    model = network(width=64)
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


@pytest.mark.parametrize(("width", "blocks", "classes", "seed"), [(64, 2, 10, 100), (2, 1, 10, 0), (3, 2, 43, 7), (4, 3, 2, 1)])
def test_initial_weights_are_the_authors(width: int, blocks: int, classes: int, seed: int) -> None:
    """The same seed gives, bit for bit, the weights of layers drawn one after another as the authors' code does."""
    slow = slow_weights(width, blocks, classes, seed)
    own = network(width, blocks, classes, seed).state_dict()
    assert own.keys() == slow.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, slow[name]), name


def test_building_leaves_the_global_generator_alone() -> None:
    """Building a network does not affect torch's global generator, and the weights do not depend on its state."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = network(seed=1)
    assert torch.equal(torch.rand(3), expected)
    second = network(seed=1)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not torch.equal(first.linear.weight, network(seed=2).linear.weight)


@pytest.mark.parametrize(("width", "blocks", "classes"), [(1, 1, 2), (2, 2, 10), (3, 3, 5)])
def test_forward_is_the_network_of_the_paper(width: int, blocks: int, classes: int) -> None:
    """Logits equal those of a network written out in functions: stem, strides 1 2 2 2, shortcuts, mean, linear layer."""
    model = used(network(width, blocks, classes)).double()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.eval()
    features = model.features(images)
    assert features.shape == (3, 8 * width)
    assert (features.std(0) > 1e-3).any()  # the images matter
    logits = model(images)
    assert logits.shape == (3, classes)
    torch.testing.assert_close(logits, slow_forward(dict(model.state_dict()), images, width, blocks))
    torch.testing.assert_close(logits, features @ model.linear.weight.T + model.linear.bias)


@pytest.mark.parametrize("training", [True, False])
def test_predict_is_in_eval_mode_and_changes_nothing(training: bool) -> None:
    """Logits of batches of different sizes come in order, each image by itself. Afterwards every module is in its earlier
    mode, even if modes differ, and BN statistics are unchanged."""
    model = used(network(blocks=1))
    model.train(training)
    model.backbone.bn1.train(not training)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = predict(model, iter([images[:3], images[3:6], images[6:]]), FP32)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert logits.shape == (7, 10)
    assert logits.std(0).min() > 1e-3  # the images matter
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for i in range(7):
        alone = slow_forward(weights, images[i : i + 1].double(), 2, 1)
        torch.testing.assert_close(logits[i : i + 1].double(), alone, rtol=1e-4, atol=1e-4)


def test_modes_are_restored_after_an_error() -> None:
    """If a batch cannot be read, the model does not stay in eval mode."""

    def batches() -> Iterator[Tensor]:
        yield torch.zeros(2, 3, 32, 32)
        raise OSError("unreadable")

    model = network(blocks=1).train()
    with pytest.raises(OSError, match="unreadable"):
        predict(model, batches(), FP32)
    assert all(module.training for module in model.modules())


def test_virtual_model_learns_in_its_last_layers_only() -> None:
    """Only layer3, layer4 and the linear layer of the virtual model are trained, its BN statistics move everywhere, and the
    original model does not change."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    virtual, trained = virtual_copy(model)
    names = {name for name, p in virtual.named_parameters() if p.requires_grad}
    assert names == {
        n for n, _ in model.named_parameters() if n.startswith(("backbone.layer3.", "backbone.layer4.", "linear."))
    }
    assert {id(p) for p in trained} == {id(p) for n, p in virtual.named_parameters() if n in names}
    assert len(trained) == len(names)
    for name, tensor in virtual.state_dict().items():
        assert torch.equal(tensor, before[name])

    virtual.train()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    virtual(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    after = virtual.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        moves = name in names or "running" in name or "num_batches" in name
        assert torch.equal(after[name], before[name]) != moves, name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_adam_settings_reach_the_step() -> None:
    """Two steps of the configured Adam are those of Adam's formula with the YAML's rate, betas, eps and weight decay."""
    s = Adam(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    weight, gradients = 0.7, (0.4, -0.9)
    parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = build_optimizer(Named("Adam", s), iter([parameter]))
    m = v = 0.0
    for step, g in enumerate(gradients, 1):
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        g += s.weight_decay * weight
        m = s.betas[0] * m + (1 - s.betas[0]) * g
        v = s.betas[1] * v + (1 - s.betas[1]) * g * g
        weight -= s.lr * (m / (1 - s.betas[0] ** step)) / (math.sqrt(v / (1 - s.betas[1] ** step)) + s.eps)
        assert parameter.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_settings_reach_the_step(nesterov: bool) -> None:
    """Three steps of the configured SGD are those of its formula with the YAML's rate, momentum, decay and Nesterov."""
    s = SGD(lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    weight, velocity = -1.3, 0.0
    parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = build_optimizer(Named("SGD", s), iter([parameter]))
    for g in (0.4, -0.9, 0.2):
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        g += s.weight_decay * weight
        velocity = s.momentum * velocity + g
        weight -= s.lr * (g + s.momentum * velocity if nesterov else velocity)
        assert parameter.item() == pytest.approx(weight, rel=1e-12)


def rates(chosen: Named | None, num_epochs: int, rate: float = 0.1) -> list[float]:
    """Return the learning rate of every epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler: Any = build_scheduler(chosen, optimizer, num_epochs)
    out = []
    for _ in range(num_epochs):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return out


@pytest.mark.parametrize(
    ("milestones", "gamma", "num_epochs", "falls_at"),
    [
        ((0.5, 0.75), 0.1, 8, (4, 6)),
        ((3.0, 5.0), 0.5, 7, (3, 5)),
        ((0.34, 1.0), 0.2, 10, (1, 3)),
        ((0.5,), 0.1, 5, (2,)),
        ((0.7,), 0.1, 90, (63,)),
    ],
)
def test_multi_step_falls_at_epochs_or_fractions(
    milestones: tuple[float, ...], gamma: float, num_epochs: int, falls_at: tuple[int, ...]
) -> None:
    """The rate falls by gamma at each milestone; a number under 1 is a fraction of the run, 1 and above an epoch."""
    slow = [0.1 * gamma ** sum(epoch >= fall for fall in falls_at) for epoch in range(num_epochs)]
    assert rates(Named("multi_step", MultiStep(milestones, gamma)), num_epochs) == pytest.approx(slow)


@pytest.mark.parametrize(("t_max", "eta_min", "period"), [(None, 0.0, 6), (None, 0.01, 6), (3, 0.0, 3)])
def test_cosine_falls_over_the_run_or_t_max(t_max: int | None, eta_min: float, period: int) -> None:
    """The rate follows half a cosine from the first rate to eta_min over T_max epochs; without T_max over the whole run."""
    slow = [eta_min + (0.1 - eta_min) * (1 + math.cos(math.pi * epoch / period)) / 2 for epoch in range(6)]
    assert rates(Named("cosine_annealing", CosineAnnealing(t_max, eta_min)), 6) == pytest.approx(slow, abs=1e-12)


def test_no_schedule_keeps_the_rate() -> None:
    """`lr_scheduler: null` leaves the learning rate as it is."""
    assert build_scheduler(None, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 5) is None
    assert rates(None, 4) == [0.1] * 4


@pytest.mark.parametrize("stride", [2, (1, 2), 3])
@pytest.mark.parametrize("channels", [1, 2, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_narrow_projection_is_the_strided_convolution(stride: Any, channels: int, memory_format: torch.memory_format) -> None:
    """The replaced 1 x 1 convolution gives the same outputs and gradients, on sides that the stride divides and others."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 5, 1, stride, bias=True).double()
    narrow = copy.deepcopy(plain)
    assert is_narrow_projection(narrow)
    narrow.__class__ = NarrowProjection
    narrow = narrow.to(memory_format=memory_format)
    for side in (6, 7):
        x = torch.randn(3, channels, side, side + 1, dtype=torch.float64)
        y = x.clone(memory_format=memory_format)
        expected, found = plain(x.requires_grad_()), narrow(y.requires_grad_())
        assert torch.allclose(found, expected, atol=1e-12)
        factor = torch.randn_like(expected)
        for out in (expected, found):
            out.backward(factor)
        assert torch.allclose(y.grad, x.grad, atol=1e-12)  # type: ignore[arg-type]
        assert torch.allclose(narrow.weight.grad, plain.weight.grad, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("resnet18_cifar", "width=2, blocks=1"), ("preact_resnet18", "width=4, blocks=1")],
)
def test_networks_of_few_channels_train_in_channels_last(name: str, settings: str) -> None:
    """The backward pass of a network with fewer than 8 channels before a projection leaves the heap intact.

    In a process of its own: the defect that this guards against (oneDNN without AVX-512) ends the process.
    """
    program = f"""
import torch
from model.networks import {name}
torch.manual_seed(0)
network = {name}.build({name}.Settings({settings})).to(memory_format=torch.channels_last)
for _ in range(20):
    images = torch.randn(16, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
strided = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2)]
assert any(m.in_channels < 8 for m in strided)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_that_train_later_can_begin_within_a_capturable_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """DBD trains its linear layer first, then all weights, with one optimizer. The fused SGD of a CUDA graph needs momenta of
    all weights then; momenta of 0 give the same weights as none."""
    monkeypatch.setattr(torch.optim, "SGD", partial(ignoring, torch.optim.SGD))
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = build_optimizer(Named("SGD", SGD(lr=0.1, momentum=0.9)), model.parameters(), capturable)
        assert all("momentum_buffer" in optimizer.state[weight] for weight in model.parameters()) == capturable
        for parts in (model[1:], model, model):
            optimizer.zero_grad()
            parts(torch.ones(5, parts[0].in_features)).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


def ignoring(kind: Any, weights: Any, fused: bool = False, **settings: Any) -> Any:
    """Return torch's optimizer without the fused kernels, and with a plain number as its rate."""
    return kind(weights, **settings | {"lr": float(settings["lr"])})


def test_a_fraction_of_few_epochs_does_not_lower_the_first_rate() -> None:
    """However short a run is, its first epoch has the configured rate; the milestones apply after it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = build_scheduler(Named("multi_step", MultiStep(milestones=(0.5, 0.75))), optimizer, 1)
    assert scheduler is not None and optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
