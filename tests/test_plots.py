"""What the plots show, read from the artists of each figure: curves, bars, cells and points against the given numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from training import metrics_row

from utils.reporting import plots
from utils.reporting.confusion import ByClass
from utils.reporting.projection import principal_components
from utils.reporting.report import Report, Subject


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[list[Axes]]:
    """The axes of each figure that the test draws, row by row."""
    seen: list[list[Axes]] = []
    drawing = plots.drawing

    @contextlib.contextmanager
    def kept(*args: Any, **options: Any) -> Iterator[tuple[Any, np.ndarray]]:
        with drawing(*args, **options) as (figure, axes):
            seen.append(list(axes.flat))
            yield figure, axes

    monkeypatch.setattr(plots, "drawing", kept)
    return seen


def history(count: int) -> list[dict[str, Any]]:
    """Rows of a run, with no two figures equal and a change of the stage after the second epoch."""
    return [
        metrics_row(
            e, stage="class-aware" if e < 2 else "meta-split", clean_accuracy=0.5 + 0.07 * e, attack_success_rate=0.9 - 0.1 * e,
            robust_accuracy=0.31 + 0.01 * e,
            clean_pool_size=40 + 5 * e, poisoned_in_clean_pool=1 + e, cover_in_clean_pool=9 - e,
        )
        for e in range(count)
    ]  # fmt: skip


def curves(axes: Axes) -> dict[str, tuple[Any, ...]]:
    """The beginning of each curve's label -> x, y, color."""
    return {
        str(line.get_label()).split(",")[0]: (list(line.get_xdata()), list(line.get_ydata()), to_hex(line.get_color()))  # type: ignore[call-overload,arg-type]
        for line in axes.get_lines()
    }


