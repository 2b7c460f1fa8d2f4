"""The stages of a defense: how many epochs each has and what it trains with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.config.reader import Reader
from utils.config.schema import Named

UNDEFENDED = "none"  # the value of `defense` that means training without one: the baseline that other runs are compared with
# What only ASD reads; and what only ASD and methods that train with its MixMatch read.
SPLITS = ("meta", "global.epoch_first", "global.epoch_second", "global.t", "global.n", "global.keep_seeds")
METHOD = (*SPLITS, "optimizer", "lr_scheduler", "semi", "global.epsilon")


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs that train in the same way."""

    name: str
    epochs: int
    optimizer: Named
    lr_scheduler: Named | None = None  # over this stage, and over the following ones that are not `new_optimizer`
    key: str = "optimizer"  # the setting that its learning rate is given by, for messages
    new_optimizer: bool = True  # begins with a new optimizer; False: goes on with that of the stage before
    keeps_model: bool = False  # trains another network, so that the model is evaluated once in the stage
    prepares: bool = False  # its model is not the defense's result yet, e.g. not repaired: it is never `best_model.pt`
    ranks_by: str = "split loss"  # what its split ranks the images by, for plots


class DefenseSettings:
    """Base of the `Settings` of a defense, the frozen dataclass that is the schema of `defense: {<name>: {...}}`.

    Attributes:
        needs_clean: the defender is given images known to be clean: `global.seed_num` of each class, or `seed_samples`.
        unread: keys and sections of the configuration that the defense does not read: they may change without making it
            another run.
        resumes_without_settings: a run may be resumed from a checkpoint that has only weights and an optimizer, as those of the
            authors' code.
    """

    needs_clean = False
    unread: tuple[str, ...] = ()
    resumes_without_settings = False

    def stages(self, config: Any) -> tuple[Stage, ...]:
        """Return the stages in order, some of which may have no epochs; `config` is the whole `Config`."""
        raise NotImplementedError

    def check(self, config: Any, reader: Reader) -> None:
        """Refuse combinations of settings that are each legal, by `reader.fail(key, value, expected)`.

        Here: a defense that needs clean images and is given none.
        """
        seed_num = config.global_.seed_num
        if self.needs_clean and seed_num < 1 and config.seed_samples is None:
            reader.fail("global.seed_num", seed_num, f"{config.defense.name} needs clean images: give at least 1")


def locate(stages: Sequence[Stage], epoch: int) -> tuple[Stage, int]:
    """Return the stage of a 0-based epoch, and the epoch's number within it.

    Raises:
        IndexError: the stages have fewer epochs.
    """
    for stage in stages:
        if epoch < stage.epochs:
            return stage, epoch
        epoch -= stage.epochs
    raise IndexError(epoch)


def gives_result(stages: Sequence[Stage], epoch: int) -> bool:
    """Return whether the model after a 0-based epoch is one that the defense is meant to give."""
    stage, _ = locate(stages, epoch)
    return not stage.prepares or stage is [s for s in stages if s.epochs][-1]


def schedule_length(stages: Sequence[Stage], stage: Stage) -> int:
    """Return the epochs of a stage's learning rate schedule: until the next new optimizer."""
    at = list(stages).index(stage)
    first = max((i for i in range(at + 1) if stages[i].new_optimizer), default=0)
    following = (i for i in range(first + 1, len(stages)) if stages[i].new_optimizer)
    return sum(s.epochs for s in stages[first : next(following, len(stages))])
