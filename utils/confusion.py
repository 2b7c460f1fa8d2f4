"""The confusion matrix of the clean test images: counts, accuracy per class, and their text in files."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

FILE = "confusion.json"


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count the images of each true class by predicted class.

    Args:
        labels, predicted: (M,) int64 in 0..C-1, on any device.
    Returns:
        (C, C) int64 on the CPU: row: true class, column: predicted class.
    """
    cell = (labels * num_classes + predicted).cpu()
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_accuracy(matrix: Tensor) -> list[float | None]:
    """Return, for each class, the share of its images that are predicted correctly; None for a class without images."""
    rows = matrix.sum(1).tolist()
    return [hits / total if total else None for hits, total in zip(matrix.diagonal().tolist(), rows, strict=True)]


def figures(matrix: Tensor) -> dict[str, Any]:
    """Return the matrix and the accuracy per class with the keys of the JSON files."""
    return {"per_class_accuracy": per_class_accuracy(matrix), "confusion": matrix.tolist()}


def to_json(values: dict[str, Any]) -> str:
    """Return indented JSON with each list of counts, such as a row of the matrix, on one line."""
    text = json.dumps(values, indent=2) + "\n"
    return re.sub(r"\[\n[\d\s,]+\]", lambda found: "[" + ", ".join(re.findall(r"\d+", found[0])) + "]", text)
