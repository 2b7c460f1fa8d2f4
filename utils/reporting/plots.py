"""The plots of a run, in `log/`: metrics by epoch, loss histograms, triggered images.

matplotlib is imported with the first plot: that takes a second, and runs continue if it is missing or broken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from utils.files import write_atomically
from utils.kinds import KINDS
from utils.reporting.best_effort import BestEffort
from utils.reporting.confusion import ByClass
from utils.reporting.projection import principal_components

CLEAN_COLOR, POISONED_COLOR, COVER_COLOR = "#2a6f97", "#c1121f", "#e09f3e"
COLORS = {"clean": CLEAN_COLOR, "poisoned": POISONED_COLOR, "cover": COVER_COLOR, "polluted pool": "#8e5ea2"}
FEATURES = "features.png"
CONFUSIONS = ("confusion.png", "triggered_confusion.png")  # of the clean and of the triggered test images
STAGE_SHADES = ("#f4f1de", "#e0ecf4", "#e8f3e8", "#f3e8f1")  # of the first, second, ... stage


def draw_accuracy(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Plot ACC and ASR, in %, by epoch, with the stages as background shades."""
    with drawing(path, (7, 4)) as (_, ((axes,),)):
        shade_stages(axes, history)
        epochs = [row["epoch"] + 1 for row in history]
        acc = [100 * row["clean_accuracy"] for row in history]
        axes.plot(epochs, acc, "o-", ms=3, color=CLEAN_COLOR, label=f"ACC, at the end {acc[-1]:.1f} %")
        if history[-1]["attack_success_rate"] is not None:  # None: the attack is unknown
            asr = [100 * row["attack_success_rate"] for row in history]
            axes.plot(epochs, asr, "s-", ms=3, color=POISONED_COLOR, label=f"ASR, at the end {asr[-1]:.1f} %")
        axes.set(xlabel="epoch", ylabel="%", ylim=(-3, 103), title=title)
        finish(axes)


def draw_purity(path: Path, history: list[dict[str, Any]], poison_share: float, title: str) -> None:
    """Plot the share of poisoned (and cover) images in the clean pool by epoch, and that of poisoned ones in the whole set."""
    with drawing(path, (7, 4)) as (_, ((axes,),)):
        shade_stages(axes, history)
        history = [row for row in history if row["clean_pool_size"]]
        epochs = [row["epoch"] + 1 for row in history]
        most = 100 * poison_share
        for kind in ("poisoned", "cover"):
            if f"{kind}_in_clean_pool" in history[-1]:
                share = [100 * row[f"{kind}_in_clean_pool"] / row["clean_pool_size"] for row in history]
                axes.plot(epochs, share, "s-", ms=3, color=COLORS[kind], label=f"{kind} in the clean pool")
                most = max(most, *share)
        axes.axhline(100 * poison_share, ls="--", lw=1, color="grey", label="poisoned in the whole training set")
        axes.set(xlabel="epoch", ylabel="% of the pool", title=title)
        axes.set_ylim(0, most * 1.15 + 0.1)
        finish(axes)


class Split(NamedTuple):
    """One split of the training set."""

    values: np.ndarray  # (N,) what the images are ranked by
    flags: np.ndarray | None  # (N,) uint8 ground truth, see `utils/kinds.py`; None: unknown
    clean_pool: np.ndarray  # (P,) indices


def draw_losses(path: Path, split: Split, label: str, title: str) -> None:
    """Plot histograms of the values that an epoch was split by, for clean, poisoned and cover images.

    Args:
        label: what the values are.
    """
    values, flags = split.values, split.flags
    inside = np.zeros(len(values), bool)
    inside[split.clean_pool] = True
    with drawing(path, (7, 4)) as (_, ((axes,),)):
        bins = np.linspace(values.min(), values.max() + 1e-9, 60)
        kinds = {"training": np.ones(len(values), bool)}
        if flags is not None:
            kinds = {kind: flags == flag for kind, flag in KINDS.items()}
        for name, which in kinds.items():
            if which.any():
                share = 100 * inside[which].mean()
                weights = np.full(which.sum(), 100 / which.sum())
                text = f"{name} images ({which.sum()}; {share:.1f} % in the clean pool)"
                color = COLORS.get(name, CLEAN_COLOR)
                axes.hist(values[which], bins.tolist(), weights=weights, alpha=0.65, color=color, label=text)
        axes.set(xlabel=label, ylabel="% of each kind of images", yscale="log", title=title)
        name_powers(axes.yaxis)
        finish(axes)


