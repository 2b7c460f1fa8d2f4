"""The reports of a run: log lines, metrics.jsonl, TensorBoard, plots."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from training import metrics_row

from utils import config
from utils.logs import Screen
from utils.reporting import page, plots, runlog
from utils.reporting.confusion import ByClass
from utils.reporting.report import Report, Subject
from utils.reporting.runlog import RunLog, add_finish, add_losses, add_row, add_start, epoch_line, progress, write_metrics
from utils.reporting.suspects import Evidence

STAGES = ("class-aware", "class-agnostic", "meta-split")


def rows(count: int, defense: str = "asd") -> list[dict[str, Any]]:
    """Return the history of a run of so many epochs."""
    asd = defense == "asd"
    out = []
    for e in range(count):
        figures = {"clean_accuracy": 0.9341 - 0.01 * e, "attack_success_rate": 0.0118 + 0.02 * e, "loss": 1.25 + e}
        pools = {"clean_pool_size": 100 + e, "polluted_pool_size": 900 - e, "poisoned_in_clean_pool": e}
        losses = {"loss_x": 0.75 + e, "loss_u": 0.125, "lambda_u": 4.0}
        split = pools | losses | dict.fromkeys(("split_tpr", "split_fpr"))
        stage = STAGES[min(e // 2, 2)] if asd else "undefended"
        own = split if asd else dict.fromkeys(split)
        out.append(metrics_row(e, defense=defense, stage=stage, seconds=12.5, **figures, **own))
    return out


def test_metrics_are_the_history(tmp_path: Path) -> None:
    """metrics.jsonl is one JSON object per epoch, exactly equal to the history."""
    history = rows(3)
    history[1]["loss"] = 1 / 3
    write_metrics(tmp_path, history)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == history
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")


def test_metrics_are_rewritten_whole(tmp_path: Path) -> None:
    """Rows that a killed run has written after its last checkpoint are removed, and so is an incomplete line."""
    write_metrics(tmp_path, rows(5))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "cle')
    write_metrics(tmp_path, rows(3))
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    write_metrics(tmp_path, [])
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_line_of_an_epoch_of_asd() -> None:
    """The line has the stage, both figures, the pools with their poisoned images, the losses and the seconds."""
    line = epoch_line(rows(3)[2], 120)
    for part in ("epoch   3/120", "class-agnostic", "ACC  91.41 %", "ASR   5.18 %", "clean pool 102 (2 poisoned)"):
        assert part in line
    for part in ("polluted 898", "loss 3.2500", "Lx 2.7500", "lambda_u 4.00", "Lu 0.12500", "12.5 s"):
        assert part in line
    assert "\n" not in line and "None" not in line


def test_the_line_of_an_epoch_counts_cover_images() -> None:
    """The line has the cover images in the clean pool if the set has any, even if the pool has none."""
    row = rows(3)[2]
    assert "clean pool 102 (2 poisoned, 7 cover)" in epoch_line(row | {"cover_in_clean_pool": 7}, 120)
    assert "clean pool 102 (2 poisoned, 0 cover)" in epoch_line(row | {"cover_in_clean_pool": 0}, 120)
    assert "cover" not in epoch_line(row, 120)
    unknown = epoch_line(row | {"poisoned_in_clean_pool": None}, 120)
    assert "clean pool 102, polluted 898" in unknown and "None" not in unknown


def test_the_line_of_an_epoch_without_defense() -> None:
    """Without ASD the line has no pools, and no None."""
    line = epoch_line(rows(1, "none")[0], 12)
    for part in ("epoch   1/12", "undefended", "ACC  93.41 %", "ASR   1.18 %", "loss 1.2500", "12.5 s"):
        assert part in line
    assert "pool" not in line and "None" not in line and "\n" not in line


@pytest.mark.parametrize(("share", "text"), [(0.0, "  0.00 %"), (1.0, "100.00 %"), (0.93414, " 93.41 %")])
def test_percent_has_one_width(share: float, text: str) -> None:
    """Percentages of any size are aligned."""
    assert runlog.percent(share) == text


@pytest.mark.parametrize("total", [0, 1, 7])
def test_a_bar_passes_every_item_on(total: int) -> None:
    """A progress bar changes neither the items nor their order."""
    assert list(progress(range(total), "test", total)) == list(range(total))
    assert list(progress(iter("abc"), "test", 3)) == ["a", "b", "c"]


def test_without_a_terminal_progress_is_a_line_each_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """In a file there is nothing of a short loop, and of a long one whole lines without control characters; a message in
    between is a line of its own."""
    handler = Screen()
    list(progress(range(3), "short", 3))
    bar: Any = progress(range(4), "long", 4)
    bar.delay, bar.mininterval = 0, 0
    for i in bar:
        handler.emit(logging.makeLogRecord({"msg": f"message {i}"}))
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"message {i}" for i in range(4)]
    assert err and all(line.startswith("long: ") and line.isprintable() for line in err.splitlines())


def read_board(folder: Path) -> EventAccumulator:
    """Return TensorBoard's own reader of a folder."""
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    board.Reload()
    return board


