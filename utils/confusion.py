"""The confusion matrix of the clean test images: counts, accuracy per class, and how both are written."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

FILE = "confusion.json"


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count the images of each class by the class that the model predicts.

    Args:
        labels, predicted: (M,) int64 in 0..C-1, on any device.
    Returns:
        (C, C) int64 on the CPU: row the true class, column the predicted one.
    """
    cell = (labels * num_classes + predicted).cpu()
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


def per_class_accuracy(matrix: Tensor) -> list[float | None]:
    """Return the share of each class' images that are predicted as that class; None for a class without images."""
    rows = matrix.sum(1).tolist()
    return [hits / total if total else None for hits, total in zip(matrix.diagonal().tolist(), rows, strict=True)]


def figures(matrix: Tensor) -> dict[str, Any]:
    """Return both as a JSON file holds them."""
    return {"per_class_accuracy": per_class_accuracy(matrix), "confusion": matrix.tolist()}


def to_json(values: dict[str, Any]) -> str:
    """Return an indented JSON text in which a list of counts takes one line, as a row of the matrix does."""
    text = json.dumps(values, indent=2) + "\n"
    return re.sub(r"\[\n[\d\s,]+\]", lambda found: "[" + ", ".join(re.findall(r"\d+", found[0])) + "]", text)
