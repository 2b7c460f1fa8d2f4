"""The files in the `log/` folder of a run: `asd.log`, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from utils import metrics
from utils.files import write_text
from utils.kinds import KINDS
from utils.logs import LogFile, ProgressLines, attach, detach
from utils.reporting.best_effort import BestEffort

logger = logging.getLogger(__name__)
T = TypeVar("T")


def progress(items: Iterable[T], name: str, total: int) -> Iterable[T]:
    """Wrap a loop in a progress bar; if standard error is not a terminal, in a line after 10 s and then every 10 s."""
    if sys.stderr.isatty():
        return tqdm(items, name, total, leave=False, dynamic_ncols=True, mininterval=0.2)
    form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} elapsed, {remaining} left, {rate_fmt}"
    return tqdm(items, name, total, leave=False, mininterval=10, delay=10, bar_format=form, file=ProgressLines())


class RunLog:
    """Writes the run's `log/` folder. TensorBoard may fail without ending the run.

    All lines that are logged until `close` go to `asd.log`.
    """

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self.folder = folder
        self.handler = LogFile(folder / "asd.log")
        attach(self.handler)
        self.start_epoch = start_epoch
        self.best_effort = BestEffort()
        self._board: Any = None

    def to_board(self, write: Callable[..., object], *args: Any) -> None:
        """Call `write(board, *args)` with TensorBoard's writer, which is created by the first call."""
        self.best_effort.attempt("TensorBoard", lambda: write(self.board(), *args))

    def board(self) -> Any:
        """Return TensorBoard's writer. It purges what a killed run has recorded after its last checkpoint."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # imported on demand: it takes a second

            threading.excepthook = print_exception
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start_epoch)  # type: ignore[no-untyped-call]
        return self._board

    def epoch(self, history: list[dict[str, Any]], num_epochs: int) -> None:
        """Log the last row of the history in one line, and write `metrics.jsonl`."""
        logger.info(epoch_line(history[-1], num_epochs))
        write_metrics(self.folder, history)

    def close(self) -> None:
        """Flush everything to disk."""
        if self._board is not None:
            self.to_board(lambda board: board.close())
            self._board = None
        detach(self.handler)


def print_exception(args: threading.ExceptHookArgs) -> None:
    """Print the traceback of a failed thread, except TensorBoard's writer: the next call reports its error."""
    if not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


def add_row(board: Any, row: dict[str, Any]) -> None:
    """Add the numbers of an epoch's row to TensorBoard."""
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "epoch":
            board.add_scalar(key, value, row["epoch"])
    board.flush()


def add_losses(board: Any, losses: torch.Tensor, flags: torch.Tensor | None, epoch: int) -> None:
    """Add a histogram of the losses (N,) to TensorBoard for each kind of images in flags (N,); None: one for all images."""
    kinds = {"all": slice(None)} if flags is None else {kind: flags == flag for kind, flag in KINDS.items()}
    for name, which in kinds.items():
        if len(losses[which]):
            board.add_histogram(f"split_loss/{name}", losses[which].numpy(), epoch)


def add_start(board: Any, settings_yaml: str, poisoned: np.ndarray) -> None:
    """Add the settings and some poisoned images, (n, H, W, 3) uint8, to TensorBoard."""
    board.add_text("config", f"```yaml\n{settings_yaml}```", 0)
    if len(poisoned):
        board.add_images("poisoned", poisoned, 0, dataformats="NHWC")


def add_finish(board: Any, hyperparameters: dict[str, Any], row: dict[str, Any]) -> None:
    """Add the hyperparameters with the final figures to TensorBoard."""
    from torch.utils.tensorboard.summary import hparams

    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in hyperparameters.items()}
    figures = {f"final/{k}": row[k] for k in ("clean_accuracy", "attack_success_rate") if row[k] is not None}
    for summary in hparams(plain, figures):
        board.file_writer.add_summary(summary)
    for key, value in figures.items():
        board.add_scalar(key, value, row["epoch"])


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write all of `metrics.jsonl` from the history, so that it always agrees with the checkpoint."""
    write_text(folder / metrics.FILE, "".join(json.dumps(row) + "\n" for row in history))


def percent(share: float) -> str:
    """Return e.g. ` 93.41 %`."""
    return f"{100 * share:6.2f} %"


def epoch_line(row: dict[str, Any], num_epochs: int) -> str:
    """Return the log line of one epoch."""
    tested = (("ACC", row["clean_accuracy"]), ("ASR", row["attack_success_rate"]))
    figures = "".join(f"  {name} {percent(share)}" for name, share in tested if share is not None)
    if row.get("clean_as_target") is not None:
        figures += f" ({percent(row['clean_as_target']).strip()} without the trigger)"
    head = f"epoch {row['epoch'] + 1:3d}/{num_epochs}  {row['stage']:14s}{figures}"
    if None in (row["loss_x"], row["loss_u"], row["lambda_u"]):
        return f"{head}  loss {row['loss']:.4f}  {row['seconds']:.1f} s"
    found = {kind: row.get(f"{kind}_in_clean_pool") for kind in ("poisoned", "cover")}
    kinds = ", ".join(f"{number} {kind}" for kind, number in found.items() if number is not None)
    pools = f"clean pool {row['clean_pool_size']}{f' ({kinds})' if kinds else ''}, polluted {row['polluted_pool_size']}"
    losses = f"loss {row['loss']:.4f} = Lx {row['loss_x']:.4f} + lambda_u {row['lambda_u']:.2f} x Lu {row['loss_u']:.5f}"
    return f"{head}  {pools}  {losses}  {row['seconds']:.1f} s"