def test_tensorboard_shows_the_run(tmp_path: Path, said: list[str]) -> None:
    """TensorBoard has each number of each epoch, a histogram of each kind, the poisoned images and the hyperparameters."""
    history = rows(3)
    split = torch.tensor([0.0, 1, 2, 3, 10, 11])
    flags = torch.tensor([0, 0, 2, 0, 1, 1])
    poisoned = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    log = RunLog(tmp_path, 0)
    log.to_board(add_start, "num_epochs: 3\n", poisoned)
    for e in range(3):
        log.to_board(add_losses, split + e, flags, e)
        log.to_board(add_row, history[e])
        log.epoch(history[: e + 1], 3)
    log.to_board(
        add_finish, {"seed.seed": 7, "optimizer.Adam.lr": 0.5, "run": "tiny", "betas": [0.9, 0.999], "limit": None}, history[-1]
    )
    log.close()

    board = read_board(tmp_path / "tensorboard")
    names = ["clean_accuracy", "attack_success_rate", "clean_pool_size", "poisoned_in_clean_pool", "loss", "loss_x", "loss_u"]
    for name in [*names, "lambda_u", "learning_rate", "seconds"]:
        assert [(s.step, s.value) for s in board.Scalars(name)] == [(r["epoch"], pytest.approx(r[name])) for r in history]
    for e in range(3):
        clean, bad = board.Histograms("split_loss/clean")[e], board.Histograms("split_loss/poisoned")[e]
        cover = board.Histograms("split_loss/cover")[e]
        assert (cover.step, cover.histogram_value.num, cover.histogram_value.min) == (e, 1, 2 + e)
        assert (clean.step, clean.histogram_value.num, clean.histogram_value.min, clean.histogram_value.max) == (e, 3, e, 3 + e)
        assert (bad.histogram_value.num, bad.histogram_value.min, bad.histogram_value.max) == (2, 10 + e, 11 + e)
        assert bad.histogram_value.sum == 21 + 2 * e
    (image,) = board.Images("poisoned")
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.width >= 32 and image.height >= 32
    (text,) = board.Tensors("config/text_summary")
    assert "num_epochs: 3" in tensor_util.make_ndarray(text.tensor_proto)[0].decode()
    start = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for part in (b"optimizer.Adam.lr", b"seed.seed", b"tiny", b"[0.9, 0.999]"):
        assert part in start
    assert board.Scalars("final/clean_accuracy")[0].value == pytest.approx(history[-1]["clean_accuracy"])
    assert board.Scalars("final/attack_success_rate")[0].value == pytest.approx(history[-1]["attack_success_rate"])

    lines = [epoch_line(row, 3) for row in history]
    assert said == lines
    kept = (tmp_path / "asd.log").read_text().splitlines()
    assert [line.partition("  ")[2] for line in kept] == lines
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_tensorboard_events_after_the_last_checkpoint_are_purged(tmp_path: Path) -> None:
    """After resuming from an earlier checkpoint, TensorBoard has each epoch once, with the later value."""
    history = rows(4)
    log = RunLog(tmp_path, 0)
    for e in range(3):
        log.to_board(add_row, history[e])
        log.epoch(history[: e + 1], 4)
    log.close()
    history[2]["loss"] = 99.0
    time.sleep(1.1)  # TensorBoard reads its files in the order of their names, which hold the second
    log = RunLog(tmp_path, 2)
    for e in range(2, 4):
        log.to_board(add_row, history[e])
        log.epoch(history[: e + 1], 4)
    log.close()
    values = [(s.step, s.value) for s in read_board(tmp_path / "tensorboard").Scalars("loss")]
    assert values == [(0, 1.25), (1, 2.25), (2, 99.0), (3, 4.25)]


