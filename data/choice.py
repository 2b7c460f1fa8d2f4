"""Which training images the attacker alters: poisoned images, stored as the run's `poison_idx.npy`, and cover images."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.config import Config
from utils.draws import numpy_generator
from utils.errors import UserError, one_line
from utils.files import write_atomically

AGAIN = "move the file away to draw it again, or start over with --resume False"
SelectionScores = Callable[[], np.ndarray]


def label_after(labels: np.ndarray, target_label: int | None, target_shift: int | None, num_classes: int) -> np.ndarray:
    """Return the labels that images carry once they are poisoned.

    A label-changing attack does not poison an image whose label would stay the same, nor does its success rate count one.

    Args:
        labels: (n,) int64, before the attack.
        target_label, target_shift: one of them is None; one class for all images, or `(y + target_shift) mod C`.
    Returns:
        (n,) int64.
    """
    if target_shift is None:
        return np.full(len(labels), target_label, np.int64)
    return (labels.astype(np.int64) + target_shift) % num_classes


def may_be_poisoned(config: Config, labels: np.ndarray, clean_label: bool) -> np.ndarray:
    """Return (N,) bool: which images of labels (N,) the configured attack may poison.

    Those whose label it changes, or with a clean-label attack those of the target class.
    """
    b = config.attacker
    return np.asarray((labels == label_after(labels, b.target_label, b.target_shift, config.num_classes)) == clean_label)


def draw_poisoned(allowed: np.ndarray, ratio: float, seed: int, mode: str, clean_label: bool = False) -> np.ndarray:
    """Draw which images are poisoned; the same seed gives the same images as the authors' code in mode `bernoulli`.

    Args:
        allowed: (N,) bool, which images may be poisoned.
        mode: `bernoulli`: one draw for every image, which is poisoned if the draw is below the ratio and the image allowed;
            `exact`: `int(ratio * N)` of the allowed images.
        clean_label: the ratio is a share of the allowed images instead of all images.
    Returns:
        (N,) float64 of 0 and 1, the format of `poison_idx.npy`.
    """
    rng = random.Random(seed)
    index = np.zeros(len(allowed))
    if mode == "bernoulli":
        drawn = np.array([rng.random() < ratio for _ in allowed], bool)
        index[drawn & allowed] = 1
        return index
    index[rng.sample(np.flatnonzero(allowed).tolist(), exact_count(allowed, ratio, clean_label))] = 1
    return index


def exact_count(allowed: np.ndarray, ratio: float, clean_label: bool) -> int:
    """Return how many of the allowed (N,) images mode `exact` poisons; `clean_label` as in `draw_poisoned`."""
    candidates = int(allowed.sum())
    count = int(ratio * (candidates if clean_label else len(allowed)))
    if count > candidates:
        raise UserError(
            f"backdoor.poison_ratio: {ratio}: needs {count} images to poison, but {candidates} are of other classes than "
            "the target: lower it"
        )
    return count


def choose_poisoned(
    config: Config, labels: np.ndarray, clean_label: bool, selection_scores: SelectionScores | None = None
) -> np.ndarray:
    """Return which images of labels (N,) the configured attack poisons: drawn at random, or those that it prefers.

    Args:
        selection_scores: returns (N,) values, of which the lowest are poisoned, ties by index; None: they are drawn.
    Returns:
        as `draw_poisoned`.
    Raises:
        UserError: the attack chooses its images, but `poison_mode` is not `exact`; or no image is poisoned.
    """
    b, allowed = config.attacker, may_be_poisoned(config, labels, clean_label)
    if selection_scores and b.poison_ratio and b.poison_mode != "exact":
        raise UserError(f"backdoor.poison_mode: {b.poison_mode}: {b.attack.name} chooses its images: give exact")
    # Drawn even if the attack chooses: their number is the same, and a wrong one is refused before the values are computed.
    index = draw_poisoned(allowed, b.poison_ratio, config.seed.seed, b.poison_mode, clean_label)
    if b.poison_ratio and not index.any():
        raise UserError(
            f"backdoor.poison_ratio: {b.poison_ratio}: poisons none of {int(allowed.sum())} images that may be poisoned: raise "
            "it, or give 0 to train without an attack"
        )
    if not selection_scores or not b.poison_ratio:
        return index
    candidates = np.flatnonzero(allowed)
    chosen = candidates[np.argsort(selection_scores()[candidates], kind="stable")[: int(index.sum())]]
    return np.isin(np.arange(len(allowed)), chosen).astype(np.float64)


def draw_cover(poisoned: np.ndarray, ratio: float, seed: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Draw `int(ratio * number of poisoned images)` cover images among the images that are not poisoned.

    Args:
        poisoned: (N,) of 0 and 1.
        allowed: (N,) bool, which images may become cover images; None: all.
    Returns:
        (n,) int64, sorted.
    """
    free = poisoned == 0 if allowed is None else (poisoned == 0) & allowed
    others, wanted = np.flatnonzero(free), ratio * int(poisoned.sum())
    if wanted >= len(others) + 1:
        raise UserError(
            f"backdoor: cover_ratio: {ratio}: needs {wanted:.0f} cover images, but there are {len(others)} to choose from: "
            "lower it"
        )
    return np.sort(numpy_generator(seed, "cover").choice(others, int(wanted), replace=False))


