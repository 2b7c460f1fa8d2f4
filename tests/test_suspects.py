"""The ranking of suspect training images: its score, its quality, and its files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.reporting import plots, suspects
from utils.reporting.suspects import Evidence

FEW = st.integers(0, 4).map(float)  # so that ties are common
SCORED = st.lists(st.tuples(FEW, st.booleans()), min_size=1, max_size=14)


def columns(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and positives as arrays."""
    return np.array([score for score, _ in pairs]), np.array([flag for _, flag in pairs], bool)


def evidence(losses: list[float], epochs: list[int], **changes: np.ndarray) -> Evidence:
    """Return evidence on images that differ only in losses and epochs."""
    n = len(losses)
    own = np.exp(-np.array(losses, float))  # so that the score, 1 - own, rises with the loss
    made = {
        "labels": np.arange(n) % 3, "model_labels": (np.arange(n) + 1) % 3, "own_probability": own,
        "rival_probability": 1 - own, "losses": np.array(losses), "epochs": np.array(epochs),
    }  # fmt: skip
    return Evidence(**(made | changes))


# -- Ranks and the score -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(FEW, min_size=1, max_size=12))
def test_equal_values_share_the_mean_of_their_ranks(values: list[float]) -> None:
    """A midrank is the number of lower values plus the middle of the equal ones, whatever the order of the data set."""
    expected = []
    for value in values:
        lower = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        expected.append(lower + sum(range(1, equal + 1)) / equal)
    assert suspects.midranks(np.array(values)).tolist() == pytest.approx(expected)


def test_the_score_is_the_margin_times_the_share_of_epochs_outside() -> None:
    """The margin is 1 if the model is certain of another label, 0 if it is certain of the carried one, 0.5 for equal
    probabilities. It is multiplied by the share of epochs outside the clean pool, out of one more than the maximum inside."""
    own, rival = np.array([0.0, 1.0, 0.5, 0.1, 0.2]), np.array([1.0, 0.0, 0.5, 0.6, 0.3])
    e = evidence([9.0, 0.0, 3.0, 7.0, 6.0], [0, 9, 4, 1, 1], own_probability=own, rival_probability=rival)
    scores = e.scores()
    assert scores["score"].tolist() == pytest.approx([1, 0, 0.5 * 0.6, 0.75 * 0.9, 0.55 * 0.9])
    assert scores["margin"].tolist() == pytest.approx([1, 0, 0.5, 0.75, 0.55])
    assert scores["split_loss"].tolist() == [9, 0, 3, 7, 6]
    assert scores["epochs_outside_clean_pool"].tolist() == [0, -9, -4, -1, -1]
    assert e.confidence.tolist() == [1, 1, 0.5, 0.6, 0.3]


def test_the_order_is_that_of_the_scores() -> None:
    """The most suspect image comes first; ties are in the order of the data set."""
    assert suspects.order(np.array([0.1, 0.9, 0.5, 0.9, 0.1])).tolist() == [1, 3, 2, 0, 4]


# -- How good a ranking is ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(SCORED)
def test_auroc_counts_the_pairs_in_order(pairs: list[tuple[float, bool]]) -> None:
    """AUROC is the share of (poisoned, other) pairs in which the poisoned image scores higher, ties as half."""
    scores, positive = columns(pairs)
    found = suspects.auroc(scores, positive)
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in itertools.product(scores[positive].tolist(), scores[~positive].tolist())
    ]
    if not wins:
        assert found is None
    else:
        assert found == pytest.approx(math.fsum(wins) / len(wins), abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(FEW, st.booleans()), min_size=1, max_size=6), st.integers(0, 6))
