"""Supervised training, pass by pass: the virtual model, training without a defense, and the stages of other defenses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.augment import Pipeline
from data.batches import SupervisedDraws
from engine.context import Context, build_stepper
from loss.supervised import cross_entropy
from model.batch_counters import count_at_end
from utils.checkpoint import State
from utils.reporting.runlog import progress
from utils.runtime.stepper import Stepper

BatchLoss = Callable[[Tensor, Tensor, int], Tensor]


def train_supervised(context: Context, state: State, name: str, draws: SupervisedDraws, batch: int) -> float:
    """Train for one pass over the drawn images and return the mean loss.

    Uses `state.stepper`; if there is none, creates one for cross-entropy and stores it there. The model stays in the mode
    that it is in, train or eval.
    """
    machine = context.machine
    full, last = draws.to(machine.device).cut(batch, least=2 * machine.world_size)
    steps = state.stepper = state.stepper or supervised_steps(context, state)
    total = torch.zeros(1, device=machine.device)
    with count_at_end(state.model, len(full.order) + (len(last.order) > 0)):
        if len(full.order):
            total = steps.run(full, lambda numbers: progress(numbers, name, len(full.order)))
        if len(last.order):
            total += steps.step(last)  # eager: a graph has fixed shapes, and this batch is smaller
    return float(machine.all_reduce(total)) / len(draws.order)


def supervised_steps(
    context: Context, state: State, batch_loss: BatchLoss | None = None, transform: Pipeline | None = None
) -> Stepper:
    """Return the stepper of supervised training.

    Args:
        batch_loss: takes this process' images (b, 3, H, W) of a batch, their indices (b,) and the size B of the whole batch;
            returns its share of the batch's loss, a scalar. None: the mean cross-entropy with the labels that the images carry.
        transform: gives the views that were drawn; None: the train transform.
    """
    machine, train_set = context.machine, context.train_set
    compute, view = batch_loss or mean_cross_entropy(context, state), transform or context.train_transform

    def step(draw: SupervisedDraws) -> Tensor:
        """Train on a batch of B images; return this rank's part of its loss times B, (1,)."""
        count = len(draw.order)
        mine = machine.shard(count)
        index = draw.order[mine]
        inputs = machine.to_memory_format(view(train_set.fetch(index), draw.views[mine]))  # (b, 3, H, W)
        loss = compute(inputs, index, count)
        state.optimizer.zero_grad(set_to_none=True)
        machine.backward(loss)
        state.optimizer.step()
        return loss.detach().view(1) * count

    return build_stepper(context, state, step, width=1)


def mean_cross_entropy(context: Context, state: State) -> BatchLoss:
    """Return the loss of plain training."""

    def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
        """Return the share of the mean cross-entropy."""
        return image_losses(context, state.parallel, inputs, index).sum() / count

    return loss


def image_losses(context: Context, model: nn.Module, inputs: Tensor, index: Tensor) -> Tensor:
    """Return the cross-entropy (b,) of images (b, 3, H, W) with the labels that they carry; index: (b,) int64."""
    with context.machine.autocast():
        logits = model(inputs)  # (b, C)
    return cross_entropy(logits, context.train_set.labels[index])
