"""The confusion matrices of the test images, accuracy and ASR per class, and their JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.reporting import confusion, plots

CLASSES = 4
PAIRS = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), max_size=25)


def matrix_of(pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Return the matrix of (true, predicted) pairs."""
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return confusion.confusion_matrix(table[:, 0], table[:, 1], CLASSES)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_the_matrix_counts_each_image_once(pairs: list[tuple[int, int]]) -> None:
    """Rows are true classes, columns predicted ones. The accuracy of a class is its share on the diagonal, null without
    images; the mean over the images is the ACC."""
    counts = [[0] * CLASSES for _ in range(CLASSES)]
    for true, predicted in pairs:
        counts[true][predicted] += 1
    matrix = matrix_of(pairs)
    assert matrix.tolist() == counts and matrix.dtype == torch.int64
    found = confusion.per_class_accuracy(matrix)
    for label, share in enumerate(found):
        own = [predicted == label for true, predicted in pairs if true == label]
        assert share == (sum(own) / len(own) if own else None)
    hits = sum((share or 0) * sum(row) for share, row in zip(found, counts, strict=True))
    assert hits == pytest.approx(sum(true == predicted for true, predicted in pairs))


def test_a_class_that_is_never_predicted() -> None:
    """The column of such a class is zero and its accuracy 0, not null."""
    matrix = matrix_of([(0, 1), (1, 1), (0, 1)])
    assert matrix[:, 0].tolist() == [0] * CLASSES
    assert confusion.per_class_accuracy(matrix) == [0.0, 1.0, None, None]


def test_the_figures_of_triggered_images() -> None:
    """The ASR of a class is its share of the images that get the attacker's label, null for a class without triggered images
    and null as a whole without an attack."""
    clean, triggered = matrix_of([(0, 0), (1, 1), (2, 3)]), matrix_of([(0, 1), (0, 0), (2, 1)])
    found = confusion.figures(confusion.ByClass(clean, triggered, torch.tensor([1, 0, 1, 0])))
    assert found["per_class_attack_success_rate"] == [0.5, None, 1.0, None]
    assert found["triggered_confusion"] == triggered.tolist() and found["confusion"] == clean.tolist()
    found = confusion.figures(confusion.ByClass(clean))
    assert found["per_class_attack_success_rate"] is None is found["triggered_confusion"]
    assert found["per_class_accuracy"] == [1.0, 1.0, 0.0, None]


@settings(deadline=None, max_examples=60)
@given(PAIRS, st.lists(st.text(max_size=12), max_size=CLASSES))
def test_the_json_has_a_row_of_the_matrix_a_line(pairs: list[tuple[int, int]], names: list[str]) -> None:
    """All values, also hostile names, are read back unchanged; each row of the matrix is one line."""
    matrix = matrix_of(pairs)
    found = confusion.ByClass(matrix, 2 * matrix, matrix[:, 1])
    values = {"class_names": names, "epoch": 3, **confusion.figures(found)}
    text = confusion.to_json(values)
    assert json.loads(text) == values
    for row in matrix.tolist() + (2 * matrix).tolist():
        assert any(line.strip(" ,") == json.dumps(row) for line in text.splitlines())


@pytest.mark.parametrize("name", ["[\n 1,\n 2]", "[1,2]", '"[\\n1]'])
def test_a_name_that_looks_like_a_row_stays_as_it_is(name: str) -> None:
    """The line layout of the JSON file does not change any string in it."""
    assert json.loads(confusion.to_json({"class_names": [name]})) == {"class_names": [name]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 10, 43, 200])
@pytest.mark.parametrize("filled", [True, False])
def test_the_plot_fits_any_number_of_classes(tmp_path: Path, classes: int, filled: bool) -> None:
    """confusion.png is drawn without warnings for few and many classes, for hostile and missing names and for an empty
    matrix; errors are visible."""
    matrix = (np.eye(classes, dtype=np.int64) * 100) * filled
    names = ["$x_1$", "<b>\udce9" + "a very long name" * 9][: classes - 1]
    plots.draw_confusion(tmp_path / "c.png", matrix, names, "run $x: clean test images")
    matrix[0, classes - 1] += 3
    plots.draw_confusion(tmp_path / "other.png", matrix, names, "run $x: clean test images")
    with Image.open(tmp_path / "c.png") as one, Image.open(tmp_path / "other.png") as other:
        assert one.format == "PNG" and min(one.size) >= 300 and max(one.size) <= 1400
        assert one.size == other.size and (np.asarray(one) != np.asarray(other)).any()
