"""The test images by class: confusion matrices of the clean and the triggered ones, shares per class, their text in files."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE = "confusion.json"


class ByClass(NamedTuple):
    """What a model predicts for the test images of each class; all on the CPU."""

    clean: Tensor  # (C, C) int64 counts of the clean images; row: true class, column: predicted class
    triggered: Tensor | None = None  # (C, C) of the triggered images; row: original class; None: without triggered images
    successes: Tensor | None = None  # (C,) of these, the images of each original class that get the attacker's label


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count the images of each true class by predicted class.

    Args:
        labels, predicted: (M,) int64 in 0..C-1, on any device.
    Returns:
        (C, C) int64 on the CPU: row: true class, column: predicted class.
    """
    cell = (labels * num_classes + predicted).cpu()
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def shares(hits: Tensor, matrix: Tensor) -> list[float | None]:
    """Return the share that hits (C,) are of the images of each class, a row of the matrix; None for a class without images."""
    rows = matrix.sum(1).tolist()
    return [hit / total if total else None for hit, total in zip(hits.tolist(), rows, strict=True)]


def per_class_accuracy(matrix: Tensor) -> list[float | None]:
    """Return, for each class, the share of its images that are predicted correctly; None for a class without images."""
    return shares(matrix.diagonal(), matrix)


def figures(found: ByClass) -> dict[str, Any]:
    """Return the matrices and the shares per class with the keys of the JSON files; None where there is no attack."""
    clean, triggered, successes = found
    return {
        "per_class_accuracy": per_class_accuracy(clean),
        "per_class_attack_success_rate": None if triggered is None or successes is None else shares(successes, triggered),
        "confusion": clean.tolist(),
        "triggered_confusion": None if triggered is None else triggered.tolist(),
    }


def to_json(values: dict[str, Any]) -> str:
    """Return indented JSON with each list of counts, such as a row of the matrix, on one line."""
    text = json.dumps(values, indent=2) + "\n"
    return re.sub(r"\[\n[\d\s,]+\]", lambda found: "[" + ", ".join(re.findall(r"\d+", found[0])) + "]", text)
