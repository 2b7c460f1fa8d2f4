"""CBD: train a network that learns the backdoor quickly, then one that gives little weight to what the first has learned.

Zhang et al., "Backdoor Defense via Deconfounded Representation Learning", CVPR 2023, without its optional term of mutual
information, which the authors' code leaves out too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import draw_supervised
from engine.context import auxiliary_state, place
from engine.defense import DefenseBase
from engine.supervised import BatchLoss, image_losses, mean_cross_entropy, supervised_steps, train_supervised
from model.classifier import build_classifier
from utils.checkpoint import State
from utils.config import Config
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import OPTIMIZERS, SCHEDULERS, SGD, MultiStep
from utils.config.stages import METHOD, DefenseSettings, Stage

BIASED = "biased"
PLAN = Named("SGD", SGD(lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True))
FLOOR = 1e-8  # of divisors: the sum of both losses, the mean of the weights


@dataclass(frozen=True)
class Settings(DefenseSettings):
    unread = (*METHOD, "undefended")
    biased_epochs: int = setting(5, "epochs of the biased network", low=1)
    clean_epochs: int = setting(100, "epochs of the clean network", low=1)
    optimizer: Named = setting(PLAN, "optimizer of both networks", choices=OPTIMIZERS)
    lr_scheduler: Named | None = setting(
        Named("multi_step", MultiStep(milestones=(20, 70))),
        "learning-rate schedule of the clean network; null: constant",
        choices=SCHEDULERS,
    )
    batch_size: int = batch_size_setting(64, "batch size of both")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The biased network, then the clean one, which is the model."""
        key = "defense.cbd.optimizer"
        return (
            Stage(BIASED, self.biased_epochs, self.optimizer, None, key, keeps_model=True, prepares=True),
            Stage("clean", self.clean_epochs, self.optimizer, self.lr_scheduler, key),
        )


class Defense(DefenseBase):
    """Two networks, one after the other; in the epochs of the biased one, the rows have the figures of the untrained model."""

    def build(self, state: State, stage: Stage) -> None:
        """Build the biased network, the stage's optimizer and its loss."""
        config, context = self.context.config, self.context
        if BIASED not in state.networks:
            biased = build_classifier(config.network, config.num_classes, config.seed.seed + 1)
            state.networks[BIASED] = place(biased, config, context.machine)
        trained = state.networks[BIASED] if stage.name == BIASED else state.model
        self.set_optimizer(state, stage, trained.parameters())
        self.part = state
        loss = self.deconfounded(state)
        if stage.name == BIASED:
            self.part = auxiliary_state(context, trained, state.optimizer)
            loss = mean_cross_entropy(context, self.part)
        self.part.stepper = supervised_steps(context, self.part, loss)

    def deconfounded(self, state: State) -> BatchLoss:
        """Return the weighted cross-entropy: `w = CE_b / (CE_b + CE + 1e-8)`, scaled to a mean of 1 in the batch.

        CE_b is the loss of the biased network, in eval mode; the weights are constants.
        """
        context, biased = self.context, state.networks[BIASED]

        def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
            """Return this rank's part of the loss."""
            losses = image_losses(context, state.parallel, inputs, index)  # (b,)
            with torch.no_grad():
                known = image_losses(context, biased.eval(), inputs, index)  # (b,)
            weights = known / (known + losses.detach() + FLOOR)
            mean = (context.machine.all_reduce(weights.sum()) / count).clamp(min=FLOOR)  # all are 0 if CE_b is
            return (weights / mean * losses).sum() / count

        return loss

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over all images; return the mean of the stage's loss."""
        config, transform = self.context.config, self.context.train_transform
        draws = draw_supervised(config.seed.seed, "cbd", epoch, len(self.context.train_set), transform)
        self.part.model.train()
        return {"loss": train_supervised(self.context, self.part, config.stage(epoch), draws, self.settings.batch_size)}
