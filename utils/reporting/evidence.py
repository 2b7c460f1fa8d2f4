"""`evidence.npz`: the final model's features and probabilities of each training image, for tools that find noisy labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.files import write_atomically

FILE = "evidence.npz"


def write_evidence(path: Path, features: np.ndarray, pred_probs: np.ndarray, labels: np.ndarray) -> None:
    """Write the arrays, row i of each for training image i, uncompressed: features fill most of it and hardly shrink.

    Args:
        features: (N, D), the input of the last layer.
        pred_probs: (N, C), the probabilities of the classes.
        labels: (N,), those that the images carry.
    """
    arrays = {
        "features": features.astype(np.float32),
        "pred_probs": pred_probs.astype(np.float32),
        "labels": labels.astype(np.int64),
        "index": np.arange(len(labels), dtype=np.int64),
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
