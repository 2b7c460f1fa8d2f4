"""Fine-pruning: prune the channels that clean images activate least, then fine-tune.

Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batches import draw_supervised
from defenses._start import (
    START_HELP,
    UNDEFENDED_STAGE,
    split_clean,
    take_weights,
    train_undefended,
    undefended_stage,
)
from engine.defense import DefenseBase
from engine.evaluation import infer
from engine.supervised import BatchLoss, mean_cross_entropy, supervised_steps, train_supervised
from loss.supervised import cross_entropy
from model.classifier import Classifier, Features
from utils.checkpoint import State
from utils.config import Config
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import OPTIMIZERS, SGD
from utils.config.stages import METHOD, DefenseSettings, Stage

PRUNED = "pruned channels"
ROUNDING = 1e-6  # images: `drop` times their number is often whole, but not as a float


@dataclass(frozen=True)
class Settings(DefenseSettings):
    needs_clean = True
    unread = METHOD
    start_run: str | None = setting(None, START_HELP)
    accuracy_drop: float = setting(0.04, "accuracy that pruning may cost, measured on half of the clean images", low=0, high=1)
    finetune_epochs: int = setting(10, "epochs on the clean images after pruning", low=0)
    finetune_optimizer: Named = setting(
        Named("SGD", SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)), "optimizer of the fine-tuning", choices=OPTIMIZERS
    )
    batch_size: int = batch_size_setting(128, "batch size of the fine-tuning")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The undefended network; one epoch without training, which evaluates the pruned network; fine-tuning."""
        key = "defense.fp.finetune_optimizer"
        return (
            replace(undefended_stage(config, self.start_run), prepares=True),
            Stage("pruned", 1, self.finetune_optimizer, None, key),
            Stage("finetune", self.finetune_epochs, self.finetune_optimizer, None, key),
        )


class Defense(DefenseBase):
    """Pruning a channel of the last stage means zeroing its column of the linear layer, whose input is the channel means."""

    pruned: Tensor | None = None  # (k,) int64, the pruned channels, on the device

    def build(self, state: State, stage: Stage) -> None:
        """Build the stage's optimizer, and a loss that holds the pruned columns at 0."""
        super().build(state, stage)
        if stage.name == "finetune":
            state.stepper = supervised_steps(self.context, state, self.held(state))

    def held(self, state: State) -> BatchLoss:
        """Return the mean cross-entropy of the network without the pruned channels."""
        plain = mean_cross_entropy(self.context, state)

        def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
            """Return this rank's part of the loss."""
            self.zero_pruned_columns(state)
            return plain(inputs, index, count)

        return loss

    def start_stage(self, state: State, stage: Stage) -> None:
        """Choose the channels and zero their columns of the linear layer, once."""
        if stage.name != "pruned":
            return
        if self.settings.start_run:
            take_weights(self.context, state, self.settings.start_run)
        rank, check = split_clean(self.given, self.context.config.seed.seed)
        state.tables[PRUNED] = self.choose(state, rank, check)
        self.zero_pruned_columns(state)

    def choose(self, state: State, rank: Tensor, check: Tensor) -> Tensor:
        """Return the channels to prune (k,) int64: as many as accuracy on the images `check` allows."""
        assert isinstance(state.model, Classifier)
        labels = self.context.train_set.labels[check].cpu()
        both = self.context.train_set.chosen(torch.cat([rank, check]))
        features = infer(self.context, "prune", Features(state.model), both).cpu().float()  # (S, D)
        order = features[: len(rank)].abs().mean(0).argsort(stable=True)  # (D,): the least active first
        return order[: prunable(features[len(rank) :], labels, state.model.linear, order, self.settings.accuracy_drop)]

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over the stage's images; of the stage `pruned` only the loss on the clean images is computed."""
        context, stage = self.context, self.context.config.stage(epoch)
        if stage == UNDEFENDED_STAGE:
            return train_undefended(context, state, epoch)
        if stage == "pruned":
            clean = context.train_set.chosen(self.given)
            losses = cross_entropy(infer(context, "pruned", state.model, clean), clean.labels)  # (S,)
            return {"loss": float(losses.mean())} | self.count(state)
        draws = draw_supervised(context.config.seed.seed, "fp", epoch, len(self.given), context.train_transform)
        state.model.train()
        loss = train_supervised(context, state, stage, draws.of(self.given), self.settings.batch_size)
        self.zero_pruned_columns(state)
        return {"loss": loss} | self.count(state)

    @torch.no_grad()
    def zero_pruned_columns(self, state: State) -> None:
        """Set the linear layer's columns of the pruned channels to 0, in place."""
        assert isinstance(state.model, Classifier)
        if self.pruned is None:  # once, not in each step: a captured step cannot copy from the host
            self.pruned = state.tables[PRUNED].to(self.context.machine.device)
        state.model.linear.weight.index_fill_(1, self.pruned, 0.0)

    def count(self, state: State) -> dict[str, float]:
        """Return the row's figure of how many channels are pruned."""
        return {"channels_pruned": len(state.tables[PRUNED])}


@torch.no_grad()
def prunable(features: Tensor, labels: Tensor, linear: torch.nn.Linear, order: Tensor, drop: float) -> int:
    """Return the largest k for which pruning the first k channels costs at most `drop` of the accuracy.

    Args:
        features: (V, D) of the images that it is measured on, with their labels (V,).
        order: (D,) channels, the first to be pruned first.
    """
    weight, bias = linear.weight.cpu().float(), linear.bias.cpu().float()
    logits, best = features @ weight.T + bias, 0
    least = int((logits.argmax(1) == labels).sum()) - drop * len(labels) - ROUNDING
    for k, channel in enumerate(order.tolist(), 1):
        logits -= features[:, channel, None] * weight[None, :, channel]
        if int((logits.argmax(1) == labels).sum()) >= least:
            best = k
    return best
