"""No defense: the same network, trained with cross-entropy on all images with the labels that they carry."""

from __future__ import annotations

from dataclasses import dataclass

from data.batches import draw_supervised
from engine.defense import DefenseBase
from engine.supervised import train_supervised
from utils.checkpoint import State
from utils.config import Config
from utils.stages import DefenseSettings, Stage


@dataclass(frozen=True)
class Settings(DefenseSettings):
    """The settings are those of the section `undefended`."""

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """All epochs are alike."""
        plan = config.undefended
        return (Stage("undefended", config.num_epochs, plan.optimizer, plan.lr_scheduler, "undefended.optimizer"),)


class Defense(DefenseBase):
    """Plain training."""

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over all images; return its mean loss."""
        config, train_set, transform = self.context.config, self.context.train_set, self.context.train_transform
        draws = draw_supervised(config.seed.seed, "undefended", epoch, len(train_set), transform)
        return {"loss": train_supervised(self.context, state, "training", draws, config.undefended.batch_size)}
