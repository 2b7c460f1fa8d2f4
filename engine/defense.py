"""Base class of all defenses: stages of epochs that train a model on the possibly mislabeled images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from engine.context import Context, build_training
from utils.checkpoint import State
from utils.config.stages import Stage, locate


class DefenseBase(ABC):
    """A defense: `class Defense(DefenseBase)` in `defenses/<name>.py`, beside its `Settings`.

    It knows the training images with the labels that they carry, and the images that it is given; never the ground truth. An
    oracle baseline, an upper bound for defenses, defines `reference_images(config, flags)` in its file: the run calls it with
    the ground truth (N,) and passes the returned indices to the defense.

    Between two epochs, everything that it needs later is in the `State`: weights, optimizer, `networks` beside the model,
    `sets` of indices. Random draws are functions of (seed, purpose, epoch). Then resuming is exact.

    Args:
        context: what is fixed for the run.
        given: (S,) int64, on the CPU: images known to be clean (`Settings.needs_clean`), or what `reference_images` of the
            file chose; else none.
    """

    def __init__(self, context: Context, given: Tensor) -> None:
        self.context, self.given = context, given
        self.settings: Any = context.config.defense.settings
        self.built: set[str] = set()  # networks beside the model that `build` has added

    def build(self, state: State, stage: Stage) -> None:
        """Give the state what a stage trains: here a new optimizer and schedule for all weights of the model.

        Called before a stage with a new optimizer begins, and before a checkpoint that was written within a stage is loaded.
        It only allocates; `start_stage` or the checkpoint then sets the values.
        """
        self.set_optimizer(state, stage, state.model.parameters())

    def prepare(self, state: State, stage: Stage) -> None:
        """Call `build`, and record which networks it adds: on resuming, these alone are loaded from the checkpoint."""
        self.build(state, stage)
        self.built |= state.networks.keys()

    def set_optimizer(self, state: State, stage: Stage, parameters: Iterable[nn.Parameter]) -> None:
        """Give the state the stage's optimizer for these parameters, and its schedule."""
        state.optimizer, state.scheduler = build_training(self.context.config, self.context.machine, stage, parameters)
        state.stepper = None  # a captured step holds the tensors of the optimizer before

    def start_stage(self, state: State, stage: Stage) -> None:
        """Called once before the first epoch of a stage, e.g. to choose images or prune a network. Default: do nothing."""
        return

    def begin_epoch(self, state: State, epoch: int) -> None:
        """Begin the stage whose first epoch this is."""
        stage, first = locate(self.context.config.stages, epoch)
        if first == 0:
            if epoch == 0 or stage.new_optimizer:
                self.prepare(state, stage)
            self.start_stage(state, stage)

    @abstractmethod
    def train_epoch(self, state: State, epoch: int) -> dict[str, float]:
        """Train one epoch, counted from the start of the run.

        Returns:
            means over the epoch: `loss`, and further figures for the epoch's row in `metrics.jsonl`.
        """
