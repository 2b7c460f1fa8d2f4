"""The context of a run (all constants that the defender knows), and builders of model, optimizer and stepper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.augment import Pipeline
from data.sets import ImageSet
from model.classifier import build_classifier, new_classifier
from model.feature_maps import collect_maps
from model.grouped_norm import group
from model.optimizer import build_optimizer, build_scheduler
from model.sync_norm import synchronize
from utils.checkpoint import State
from utils.config import Config
from utils.config.stages import Stage, locate, schedule_length
from utils.errors import UserError
from utils.runtime.machine import Machine
from utils.runtime.stepper import Stepper


@dataclass(frozen=True)
class Context:
    """What is fixed for a run and known to the defender. It contains no ground truth."""

    config: Config
    machine: Machine
    train_set: ImageSet  # N images with the labels that they carry
    train_transform: Pipeline
    eval_transform: Pipeline


def build_context(config: Config, machine: Machine, train_set: ImageSet) -> Context:
    """Return the context of a run on these images, which must be on the machine's device."""
    return Context(config, machine, train_set, *build_transforms(config, train_set))


def build_transforms(config: Config, images: ImageSet) -> tuple[Pipeline, Pipeline]:
    """Return the train and the eval transform for images of this size."""
    height, width = images.images.shape[2:]
    train, test = config.transform.train, config.transform.test
    return Pipeline(train.primary, train.remaining, height, width), Pipeline(test.primary, test.remaining, height, width)


def check_sizes(config: Config, *transforms: Pipeline, parts: Sequence[str] = ()) -> dict[str, Any]:
    """Raise `UserError` if the network cannot take the views that the transforms give, before anything is trained.

    Args:
        parts: of the backbone.
    Returns:
        the outputs of these parts for one image of the first transform, without values: only their shapes are computed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = new_classifier(config.network, config.num_classes).eval()
        maps = collect_maps(network, parts)
        for height, width in reversed([transform.output_size for transform in transforms]):
            network(torch.empty(1, 3, height, width))
    return maps


def build_state(config: Config, machine: Machine, count: int) -> State:
    """Return the state before the first epoch on `count` images: fresh weights, optimizer, schedule."""
    model = place(build_classifier(config.network, config.num_classes, config.seed.seed), config, machine)
    if config.runtime.merged:
        model = group(model)
    stage, _ = locate(config.stages, 0)
    optimizer, scheduler = build_training(config, machine, stage, model.parameters())
    state = State(model, optimizer, scheduler, epochs_in_clean_pool=torch.zeros(count, dtype=torch.int32))
    state.parallel = machine.compiled(model) if config.runtime.compile else machine.wrap(model)
    return state


def place(network: nn.Module, config: Config, machine: Machine) -> nn.Module:
    """Return a network on the machine's device and in its memory format, its BN synchronized if `sync_bn` is set."""
    network = network.to(machine.device).to(memory_format=machine.memory_format)
    return synchronize(network, machine.device) if config.sync_bn and machine.world_size > 1 else network


def build_training(
    config: Config, machine: Machine, stage: Stage, parameters: Iterable[nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    """Return a new optimizer of these parameters and its schedule, as a stage wants them."""
    optimizer = build_optimizer(stage.optimizer, parameters, capturable=machine.uses_graph(config.runtime.mode))
    return optimizer, build_scheduler(stage.lr_scheduler, optimizer, schedule_length(config.stages, stage))


def auxiliary_state(context: Context, network: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Return the state in which a network other than the model is trained; checkpoints do not contain it."""
    state = State(network, optimizer, scheduler=None)
    state.parallel = context.machine.wrap(network)
    return state


def build_stepper(context: Context, state: State, step: Callable[[Any], Tensor], width: int) -> Stepper:
    """Return a stepper that runs `step` on each row of tables of draws: eagerly, or as a CUDA graph captured once.

    Args:
        step: a training step, which changes the tensors of `state` in place and returns (width,).
    Raises:
        UserError: `runtime.mode` is `graph`, but the images are not on the device.
    """
    mode, resident = context.config.runtime.mode, context.train_set.resident
    graph = context.machine.uses_graph(mode)
    if graph and mode == "graph" and not resident:
        raise UserError("runtime.mode: graph: needs the images on the device: set data.placement=device, or runtime.mode=auto")
    capture = graph and resident  # otherwise the step waits for the host, which a graph cannot do
    return Stepper(step, state.tensors, width, capture, insist=mode == "graph")
