"""Ranks the training images by suspicion after an ASD run: a score for each, a table, and the quality of the ranking.

ASD itself does not decide which images are poisoned; it only needs a pool that is clean enough. But its final model has not
learned the labels of poisoned images and confidently predicts other ones, and its splits have kept most of them out of the
clean pool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.csv_text import csv_text
from utils.files import write_atomically, write_text
from utils.kinds import COVER, POISONED
from utils.names import class_name

CSV, PICTURE, QUALITY = "suspects.csv", "suspects.png", "suspects.json"
FIRST = 100  # images of the contact sheet, and of the reported precision
HEAD = ("rank", "name", "label", "model_label", "confidence", "split_loss", "epochs_in_clean_pool", "score")


@dataclass(frozen=True)
class Evidence:
    """What is known about each of the N training images from the final model and the splits."""

    labels: np.ndarray  # (N,) int64, the labels that the images carry
    model_labels: np.ndarray  # (N,) int64, predicted by the model
    own_probability: np.ndarray  # (N,) in 0..1, of the label that the image carries
    rival_probability: np.ndarray  # (N,) in 0..1, of the most probable other label
    losses: np.ndarray  # (N,) split loss without augmentation
    epochs: np.ndarray  # (N,) epochs in the clean pool

    @property
    def confidence(self) -> np.ndarray:
        """The probability (N,) of the predicted label."""
        return np.maximum(self.own_probability, self.rival_probability)

    def scores(self) -> dict[str, np.ndarray]:
        """Return the score (N,) in 0..1 and the measures that it is compared with, each (N,); high values are suspect.

        The score is the product of two factors: the margin by which the final model prefers another label, mapped to 0..1,
        and 1 - e / (max e + 1), where e is the number of epochs that the image was in the clean pool and max e that of the
        image that was there most often. Poisoned images have both: the model confidently predicts another label, and the
        splits keep them out. Hard clean images lack the first; the clean half that stages 2
        and 3 leave out lacks the second. `suspects.json` has the quality of the score and of its parts, so that each
        run shows whether the product is the better measure.
        """
        margin = (1 + self.rival_probability - self.own_probability) / 2
        outside = 1 - self.epochs / (self.epochs.max(initial=0) + 1.0)
        return {
            "score": margin * outside,
            "margin": margin,
            "split_loss": self.losses,
            "epochs_outside_clean_pool": -self.epochs.astype(np.float64),
        }


def midranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks 1 to N of (N,) values in ascending order; equal values get the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[group]
    return ranks


def order(scores: np.ndarray) -> np.ndarray:
    """Return the indices (N,) from the most to the least suspect; ties by index."""
    return np.argsort(-scores, kind="stable")


# -- The quality of a ranking, if the ground truth is known ------------------------------------------------------------


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the probability that a positive scores higher than a negative, ties counting 1/2; None if either is missing.

    Args:
        scores: (N,).
        positive: (N,) bool.
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        return None
    above = midranks(scores)[positive].sum() - count * (count + 1) / 2  # Mann and Whitney's U
    return float(above / (count * (len(positive) - count)))


def precision_recall_at(scores: np.ndarray, positive: np.ndarray, count: int) -> tuple[float, float] | None:
    """Return precision and recall of the `count` highest scores; None if there are no positives or `count` is 0.

    Ties at the threshold are broken at random: the expected values are returned, so the order of the data set does not matter.
    """
    total = int(positive.sum())
    if total == 0 or count == 0:
        return None
    edge = np.sort(scores)[-count]
    above, tied = scores > edge, scores == edge
    hits = positive[above].sum() + (count - above.sum()) * positive[tied].mean()
    return float(hits / count), float(hits / total)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the mean, over the positives, of the precision at each one's score; None without positives."""
    total = int(positive.sum())
    if total == 0:
        return None
    _, group = np.unique(-scores, return_inverse=True)  # from the highest score down
    found = np.bincount(group, positive)
    precision = np.cumsum(found) / np.cumsum(np.bincount(group))
    return float((found * precision).sum() / total)


def quality(evidence: Evidence, flags: np.ndarray) -> dict[str, Any]:
    """Return the contents of `suspects.json`: counts, and how well each of `Evidence.scores` finds the poisoned images.

    Cover images are neither poisoned nor clean: the measures leave them out.

    Args:
        flags: (N,) ground truth, see `utils/kinds.py`.
    """
    judged = flags != COVER
    poisoned = flags[judged] == POISONED
    count = int(poisoned.sum())
    measures = {}
    for name, scores in evidence.scores().items():
        scores = scores[judged]
        first = precision_recall_at(scores, poisoned, min(FIRST, len(scores)))
        precision, recall = precision_recall_at(scores, poisoned, count) or (None, None)
        measures[name] = {
            "auroc": auroc(scores, poisoned),
            "precision_at_true_count": precision,
            "recall_at_true_count": recall,
            f"precision_of_first_{FIRST}": first[0] if first else None,
            "average_precision": average_precision(scores, poisoned),
        }
    counts = {"images": len(flags), "poisoned": count, "cover": int((flags == COVER).sum())}
    return {"counts": counts, "measures": measures}


# -- Files and texts -------------------------------------------------------------------------------------------------


def captions(evidence: Evidence, which: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Return `label → predicted label` of the images `which`, (n,) int64."""
    pairs = zip(evidence.labels[which].tolist(), evidence.model_labels[which].tolist(), strict=True)
    return [f"{class_name(own, class_names)} \u2192 {class_name(models, class_names)}" for own, models in pairs]


def table(evidence: Evidence, names: Sequence[str] | None, class_names: Sequence[str]) -> str:
    """Return the text of `suspects.csv`: one row for each image, the most suspect first.

    Args:
        names: (N,) of the images; None: use their numbers.
    """
    e, scores = evidence, evidence.scores()["score"]
    rows = (
        [
            rank, names[i] if names else i,
            class_name(int(e.labels[i]), class_names), class_name(int(e.model_labels[i]), class_names),
            f"{e.confidence[i]:.4f}", f"{e.losses[i]:.6g}", int(e.epochs[i]), f"{scores[i]:.6f}",
        ]
        for rank, i in enumerate(order(scores).tolist(), 1)
    )  # fmt: skip
    return csv_text([HEAD, *rows])


def write_table(path: Path, evidence: Evidence, names: Sequence[str] | None, class_names: Sequence[str]) -> None:
    """Write `suspects.csv`; names that are not UTF-8 keep their bytes."""
    text = table(evidence, names, class_names).encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(text))


def quality_line(found: dict[str, Any]) -> str:
    """Return the quality of the score as one line."""
    measure, counts = found["measures"]["score"], found["counts"]
    if measure["auroc"] is None:
        return f"suspects: {counts['poisoned']} of {counts['images']} images are poisoned: the ranking cannot be judged"
    return (
        f"suspects: AUROC {measure['auroc']:.4f}; of the first {counts['poisoned']} images "
        f"{100 * measure['precision_at_true_count']:.1f} % are poisoned"
    )


def write_quality(path: Path, found: dict[str, Any]) -> None:
    """Write `suspects.json`."""
    write_text(path, json.dumps(found, indent=2) + "\n")
