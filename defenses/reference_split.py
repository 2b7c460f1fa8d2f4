"""Oracle baseline: ASD's MixMatch with one fixed clean pool for the whole run, an upper bound for every split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ASD import mixmatch_steps, train_mixmatch
from data.pools import check_share
from engine.context import Context
from engine.defense import DefenseBase
from utils.checkpoint import State
from utils.config import Config
from utils.config.schema import setting
from utils.config.stages import SPLITS, DefenseSettings, Stage
from utils.draws import generator
from utils.errors import UserError
from utils.kinds import CLEAN


@dataclass(frozen=True)
class Settings(DefenseSettings):
    """Optimizer, schedule, MixMatch and the size of the pool (`global.epsilon`) are ASD's."""

    unread = (*SPLITS, "undefended")
    pool: str = setting("clean", "where the pool is drawn from: the clean images, or all of them", options=("clean", "random"))

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """All epochs are alike."""
        return (Stage("fixed split", config.num_epochs, config.optimizer, config.lr_scheduler),)


def reference_images(config: Config, flags: Tensor) -> Tensor:
    """Return the clean pool, sorted (P,) int64, from the ground truth (N,) uint8."""
    size = int(len(flags) * config.global_.epsilon)
    of_all = config.defense.settings.pool == "random"
    candidates = torch.arange(len(flags)) if of_all else torch.nonzero(flags == CLEAN).squeeze(1)
    if len(candidates) < size:
        raise UserError(
            f"global.epsilon: {config.global_.epsilon}: a pool of {size} images needs more than the {len(candidates)} "
            "clean ones: lower it"
        )
    order = torch.randperm(len(candidates), generator=generator(config.seed.seed, "fixed split", 0))
    return candidates[order[:size]].sort().values


class Defense(DefenseBase):
    """MixMatch with a fixed pool."""

    def __init__(self, context: Context, given: Tensor) -> None:
        super().__init__(context, given)
        check_share(context.config, len(context.train_set), 0)

    def build(self, state: State, stage: Stage) -> None:
        """Build the optimizer and what runs the steps."""
        super().build(state, stage)
        state.stepper = mixmatch_steps(self.context, state)

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one epoch of MixMatch; return its mean losses."""
        state.keep_split(self.given, None)
        return train_mixmatch(self.context, epoch, state, self.given)