def test_a_run_without_poisoned_images_is_logged(tmp_path: Path) -> None:
    """Without poisoned images there is no histogram and no image of them, and no error."""
    log = RunLog(tmp_path, 0)
    log.to_board(add_start, "", np.zeros((0, 32, 32, 3), np.uint8))
    log.to_board(add_losses, torch.ones(4), torch.zeros(4), 0)
    log.to_board(add_row, rows(1, "none")[0])
    log.epoch(rows(1, "none"), 1)
    log.to_board(add_finish, {"a": 1}, rows(1, "none")[0])
    log.close()
    board = read_board(tmp_path / "tensorboard")
    assert board.Tags()["histograms"] == ["split_loss/clean"] and board.Tags()["images"] == []
    assert "clean_pool_size" not in board.Tags()["scalars"]


def image(path: Path) -> np.ndarray:
    """Return the pixels of a PNG, whose size fits a screen and a README."""
    with Image.open(path) as image:
        assert image.format == "PNG" and 200 <= image.width <= 2000 and 200 <= image.height <= 1500
        return np.asarray(image.convert("RGB")).astype(int)


def share_of(pixels: np.ndarray, color: str, opacity: float = 1.0) -> float:
    """Return the share of pixels with about this color, on white."""
    wanted = 255 - opacity * (255 - np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]))
    return float((abs(pixels - wanted).max(2) < 40).mean())


@pytest.mark.parametrize(("count", "defense"), [(1, "asd"), (2, "asd"), (6, "asd"), (1, "none"), (4, "none")])
def test_the_plot_of_accuracy(tmp_path: Path, count: int, defense: str) -> None:
    """ACC and ASR are drawn for runs of any length, also of one epoch, each in its color."""
    plots.draw_accuracy(tmp_path / "a.png", rows(count, defense), "a title")
    pixels = image(tmp_path / "a.png")
    assert share_of(pixels, plots.CLEAN_COLOR) > 1e-4 and share_of(pixels, plots.POISONED_COLOR) > 1e-4


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("poison_share", [0.0, 0.05])
def test_the_plot_of_purity(tmp_path: Path, count: int, poison_share: float) -> None:
    """The share of poisoned images in the clean pool is drawn, also if it is 0."""
    history = rows(count)
    for row in history:
        row["poisoned_in_clean_pool"] *= poison_share > 0
    plots.draw_purity(tmp_path / "p.png", history, poison_share, "a title")
    assert share_of(image(tmp_path / "p.png"), plots.POISONED_COLOR) > 1e-4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("poisoned", [0, 5, 50])
@pytest.mark.parametrize("values", ["spread", "zero", "large", "tiny"])
def test_the_plot_of_losses(tmp_path: Path, poisoned: int, values: str) -> None:
    """Loss histograms are drawn without warnings, also if no or all images are poisoned, or all losses are equal."""
    losses = np.random.default_rng(0).random(50).astype(np.float32)
    losses = {"spread": losses, "zero": 0 * losses, "large": 0 * losses + 12345.678, "tiny": 0 * losses - 1e-20}[values]
    flags = np.zeros(50, np.uint8)
    flags[:poisoned] = 1
    plots.draw_losses(tmp_path / "l.png", plots.Split(losses, flags, np.arange(20)), "split loss", "a title")
    pixels = image(tmp_path / "l.png")
    if values == "spread" and poisoned in (0, 50):
        assert (share_of(pixels, plots.CLEAN_COLOR, 0.65) > 0.01) == (poisoned == 0)
        assert (share_of(pixels, plots.POISONED_COLOR, 0.65) > 0.01) == (poisoned == 50)


