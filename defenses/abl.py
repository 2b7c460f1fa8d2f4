"""ABL: isolate a few images of low loss, fine-tune on the others, unlearn the isolated ones.

Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.augment import Pipeline
from data.batches import draw_supervised
from data.pools import class_agnostic_split, pools_of
from engine.context import Context
from engine.defense import DefenseBase
from engine.evaluation import infer
from engine.supervised import BatchLoss, image_losses, mean_cross_entropy, supervised_steps, train_supervised
from loss.supervised import cross_entropy
from utils.checkpoint import State
from utils.config import Config
from utils.config.schema import Named, batch_size_setting, setting
from utils.config.settings import OPTIMIZERS, SCHEDULERS, SGD, MultiStep
from utils.config.stages import METHOD, DefenseSettings, Stage, locate
from utils.errors import UserError

ISOLATED = "isolated"


def sgd(lr: float) -> Named:
    """Return the optimizer of all stages."""
    return Named("SGD", SGD(lr=lr, momentum=0.9, weight_decay=5e-4))


@dataclass(frozen=True)
class Settings(DefenseSettings):
    unread = (*METHOD, "undefended")
    isolation_epochs: int = setting(20, "epochs of the isolation stage", low=1)
    isolation_optimizer: Named = setting(sgd(0.1), "optimizer of the isolation stage", choices=OPTIMIZERS)
    gamma: float = setting(0.5, "the loss at which gradient ascent begins", low=0)
    unit: str = setting(
        "batch", "ascent is decided by the mean loss of the batch, or separately for each image", options=("batch", "example")
    )
    isolation_ratio: float = setting(0.01, "share of the images that are isolated", above=0, below=1)
    finetune_epochs: int = setting(70, "epochs on the images that are not isolated", low=0)
    finetune_optimizer: Named = setting(sgd(0.1), "optimizer of the fine-tuning", choices=OPTIMIZERS)
    finetune_scheduler: Named | None = setting(
        Named("multi_step", MultiStep(milestones=(30, 55))),
        "learning-rate schedule of the fine-tuning; null: constant",
        choices=SCHEDULERS,
    )
    unlearn_epochs: int = setting(5, "epochs of gradient ascent on the isolated images", low=0)
    unlearn_optimizer: Named = setting(sgd(5e-4), "optimizer of the unlearning", choices=OPTIMIZERS)
    unlearn_bn: str = setting("train", "batch statistics while unlearning: train updates them", options=("train", "eval"))
    augmented: tuple[str, ...] = setting(
        ("isolation", "finetune", "unlearn"), "stages that see augmented images", options=("isolation", "finetune", "unlearn")
    )
    batch_size: int = batch_size_setting(128, "batch size of all stages")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """Each stage has an optimizer of its own, without momentum from the one before."""
        plans = {
            "isolation": (self.isolation_epochs, self.isolation_optimizer, None),
            "finetune": (self.finetune_epochs, self.finetune_optimizer, self.finetune_scheduler),
            "unlearn": (self.unlearn_epochs, self.unlearn_optimizer, None),
        }
        return tuple(
            Stage(name, *plan, f"defense.abl.{name}_optimizer", prepares=name != "unlearn") for name, plan in plans.items()
        )


class Defense(DefenseBase):
    """The three stages of ABL on one network."""

    def __init__(self, context: Context, given: Tensor) -> None:
        super().__init__(context, given)
        s, n, least = self.settings, len(context.train_set), 2 * context.machine.world_size
        isolated = int(n * s.isolation_ratio)
        if s.unlearn_epochs and isolated < least:
            raise UserError(
                f"defense.abl.isolation_ratio: {s.isolation_ratio}: isolates {isolated} of {n} images, but a training step "
                f"needs {least}: raise it, or set unlearn_epochs to 0"
            )

    def build(self, state: State, stage: Stage) -> None:
        """Build the stage's optimizer and its loss."""
        super().build(state, stage)
        loss = mean_cross_entropy(self.context, state)
        if stage.name == "isolation":
            loss = ascent_below(self.context, state, self.settings)
        elif stage.name == "unlearn":
            loss = negative(loss)
        state.stepper = supervised_steps(self.context, state, loss, self.view(stage))

    def view(self, stage: Stage) -> Pipeline:
        """Return the transform of a stage."""
        return self.context.train_transform if stage.name in self.settings.augmented else self.context.eval_transform

    def start_stage(self, state: State, stage: Stage) -> None:
        """After the isolation stage, isolate the images of lowest loss."""
        if stage.name != "isolation" and ISOLATED not in state.sets:
            state.sets[ISOLATED] = isolate(self.context, state, self.settings.isolation_ratio)

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over the stage's images; return the mean of its loss."""
        stage, _ = locate(self.context.config.stages, epoch)
        chosen = torch.arange(len(self.context.train_set))
        if stage.name == "finetune":
            chosen = pools_of(state.sets[ISOLATED], len(chosen)).polluted
        elif stage.name == "unlearn":
            chosen = state.sets[ISOLATED]
        draws = draw_supervised(self.context.config.seed.seed, "abl", epoch, len(chosen), self.view(stage)).of(chosen)
        state.model.train(stage.name != "unlearn" or self.settings.unlearn_bn == "train")
        return {"loss": train_supervised(self.context, state, stage.name, draws, self.settings.batch_size)}


def ascent_below(context: Context, state: State, settings: Settings) -> BatchLoss:
    """Return local gradient ascent (LGA): `sign(m - gamma) m` for the mean cross-entropy m of the batch, or of each image.

    The sign is a constant. Flooding, `|m - gamma| + gamma`, has the same gradient.
    """

    def loss(inputs: Tensor, index: Tensor, count: int) -> Tensor:
        """Return this rank's part of the loss."""
        losses = image_losses(context, state.parallel, inputs, index)  # (b,)
        if settings.unit == "example":
            return (torch.sign(losses.detach() - settings.gamma) * losses).sum() / count
        share = losses.sum() / count
        mean = context.machine.all_reduce(share.detach().clone())
        return torch.sign(mean - settings.gamma) * share

    return loss


def negative(loss: BatchLoss) -> BatchLoss:
    """Return the loss that gradient descent increases."""
    return lambda inputs, index, count: -loss(inputs, index, count)


def isolate(context: Context, state: State, ratio: float) -> Tensor:
    """Return the `int(N ratio)` images of lowest cross-entropy, plain views in eval mode, sorted (n,) int64."""
    logits = infer(context, "isolate", state.model, context.train_set)  # (N, C)
    losses = cross_entropy(logits, context.train_set.labels).cpu()  # (N,)
    return class_agnostic_split(losses, ratio)
