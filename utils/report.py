"""What a run shows a person: the lines of its log, its pictures, TensorBoard. One process of a run has a report."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from utils import pictures
from utils.checkpoint import State, flatten
from utils.config import Config, to_yaml
from utils.machine import Machine
from utils.run import Run
from utils.runlog import RunLog, write_metrics
from utils.schema import as_dict


class Report:
    """The report of one run; it alone, beside the drawing of the seed samples, reads the ground truth.

    Args:
        flags: (N,) uint8 ground truth, 1 poisoned.
        examples: (2, n, H, W, 3) uint8, some poisoned images before and after.
        start_epoch: the first epoch of this process.
    """

    def __init__(self, run: Run, config: Config, flags: Tensor, examples: np.ndarray, start_epoch: int) -> None:
        self.run, self.config, self.flags, self.examples = run, config, flags, examples
        self.log = RunLog(run.log, start_epoch)
        self.title = f"{run.name}: {config.attack.name}, defense {config.defense}"

    def start(self, machine: Machine, state: State, clean_tests: int, backdoor_tests: int) -> None:
        """Say what is about to run, and draw the triggered images."""
        c, poisoned = self.config, int((self.flags == 1).sum())
        self.log.say(
            f"run {self.run.name}: defense {c.defense}, attack {c.attack.name}, target class {c.backdoor.target_label}"
        )
        self.log.say(
            f"training images {len(self.flags)} ({poisoned} poisoned), test images {clean_tests}, "
            f"triggered test images {backdoor_tests}"
        )
        parameters = sum(p.numel() for p in state.model.parameters())
        processes = f", {machine.size} processes" if machine.size > 1 else ""
        number = "bf16" if machine.amp else "fp32"
        self.log.say(
            f"{c.network.name}, {parameters:,} parameters, on {machine.device} in {number}{processes}; logs in {self.run.log}"
        )
        if state.epoch >= c.num_epochs:
            self.log.say(f"the checkpoint has all {c.num_epochs} epochs: nothing to do")
        elif state.epoch:
            self.log.say(f"going on after epoch {state.epoch}/{c.num_epochs}")
        else:
            self.log.start(to_yaml(c), self.examples[1])
        if state.history:
            write_metrics(self.run.log, state.history)  # a run killed after its checkpoint has not written its last row
        if poisoned:
            path = self.run.log / "triggered.png"
            pictures.draw_triggered(path, self.examples, f"{c.attack.name}: poisoned training images")

    def split(self, epoch: int, clean_pool: Tensor, values: Tensor) -> None:
        """Report the values (N,) that split the set, and draw them at the end of each stage."""
        c, stage = self.config, self.config.stage(epoch)
        self.log.losses(values, self.flags, epoch)
        if epoch + 1 == c.num_epochs or c.stage(epoch + 1) != stage:
            label = "split loss - split loss of the virtual model" if stage == "meta-split" else "split loss"
            title = f"{stage.removesuffix('-split')} split of epoch {epoch + 1}: {len(clean_pool)} images in the clean pool"
            path = self.run.log / f"split_{stage}.png"
            pictures.draw_losses(path, values.numpy(), self.flags.numpy(), clean_pool.numpy(), label, title)

    def epoch(self, state: State) -> None:
        """Report the last row of the history."""
        self.log.epoch(state.history, self.config.num_epochs)

    def conclude(self, state: State) -> None:
        """Draw the run's pictures and say what came out."""
        if not state.history:  # the authors' checkpoints have none
            return
        row = state.history[-1]
        pictures.draw_accuracy(self.run.log / "accuracy.png", state.history, self.title)
        if self.config.defense == "asd":
            share = float((self.flags == 1).float().mean())
            pictures.draw_purity(self.run.log / "purity.png", state.history, share, self.title)
        seconds = sum(r["seconds"] for r in state.history)
        self.log.say(
            f"done: ACC {100 * row['clean_accuracy']:.2f} %, ASR {100 * row['attack_success_rate']:.2f} % after "
            f"{state.epoch} epochs in {seconds:.0f} s; best ACC {100 * state.best_acc:.2f} % in epoch {state.best_epoch}"
        )
        self.log.finish(flatten(as_dict(self.config)), row)


class Silence:
    """The report of the other processes: every method is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
