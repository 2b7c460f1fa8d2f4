"""Per-image classification losses, (B,) without reduction (paper section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY_FLOOR = 1e-7  # of the softmax in the reverse cross-entropy
LABEL_FLOOR = 1e-4  # of the one-hot label in the reverse cross-entropy: log 0 becomes log 1e-4


def full_precision(logits: Tensor) -> Tensor:
    """Return bf16 or fp16 logits as float32, in which all losses are computed."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log softmax(z)_y: (B, C), (B,) int64 -> (B,)."""
    return F.cross_entropy(full_precision(logits), labels, reduction="none")


def reverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -sum_c clamp(softmax(z)_c) log clamp(onehot_c): (B, C), (B,) int64 -> (B,) (Wang et al., ICCV 2019)."""
    probabilities = full_precision(logits).softmax(1).clamp(PROBABILITY_FLOOR, 1)  # (B, C)
    onehot = F.one_hot(labels, logits.shape[1]).to(probabilities.dtype).clamp(LABEL_FLOOR, 1)  # (B, C)
    return -(probabilities * onehot.log()).sum(1)


def symmetric_cross_entropy(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Return the split loss alpha CE + beta RCE: (B, C), (B,) int64 -> (B,)."""
    return alpha * cross_entropy(logits, labels) + beta * reverse_cross_entropy(logits, labels)
