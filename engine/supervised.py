"""Plain training with cross-entropy on the labels that the images carry: the virtual model, and `defense: none`."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batches import SupervisedDraws, draw_supervised
from engine.context import Context, build_stepper
from loss.supervised import cross_entropy
from model.batch_counters import count_at_end
from utils.checkpoint import State
from utils.runlog import progress
from utils.stepper import Stepper


def train_undefended(context: Context, epoch: int, state: State) -> dict[str, float]:
    """Train one epoch on all images, without a defense (`defense: none`); return the mean loss."""
    config = context.config
    draws = draw_supervised(config.seed.seed, "undefended", epoch, len(context.train_set), context.train_transform)
    return {"loss": train_supervised(context, state, "training", draws, config.undefended.batch_size)}


def train_supervised(context: Context, state: State, name: str, draws: SupervisedDraws, batch: int) -> float:
    """Train with cross-entropy for one pass over all images; return the mean loss."""
    machine = context.machine
    full, last = draws.to(machine.device).cut(batch, least=2 * machine.world_size)
    steps = state.steps or supervised_steps(context, state)
    total = torch.zeros(1, device=machine.device)
    state.model.train()
    with count_at_end(state.model, len(full.order) + (len(last.order) > 0)):
        if len(full.order):
            total = steps.run(full, lambda numbers: progress(numbers, name, len(full.order)))
        if len(last.order):
            total += steps.step(last)  # eager: a graph has fixed shapes, and this batch is smaller
    return float(machine.all_reduce(total)) / len(draws.order)


def supervised_steps(context: Context, state: State) -> Stepper:
    """Return the stepper of training with cross-entropy."""
    machine, train_set = context.machine, context.train_set

    def step(draw: SupervisedDraws) -> Tensor:
        """Train on a batch of B images; return the sum (1,) of the losses of this process's share."""
        count = len(draw.order)
        mine = machine.shard(count)
        index = draw.order[mine]
        images = context.train_transform(train_set.fetch(index), draw.views[mine])
        inputs = machine.to_memory_format(images)  # (B, 3, H, W); with several processes, this one's share of B
        with machine.autocast():
            logits = state.parallel(inputs)  # (B, C)
        losses = cross_entropy(logits, train_set.labels[index])  # (B,)
        mean = losses.sum() / count
        state.optimizer.zero_grad(set_to_none=True)
        machine.backward(mean)
        state.optimizer.step()
        return mean.detach().view(1) * count

    return build_stepper(context, state, step, width=1)