def test_the_plots_distinguish_cover_images(tmp_path: Path) -> None:
    """Histograms and purity have a third color for cover images if, and only if, the set has any."""
    losses = np.random.default_rng(0).random(60).astype(np.float32)
    for cover in (0, 20):
        flags = np.repeat([0, 1, 2], [20, 40 - cover, cover]).astype(np.uint8)
        plots.draw_losses(tmp_path / "l.png", plots.Split(losses + 2 * flags, flags, np.arange(20)), "split loss", "a title")
        history = [row | ({"cover_in_clean_pool": 5} if cover else {}) for row in rows(3)]
        plots.draw_purity(tmp_path / "p.png", history, 0.05, "a title")
        losses_show = share_of(image(tmp_path / "l.png"), plots.COVER_COLOR, 0.65) > 0.01
        purity_shows = share_of(image(tmp_path / "p.png"), plots.COVER_COLOR) > 1e-4
        assert losses_show == purity_shows == bool(cover)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("side", [32, 64])
def test_the_plot_of_triggered_images(tmp_path: Path, count: int, side: int) -> None:
    """The contact sheet shows up to eight images before and after; a trigger changes the sheet."""
    before = np.random.default_rng(0).integers(0, 200, (count, side, side, 3), dtype=np.uint8)
    after = before.copy()
    after[:, 4:8, 4:8] = 255
    plots.draw_triggered(tmp_path / "t.png", np.stack([before, after]), "a title")
    plots.draw_triggered(tmp_path / "same.png", np.stack([before, before]), "a title")
    drawn, same = image(tmp_path / "t.png"), image(tmp_path / "same.png")
    assert drawn.shape == same.shape and (drawn != same).any()
    changed = np.argwhere((drawn != same).any(2))[:, 1]
    assert changed.min() < drawn.shape[1] / 2 or count == 1
    assert len(np.unique(changed)) >= 2 * min(count, 8), "every image of the sheet shows its trigger"


def test_a_faint_trigger_can_be_seen(tmp_path: Path) -> None:
    """An invisible change of 4 levels is amplified tenfold in the third row of the contact sheet."""
    before = np.full((2, 32, 32, 3), 100, np.uint8)
    plots.draw_triggered(tmp_path / "t.png", np.stack([before, before + np.uint8(4)]), "a title")
    plots.draw_triggered(tmp_path / "same.png", np.stack([before, before]), "a title")
    difference = abs(image(tmp_path / "t.png") - image(tmp_path / "same.png")).max(2)
    shares = {level: float((difference == level).mean()) for level in (4, 40)}
    assert shares[4] > 0.05 and shares[40] == pytest.approx(shares[4], rel=0.1)


