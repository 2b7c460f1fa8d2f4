"""ASD. The method itself is in `ASD.py` at the repository root; this file registers it as `defense: asd`."""

from __future__ import annotations

from dataclasses import dataclass

from ASD import Defense as Defense
from utils.config import Config
from utils.config.reader import Reader
from utils.config.stages import DefenseSettings, Stage


@dataclass(frozen=True)
class Settings(DefenseSettings):
    """ASD's settings have sections of their own in the YAML, as in the authors' files: `global`, `split`, `semi`, `meta`."""

    needs_clean = True
    unread = ("undefended",)
    resumes_without_settings = True

    def stages(self, config: Config) -> tuple[Stage, ...]:
        """The split is a function of the epoch (paper section 3.2); one optimizer trains throughout."""
        g, last = config.global_, config.num_epochs
        ends = [min(end, last) for end in (g.epoch_first, g.epoch_second)] + [last]
        begins = [0, *ends[:-1]]
        own, virtual = "split loss", "split loss - split loss of the virtual model"
        names = {"class-aware": own, "class-agnostic": own, "meta-split": virtual}
        return tuple(
            Stage(name, end - begin, config.optimizer, config.lr_scheduler, new_optimizer=False, ranks_by=ranks_by)
            for (name, ranks_by), begin, end in zip(names.items(), begins, ends, strict=True)
        )

    def check(self, config: Config, reader: Reader) -> None:
        """Every epoch needs a split, and the first clean pool an image."""
        g = config.global_
        if config.num_epochs > g.epoch_third:
            remedy = f"no split is defined from epoch {g.epoch_third} on: lower num_epochs or raise global.epoch_third"
            reader.fail("num_epochs", config.num_epochs, remedy)
        if g.seed_num < 1 and g.epoch_first > 0 and config.seed_samples is None:
            reader.fail("global.seed_num", g.seed_num, "the first clean pool would be empty: give at least 1")