def test_precision_and_recall_are_the_mean_over_all_orders_of_ties(pairs: list[tuple[float, bool]], count: int) -> None:
    """Precision and recall of the first k images are the means over every order of the ties."""
    count = min(count, len(pairs))
    scores, positive = columns(pairs)
    found = suspects.precision_recall_at(scores, positive, count)
    if count == 0 or not positive.any():
        assert found is None
        return
    legal = [
        order for order in itertools.permutations(range(len(pairs)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]  # fmt: skip
    hits = [sum(bool(positive[i]) for i in order[:count]) for order in legal]
    mean = math.fsum(hits) / len(hits)
    assert found == pytest.approx((mean / count, mean / positive.sum()), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(SCORED)
def test_average_precision_is_the_mean_precision_at_each_poisoned_image(pairs: list[tuple[float, bool]]) -> None:
    """Average precision is the mean, over the poisoned images, of the poisoned share among all images with an equal or
    higher score."""
    scores, positive = columns(pairs)
    found = suspects.average_precision(scores, positive)
    shares = []
    for score in scores[positive].tolist():
        as_high = [bool(flag) for other, flag in zip(scores.tolist(), positive.tolist(), strict=True) if other >= score]
        shares.append(sum(as_high) / len(as_high))
    if not shares:
        assert found is None
    else:
        assert found == pytest.approx(math.fsum(shares) / len(shares), abs=1e-12)


def test_quality_of_a_perfect_and_of_a_reversed_ranking() -> None:
    """suspects.json has the counts and each score separately: correct losses and reversed epochs give AUROC 1 and 0; cover
    images count neither as poisoned nor as clean, whatever their score."""
    flags = np.array([0, 1, 2, 0, 1, 0], np.uint8)
    found = suspects.quality(evidence([0.1, 5, 9.0, 0.3, 4, 0.4], [1, 9, 0, 1, 8, 1]), flags)
    assert found["counts"] == {"images": 6, "poisoned": 2, "cover": 1}
    for name in ("margin", "split_loss"):
        assert found["measures"][name].pop("precision_of_first_100") == pytest.approx(2 / 5)  # there are five images
        assert set(found["measures"][name].values()) == {1.0}, name
    outside = found["measures"]["epochs_outside_clean_pool"]
    assert outside["auroc"] == 0.0 and outside["precision_at_true_count"] == 0.0 == outside["recall_at_true_count"]
    assert outside["average_precision"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert json.loads(json.dumps(found)) == found


def test_the_first_hundred_are_those_that_score_highest() -> None:
    """Of 200 images, the 100 with the highest scores include 30 of the 50 poisoned ones."""
    flags = np.zeros(200, np.uint8)
    flags[:30], flags[150:170] = 1, 1
    losses = np.linspace(9, 1, 200).tolist()
    found = suspects.quality(evidence(losses, [1] * 200), flags)["measures"]["split_loss"]
    assert found["precision_of_first_100"] == pytest.approx(0.3)


@pytest.mark.parametrize("flag", [0, 1])
def test_quality_without_both_kinds_is_null(flag: int) -> None:
    """If no or every image is poisoned, AUROC is null, and the line states that the ranking cannot be judged."""
    found = suspects.quality(evidence([1, 2], [0, 1]), np.full(2, flag, np.uint8))
    assert found["measures"]["score"]["auroc"] is None
    assert f"{2 * flag} of 2 images are poisoned" in suspects.quality_line(found)


def test_the_line_has_auroc_and_precision() -> None:
    """The log line has the AUROC and the precision at the number of poisoned images."""
    found = suspects.quality(evidence([3, 1, 2, 0], [0, 0, 0, 0]), np.array([1, 1, 0, 0], np.uint8))
    line = suspects.quality_line(found)
    assert "AUROC 0.7500" in line and "of the first 2 images 50.0 % are poisoned" in line and "\n" not in line


# -- The files ---------------------------------------------------------------------------------------------------------


def read(text: str) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    return list(csv.DictReader(io.StringIO(text)))


def test_the_table_has_every_image_with_its_own_facts() -> None:
    """suspects.csv has each image once, by decreasing score, with its name, its label, the predicted one, and its own
    numbers."""
    e = evidence([0.5, 7.25, 0.001, 3.0], [4, 0, 9, 1])
    names = ["cat/1.png", 'dog/a "b", c.png', "cat/2.png", "bird/x.png"]
    rows = read(suspects.table(e, names, ("cat", "dog")))
    assert [row["name"] for row in rows] == [names[i] for i in (1, 3, 0, 2)]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    expected = [(1 - math.exp(-x)) * (1 - inside / 10) for x, inside in ((7.25, 0), (3.0, 1), (0.5, 4), (0.001, 9))]
    assert [float(row["score"]) for row in rows] == pytest.approx(expected, abs=1e-6)
    for row, i in zip(rows, (1, 3, 0, 2), strict=True):
        assert row["label"] == ["cat", "dog", "2", "cat"][i] and row["model_label"] == ["dog", "2", "cat", "dog"][i]
        assert float(row["split_loss"]) == pytest.approx(e.losses[i], rel=1e-5)
        assert float(row["confidence"]) == pytest.approx(e.confidence[i], abs=1e-4)
        assert int(row["epochs_in_clean_pool"]) == e.epochs[i]


def test_a_carriage_return_in_a_name_shifts_no_column() -> None:
    """A file may have any name: the table still has one row for each image."""
    text = suspects.table(evidence([1.0, 2.0], [0, 0]), ["cat/a\rb.png", "cat/c\nd.png"], ("cat", "dog", "bird"))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len(rows) == 3 and {row[1] for row in rows[1:]} == {"cat/a\rb.png", "cat/c\nd.png"}


def test_images_without_names_have_numbers(tmp_path: Path) -> None:
    """Images without file names have numbers; a file name that is not UTF-8 keeps its bytes."""
    e = evidence([0.5, 7.25], [4, 0])
    assert [row["name"] for row in read(suspects.table(e, None, ()))] == ["1", "0"]
    suspects.write_table(tmp_path / "s.csv", e, ["a/\udcff.png", "b"], ())
    assert b"a/\xff.png" in (tmp_path / "s.csv").read_bytes()


def test_captions_name_the_label_and_the_models() -> None:
    """The caption of an image has its label and the predicted one."""
    e = evidence([1, 2, 3, 4], [0, 0, 0, 0])
    assert suspects.captions(e, np.array([2, 0]), ("cat", "dog", "frog")) == ["frog \u2192 cat", "cat \u2192 dog"]


@pytest.mark.parametrize(("count", "shape"), [(1, (32, 32)), (100, (32, 32)), (13, (20, 44))])
def test_the_sheet_shows_every_image(tmp_path: Path, count: int, shape: tuple[int, int]) -> None:
    """suspects.png shows each image completely, in its own colors, with any caption."""
    images = np.zeros((count, *shape, 3), np.uint8)
    images[:, :, :, 0] = 200  # one red no caption has
    captions = ["$a_1$ \u2192 a very long name of a class that no place has", "plain"] * count
    plots.draw_suspects(tmp_path / "s.png", images, captions[:count], "run $x: the most suspect")
    with Image.open(tmp_path / "s.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = abs(pixels - (200, 0, 0)).sum(2) < 20
    starts = red & ~np.roll(red, 1, 1)
    assert red.sum() > count * 500
    rows = [row for row in range(red.shape[0]) if red[row].any()]
    bands = 1 + sum(b - a > 1 for a, b in itertools.pairwise(rows))
    assert bands == -(-count // 10)
    assert starts[rows[20]].sum() == min(count, 10)  # below the blurred edge
    assert set(starts[rows[2] : rows[20]].sum(1)) == {min(count, 10)}, "the title lies on the images"