OWN_RC = "text.usetex: True\nfont.family: no such font\nsavefig.format: svg\nfigure.autolayout: True\n"
DRAW = """
import sys
from pathlib import Path
from utils.reporting import plots
row = {"clean_accuracy": 0.5, "attack_success_rate": None, "stage": "class-aware"}
plots.draw_accuracy(Path(sys.argv[1]), [row | {"epoch": e} for e in range(3)], "a title")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_plots_are_the_same_for_every_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's matplotlibrc and a notebook's MPLBACKEND do not change the plots, and no figures stay open."""
    own = tmp_path / "matplotlibrc"
    own.write_text(OWN_RC)
    odd = {"MATPLOTLIBRC": str(own), "MPLBACKEND": "inline", "PYTHONPATH": str(REPOSITORY)}  # of a package that is not here
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "odd.png")],
        env=os.environ | odd,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    row = {"clean_accuracy": 0.5, "attack_success_rate": None, "stage": "class-aware"}
    plots.draw_accuracy(tmp_path / "a.png", [row | {"epoch": e} for e in range(3)], "a title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "odd.png").read_bytes()


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.b", b"\x89PNG"), ("a", b"\x89PNG")])
def test_the_suffix_of_a_plot_is_its_format(tmp_path: Path, name: str, start: bytes) -> None:
    """`--plot FILE.pdf` is a PDF; without a known suffix the file is a PNG."""
    plots.draw_comparison(tmp_path / name, [("ASD", [rows(2)]), ("no defense", [rows(3, "none")])])
    assert (tmp_path / name).read_bytes().startswith(start)


def draw_any(kind: str, path: Path, title: str) -> None:
    """Draw a plot of a kind with a title."""
    if kind == "accuracy":
        plots.draw_accuracy(path, rows(2), title)
    elif kind == "confusion":
        plots.draw_confusion(path, np.eye(3, dtype=np.int64), ["$", "$$", "$$$"], title)
    elif kind == "features":
        plots.draw_features(path, torch.arange(24.0).view(8, 3) % 7, {}, title)
    else:
        plots.draw_comparison(path, [(title, [rows(2)]), ("$$", [rows(2)])])


@pytest.mark.parametrize("kind", ["accuracy", "confusion", "features", "comparison"])
@pytest.mark.parametrize("name", ["$", "$$", "$x\\foo$", "$x\\foo$ $$ " * 12, "b\udce9e", "a_1^2", "%&#{"])
def test_a_name_in_a_plot_is_drawn_literally(tmp_path: Path, name: str, kind: str) -> None:
    """Names are not read as formulas and cause no errors, also in titles of several lines; different names give different
    plots."""
    draw_any(kind, tmp_path / "a.png", f"class {name}")
    draw_any(kind, tmp_path / "b.png", "class ")
    one, other = image(tmp_path / "a.png"), image(tmp_path / "b.png")
    assert one.shape != other.shape or (one != other).any()


class BrokenDisk:
    """Replaces TensorBoard's writer on a full disk."""

    calls = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any, **kwargs: Any) -> None:
            BrokenDisk.calls += 1
            raise OSError(28, "No space left on device")

        return fail


@pytest.mark.parametrize("kind", ["missing", "full"])
def test_a_run_continues_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], kind: str
) -> None:
    """If TensorBoard cannot be imported or written, that is logged once; the run's own files are complete."""
    if kind == "missing":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    else:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", BrokenDisk)
    BrokenDisk.calls = 0
    log = RunLog(tmp_path, 0)
    log.to_board(add_start, "num_epochs: 3\n", np.zeros((1, 8, 8, 3), np.uint8))
    for e in range(3):
        log.to_board(add_losses, torch.ones(4), None, e)
        log.to_board(add_row, rows(e + 1)[e])
        log.epoch(rows(e + 1), 3)
    log.to_board(add_finish, {"a": 1}, rows(3)[-1])
    log.close()
    assert [line.startswith("warning: TensorBoard: ") for line in said] == [True, False, False, False]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert BrokenDisk.calls == (kind == "full")


