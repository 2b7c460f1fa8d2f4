"""Attention distillation (Li et al., "Neural Attention Distillation", ICLR 2021)."""

from __future__ import annotations

from torch import Tensor

from loss.supervised import full_precision

EPSILON = 1e-6


def attention_map(features: Tensor) -> Tensor:
    """Return `a / (|a|_2 + 1e-6)` of `a = sum_c |f_c|^2`: (B, c, h, w) -> (B, h w)."""
    attention = full_precision(features).square().sum(1).flatten(1)
    return attention / (attention.norm(dim=1, keepdim=True) + EPSILON)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference over the positions of two attention maps: (B, c, h, w) twice -> (B,)."""
    return (attention_map(student) - attention_map(teacher)).square().mean(1)
