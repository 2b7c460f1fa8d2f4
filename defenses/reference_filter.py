"""Oracle baseline: plain training on a subset chosen with the ground truth, an upper bound for every filter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defenses._start import train_undefended, undefended_stage
from engine.context import Context
from engine.defense import DefenseBase
from utils.checkpoint import State
from utils.config import Config
from utils.config.reader import Reader
from utils.config.schema import setting
from utils.config.stages import METHOD, DefenseSettings, Stage
from utils.draws import generator
from utils.errors import UserError
from utils.kinds import CLEAN, COVER, POISONED


@dataclass(frozen=True)
class Settings(DefenseSettings):
    """Optimizer, schedule and batch size are those of the section `undefended`."""

    unread = METHOD
    removes: str = setting(
        "poisoned", "what is left out: the poisoned images, or as many images drawn at random", options=("poisoned", "random")
    )
    keeps_cover: bool = setting(False, "removes: poisoned: train on the cover images too")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """All epochs are alike."""
        return (replace(undefended_stage(config, None), name="filtered"),)

    def check(self, config: Config, reader: Reader) -> None:
        """A random filter does not know cover images."""
        super().check(config, reader)
        if self.keeps_cover and self.removes == "random":
            reader.fail("defense.reference_filter.keeps_cover", True, "has no effect with removes: random: leave it out")


def reference_images(config: Config, flags: Tensor) -> Tensor:
    """Return the images to train on, sorted (K,) int64, from the ground truth (N,) uint8."""
    settings = config.defense.settings
    if settings.removes == "random":
        order = torch.randperm(len(flags), generator=generator(config.seed.seed, "random filter", 0))
        return order[int((flags == POISONED).sum()) :].sort().values
    kept = (flags == CLEAN) | ((flags == COVER) if settings.keeps_cover else torch.zeros_like(flags, dtype=torch.bool))
    return torch.nonzero(kept).squeeze(1)


class Defense(DefenseBase):
    """Plain training on the given images."""

    def __init__(self, context: Context, given: Tensor) -> None:
        super().__init__(context, given)
        if len(given) < 2 * context.machine.world_size:
            raise UserError(
                f"defense: reference_filter: keeps {len(given)} of {len(context.train_set)} images, too few to train on: lower "
                "backdoor.poison_ratio"
            )

    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one pass over the kept images; return its mean loss."""
        state.sets["kept"] = self.given
        return train_undefended(self.context, state, epoch, self.given)