def test_a_failed_thread_of_tensorboard_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    """If TensorBoard's thread fails, the run does not wait for it, and no traceback is printed."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    log = RunLog(tmp_path, 0)
    log.board().file_writer.event_writer._async_writer._writer.write = lambda data: 1 / 0
    for e in range(9):
        log.to_board(add_row, rows(e + 1)[e])
        log.epoch(rows(e + 1), 9)
    log.close()
    assert sum(line.startswith("warning: TensorBoard: ") for line in said) == 1 and capsys.readouterr().err == ""
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_name_that_is_no_text_is_kept_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """asd.log has escapes for bytes that are not UTF-8."""
    monkeypatch.setattr(logging.getLogger("data"), "propagate", False)  # what pytest captures must be text
    log = RunLog(tmp_path, 0)
    logging.getLogger("data").info("b\udce9e")
    log.close()
    assert "b\\udce9e" in (tmp_path / "asd.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("size", [0, 6, 12])
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.permutations(range(12)))
def test_the_rates_of_a_split_are_those_of_a_count(size: int, flags: list[int], order: list[int]) -> None:
    """TPR is the share of the poisoned images outside the clean pool, FPR that of the clean ones; cover images count in
    neither, and a missing kind has no rate."""
    report, pool = Report.__new__(Report), order[:size]
    report.flags = torch.tensor(flags, dtype=torch.uint8)
    found = report.truth_of_pool(torch.tensor(sorted(pool), dtype=torch.int64))
    for key, flag in (("split_tpr", 1), ("split_fpr", 0)):
        outside = [i not in pool for i in range(12) if flags[i] == flag]
        assert found[key] == (sum(outside) / len(outside) if outside else None)
    assert found["poisoned_in_clean_pool"] == sum(flags[i] == 1 for i in pool)
    assert found.get("cover_in_clean_pool") == (sum(flags[i] == 2 for i in pool) if 2 in flags else None)


@pytest.mark.parametrize("flags", [None, torch.tensor([0, 1, 2], dtype=torch.uint8)])
def test_the_rates_of_a_split_are_null_where_nobody_knows_them(flags: torch.Tensor | None) -> None:
    """Without ground truth, and in a run without a split, every key exists and is null."""
    report = Report.__new__(Report)
    report.flags = flags
    found = report.truth_of_pool(None if flags is not None else torch.tensor([0]))
    assert {"poisoned_in_clean_pool", "split_tpr", "split_fpr"} <= found.keys() and set(found.values()) == {None}


def test_suspects_are_written_before_their_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranking is written before its contact sheet is drawn, and remains if that fails."""
    e = Evidence(*(np.array(column) for column in ([0, 1], [1, 1], [0.1, 0.9], [0.9, 0.1], [1.0, 0.1], [0, 2])))
    run = SimpleNamespace(log=tmp_path, saved=tmp_path, name="run")
    subject = Subject(None, (), None, None, np.zeros((2, 0)), "")
    report = Report(run, SimpleNamespace(defense=SimpleNamespace(name="asd")), subject, 0)  # type: ignore[arg-type]
    there: list[bool] = []

    def fail(*args: Any) -> None:
        there.append((tmp_path / "suspects.csv").exists())
        raise ValueError("no image today")

    monkeypatch.setattr(plots, "draw_suspects", fail)
    images = SimpleNamespace(fetch=lambda index: torch.zeros(len(index), 3, 4, 4, dtype=torch.uint8))
    report.rank_suspects(e, images)
    report.close()
    assert there == [True] and (tmp_path / "suspects.csv").exists()
    assert (tmp_path / "asd.log").read_text().count("no image today") == 1


def test_a_page_that_fails_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """If report.html cannot be written, one line is logged, and the run completes with all other results."""
    (tmp_path / "log").mkdir()
    run = SimpleNamespace(log=tmp_path / "log", saved=tmp_path, name="run")
    subject = Subject(None, ("a", "b"), None, torch.zeros(4, dtype=torch.uint8), np.zeros((2, 0)), "")
    report = Report(run, config.load(REPOSITORY / "config" / "demo_undefended.yaml"), subject, 0)  # type: ignore[arg-type]
    monkeypatch.setattr(page, "write_page", lambda *args: 1 / 0)
    history = rows(2, "none")
    state = SimpleNamespace(history=history, epoch=2, best_acc=0.9, best_epoch=1, clean_pool=())
    report.conclude(state, ByClass(torch.tensor([[3, 1], [0, 2]])))  # type: ignore[arg-type]
    report.close()
    assert ["report.html" in line for line in said if line.startswith("warning: ")] == [True]
    assert json.loads((tmp_path / "log" / "confusion.json").read_text())["per_class_accuracy"] == [0.75, 1.0]
    assert read_board(tmp_path / "log" / "tensorboard").Scalars("final/clean_accuracy")
