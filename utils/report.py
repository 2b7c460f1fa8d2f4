"""What a run shows a person: the lines of its log, its pictures, TensorBoard. One process of a run has a report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import confusion, evidence, page, pictures, suspects
from utils.checkpoint import State, flatten
from utils.config import Backdoor, Config, to_yaml
from utils.files import write_text
from utils.machine import Machine
from utils.run import Run
from utils.runlog import KINDS, RunLog, write_metrics
from utils.schema import as_dict
from utils.suspects import Evidence

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What a report tells of the data: the attack, and the ground truth where it is known."""

    backdoor: Backdoor | None  # None: unknown
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None  # (N,) of the training images; None: they have numbers only
    flags: Tensor | None  # (N,) uint8 ground truth, as `KINDS` has it; None: unknown
    examples: np.ndarray  # (2, n, H, W, 3) uint8, some images before and after the attack
    caption: str  # what the examples are


class Report:
    """The report of one run; it alone, beside the drawing of the seed samples, reads the ground truth.

    Args:
        start_epoch: the first epoch of this process.
    """

    def __init__(self, run: Run, config: Config, subject: Subject, start_epoch: int) -> None:
        self.run, self.config, self.subject, self.flags = run, config, subject, subject.flags
        self.log = RunLog(run.log, start_epoch)
        self.attempt = self.log.best_effort.attempt
        backdoor = subject.backdoor
        target = f", target class {backdoor.target_text(subject.class_names)}" if backdoor else ""
        self.attack = f"attack {backdoor.attack.name if backdoor else 'unknown'}{target}"
        self.poison_share = None if self.flags is None else float((self.flags == KINDS["poisoned"]).float().mean())
        if self.poison_share == 0:
            self.attack = "no attack"
        self.title = f"{run.name}: {self.attack}, defense {config.defense}"

    def close(self) -> None:
        """Close the run's log; what is logged later is no longer kept."""
        self.log.close()

    def start(self, machine: Machine, state: State, clean_tests: int | None, backdoor_tests: int | None) -> None:
        """Log what is about to run, and draw the triggered images.

        Args:
            clean_tests, backdoor_tests: how many test images there are; None: no such set.
        """
        c, n = self.config, len(state.epochs_in_clean_pool)
        logger.info(f"run {self.run.name}: defense {c.defense}, {self.attack}")
        triggered = "" if backdoor_tests is None else f", triggered test images {backdoor_tests}"
        logger.info(f"training images {n}{self.composition()}, test images {clean_tests or 'none'}{triggered}")
        if clean_tests is None:
            logger.info("without test images there is no accuracy and no best_model.pt: latest_model.pt is the result")
        parameters = sum(p.numel() for p in state.model.parameters())
        processes = f", {machine.world_size} processes" if machine.world_size > 1 else ""
        number = "bf16" if machine.amp else "fp32"
        logger.info(
            f"{c.network.name}, {parameters:,} parameters, on {machine.device} in {number}{processes}; logs in {self.run.log}"
        )
        if state.epoch >= c.num_epochs:
            logger.info(f"the checkpoint has all {c.num_epochs} epochs: nothing to do")
        elif state.epoch:
            logger.info(f"going on after epoch {state.epoch}/{c.num_epochs}")
        else:
            self.log.start(to_yaml(c), self.subject.examples[1])
        if state.history:
            write_metrics(self.run.log, state.history)  # a run killed after its checkpoint has not written its last row
        if self.subject.examples.shape[1]:
            path = self.run.log / "triggered.png"
            self.attempt(str(path), pictures.draw_triggered, path, self.subject.examples, self.subject.caption)

    def composition(self) -> str:
        """Return e.g. ` (2250 poisoned, 4500 cover)`, or nothing where the truth is unknown."""
        if self.flags is None:
            return ""
        counts = {kind: int((self.flags == flag).sum()) for kind, flag in KINDS.items()}
        return f" ({counts['poisoned']} poisoned" + (f", {counts['cover']} cover)" if counts["cover"] else ")")

    def split(self, epoch: int, clean_pool: Tensor, values: Tensor) -> None:
        """Report the values (N,) that split the set, and draw them at the end of each stage."""
        c, stage = self.config, self.config.stage(epoch)
        self.log.losses(values, self.flags, epoch)
        if epoch + 1 == c.num_epochs or c.stage(epoch + 1) != stage:
            label = "split loss - split loss of the virtual model" if stage == "meta-split" else "split loss"
            title = f"{stage.removesuffix('-split')} split of epoch {epoch + 1}: {len(clean_pool)} images in the clean pool"
            path = self.run.log / f"split_{stage}.png"
            flags = None if self.flags is None else self.flags.numpy()
            drawn = (values.numpy(), flags, clean_pool.numpy(), label, title)
            self.attempt(str(path), pictures.draw_losses, path, *drawn)

    def record(self, row: dict[str, Any]) -> None:
        """Add an epoch to TensorBoard, before its checkpoint is written."""
        self.log.record(row)

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """Report the last row of the history, in the thread that has just written its checkpoint."""
        self.log.epoch(history, self.config.num_epochs)

    def truth_of_pool(self, clean_pool: Tensor | None) -> dict[str, float | None]:
        """Return what the row of an epoch tells of its split; None where the truth is unknown or nothing is split.

        Returns:
            `poisoned_in_clean_pool`, and `cover_in_clean_pool` where the set has cover images: counts; `split_tpr`,
            `split_fpr`: the share of the poisoned and of the clean images outside the clean pool, None where there are none.
        """
        flags = self.flags
        kinds = {"poisoned_in_clean_pool": KINDS["poisoned"]}
        if flags is not None and bool((flags == KINDS["cover"]).any()):
            kinds["cover_in_clean_pool"] = KINDS["cover"]
        if flags is None or clean_pool is None:
            return dict.fromkeys((*kinds, "split_tpr", "split_fpr"))
        inside = torch.bincount(flags[clean_pool], minlength=len(KINDS)).tolist()
        total = torch.bincount(flags, minlength=len(KINDS)).tolist()
        tpr, fpr = (
            (total[flag] - inside[flag]) / total[flag] if total[flag] else None for flag in (KINDS["poisoned"], KINDS["clean"])
        )
        return {key: inside[flag] for key, flag in kinds.items()} | {"split_tpr": tpr, "split_fpr": fpr}

    def rank_suspects(self, evidence: Evidence, images: Any) -> None:
        """Rank the training images, write `suspects.csv` and its picture, and how good the ranking is if that is known.

        Args:
            images: the training set, of which some are fetched for the picture.
        """
        if self.flags is not None:
            found = suspects.quality(evidence, self.flags.numpy())
            suspects.write_quality(self.run.saved / suspects.QUALITY, found)
            logger.info(suspects.quality_line(found))
        suspects.write_table(self.run.saved / suspects.CSV, evidence, self.subject.names, self.subject.class_names)
        logger.info(f"suspects: {self.run.saved / suspects.CSV} ranks all training images, {suspects.PICTURE} shows the first")
        self.attempt(str(self.run.saved / suspects.PICTURE), self.draw_suspects, evidence, images)

    def draw_suspects(self, evidence: Evidence, images: Any) -> None:
        """Draw the most suspect images, each with its label and the model's."""
        first = suspects.order(evidence.scores()["score"])[: suspects.FIRST]
        shown = images.fetch(torch.from_numpy(first)).permute(0, 2, 3, 1).cpu().numpy()
        title = f"{self.run.name}: the {len(first)} most suspect of {len(evidence.labels)} images, label \u2192 model's label"
        captions = suspects.captions(evidence, first, self.subject.class_names)
        pictures.draw_suspects(self.run.saved / suspects.PICTURE, shown, captions, title)

    def draw_features(self, state: State, features: Tensor) -> None:
        """Draw the penultimate features (N, D) of the training images by ground truth and by pool of the last split."""
        groups = {}
        if self.flags is not None:
            groups["ground truth"] = {kind: (self.flags == flag).numpy() for kind, flag in KINDS.items()}
        if self.config.defense == "asd" and state.clean_pool is not None:
            inside = torch.zeros(len(features), dtype=torch.bool)
            inside[state.clean_pool] = True
            groups["last split"] = {"clean pool": inside.numpy(), "polluted pool": (~inside).numpy()}
        path = self.run.log / pictures.FEATURES
        self.attempt(str(path), pictures.draw_features, path, features, groups, self.title)

    def keep_evidence(self, features: Tensor, probabilities: Tensor, labels: Tensor) -> None:
        """Write `evidence.npz`: features (N, D), probabilities (N, C) and carried labels (N,) of the training images."""
        path = self.run.saved / evidence.FILE
        evidence.write_evidence(path, features.numpy(), probabilities.numpy(), labels.numpy())
        logger.info(
            f"evidence: {path} has features and probabilities of all training images, {path.stat().st_size / 1e6:.1f} MB"
        )

    def conclude(self, state: State, matrix: Tensor | None) -> None:
        """Log what came out, draw the run's pictures and write its page.

        Args:
            matrix: (C, C) confusion matrix of the clean test images; None: unknown, or kept earlier.
        """
        if not state.history:  # the authors' checkpoints have none
            return
        row = state.history[-1]
        acc, asr = row["clean_accuracy"], row["attack_success_rate"]
        seconds = sum(r["seconds"] for r in state.history)
        figures = ", ".join(f"{name} {100 * x:.2f} %" for name, x in (("ACC", acc), ("ASR", asr)) if x is not None)
        best = "" if acc is None else f"; best ACC {100 * state.best_acc:.2f} % in epoch {state.best_epoch}"
        logger.info(f"done{figures and ': '}{figures} after {state.epoch} epochs in {seconds:.0f} s{best}")
        if acc is not None:
            path = self.run.log / "accuracy.png"
            self.attempt(str(path), pictures.draw_accuracy, path, state.history, self.title)
        if matrix is not None:
            self.keep_confusion(matrix, row["epoch"])
        if self.config.defense == "asd" and self.poison_share:
            path = self.run.log / "purity.png"
            self.attempt(str(path), pictures.draw_purity, path, state.history, self.poison_share, self.title)
        self.attempt(str(self.run.log / page.FILE), page.write_page, self.run.saved, self.title)
        self.log.finish(flatten(as_dict(self.config)), row)

    def keep_confusion(self, matrix: Tensor, epoch: int) -> None:
        """Write `confusion.json` and its plot."""
        names = self.subject.class_names
        head = {"epoch": epoch, "class_names": list(names)}
        write_text(self.run.log / confusion.FILE, confusion.to_json(head | confusion.figures(matrix)))
        path = self.run.log / "confusion.png"
        self.attempt(str(path), pictures.draw_confusion, path, matrix.numpy(), names, f"{self.title}: clean test images")