def test_the_curves_of_accuracy(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """ACC is blue and ASR red, in % by the epoch counted from 1; the legend has their last values."""
    rows = history(4)
    plots.draw_accuracy(tmp_path / "a.png", rows, "a title")
    ((axes,),) = panels
    found = curves(axes)
    assert found["ACC"] == ([1, 2, 3, 4], pytest.approx([50, 57, 64, 71]), plots.CLEAN_COLOR)
    assert found["ASR"] == ([1, 2, 3, 4], pytest.approx([90, 80, 70, 60]), plots.POISONED_COLOR)
    labels = axes.get_legend_handles_labels()[1]
    assert [label.partition(", ")[2] for label in labels] == ["at the end 71.0 %", "at the end 60.0 %"]
    assert [text.get_text() for text in axes.texts] == ["class-aware", "meta-split"]
    assert [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches] == [(0.5, 2.5), (2.5, 4.5)]  # type: ignore[attr-defined]


def test_the_curves_of_purity(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """The poisoned and the cover images as shares of the pool of their own epoch, and the poisoned share of the whole set."""
    rows = history(3)
    plots.draw_purity(tmp_path / "p.png", rows, 0.05, "a title")
    found = curves(panels[0][0])
    for kind in ("poisoned", "cover"):
        expected = [100 * row[f"{kind}_in_clean_pool"] / row["clean_pool_size"] for row in rows]
        assert found[f"{kind} in the clean pool"] == ([1, 2, 3], pytest.approx(expected), plots.COLORS[kind])
    assert found["poisoned in the whole training set"][1] == pytest.approx([5, 5])
    assert panels[0][0].get_ylim()[1] > max(max(found[key][1]) for key in found)


def test_the_bars_of_losses(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """Each kind's bars add up to 100 %, lie at its values, and the legend has its count and its share inside the pool."""
    flags = np.repeat([0, 1, 2], [30, 20, 10]).astype(np.uint8)
    values = (np.random.default_rng(3).random(60) + 2 * flags).astype(np.float32)
    pool = np.array([*range(24), 30, 31, 32, 50])
    plots.draw_losses(tmp_path / "l.png", plots.Split(values, flags, pool), "split loss", "a title")
    axes = panels[0][0]
    assert axes.get_legend_handles_labels()[1] == [
        "clean images (30; 80.0 % in the clean pool)", "poisoned images (20; 15.0 % in the clean pool)",
        "cover images (10; 10.0 % in the clean pool)",
    ]  # fmt: skip
    for flag, bars in enumerate(axes.containers):
        assert to_hex(bars[0].get_facecolor()) == list(plots.COLORS.values())[flag]
        filled = [bar for bar in bars if bar.get_height() > 0]
        assert sum(bar.get_height() for bar in filled) == pytest.approx(100)
        low, high = filled[0].get_x(), filled[-1].get_x() + filled[-1].get_width()
        assert low <= values[flags == flag].min() + 1e-6 and high >= values[flags == flag].max() - 1e-6
    assert axes.get_xlabel() == "split loss"


def test_the_cells_of_the_confusion_matrix(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """The cell of row i and column j has the images of class i that are predicted as j, colored by their share of class i."""
    matrix = np.random.default_rng(3).integers(0, 90, (3, 3))
    matrix[2] *= 7
    plots.draw_confusion(tmp_path / "c.png", matrix, ["cat", "dog", "bird"], "a title")
    axes = panels[0][0]
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert shown == {cell: str(count) for cell, count in np.ndenumerate(matrix)}
    colored = np.asarray(axes.images[0].get_array())
    assert colored == pytest.approx(100 * matrix / matrix.sum(1)[:, None])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "bird"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "bird"]


def test_the_points_of_features(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """One panel colors the images by the ground truth, the other by the pool of the last split."""
    features = torch.from_numpy(np.random.default_rng(3).normal(size=(40, 6))).float()
    flags, pool = torch.arange(40) % 4 == 0, torch.arange(0, 40, 3)
    subject = Subject(None, ("a",), None, flags.to(torch.uint8), np.zeros((2, 0, 2, 2, 3), np.uint8), "")
    folder = SimpleNamespace(log=tmp_path, saved=tmp_path, name="r")
    config: Any = SimpleNamespace(defense=SimpleNamespace(name="asd"))
    report = Report(folder, config, subject, 0)  # type: ignore[arg-type]
    report.draw_features(SimpleNamespace(clean_pool=pool), features)  # type: ignore[arg-type]
    report.close()
    plane = principal_components(features)[0].numpy()
    inside = np.isin(np.arange(40), pool)
    expected = [
        {"clean (30)": ~flags.numpy(), "poisoned (10)": flags.numpy()},
        {f"clean pool ({inside.sum()})": inside, f"polluted pool ({(~inside).sum()})": ~inside},
    ]
    assert [axes.get_title() for axes in panels[0]] == ["ground truth", "last split"]
    for axes, groups in zip(panels[0], expected, strict=True):
        found = {str(points.get_label()): np.asarray(points.get_offsets()) for points in axes.collections}
        assert found.keys() == groups.keys()
        for label, which in groups.items():
            assert found[label] == pytest.approx(plane[which])


def test_the_curves_of_a_comparison(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """Each group has its own panel, each of its runs one curve of ACC and one of ASR."""
    one, two, other = history(2), history(3), history(4)
    plots.draw_comparison(tmp_path / "c.png", [("ASD", [one, two]), ("no defense", [other])])
    assert [axes.get_title() for axes in panels[0]] == ["ASD", "no defense"]
    for axes, runs in zip(panels[0], ([one, two], [other]), strict=True):
        lines = axes.get_lines()
        assert len(lines) == 2 * len(runs)
        for i, run in enumerate(runs):
            for line, key, color in zip(
                lines[2 * i : 2 * i + 2], ("clean_accuracy", "attack_success_rate"), (plots.CLEAN_COLOR, plots.POISONED_COLOR),
                strict=True,
            ):  # fmt: skip
                assert np.asarray(line.get_xdata()).tolist() == [row["epoch"] + 1 for row in run]
                assert np.asarray(line.get_ydata()) == pytest.approx([100 * row[key] for row in run])
                assert to_hex(line.get_color()) == color
    assert [text.get_text() for text in panels[0][0].get_legend().get_texts()] == [  # type: ignore[union-attr]
        "clean accuracy (ACC)", "attack success rate (ASR)",
    ]  # fmt: skip


def test_each_matrix_has_its_own_plot(tmp_path: Path, panels: list[list[Axes]]) -> None:
    """confusion.png is that of the clean test images, triggered_confusion.png that of the triggered ones."""
    clean, triggered = torch.tensor([[5, 1], [2, 6]]), torch.tensor([[0, 7], [8, 3]])
    subject = Subject(None, ("a", "b"), None, None, np.zeros((2, 0, 2, 2, 3), np.uint8), "")
    config: Any = SimpleNamespace(defense=SimpleNamespace(name="asd"))
    report = Report(SimpleNamespace(log=tmp_path, saved=tmp_path, name="r"), config, subject, 0)  # type: ignore[arg-type]
    report.keep_confusion(ByClass(clean, triggered, triggered[:, 1]), 0)
    report.close()
    shown = [[text.get_text() for text in axes.texts] for (axes,) in panels]
    assert shown == [["5", "1", "2", "6"], ["0", "7", "8", "3"]]
    assert {path.name for path in tmp_path.glob("*confusion.png")} == set(plots.CONFUSIONS)
