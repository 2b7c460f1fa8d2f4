"""The report of a run: log lines, plots, TensorBoard, report page. Only rank 0 has one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint import State
from utils.config import Config, stages, to_yaml
from utils.config.compatibility import flatten
from utils.config.schema import as_dict
from utils.config.settings import Backdoor
from utils.files import write_text
from utils.kinds import CLEAN, COVER, KINDS, POISONED
from utils.reporting import confusion, evidence, page, plots, suspects
from utils.reporting.confusion import ByClass
from utils.reporting.runlog import RunLog, add_finish, add_losses, add_row, add_start, write_metrics
from utils.reporting.suspects import Evidence
from utils.run import Run
from utils.runtime.machine import Machine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What a report needs to know about the data: the attack, and the ground truth if it is known."""

    backdoor: Backdoor | None  # None: unknown
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None  # (N,) of the training images; None: they have no names
    flags: Tensor | None  # (N,) uint8 ground truth, see `utils/kinds.py`; None: unknown
    examples: np.ndarray  # (2, n, H, W, 3) uint8, some images before and after the attack
    caption: str  # what the examples are


class Report:
    """The report of one run. Only the report, the drawing of the seed samples and the oracle baselines read the ground truth.

    Args:
        start_epoch: the first epoch that this process trains.
    """

    def __init__(self, run: Run, config: Config, subject: Subject, start_epoch: int) -> None:
        self.run, self.config, self.subject, self.flags = run, config, subject, subject.flags
        self.log = RunLog(run.log, start_epoch)
        self.attempt = self.log.best_effort.attempt
        backdoor = subject.backdoor
        target = f", target class {backdoor.target_text(subject.class_names)}" if backdoor else ""
        self.attack = f"attack {backdoor.attack.name if backdoor else 'unknown'}{target}"
        self.poison_share = None if self.flags is None else float((self.flags == POISONED).float().mean())
        if self.poison_share == 0:
            self.attack = "no attack"
        self.title = f"{run.name}: {self.attack}, defense {config.defense.name}"

    def close(self) -> None:
        """Close the run's log; later lines are not recorded."""
        self.log.close()

    def start(self, machine: Machine, state: State, clean_tests: int | None, backdoor_tests: int | None) -> None:
        """Log the run's data, network and device, and draw the triggered images.

        Args:
            clean_tests, backdoor_tests: number of test images; None: no such set.
        """
        c, n = self.config, len(state.epochs_in_clean_pool)
        logger.info(f"run {self.run.name}: defense {c.defense.name}, {self.attack}")
        triggered = "" if backdoor_tests is None else f", triggered test images {backdoor_tests}"
        logger.info(f"training images {n}{self.composition()}, test images {clean_tests or 'none'}{triggered}")
        if clean_tests is None:
            logger.info("no test images: there is no accuracy and no best_model.pt, only latest_model.pt")
        parameters = sum(p.numel() for p in state.model.parameters())
        processes = f", {machine.world_size} processes" if machine.world_size > 1 else ""
        precision = "bf16" if machine.amp else "fp32"
        logger.info(
            f"{c.network.name}: {parameters:,} parameters, {precision} on {machine.device}{processes}; logs in {self.run.log}"
        )
        if state.epoch >= c.epochs:
            logger.info(f"the checkpoint has all {c.epochs} epochs: nothing to do")
        elif state.epoch:
            logger.info(f"resuming after epoch {state.epoch}/{c.epochs}")
        else:
            self.log.to_board(add_start, to_yaml(c), self.subject.examples[1])
        if state.history:
            write_metrics(self.run.log, state.history)  # a run that was killed after a checkpoint lacks its last row
        if self.subject.examples.shape[1]:
            path = self.run.log / "triggered.png"
            self.attempt(str(path), plots.draw_triggered, path, self.subject.examples, self.subject.caption)

    def composition(self) -> str:
        """Return e.g. ` (2250 poisoned, 4500 cover)`, or an empty string if the ground truth is unknown."""
        if self.flags is None:
            return ""
        counts = {kind: int((self.flags == flag).sum()) for kind, flag in KINDS.items()}
        return f" ({counts['poisoned']} poisoned" + (f", {counts['cover']} cover)" if counts["cover"] else ")")

    def split(self, epoch: int, clean_pool: Tensor, values: Tensor) -> None:
        """Record the values (N,) that the images were ranked by; plot them at the end of each stage."""
        c, stage = self.config, self.config.stage(epoch)
        self.log.to_board(add_losses, values, self.flags, epoch)
        if epoch + 1 == c.epochs or c.stage(epoch + 1) != stage:
            label = stages.locate(c.stages, epoch)[0].ranks_by
            title = f"{stage.removesuffix('-split')} split of epoch {epoch + 1}: {len(clean_pool)} images in the clean pool"
            path = self.run.log / f"split_{stage}.png"
            flags = None if self.flags is None else self.flags.numpy()
            split = plots.Split(values.numpy(), flags, clean_pool.numpy())
            self.attempt(str(path), plots.draw_losses, path, split, label, title)

    def record(self, row: dict[str, Any]) -> None:
        """Add an epoch to TensorBoard. To be called before its checkpoint is written.

        On resuming, records after the last checkpoint are purged, but nothing would add a missing one.
        """
        self.log.to_board(add_row, row)

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Log the last row of the history; called by the thread that has just written its checkpoint."""
        self.log.epoch(history, self.config.epochs)

    def truth_of_pool(self, clean_pool: Tensor | None) -> dict[str, float | None]:
        """Return the figures of a split for the row of its epoch; None if the ground truth is unknown or there is no split.

        Returns:
            `poisoned_in_clean_pool`, and `cover_in_clean_pool` if the set has cover images: counts; `split_tpr`,
            `split_fpr`: the share of the poisoned and of the clean images outside the clean pool, None if there are none.
        """
        flags = self.flags
        kinds = {"poisoned_in_clean_pool": POISONED}
        if flags is not None and bool((flags == COVER).any()):
            kinds["cover_in_clean_pool"] = COVER
        if flags is None or clean_pool is None:
            return dict.fromkeys((*kinds, "split_tpr", "split_fpr"))
        inside = torch.bincount(flags[clean_pool], minlength=len(KINDS)).tolist()
        total = torch.bincount(flags, minlength=len(KINDS)).tolist()
        tpr, fpr = ((total[flag] - inside[flag]) / total[flag] if total[flag] else None for flag in (POISONED, CLEAN))
        return {key: inside[flag] for key, flag in kinds.items()} | {"split_tpr": tpr, "split_fpr": fpr}

    def poisoned_in(self, indices: Tensor) -> int | None:
        """Return how many of these training images (n,) are poisoned; None if the truth is unknown."""
        return None if self.flags is None else int((self.flags[indices] == POISONED).sum())

    def rank_suspects(self, evidence: Evidence, images: Any) -> None:
        """Rank the training images; write `suspects.csv`, `suspects.png` and, if the ground truth is known, `suspects.json`.

        Args:
            images: the training set, from which those for the contact sheet are fetched.
        """
        if self.flags is not None:
            found = suspects.quality(evidence, self.flags.numpy())
            suspects.write_quality(self.run.saved / suspects.QUALITY, found)
            logger.info(suspects.quality_line(found))
        suspects.write_table(self.run.saved / suspects.CSV, evidence, self.subject.names, self.subject.class_names)
        logger.info(f"suspects: all images, ranked, in {self.run.saved / suspects.CSV}; the first in {suspects.PICTURE}")
        self.attempt(str(self.run.saved / suspects.PICTURE), self.draw_suspects, evidence, images)

    def draw_suspects(self, evidence: Evidence, images: Any) -> None:
        """Draw the most suspect images, each with its label and the predicted one."""
        first = suspects.order(evidence.scores()["score"])[: suspects.FIRST]
        shown = images.fetch(torch.from_numpy(first)).permute(0, 2, 3, 1).cpu().numpy()
        title = f"{self.run.name}: the {len(first)} most suspect of {len(evidence.labels)} images, label \u2192 predicted label"
        captions = suspects.captions(evidence, first, self.subject.class_names)
        plots.draw_suspects(self.run.saved / suspects.PICTURE, shown, captions, title)

    def draw_features(self, state: State, features: Tensor) -> None:
        """Draw the penultimate features (N, D) of the training images by ground truth and by pool of the last split."""
        groups = {}
        if self.flags is not None:
            groups["ground truth"] = {kind: (self.flags == flag).numpy() for kind, flag in KINDS.items()}
        if len(state.clean_pool):
            inside = torch.zeros(len(features), dtype=torch.bool)
            inside[state.clean_pool] = True
            groups["last split"] = {"clean pool": inside.numpy(), "polluted pool": (~inside).numpy()}
        path = self.run.log / plots.FEATURES
        self.attempt(str(path), plots.draw_features, path, features, groups, self.title)

    def keep_evidence(self, features: Tensor, probabilities: Tensor, labels: Tensor) -> None:
        """Write `evidence.npz`: features (N, D), probabilities (N, C) and carried labels (N,) of the training images."""
        path = self.run.saved / evidence.FILE
        evidence.write_evidence(path, features.numpy(), probabilities.numpy(), labels.numpy())
        logger.info(
            f"evidence: {path} has features and probabilities of all training images, {path.stat().st_size / 1e6:.1f} MB"
        )

    def conclude(self, state: State, by_class: ByClass | None) -> None:
        """Log the final figures, draw the run's plots and write its page.

        Args:
            by_class: what is predicted for the test images of each class; None: unknown, or written earlier.
        """
        if not state.history:  # the authors' checkpoints have none
            return
        row = state.history[-1]
        acc, asr = row["clean_accuracy"], row["attack_success_rate"]
        seconds = sum(r["seconds"] for r in state.history)
        figures = ", ".join(f"{name} {100 * x:.2f} %" for name, x in (("ACC", acc), ("ASR", asr)) if x is not None)
        best = "" if acc is None else f"; best ACC {100 * state.best_acc:.2f} % in epoch {state.best_epoch}"
        logger.info(f"done{figures and ': '}{figures} after epoch {state.epoch} in {seconds:.0f} s{best}")
        if acc is not None:
            path = self.run.log / "accuracy.png"
            self.attempt(str(path), plots.draw_accuracy, path, state.history, self.title)
        if by_class is not None:
            self.keep_confusion(by_class, row["epoch"])
        if len(state.clean_pool) and self.poison_share:
            path = self.run.log / "purity.png"
            self.attempt(str(path), plots.draw_purity, path, state.history, self.poison_share, self.title)
        self.attempt(str(self.run.log / page.FILE), page.write_page, self.run.saved, self.title)
        self.log.to_board(add_finish, flatten(as_dict(self.config)), row)

    def keep_confusion(self, by_class: ByClass, epoch: int) -> None:
        """Write `confusion.json` and a plot of each matrix."""
        names = self.subject.class_names
        head = {"epoch": epoch, "class_names": list(names)}
        write_text(self.run.log / confusion.FILE, confusion.to_json(head | confusion.figures(by_class)))
        paths = [self.run.log / file for file in plots.CONFUSIONS]
        plots.plot_confusions(self.log.best_effort, paths, by_class, names, self.title)
