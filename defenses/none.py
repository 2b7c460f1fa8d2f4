"""No defense: the same network, trained with cross-entropy on all images with the labels that they carry."""

from __future__ import annotations

from dataclasses import dataclass

from defenses._start import train_undefended, undefended_stage
from engine.defense import DefenseBase
from utils.checkpoint import State
from utils.config import Config
from utils.config.stages import METHOD, DefenseSettings, Stage


@dataclass(frozen=True)
class Settings(DefenseSettings):
    """The settings are those of the section `undefended`."""

    unread = METHOD
    resumes_without_settings = True

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """All epochs are alike."""
        return (undefended_stage(config, None),)


class Defense(DefenseBase):
    """Plain training."""

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over all images; return its mean loss."""
        return train_undefended(self.context, state, epoch)
