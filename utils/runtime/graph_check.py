"""Whether a captured CUDA graph does what the eager steps do: comparison of the tensors that both have changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SUMS, COUNTER = "sums of losses", "row counter"  # kinds of tensors besides those of the model and the optimizer
SUMS_APART = 0.02  # relative
PATHS_APART, MOST_APART = 0.5, 0.9  # relative to the length of the change
ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative to the norm of a tensor

Kinds = Mapping[str, list[Tensor]]  # the tensors that a step changes, by kind (`stepper.changed_tensors`)


@torch.no_grad()
def difference(found: Kinds, expected: Kinds, before: dict[int, Tensor], scatter: Mapping[str, float]) -> str:
    """Return what is wrong with the trial of a graph, or an empty string.

    Two eager trials also differ: CUDA adds in no fixed order, bf16 rounds, and Adam's first steps depend mainly on the signs
    of the gradients, so that a gradient near zero moves its weight in either direction. Each kind of tensors is compared
    separately, so that small ones are not hidden by large ones:

    - Counters (integers: row counter, Adam's steps, BN's batches) must be equal.
    - Every tensor that the eager steps changed must have changed.
    - The sums of losses must agree within 2 %.
    - The changes of all tensors of a kind, taken together, may differ by half of their length, or by twice the difference
      between two eager trials. Rounding every product to bf16 gave up to 0.45 (ResNet-18 of width 16); work done twice or
      omitted gives 1 or more. Single tensors cannot be judged: the gradient of a bias before BN is rounding error only.

    Args:
        found, expected: the outcomes of the replays and of the eager steps.
        before: the values before the trial, by the id of the tensors in `found`; tensors that did not exist were zero.
        scatter: the `distances` between two eager trials.
    """
    for kind in moving(expected):
        for ours, theirs in zip(found[kind], expected[kind], strict=True):
            if is_counter(theirs):
                if not torch.equal(ours, theirs):
                    return f"in a trial a counter was wrong ({kind})"
            elif torch.equal(ours, origin := value_before(ours, before)) and norm(theirs - origin) > ROUNDING * norm(theirs):
                return f"in a trial a tensor did not change ({kind})"
    for ours, theirs in zip(found[SUMS], expected[SUMS], strict=True):
        if not torch.allclose(ours, theirs, rtol=SUMS_APART, atol=1e-6):
            return f"in a trial the losses were {ours.tolist()} instead of {theirs.tolist()}"
    for kind, distance in distances(found, expected, before).items():
        if not distance <= min(max(PATHS_APART, 2 * scatter[kind]), MOST_APART):  # `not`: also if the distance is NaN
            return f"in a trial the {kind} changed differently, by {distance:.2f} of the expected change"
    return ""


@torch.no_grad()
def distances(found: Kinds, expected: Kinds, before: dict[int, Tensor]) -> dict[str, float]:
    """Return, by kind, the distance between two outcomes relative to the length of the expected change from `before`."""
    apart = {}
    for kind in moving(expected):
        pairs = [(a, b) for a, b in zip(found[kind], expected[kind], strict=True) if not is_counter(b)]
        off = math.hypot(*(norm(a - b) for a, b in pairs))
        path = math.hypot(*(norm(b - value_before(a, before)) for a, b in pairs))
        rounding = ROUNDING * math.hypot(*(norm(b) for _, b in pairs))  # an upper bound for tensors that do not change
        apart[kind] = off / max(path, rounding, 1e-30)
    return apart


def moving(outcome: Kinds) -> list[str]:
    """Return the kinds of tensors in an outcome that are changed in place."""
    return [kind for kind in outcome if kind != SUMS]


def value_before(t: Tensor, before: dict[int, Tensor]) -> Tensor:
    """Return the value that a tensor had before; zero if it did not exist."""
    return before[id(t)] if id(t) in before else torch.zeros_like(t)


def norm(t: Tensor) -> float:
    """Return the Euclidean norm of a tensor."""
    return float(t.double().square().sum().sqrt())


def is_counter(t: Tensor) -> bool:
    """Return whether a tensor is a counter: integers, or a float scalar with an integral value (Adam's steps)."""
    return not t.is_floating_point() or (t.ndim == 0 and bool(t == t.round()))