def poison_index(
    path: Path, labels: np.ndarray, config: Config, clean_label: bool = False, selection_scores: SelectionScores | None = None
) -> np.ndarray:
    """Return the run's `poison_idx.npy`, checked against the settings; if there is no such file, choose.

    Args:
        labels: (N,) int64, before the attack.
    Returns:
        (N,) float64 of 0 and 1.
    Raises:
        UserError: the file cannot be read, or does not fit the data and the settings.
    """
    if not path.exists():
        return choose_poisoned(config, labels, clean_label, selection_scores)
    poisoned = read_index(path, len(labels))
    if wrong := misfit(poisoned, config, labels, clean_label):
        raise UserError(f"{path}: {wrong}: {AGAIN}")
    return poisoned.astype(np.float64)


def keep_index(path: Path, index: np.ndarray) -> None:
    """Store which images are poisoned, (N,) float64 of 0 and 1, unless the file exists."""
    if not path.exists():
        write_atomically(path, lambda file: np.save(file, index, allow_pickle=False))


def read_index(path: Path, count: int) -> np.ndarray:
    """Return which of `count` images the file says are poisoned, (N,) bool.

    Raises:
        UserError: the file cannot be read, or has another form.
    """
    try:
        index = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy passes on the exceptions of many parsers
        raise UserError(f"{path}: not an array of numbers ({one_line(error)}): {AGAIN}") from None
    if not isinstance(index, np.ndarray) or index.shape != (count,):
        shape = getattr(index, "shape", "no array")
        raise UserError(f"{path}: shape {shape}: the training set has {count} images: {AGAIN}")
    if index.dtype.kind not in "fiub" or not np.isin(index, (0, 1)).all():
        raise UserError(f"{path}: contains values other than 0 and 1: {AGAIN}")
    return np.asarray(index == 1)


def misfit(poisoned: np.ndarray, config: Config, labels: np.ndarray, clean_label: bool) -> str | None:
    """Return why the settings cannot have given these poisoned images, (N,) bool, of labels (N,); None if they can."""
    b, allowed = config.attacker, may_be_poisoned(config, labels, clean_label)
    if (poisoned & ~allowed).any():
        return f"poisons images of {'other classes than' if clean_label else 'the target class'} {b.target_label}"
    if b.poison_mode == "exact":
        expected, slack = float(exact_count(allowed, b.poison_ratio, clean_label)), 0.0
    else:
        expected = b.poison_ratio * int(allowed.sum())
        slack = 5 * (expected * (1 - b.poison_ratio)) ** 0.5 + 1  # five standard deviations of a binomial count
    if poisoned.any() != (b.poison_ratio > 0) or abs(poisoned.sum() - expected) > slack:
        found = f"{int(poisoned.sum())} poisoned images"
        return f"{found}, but backdoor.poison_ratio {b.poison_ratio} means about {expected:.0f}"
    return None