def draw_triggered(path: Path, examples: np.ndarray, title: str) -> None:
    """Draw a contact sheet of (2, n, H, W, 3) uint8: each image before and after the attack, and 10 x the difference."""
    before, after = examples[:, :8].astype(int)
    rows = [before, after, np.clip(abs(after - before) * 10, 0, 255)]
    n = before.shape[0]
    with drawing(path, (1.15 * n + 0.9, 4.1), 3, n) as (figure, axes):
        for row, (name, images) in enumerate(zip(("original", "triggered", "change x 10"), rows, strict=True)):
            for column in range(n):
                axes[row][column].imshow(images[column].astype(np.uint8), interpolation="nearest")
                axes[row][column].set(xticks=[], yticks=[])
            axes[row][0].set_ylabel(name)
        figure.suptitle(title)


def draw_suspects(path: Path, images: np.ndarray, captions: list[str], title: str) -> None:
    """Draw a contact sheet of (n, H, W, 3) uint8, ten images in a row, each with its caption below."""
    n, height, width = images.shape[:3]
    rows, tall = -(-n // 10), height / width  # heights relative to the width of an image
    step = tall + 0.25
    inches = 1.1 * rows * step + 0.4
    with drawing(path, (12, inches)) as (figure, ((axes,),)):
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, y = 1.1 * (i % 10), step * (i // 10)
            axes.imshow(image, extent=(x, x + 1, y + tall, y))
            short = caption if len(caption) <= 21 else caption[:20] + "\u2026"
            axes.text(x + 0.5, y + tall + 0.04, short, ha="center", va="top", fontsize=6)
        axes.set(xlim=(0, 10.9), ylim=(rows * step, 0))
        axes.axis("off")
        figure.suptitle(title, y=1 - 0.1 / inches, va="top", fontsize=9)


def draw_confusion(path: Path, matrix: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draw the confusion matrix (C, C) of counts (row: true class, column: predicted class) as shares of the row.

    The color scale is a square root, so that rare errors are visible. The counts are shown for up to 12 classes, the class
    names for up to 50.
    """
    n = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    names = [escape(class_names[i]) if i < len(class_names) else str(i) for i in range(n)]  # `drawing` does not see tick labels
    short = [name if len(name) <= 14 else name[:13] + "\u2026" for name in names]
    side = min(max(3.0 + 0.42 * n, 5.0), 9.5)
    with drawing(path, (side + 0.8, side)) as (figure, ((axes,),)):
        from matplotlib.colors import PowerNorm

        image = axes.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        figure.colorbar(image, ax=axes, shrink=0.8, label="% of the class")
        if n <= 12:
            for (row, column), count in np.ndenumerate(matrix):
                color = "white" if shares[row, column] > 0.3 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
        size = 9 if n <= 12 else 8 if n <= 30 else 6
        if n <= 50:
            axes.set_xticks(range(n), short, rotation=90, fontsize=size)
            axes.set_yticks(range(n), short, fontsize=size)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(wrapped(title, side), fontsize=9)


def plot_confusions(
    best_effort: BestEffort, paths: Sequence[Path], by_class: ByClass, class_names: Sequence[str], title: str
) -> list[Path]:
    """Draw the confusion matrices that there are, and return the files that could be drawn.

    Args:
        paths: that of the clean and that of the triggered test images.
        title: what was tested.
    """
    drawn = []
    for path, kind, matrix in zip(paths, ("clean", "triggered"), by_class[:2], strict=True):
        if matrix is not None:
            line = f"{title}: {kind} test images"
            if best_effort.attempt(str(path), draw_confusion, path, matrix.numpy(), class_names, line):
                drawn.append(path)
    return drawn


def draw_features(path: Path, features: Tensor, groups: dict[str, dict[str, np.ndarray]], title: str) -> None:
    """Plot features (N, D) on the plane of their first two principal components, one panel for each grouping.

    Args:
        groups: title of a panel -> name of a group -> its points, (N,) bool; empty: one panel with one group.
    """
    plane, shares = (values.numpy() for values in principal_components(features))  # (N, 2), (2,)
    groups = groups or {"training images": {"all": np.ones(len(plane), bool)}}
    with drawing(path, (5.4 * len(groups) + 0.4, 5), 1, len(groups)) as (figure, panels):
        for axes, (name, parts) in zip(panels[0], groups.items(), strict=True):
            for part, which in parts.items():
                if which.any():
                    color = COLORS.get(part, CLEAN_COLOR)
                    text = f"{part} ({which.sum()})"
                    axes.scatter(*plane[which].T, s=5, alpha=0.5, linewidths=0, color=color, label=text)
            axes.set(xlabel=f"component 1 ({100 * shares[0]:.0f} % of the variance)", title=name)
            axes.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)")
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, markerscale=3, loc="upper right")  # `best` takes seconds for so many points
        figure.suptitle(wrapped(f"{title}: penultimate features", 5.4 * len(groups)), fontsize=10)


def draw_comparison(path: Path, groups: list[tuple[str, list[list[dict[str, Any]]]]]) -> None:
    """Plot ACC and ASR, in %, by epoch: one panel for each titled group of runs, one line for the history of each run."""
    with drawing(path, (5 * len(groups), 3.8), 1, len(groups), sharey=True) as (_, panels):
        lines: dict[str, Any] = {}
        for axes, (title, histories) in zip(panels[0], groups, strict=True):
            for history in histories:
                epochs = [row["epoch"] + 1 for row in history]
                for key, color, name in (
                    ("clean_accuracy", CLEAN_COLOR, "clean accuracy (ACC)"),
                    ("attack_success_rate", POISONED_COLOR, "attack success rate (ASR)"),
                ):
                    if history[-1][key] is not None:  # None: no images to test on
                        values = [100 * row[key] for row in history]
                        (lines[name],) = axes.plot(epochs, values, "o-", ms=3, lw=1.2, alpha=0.8, color=color)
            axes.set_title(wrapped(title, 4.5), fontsize=10)
            axes.set(xlabel="epoch", ylim=(-3, 103))
            axes.grid(alpha=0.25)
        panels[0][0].set_ylabel("%")
        panels[0][0].legend(lines.values(), lines, fontsize=8)


def wrapped(title: str, width: float) -> str:
    """Return a title in lines that fit into `width` inches. matplotlib's own wrapping reads `$` as the start of a formula."""
    return "\n".join(textwrap.wrap(title, max(20, round(13 * width)), break_on_hyphens=False))


def shade_stages(axes: Any, history: list[dict[str, Any]]) -> None:
    """Shade the background by stage, with the name of each stage; a run with a single stage needs neither."""
    names, start = list(dict.fromkeys(row["stage"] for row in history)), 0
    for i, row in enumerate(history):
        last = i + 1 == len(history) or history[i + 1]["stage"] != row["stage"]
        if last and len(names) > 1:
            low, high = history[start]["epoch"] + 0.5, row["epoch"] + 1.5
            axes.axvspan(low, high, color=STAGE_SHADES[names.index(row["stage"]) % len(STAGE_SHADES)], zorder=0)
            place = axes.get_xaxis_transform()
            axes.text((low + high) / 2, 1.0, row["stage"], ha="center", va="bottom", fontsize=7, transform=place)
            start = i + 1
    axes.set_xlim(history[0]["epoch"] + 0.5, history[-1]["epoch"] + 1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def name_powers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers; matplotlib's labels are formulas, which `drawing` turns off."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def finish(axes: Any) -> None:
    """Add legend and grid, and space for the names of the stages below the title."""
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)
    axes.set_title(axes.get_title(), pad=14, fontsize=10)


@contextlib.contextmanager
def drawing(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield a figure of `size` inches and its axes (rows, columns); write it at the end of the block.

    The suffix of the file gives its format (PNG, PDF, SVG and others); PNG if it is unknown.

    A user's settings of matplotlib (`MPLBACKEND`, a `matplotlibrc` with LaTeX) have no effect. Text is drawn literally: class
    names may contain `$` or undecodable bytes.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns about the user's matplotlibrc
    backend = os.environ.pop("MPLBACKEND", None)  # matplotlib refuses to be imported with one that is not installed
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.text import Text
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        figure = Figure(size, layout="tight")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        for text in figure.findobj(Text):
            text.set_text(escape(text.get_text()))
        form = path.suffix[1:].lower()
        form = form if form in figure.canvas.get_supported_filetypes() else "png"
        write_atomically(path, lambda file: figure.savefig(file, format=form, dpi=110))


def escape(text: str) -> str:
    """Return the text with escapes such as `\\udce9` for undecodable bytes, e.g. of file names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
